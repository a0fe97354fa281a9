"""Ends the work on a request whose caller has disconnected."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.types import Receive

Watch = Callable[[Callable[[], None]], Callable[[], None]]
"""Calls a function once the caller has disconnected. Returns what ends that."""


def watch_by_task(receive: Receive) -> Watch:
    """A Watch for a caller that only ASGI's `receive` tells of."""

    def watch(left: Callable[[], None]) -> Callable[[], None]:
        async def wait() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            left()

        waiting = asyncio.create_task(wait(), name="client-disconnect")

        def stop() -> None:
            waiting.cancel()

        return stop

    return watch


class DisconnectWatch:
    """Cancels an answer in the making `linger` seconds after its caller has disconnected."""

    __slots__ = ("_answering", "_linger", "_requested", "_timer", "_watch")

    def __init__(self, watch: Watch, linger: float = 0) -> None:
        self._watch, self._linger = watch, linger
        self._answering: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._requested = False

    async def run(self, answer: Awaitable[None]) -> None:
        """Awaits `answer`, also what it does when it is cancelled. Returns if the caller's leaving ended it, or raises its error.

        The calling task may be cancelled from outside too, which cancels the answer and is passed on.
        """
        task = self._answering = asyncio.current_task()
        if task is None:
            raise RuntimeError("a request is served outside of a task")
        before = task.cancelling()
        stop = self._watch(self._leave)
        try:
            await answer
        except asyncio.CancelledError:
            if not self._requested or task.cancelling() > before + 1:
                raise
        finally:
            self._answering = None
            stop()
            if self._timer is not None:
                self._timer.cancel()
            if self._requested:
                task.uncancel()

    def _leave(self) -> None:
        if self._linger and self._answering is not None:
            self._timer = asyncio.get_running_loop().call_later(self._linger, self._cancel)
        else:
            self._cancel()

    def _cancel(self) -> None:
        if self._answering is not None:
            self._requested = True
            self._answering.cancel("the caller disconnected")
