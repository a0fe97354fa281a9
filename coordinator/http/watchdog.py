"""A timeout for the awaits that every streamed token passes: one shared timer instead of one timer per await."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class Watchdog:
    """Interrupts an await of the current task that takes longer than `seconds`, after twice that time at the latest.

    `asyncio.timeout` would create a timer for every await, which costs as much as relaying a frame. Call `close` at the end.
    """

    def __init__(self, seconds: float) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a Watchdog must be created inside a task")
        self._task, self._seconds = task, seconds
        self._loop = asyncio.get_running_loop()
        self._waiting_since: float | None = None
        self._earlier_cancels = 0
        self._tripped = False
        self._timer = self._loop.call_later(seconds, self._check)

    async def wait(self, awaitable: Awaitable[T]) -> T:
        """Returns the result of the awaitable. Raises TimeoutError if the watchdog interrupted it."""
        self._waiting_since, self._earlier_cancels = self._loop.time(), self._task.cancelling()
        try:
            return await awaitable
        except asyncio.CancelledError:
            if self._tripped:
                self._tripped = False
                if self._task.uncancel() <= self._earlier_cancels:  # nobody else cancelled the task
                    raise TimeoutError from None
            raise
        finally:
            self._waiting_since = None

    def trip(self) -> None:
        """Interrupts the await under way, if there is one."""
        if self._waiting_since is not None and not self._tripped:
            self._tripped = True
            self._task.cancel()

    def close(self) -> None:
        """Stops the timer."""
        self._timer.cancel()

    def _check(self) -> None:
        now = self._loop.time()
        if self._waiting_since is not None and now - self._waiting_since >= self._seconds:
            self.trip()
        self._timer = self._loop.call_at((self._waiting_since or now) + self._seconds, self._check)
