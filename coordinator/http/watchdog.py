"""A timeout for the awaits that every streamed token passes: one shared timer instead of one timer per await."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")
LOOKS = 4


class _Timer:
    """Looks at all watchdogs of one event loop with the same `seconds`, LOOKS times in that time. A timer each would take 500
    bytes.
    """

    def __init__(self, seconds: float) -> None:
        self._interval = seconds / LOOKS
        self._watchdogs: set[Watchdog] = set()
        self._handle: asyncio.TimerHandle | None = None

    def add(self, watchdog: Watchdog, loop: asyncio.AbstractEventLoop) -> None:
        self._watchdogs.add(watchdog)
        if self._handle is None:
            self._handle = loop.call_later(self._interval, self._check, loop)

    def discard(self, watchdog: Watchdog) -> None:
        self._watchdogs.discard(watchdog)
        if not self._watchdogs and self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        self._handle = loop.call_later(self._interval, self._check, loop)
        now = loop.time()
        for watchdog in self._watchdogs:
            watchdog.check(now)


_timers: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[float, _Timer]] = WeakKeyDictionary()
"""The timers of each event loop, by their seconds."""


class Watchdog:
    """Interrupts an await of the current task that takes longer than `seconds`, after a quarter more at the latest.

    `asyncio.timeout` would create a timer for every await, which costs as much as relaying a frame. Call `close` at the end.
    """

    __slots__ = ("_earlier_cancels", "_loop", "_seconds", "_task", "_timer", "_tripped", "_waiting_since")

    def __init__(self, seconds: float) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a Watchdog must be created inside a task")
        self._task, self._seconds = task, seconds
        self._loop = asyncio.get_running_loop()
        self._waiting_since: float | None = None
        self._earlier_cancels = 0
        self._tripped = False
        timers = _timers.setdefault(self._loop, {})
        self._timer = timers.get(seconds) or timers.setdefault(seconds, _Timer(seconds))
        self._timer.add(self, self._loop)

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
        self._timer.discard(self)

    def check(self, now: float) -> None:
        """Interrupts the await under way if it takes too long. `now`: the time of the event loop."""
        if self._waiting_since is not None and now - self._waiting_since >= self._seconds:
            self.trip()
