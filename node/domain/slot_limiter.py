"""The number of jobs that an engine has at once: fixed by the config, or learned from the engine's behaviour.

Learning is additive increase, multiplicative decrease, as in TCP congestion control (Chiu and Jain, 1989). The limit grows by one
after a full round of jobs that went well. It falls by a third when the engine reports that it is busy, or when first tokens take
several times as long as at best.

An engine that refuses a job because it is busy shows how many it takes: those that it has already. From then on, it gets no more
than these. After a pause it gets one more, and so on, until it has all of its slots again or refuses once more. The pause is a
second at first and doubles while refusals follow each other. So one strange refusal costs little, and an engine that is smaller
than its config says refuses few jobs.
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
MIN_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1.0, 30.0
"""Until an engine that refused a job gets one more."""
_QUIET_PAUSES = 4
"""Without a refusal for this many pauses after a pause, the next one is as short as at first."""
_MEAN_WEIGHT, _FORGETTING = 0.2, 1.002


class SlotLimiter:
    """Limits the number of jobs that an engine has at once: `limit` that run, and `queue_depth` that wait in its own queue.

    With `max_limit`, it learns a limit from 1 to `max_limit` and starts at `limit`.
    """

    def __init__(self, limit: int, max_limit: int | None = None, queue_depth: int = 0) -> None:
        self._limit, self._max_limit, self._queue_depth = float(limit), max_limit, queue_depth
        self._running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._mean: float | None = None
        self._best = 0.0
        self._reduced_at = float("-inf")
        self._most: int | None = None
        """Jobs that the engine takes since it refused one; None if it takes all."""
        self._pause, self._pause_ends = 0.0, float("-inf")

    @property
    def limit(self) -> int:
        """The number of jobs that may run now."""
        return self._within(int(self._limit))

    @property
    def queue(self) -> int:
        """The number of jobs beyond `limit` that may wait in the engine's queue now."""
        return self.places - self.limit

    @property
    def places(self) -> int:
        """The number of jobs that the engine may have now, in its slots and its queue."""
        return self._within(int(self._limit) + self._queue_depth)

    @property
    def running(self) -> int:
        """The number of jobs that the engine has: those that run or wait there."""
        return self._running

    def _within(self, number: int) -> int:
        return number if self._most is None else min(number, self._most)

    def reset(self, limit: int, max_limit: int | None = None, queue_depth: int = 0) -> None:
        """Restarts with these limits after the config changed."""
        self._limit, self._max_limit, self._queue_depth, self._most = float(limit), max_limit, queue_depth, None
        self._wake()

    def try_acquire(self) -> bool:
        """Takes a slot if one is free and nobody waits for it. Call `release` after it."""
        if self._waiting or not self._has_room:
            return False
        self._running += 1
        return True

    def release(self) -> None:
        """Gives a slot back."""
        self._running -= 1
        self._wake()

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Waits for a slot and holds it."""
        await self.acquire()
        try:
            yield
        finally:
            self.release()

    @property
    def _has_room(self) -> bool:
        return self._running < self.places

    async def acquire(self) -> None:
        """Waits for a slot and takes it. Call `release` after it."""
        if self.try_acquire():
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
        while self._waiting and self._has_room:
            turn = self._waiting.popleft()
            if not turn.done():
                self._running += 1
                turn.set_result(None)

    def refused(self, now: float, retry_after: float | None = None) -> float:
        """Notes that the engine refused a job, which still holds its slot, because it is busy. Returns the pause in seconds.

        Call `try_more` after the pause. `now`, `retry_after`: seconds; the engine asked to be left alone for `retry_after`.
        """
        if now >= self._pause_ends + _QUIET_PAUSES * self._pause:
            self._pause = MIN_PAUSE_SECONDS
        elif now >= self._pause_ends:  # else the job began before the last refusal, and says nothing new
            self._pause = min(2 * self._pause, MAX_PAUSE_SECONDS)
        pause = max(self._pause, min(retry_after or 0.0, MAX_PAUSE_SECONDS))
        self._pause_ends = now + pause
        self._most = self._within(max(0, self._running - 1))
        return pause

    def try_more(self) -> bool:
        """Lets the engine have one job more, a pause after it refused one. Returns whether it has not all of its slots yet."""
        if self._most is None:
            return False
        self._most += 1
        if self._most >= int(self._limit) + self._queue_depth:
            self._most = None
        self._wake()
        return self._most is not None

    def learn(self, now: float, *, busy: bool, first_seconds: float | None, full: bool) -> bool:
        """Adjusts the limit after a job ended at `now` (seconds); returns whether it changed.

        `busy`: the engine reported that it is busy; `first_seconds`: time to the first output; `full`: all slots were taken.
        """
        if self._max_limit is None:
            return False
        before = int(self._limit)
        if busy or self._is_slow(first_seconds):
            if now - self._reduced_at >= COOLDOWN_SECONDS:
                self._limit, self._reduced_at = max(1.0, self._limit * DECREASE_FACTOR), now
                self._mean = None
        elif full and first_seconds is not None:
            self._limit = min(float(self._max_limit), self._limit + 1 / self._limit)
            self._wake()
        return int(self._limit) != before

    def _is_slow(self, first: float | None) -> bool:
        """Compares with the best mean so far, which is slowly forgotten, because prompts, models and machines change."""
        if first is None:
            return False
        self._mean = first if self._mean is None else self._mean + _MEAN_WEIGHT * (first - self._mean)
        self._best = min(self._best * _FORGETTING, self._mean) if self._best else self._mean
        return self._limit > 1 and self._mean > SLOW_FACTOR * self._best
