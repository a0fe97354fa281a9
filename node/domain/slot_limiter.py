"""How many jobs an engine runs at once: as many as the config says, or as many as it was seen to take.

Learned as TCP learns a window (additive increase, multiplicative decrease; Chiu and Jain, 1989): one slot more for every round of
jobs that filled all slots and went well; a third less when the engine says that it is busy, or when first tokens take several
times as long as they did at best.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

BACK_OFF = 0.7
SLOW = 4.0
"""First tokens this many times slower than at best are too slow."""
COOL_SECONDS = 2.0
"""The jobs under way when the limit fell say nothing of the new one."""
_WEIGHT, _FORGET = 0.2, 1.002


class SlotLimiter:
    """A gate for so many at once. With `most`, it learns between 1 and that, and `limit` is where it begins."""

    def __init__(self, limit: int, max_limit: int | None = None) -> None:
        self._limit, self._max_limit = float(limit), max_limit
        self._running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._mean: float | None = None
        self._best = 0.0
        self._reduced_at = float("-inf")

    @property
    def limit(self) -> int:
        """How many may run now."""
        return int(self._limit)

    def reset(self, limit: int, most: int | None = None) -> None:
        """The config has changed: begins anew from there."""
        self._limit, self._max_limit = float(limit), most
        self._wake()

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Waits for a slot and holds it."""
        await self._acquire()
        try:
            yield
        finally:
            self._running -= 1
            self._wake()

    async def _acquire(self) -> None:
        if self._running < self.limit and not self._waiting:
            self._running += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # its turn came in the same moment: it goes to the next
                self._running -= 1
                self._wake()
            raise

    def _wake(self) -> None:
        while self._waiting and self._running < self.limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self._running += 1
                turn.set_result(None)

    def learn(self, now: float, *, busy: bool, first_seconds: float | None, full: bool) -> bool:
        """A job ended at `now` (seconds): the engine said it was busy, or its first output took so long; `full`: all slots were
        taken. Whether the limit changed.
        """
        if self._max_limit is None:
            return False
        before = self.limit
        if busy or self._is_slow(first_seconds):
            if now - self._reduced_at >= COOL_SECONDS:
                self._limit, self._reduced_at = max(1.0, self._limit * BACK_OFF), now
                self._mean = None
        elif full and first_seconds is not None:
            self._limit = min(float(self._max_limit), self._limit + 1 / self._limit)
            self._wake()
        return self.limit != before

    def _is_slow(self, first: float | None) -> bool:
        """Against the best mean so far, which is slowly forgotten: prompts, models and machines change."""
        if first is None:
            return False
        self._mean = first if self._mean is None else self._mean + _WEIGHT * (first - self._mean)
        self._best = min(self._best * _FORGET, self._mean) if self._best else self._mean
        return self._limit > 1 and self._mean > SLOW * self._best
