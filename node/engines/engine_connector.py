"""aiohttp's client, for engines behind a proxy.

The client tells of one attempt at a request whether its connection was used before, and when its body was sent. aiohttp's traces
tell the same, at the price of a dozen coroutines a request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self
from weakref import WeakSet

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import BytesPayload

from node.engines.engine_settings import EngineSettings

if TYPE_CHECKING:
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace


class RequestBody(BytesPayload):
    """The body of one attempt. `reused_connection`: whether its connection had served another request before."""

    def __init__(self, body: bytes, on_sent: Callable[[], None]) -> None:
        super().__init__(body)
        self._on_sent = on_sent
        self.reused_connection = False

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        """Writes the body, and calls `on_sent`."""
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


class AiohttpResponse:
    """A response of aiohttp's client (`node.engines.http_connection.EngineResponse`)."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    @property
    def status(self) -> int:
        """See EngineResponse."""
        return self._response.status

    @property
    def content_type(self) -> str:
        """See EngineResponse."""
        return self._response.content_type

    def header(self, name: str) -> str:
        """See EngineResponse."""
        return self._response.headers.get(name, "")

    async def readany(self) -> bytes:
        """See EngineResponse."""
        return await self._response.content.readany()

    def finish_soon(self, seconds: float) -> None:
        """See EngineResponse. aiohttp closes the connection if the end is not here yet."""

    def release(self) -> None:
        """See EngineResponse."""
        self._response.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


class ProxiedClient:
    """aiohttp's client with the settings of an engine. Created inside the running event loop; call `close` at the end."""

    def __init__(self, settings: EngineSettings) -> None:
        self._session = aiohttp.ClientSession(
            connector=EngineConnector(limit=0, keepalive_timeout=30),
            # The runner's deadlines bound the answer; this bounds only the time before it.
            timeout=aiohttp.ClientTimeout(total=None, connect=settings.connect_seconds, sock_connect=settings.connect_seconds),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=settings.trust_env,
        )

    async def close(self) -> None:
        """Closes all connections."""
        await self._session.close()

    async def send(
        self, method: str, address: str, headers: Mapping[str, str], body: bytes, on_sent: Callable[[], None]
    ) -> AiohttpResponse:
        """See node.engines.http_client.EngineClient.send."""
        while True:
            data = RequestBody(body, on_sent) if body or method == "POST" else None
            try:
                return AiohttpResponse(
                    await self._session.request(method, address, data=data, headers=headers, allow_redirects=False)
                )
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                if data is None or not data.reused_connection:
                    raise
