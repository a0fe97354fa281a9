"""A bound on waiting that costs next to nothing each time: for the awaits that every streamed token passes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class Patience:
    """Cuts off an await that takes longer than `seconds`, give or take as much again.

    One timer serves all awaits of the task that made it, where asyncio.timeout would make one each, at the price of relaying
    a frame. `close` it in the end.
    """

    def __init__(self, seconds: float) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("only a task can be patient")
        self._task, self._seconds = task, seconds
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None
        self._others = 0
        self._cut = False
        self._timer = self._loop.call_later(seconds, self._look)

    async def wait(self, awaitable: Awaitable[T]) -> T:
        """Its result. Raises TimeoutError if it was cut off."""
        self._since, self._others = self._loop.time(), self._task.cancelling()
        try:
            return await awaitable
        except asyncio.CancelledError:
            if self._cut:
                self._cut = False
                if self._task.uncancel() <= self._others:  # nobody else wants the task to stop
                    raise TimeoutError from None
            raise
        finally:
            self._since = None

    def cut(self) -> None:
        """Cuts off the await under way, if there is one."""
        if self._since is not None and not self._cut:
            self._cut = True
            self._task.cancel()

    def close(self) -> None:
        """Stops watching."""
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        if self._since is not None and now - self._since >= self._seconds:
            self.cut()
        self._timer = self._loop.call_at((self._since or now) + self._seconds, self._look)
