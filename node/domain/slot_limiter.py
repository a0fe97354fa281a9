"""The number of jobs that an engine runs at once: fixed by the config, or learned from the engine's behaviour.

Learning is additive increase, multiplicative decrease, as in TCP congestion control (Chiu and Jain, 1989). The limit grows by one
after a full round of jobs that went well. It falls by a third when the engine reports that it is busy, or when first tokens take
several times as long as at best.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

DECREASE_FACTOR = 0.7
SLOW_FACTOR = 4.0
"""First tokens that take this many times as long as at best are too slow."""
COOLDOWN_SECONDS = 2.0
"""After a decrease, jobs that started before it say nothing about the new limit."""
_MEAN_WEIGHT, _FORGETTING = 0.2, 1.002


class SlotLimiter:
    """Limits the number of jobs that run at once. With `max_limit`, it learns a limit from 1 to `max_limit` and starts at
    `limit`.
    """

    def __init__(self, limit: int, max_limit: int | None = None) -> None:
        self._limit, self._max_limit = float(limit), max_limit
        self._running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._mean: float | None = None
        self._best = 0.0
        self._reduced_at = float("-inf")

    @property
    def limit(self) -> int:
        """The number of jobs that may run now."""
        return int(self._limit)

    def reset(self, limit: int, max_limit: int | None = None) -> None:
        """Restarts with these limits after the config changed."""
        self._limit, self._max_limit = float(limit), max_limit
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
            if turn.done() and not turn.cancelled():  # granted in the same moment: passes the slot on
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
        """Adjusts the limit after a job ended at `now` (seconds); returns whether it changed.

        `busy`: the engine reported that it is busy; `first_seconds`: time to the first output; `full`: all slots were taken.
        """
        if self._max_limit is None:
            return False
        before = self.limit
        if busy or self._is_slow(first_seconds):
            if now - self._reduced_at >= COOLDOWN_SECONDS:
                self._limit, self._reduced_at = max(1.0, self._limit * DECREASE_FACTOR), now
                self._mean = None
        elif full and first_seconds is not None:
            self._limit = min(float(self._max_limit), self._limit + 1 / self._limit)
            self._wake()
        return self.limit != before

    def _is_slow(self, first: float | None) -> bool:
        """Compares with the best mean so far, which is slowly forgotten, because prompts, models and machines change."""
        if first is None:
            return False
        self._mean = first if self._mean is None else self._mean + _MEAN_WEIGHT * (first - self._mean)
        self._best = min(self._best * _FORGETTING, self._mean) if self._best else self._mean
        return self._limit > 1 and self._mean > SLOW_FACTOR * self._best
