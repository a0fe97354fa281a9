"""Notices that the client of a request left: by a call of the server, or with a task where a server makes no such calls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import Receive, Scope

from tallystick.runtime.http_protocol import GONE_EXTENSION


class ClientWatch:
    """The watch of one request, whose body was read."""

    __slots__ = ("_receive", "_set_gone", "_task")

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._receive = receive
        self._set_gone: Callable[[Callable[[], None] | None], None] | None = (scope.get("extensions") or {}).get(GONE_EXTENSION)
        self._task: asyncio.Task[None] | None = None

    def begin(self, gone: Callable[[], None]) -> None:
        """Calls this function when the client leaves, until `end`."""
        if self._set_gone is not None:
            self._set_gone(gone)
        else:
            self._task = asyncio.create_task(_wait_until_gone(self._receive), name="client-gone")
            self._task.add_done_callback(lambda task: None if task.cancelled() else gone())

    def end(self) -> None:
        """Ends the watch."""
        if self._set_gone is not None:
            self._set_gone(None)
        if self._task is not None:
            self._task.cancel()


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
