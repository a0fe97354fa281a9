"""A cache of chain reads, by key: concurrent readers of one key share one request, and old values can be served meanwhile.

The cache does not decide what a failed read means. It raises the error to each caller that waited; `last` gives the caller the
value that was read before, with its age.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tallystick.protocol.errors import Code, Unavailable

MAX_READS = 64
"""Reads of one cache under way at a time: a request to the chain takes far more memory than what waits for it."""
ROOM_SECONDS = 10.0
"""How long a read waits for others to end. Then it fails, so that its readers go on with what they know while the chain hangs."""
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class CachedRead(Generic[V]):
    """A value and the time at which its read began, on the cache's clock."""

    value: V
    read_at: float


class ReadCache(Generic[K, V]):
    """The last values that `read` returned, at most `capacity` of them; the one that was read longest ago is dropped first.

    `clock` gives monotonic seconds. `name` is for the names of the asyncio tasks.
    """

    def __init__(
        self,
        name: str,
        read: Callable[[K], Awaitable[V]],
        *,
        capacity: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._read, self._capacity, self._clock = name, read, capacity, clock
        self._values: OrderedDict[K, CachedRead[V]] = OrderedDict()
        self._reads: dict[K, asyncio.Task[V]] = {}
        self._room = asyncio.Semaphore(MAX_READS)

    async def get(self, key: K, *, max_age: float, max_stale: float = 0.0) -> V:
        """The cached value if it is at most `max_age` seconds old, else a new one.

        A value of at most `max_stale` seconds is also returned at once, and a new one is read in the background. Raises what
        `read` raises, and Unavailable if too many others are being read.
        """
        cached = self._values.get(key)
        if cached is not None:
            age = self._clock() - cached.read_at
            if age > max_age:
                self._start_read(key)
            if age <= max(max_age, max_stale):
                return cached.value
        return await self.refresh(key)

    async def refresh(self, key: K) -> V:
        """A new value, even if one is cached. Raises what `read` raises."""
        return await asyncio.shield(self._start_read(key))

    def last(self, key: K) -> CachedRead[V] | None:
        """The last value of a key, of any age; None if none is cached."""
        return self._values.get(key)

    def __len__(self) -> int:
        return len(self._values)

    def renew(self, key: K) -> None:
        """Counts the cached value of a key as read now. After a failed read this delays the next one."""
        cached = self._values.get(key)
        if cached is not None:
            self._store(key, CachedRead(cached.value, self._clock()))

    async def close(self) -> None:
        """Cancels all reads in progress."""
        reads = list(self._reads.values())
        for read in reads:
            read.cancel()
        await asyncio.gather(*reads, return_exceptions=True)

    def _start_read(self, key: K) -> asyncio.Task[V]:
        read = self._reads.get(key)
        if read is None:
            read = self._reads[key] = asyncio.create_task(self._read_and_store(key), name=f"{self._name} {key}")
            read.add_done_callback(lambda done: self._finish_read(key, done))
        return read

    def _finish_read(self, key: K, done: asyncio.Task[Any]) -> None:
        del self._reads[key]
        if not done.cancelled():
            done.exception()  # retrieved here, since a background read has no other reader

    async def _read_and_store(self, key: K) -> V:
        await self._take_room()
        try:
            began = self._clock()
            value = await self._read(key)
        finally:
            self._room.release()
        self._store(key, CachedRead(value, began))
        return value

    async def _take_room(self) -> None:
        """Raises Unavailable if there is none for ROOM_SECONDS."""
        try:
            async with asyncio.timeout(ROOM_SECONDS if self._room.locked() else None):
                await self._room.acquire()
        except TimeoutError:
            text = f"the chain is slow: {MAX_READS} reads are under way, for which this one waited {ROOM_SECONDS:g} s"
            raise Unavailable(Code.CHAIN_UNAVAILABLE, text) from None

    def _store(self, key: K, cached: CachedRead[V]) -> None:
        self._values[key] = cached
        self._values.move_to_end(key)
        while len(self._values) > self._capacity:
            self._values.popitem(last=False)
