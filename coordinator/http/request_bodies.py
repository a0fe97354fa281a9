"""Request bodies: how many bytes of them the coordinator holds, of one address and in all, and how slowly they may come.

A body counts from its first byte until what it asked for is over. Where all together is used up, the address that holds most
loses its largest unfinished body, so that a flood costs those who have little nothing.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Receive

from coordinator.domain import resource_bounds
from coordinator.domain.limits import IntakeLimits
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, Unavailable
from tallystick.runtime.connection_limiter import address_key


class BodyReservation:
    """What one request holds. It is open until `Bodies.close`."""

    __slots__ = ("address", "bytes", "cut", "deadline")

    def __init__(self, address: str) -> None:
        self.address, self.bytes, self.cut = address, 0, False
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
        """Requests that are not closed."""
        return self._open.total()

    def begin(self, address: str) -> BodyReservation:
        """A request of this address. Raises Unavailable where it has as many under way as it may."""
        key = address_key(address)
        if self._open[key] >= self._limits.jobs_per_address:
            text = f"{address} has {self._limits.jobs_per_address} jobs under way, which is all that one address may have"
            raise Unavailable(Code.RATE_LIMITED, text, fault=Fault.CLIENT)
        self._open[key] += 1
        return BodyReservation(key)

    def close(self, reservation: BodyReservation) -> None:
        """The request is over; so is what it held."""
        self._count(reservation, -reservation.bytes)
        self._open -= Counter((reservation.address,))

    def _count(self, reservation: BodyReservation, size: int) -> None:
        reservation.bytes += size
        self._total += size
        self._bytes[reservation.address] += size
        if not self._bytes[reservation.address]:
            del self._bytes[reservation.address]

    def hold(self, reservation: BodyReservation, size: int) -> None:
        """The request makes the coordinator hold so much more for it, such as an old answer. Raises Unavailable."""
        self._count(reservation, size)
        self._check_share(reservation)

    def _check_share(self, reservation: BodyReservation) -> None:
        if self._bytes[reservation.address] > self._limits.address_bytes:
            text = f"bodies of {reservation.address}: expected at most {self._limits.address_bytes} bytes; wait for a job to end"
            raise Unavailable(Code.RATE_LIMITED, text, fault=Fault.CLIENT)

    async def read(self, receive: Receive, reservation: BodyReservation, limit: int, what: str) -> bytes:
        """The whole body, of at most `limit` bytes. Raises Refusal for a longer one, BadMessage for one that comes too slowly,
        Unavailable where there is no room for it, and ConnectionResetError for a client that is gone.
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
                        if reservation.cut:
                            raise self._full()
                        parts.append(event.get("body", b""))
                        self._take(reservation, len(parts[-1]), limit, what)
                        if not event.get("more_body"):
                            return b"".join(parts)
                        deadline.reschedule(began + reservation.bytes / resource_bounds.BODY_RATE)
        except TimeoutError:
            if reservation.cut:
                raise self._full() from None
            rate = resource_bounds.BODY_RATE // 1024
            pace = f"{resource_bounds.BODY_GRACE_SECONDS:g} s and the time that it takes at {rate} KiB a second"
            raise BadMessage(f"{what}: did not arrive within {pace}") from None

    @contextmanager
    def _being_read(self, reservation: BodyReservation, deadline: asyncio.Timeout) -> Iterator[None]:
        reservation.deadline = deadline
        self._reading.add(reservation)
        try:
            yield
        finally:
            reservation.deadline = None
            self._reading.discard(reservation)

    def _take(self, reservation: BodyReservation, size: int, limit: int, what: str) -> None:
        self._count(reservation, size)
        if reservation.bytes > limit:
            raise Refusal(Code.BODY_TOO_LARGE, f"{what} has at most {limit} bytes")
        self._check_share(reservation)
        while self._total > self._limits.total_body_bytes:
            self._cut_largest(reservation)

    def _cut_largest(self, reservation: BodyReservation) -> None:
        """Makes room for a body at the cost of who holds most, if that is not its own address. Raises Unavailable."""
        others = [one for one in self._reading if one.bytes and self._bytes[one.address] > self._bytes[reservation.address]]
        if not others:
            raise self._full()
        victim = max(others, key=lambda one: (self._bytes[one.address], one.bytes))
        victim.cut = True
        self._count(victim, -victim.bytes)
        self._reading.discard(victim)
        if victim.deadline is not None:
            victim.deadline.reschedule(asyncio.get_running_loop().time())

    @staticmethod
    def _full() -> Unavailable:
        text = "this coordinator holds as many requests as it can"
        return Unavailable(Code.RATE_LIMITED, text, fault=Fault.COORDINATOR)
