"""What the HTTP client tells of one attempt at a request: whether its connection was used before, and when its body was sent.

aiohttp's traces tell the same, at the price of a dozen coroutines a request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakSet

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import BytesPayload

from node.domain.requests import EngineRequest

if TYPE_CHECKING:
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace


class RequestBody(BytesPayload):
    """The body of one attempt. `reused_connection`: whether its connection had served another request before."""

    def __init__(self, request: EngineRequest) -> None:
        super().__init__(request.body, content_type=request.content_type)
        self._on_sent = request.on_sent
        self.reused_connection = False

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        """Writes the body, and calls the request's `on_sent`."""
        await super().write_with_length(writer, content_length)
        self._on_sent()


class EngineConnector(aiohttp.TCPConnector):
    """Tells each RequestBody whether the connection that it gets had served another request."""

    def __init__(self, *, limit: int, keepalive_timeout: float) -> None:
        super().__init__(limit=limit, keepalive_timeout=keepalive_timeout)
        self._used: WeakSet[object] = WeakSet()

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - as the base class has it
    ) -> Connection:
        """See aiohttp.BaseConnector."""
        connection = await super().connect(req, traces, timeout)
        is_used = connection.protocol in self._used
        if not is_used:
            self._used.add(connection.protocol)
        if isinstance(req.body, RequestBody):
            req.body.reused_connection = is_used
        return connection
