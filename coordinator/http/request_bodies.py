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
from coordinator.domain.limits import Intake
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, Unavailable
from tallystick.runtime.connection_limiter import address_key


class Load:
    """What one request holds. It is open until `Bodies.close`."""

    __slots__ = ("address", "bytes", "cut", "deadline")

    def __init__(self, address: str) -> None:
        self.address, self.bytes, self.cut = address, 0, False
        self.deadline: asyncio.Timeout | None = None
        """While the body is read."""


class Bodies:
    """See the module's docstring."""

    def __init__(self, limits: Intake) -> None:
        self._limits = limits
        self._open: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._total = 0
        self._reading: set[Load] = set()

    @property
    def held(self) -> int:
        """Bytes of all bodies."""
        return self._total

    @property
    def open(self) -> int:
        """Requests that are not closed."""
        return self._open.total()

    def begin(self, address: str) -> Load:
        """A request of this address. Raises Unavailable where it has as many under way as it may."""
        key = address_key(address)
        if self._open[key] >= self._limits.address_jobs:
            text = f"{address} has {self._limits.address_jobs} jobs under way, which is all that one address may have"
            raise Unavailable(Code.RATE_LIMITED, text, fault=Fault.CLIENT)
        self._open[key] += 1
        return Load(key)

    def close(self, load: Load) -> None:
        """The request is over; so is what it held."""
        self._count(load, -load.bytes)
        self._open -= Counter((load.address,))

    def _count(self, load: Load, size: int) -> None:
        load.bytes += size
        self._total += size
        self._bytes[load.address] += size
        if not self._bytes[load.address]:
            del self._bytes[load.address]

    def hold(self, load: Load, size: int) -> None:
        """The request makes the coordinator hold so much more for it, such as an old answer. Raises Unavailable."""
        self._count(load, size)
        self._check_share(load)

    def _check_share(self, load: Load) -> None:
        if self._bytes[load.address] > self._limits.address_bodies:
            text = f"the requests of {load.address} hold {self._limits.address_bodies} bytes, which is all that one address may"
            raise Unavailable(Code.RATE_LIMITED, text, fault=Fault.CLIENT)

    async def read(self, receive: Receive, load: Load, limit: int, what: str) -> bytes:
        """The whole body, of at most `limit` bytes. Raises Refusal for a longer one, BadMessage for one that comes too slowly,
        Unavailable where there is no room for it, and ConnectionResetError for a client that is gone.
        """
        parts: list[bytes] = []
        began = asyncio.get_running_loop().time() + resource_bounds.BODY_GRACE_SECONDS
        try:
            async with asyncio.timeout_at(began) as deadline:
                with self._being_read(load, deadline):
                    while True:
                        event = await receive()
                        if event["type"] == "http.disconnect":
                            raise ConnectionResetError
                        if load.cut:
                            raise self._full()
                        parts.append(event.get("body", b""))
                        self._take(load, len(parts[-1]), limit, what)
                        if not event.get("more_body"):
                            return b"".join(parts)
                        deadline.reschedule(began + load.bytes / resource_bounds.BODY_RATE)
        except TimeoutError:
            if load.cut:
                raise self._full() from None
            rate = resource_bounds.BODY_RATE // 1024
            pace = f"{resource_bounds.BODY_GRACE_SECONDS:g} s and the time that it takes at {rate} KiB a second"
            raise BadMessage(f"{what}: did not arrive within {pace}") from None

    @contextmanager
    def _being_read(self, load: Load, deadline: asyncio.Timeout) -> Iterator[None]:
        load.deadline = deadline
        self._reading.add(load)
        try:
            yield
        finally:
            load.deadline = None
            self._reading.discard(load)

    def _take(self, load: Load, size: int, limit: int, what: str) -> None:
        self._count(load, size)
        if load.bytes > limit:
            raise Refusal(Code.BODY_TOO_LARGE, f"{what} has at most {limit} bytes")
        self._check_share(load)
        while self._total > self._limits.bodies:
            self._cut_largest(load)

    def _cut_largest(self, load: Load) -> None:
        """Makes room for a body at the cost of who holds most, if that is not its own address. Raises Unavailable."""
        others = [one for one in self._reading if one.bytes and self._bytes[one.address] > self._bytes[load.address]]
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
