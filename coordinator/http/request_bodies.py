"""Request bodies: how many bytes of them the coordinator holds, per address and in all, and how slowly they may arrive.

A body counts from its first byte until the request or job that it belongs to is over. When the total is used up, the address
that holds most loses its largest unfinished body, so a flood costs small senders nothing.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Receive, Scope

from coordinator.domain import resource_bounds
from coordinator.domain.limits import IntakeLimits
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, Unavailable
from tallystick.runtime.connection_limiter import address_key


def refuse_codings(scope: Scope) -> None:
    """Raises Refusal (unsupported_encoding) for a request with a Content-Encoding, which no client of a coordinator needs."""
    for name, value in scope.get("headers", ()):
        if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            text = f"Content-Encoding: expected none, got {value[:60].decode('latin-1')!r}; send the body as it is"
            raise Refusal(Code.UNSUPPORTED_ENCODING, text)


class BodyReservation:
    """The bytes that one request holds. It is open until `RequestBodies.close`."""

    __slots__ = ("address", "bytes", "deadline", "evicted")

    def __init__(self, address: str) -> None:
        self.address, self.bytes, self.evicted = address, 0, False
        self.deadline: asyncio.Timeout | None = None
        """While the body is read."""


class RequestBodies:
    """See the module's docstring."""

    def __init__(self, limits: IntakeLimits) -> None:
        self._limits = limits
        self._open: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._total = 0
        self._reading: set[BodyReservation] = set()

    @property
    def held(self) -> int:
        """Bytes of all bodies."""
        return self._total

    @property
    def open(self) -> int:
        """The number of open reservations."""
        return self._open.total()

    def begin(self, address: str) -> BodyReservation:
        """Opens a reservation. Raises Unavailable (rate_limited) if the address has too many jobs under way."""
        key = address_key(address)
        if self._open[key] >= self._limits.jobs_per_address:
            text = f"{address} has {self._limits.jobs_per_address} jobs here, those that wait included, the maximum per address"
            raise Unavailable(Code.RATE_LIMITED, f"{text} (max_jobs_per_address); wait for one to end", fault=Fault.CLIENT)
        self._open[key] += 1
        return BodyReservation(key)

    def close(self, reservation: BodyReservation) -> None:
        """Closes a reservation and releases its bytes."""
        self._count(reservation, -reservation.bytes)
        self._open[reservation.address] -= 1
        if not self._open[reservation.address]:
            del self._open[reservation.address]

    def _count(self, reservation: BodyReservation, size: int) -> None:
        reservation.bytes += size
        self._total += size
        self._bytes[reservation.address] += size
        if not self._bytes[reservation.address]:
            del self._bytes[reservation.address]

    def hold(self, reservation: BodyReservation, size: int) -> None:
        """Adds bytes that the coordinator holds for the request, such as an old response. Raises Unavailable (rate_limited)."""
        self._count(reservation, size)
        self._check_share(reservation)

    def _check_share(self, reservation: BodyReservation) -> None:
        if self._bytes[reservation.address] > self._limits.address_bytes:
            bound = f"expected at most {self._limits.address_bytes} bytes (max_bodies_mib_per_address)"
            text = f"bodies of {reservation.address}: {bound}; wait for a job to end"
            raise Unavailable(Code.RATE_LIMITED, text, fault=Fault.CLIENT)

    def hold_body(self, reservation: BodyReservation, size: int, limit: int, what: str) -> None:
        """Counts a body that arrived at once. Raises as `read` does: Refusal for a longer one, Unavailable without room."""
        self._add(reservation, size, limit, what)

    async def read(self, receive: Receive, reservation: BodyReservation, limit: int, what: str) -> bytes:
        """Reads a whole body of at most `limit` bytes. `what` names it in errors.

        Raises Refusal for a longer body, BadMessage for one that arrives too slowly, Unavailable if there is no room for it, and
        ConnectionResetError if the client is gone.
        """
        parts: list[bytes] = []
        began = asyncio.get_running_loop().time() + resource_bounds.BODY_GRACE_SECONDS
        try:
            async with asyncio.timeout_at(began) as deadline:
                with self._being_read(reservation, deadline):
                    while True:
                        event = await receive()
                        if event["type"] == "http.disconnect":
                            raise ConnectionResetError
                        if reservation.evicted:
                            raise self._full()
                        parts.append(event.get("body", b""))
                        self._add(reservation, len(parts[-1]), limit, what)
                        if not event.get("more_body"):
                            return b"".join(parts)
                        deadline.reschedule(began + reservation.bytes / resource_bounds.BODY_RATE)
        except TimeoutError:
            if reservation.evicted:
                raise self._full() from None
            rate = resource_bounds.BODY_RATE // 1024
            grace = f"{resource_bounds.BODY_GRACE_SECONDS:g} s"
            raise BadMessage(f"{what}: must arrive within {grace} plus the transfer time at {rate} KiB/s") from None

    @contextmanager
    def _being_read(self, reservation: BodyReservation, deadline: asyncio.Timeout) -> Iterator[None]:
        reservation.deadline = deadline
        self._reading.add(reservation)
        try:
            yield
        finally:
            reservation.deadline = None
            self._reading.discard(reservation)

    def _add(self, reservation: BodyReservation, size: int, limit: int, what: str) -> None:
        self._count(reservation, size)
        if reservation.bytes > limit:
            raise Refusal(Code.BODY_TOO_LARGE, f"{what}: expected at most {limit} bytes")
        self._check_share(reservation)
        while self._total > self._limits.total_body_bytes:
            self._evict_largest(reservation)

    def _evict_largest(self, reservation: BodyReservation) -> None:
        """Evicts the largest unfinished body of the address that holds most. Raises Unavailable if no address holds more."""
        held = self._bytes
        others = [other for other in self._reading if other.bytes and held[other.address] > held[reservation.address]]
        if not others:
            raise self._full()
        victim = max(others, key=lambda other: (held[other.address], other.bytes))
        victim.evicted = True
        self._count(victim, -victim.bytes)
        self._reading.discard(victim)
        if victim.deadline is not None:
            victim.deadline.reschedule(asyncio.get_running_loop().time())

    @staticmethod
    def _full() -> Unavailable:
        text = "this coordinator holds as many request bodies as it may (max_bodies_mib); try again later"
        return Unavailable(Code.RATE_LIMITED, text, fault=Fault.COORDINATOR)
