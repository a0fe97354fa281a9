"""Notices that the client of a request left: by a call of the server, or with a task where a server makes no such calls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from weakref import ref

from starlette.types import Receive, Scope

from tallystick.runtime.http_protocol import GONE_EXTENSION, HttpProtocol


class ClientWatch:
    """The watch of one request, whose body was read."""

    __slots__ = ("_connection", "_receive", "_task")

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._receive = receive
        reference: ref[HttpProtocol] | None = (scope.get("extensions") or {}).get(GONE_EXTENSION)
        self._connection = None if reference is None else reference()
        self._task: asyncio.Task[None] | None = None

    def begin(self, gone: Callable[[], None]) -> None:
        """Calls this function when the client leaves, until `end`."""
        if self._connection is not None:
            self._connection.call_when_gone(gone)
        else:
            self._task = asyncio.create_task(_wait_until_gone(self._receive), name="client-gone")
            self._task.add_done_callback(partial(_tell, gone))

    def end(self) -> None:
        """Ends the watch."""
        if self._connection is not None:
            self._connection.call_when_gone(None)
        if self._task is not None:
            self._task.cancel()


def _tell(gone: Callable[[], None], task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # retrieved: a server that cannot say more about its client has lost it
        gone()


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
