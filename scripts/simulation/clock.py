"""A virtual clock that runs coroutines: time moves at once to the next event, so a simulated day takes minutes.

The coordinator's coroutines run on it unchanged. They wait only for a `LeanEvent`, in whose place they are given a `Signal`.
Events at the same time run in the order in which they were scheduled, so a run depends on its seed alone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from heapq import heappop, heappush
from typing import Any, Literal

from tallystick.runtime.lean_event import LeanEvent

Life = Coroutine[Any, Any, None]


class Wait:
    """What a coroutine waits for: a number of seconds, a signal, or the first of the two."""

    __slots__ = ("life", "seconds", "signal")

    def __init__(self, seconds: float | None, signal: Signal | None = None) -> None:
        self.seconds, self.signal = seconds, signal
        self.life: Life | None = None

    def __await__(self) -> Generator[Wait, None, None]:
        """Suspends the coroutine until the clock resumes it."""
        yield self


class VirtualClock:
    """See the module's docstring. `now`: seconds since the run began."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._scheduled = 0
        self._lives: dict[Life, None] = {}

    def tick(self) -> float:
        """Returns `now`."""
        return self.now

    def call_at(self, at: float, call: Callable[[], None]) -> None:
        """Schedules a call."""
        self._scheduled += 1
        heappush(self._events, (at, self._scheduled, call))

    def start(self, life: Life) -> None:
        """Runs a coroutine until it first waits, and from then on whenever its wait is over."""
        self._lives[life] = None
        self._step(life)

    def _step(self, life: Life) -> None:
        try:
            wait = life.send(None)
        except StopIteration:
            del self._lives[life]
            return
        wait.life = life
        if wait.signal is not None:
            wait.signal.add(wait)
        if wait.seconds is not None:
            self.call_at(self.now + wait.seconds, lambda: self.resume(wait))

    def resume(self, wait: Wait) -> None:
        """Ends a wait, unless it has ended already."""
        life, wait.life = wait.life, None
        if life is None:
            return
        if wait.signal is not None:
            wait.signal.remove(wait)
        self._step(life)

    def run(self, until: float) -> None:
        """Runs all events up to a time."""
        events = self._events
        while events and events[0][0] <= until:
            self.now, _, call = heappop(events)
            call()
        self.now = until

    def close(self) -> None:
        """Cancels all coroutines that still wait, at the present time."""
        while self._lives:
            life, _ = self._lives.popitem()
            with contextlib.suppress(asyncio.CancelledError, StopIteration):
                life.throw(asyncio.CancelledError())

    def signal(self) -> Signal:
        """Returns a new signal."""
        return Signal(self)


def sleep(seconds: float) -> Wait:
    """Waits for a number of seconds."""
    return Wait(seconds)


class Signal(LeanEvent):
    """An event that coroutines on a virtual clock can wait for."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self._clock, self._held = clock, dict[Wait, None]()

    def set(self) -> None:
        """Resumes all coroutines that wait, after the current one."""
        super().set()
        for wait in self._held:
            self._clock.call_at(self._clock.now, partial(self._clock.resume, wait))

    async def wait(self) -> Literal[True]:
        """Waits until the signal is set."""
        if not self.is_set():
            await Wait(None, self)
        return True

    async def wait_for(self, seconds: float) -> bool:
        """Waits until the signal is set or the seconds are over. Returns whether it is set."""
        if not self.is_set():
            await Wait(seconds, self)
        return self.is_set()

    def add(self, wait: Wait) -> None:
        """Notes a coroutine that waits."""
        self._held[wait] = None

    def remove(self, wait: Wait) -> None:
        """Undoes `add`."""
        self._held.pop(wait, None)
