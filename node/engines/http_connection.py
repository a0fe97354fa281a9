"""One HTTP/1.1 connection to an engine, for one request at a time (RFC 9112).

httptools parses. A request costs one future: nothing here has a task or a timeout of its own, because the deadlines of the job
bound all waits. Errors are those of aiohttp's client, so callers treat both clients alike.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self, cast

import aiohttp
import httptools

_MAX_HEAD_BYTES = 64 << 10
"""Bytes that an engine may send without any byte of the body: heads, frames of chunks, trailers."""
_MAX_BUFFERED = 128 << 10
"""Bytes of a body that wait for their reader, above which nothing more is read from the connection."""
_WRITE_BUFFER = 64 << 10
_BODILESS = frozenset({204, 304})
_DEFAULT_TYPE = "application/octet-stream"


class EngineResponse(Protocol):
    """The response of an engine, whichever client received it. Leaving its block releases the connection."""

    @property
    def status(self) -> int:
        """The status code."""
        ...

    @property
    def content_type(self) -> str:
        """The media type, without parameters, in lower case."""
        ...

    def header(self, name: str) -> str:
        """The value of a header, whose `name` is in lower case; empty if there is none."""
        ...

    async def readany(self) -> bytes:
        """The bytes of the body that are here, at least one; empty at the end. Raises aiohttp.ClientError if it broke off."""
        ...

    def finish_soon(self, seconds: float) -> None:
        """Lets the rest of the body be discarded, so that its connection can be used again if it ends within `seconds`."""
        ...

    def release(self) -> None:
        """Gives the connection back; closes it if the response has not ended."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class MalformedResponse(aiohttp.ClientPayloadError):
    """The bytes of an engine are no HTTP response. The text quotes nothing of them."""


class HttpConnection(asyncio.Protocol):
    """See the module's docstring.

    `used`: whether it had served another request; `idle_since`: when it became free, in seconds of the loop's clock. `on_free` is
    called when it can serve the next request, `on_lost` when it has ended.
    """

    def __init__(self, on_free: Callable[[HttpConnection], None], on_lost: Callable[[HttpConnection], None]) -> None:
        self.used, self.idle_since = False, 0.0
        self._on_free, self._on_lost = on_free, on_lost
        self._loop = asyncio.get_running_loop()
        self._parser: Any = None
        self._transport: asyncio.Transport | None = None
        self._exchange: HttpExchange | None = None
        self._on_sent: Callable[[], None] | None = None
        self._is_full = False

    # For the client

    @property
    def is_open(self) -> bool:
        """Whether a request can be sent on it."""
        return self._transport is not None and not self._transport.is_closing()

    async def send(self, head: bytes, body: bytes, on_sent: Callable[[], None]) -> HttpExchange:
        """Sends a request and returns its response once the head is here. `on_sent` is called when the request has left.

        Raises aiohttp.ServerDisconnectedError or ClientOSError if the connection ended first, MalformedResponse.
        """
        transport = self._transport
        if transport is None or transport.is_closing():
            raise aiohttp.ServerDisconnectedError
        exchange = self._exchange = HttpExchange(self, self._loop)
        try:
            if body:
                transport.writelines((head, body))
            else:
                transport.write(head)
            if self._is_full:
                self._on_sent = on_sent
            else:
                on_sent()
            await exchange.head_received
        except BaseException:
            self.close()
            raise
        return exchange

    def close(self) -> None:
        """Ends the connection at once. With TLS, nothing waits for the engine to agree: that would let it generate on."""
        self._on_sent = None
        if self._transport is not None:
            self._transport.abort()

    def free(self, exchange: HttpExchange) -> None:
        """Called by a response when its reader needs it no more. Does nothing for a response that it no longer serves.

        A connection that was not read to its end is closed: bytes may wait there that would answer the next request.
        """
        if exchange is not self._exchange:
            return
        self._exchange, transport = None, self._transport
        is_clean = exchange.complete and exchange.keeps_alive and not exchange.is_paused and not self._is_full
        if not is_clean or transport is None or transport.is_closing() or transport.get_write_buffer_size():
            self.close()
            return
        self.used, self.idle_since, self._on_sent = True, self._loop.time(), None
        self._on_free(self)

    def set_reading(self, *, active: bool) -> None:
        """Reads on from the engine, or stops until the body was taken."""
        if self._transport is not None and not self._transport.is_closing():
            if active:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.BaseProtocol."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_WRITE_BUFFER, low=0)
        if (sock := transport.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # an answer may be silent for minutes
        self._parser = httptools.HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(  # as browsers and other clients read
            lenient_headers=True, lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True
        )

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        exchange = self._exchange
        if exchange is None:  # nobody asked for anything
            self.close()
            return
        exchange.silent_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            exchange.fail(MalformedResponse("a change of the protocol"))
        except httptools.HttpParserError:
            exchange.fail(MalformedResponse("bytes that are no HTTP response"))
        if exchange.silent_bytes > _MAX_HEAD_BYTES:
            exchange.fail(MalformedResponse(f"more than {_MAX_HEAD_BYTES} bytes of heads"))
        exchange.wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.BaseProtocol."""
        self._transport = self._parser = None  # a parser refers to its connection
        if self._exchange is not None:
            self._exchange.connection_ended(exc)
        self._on_lost(self)

    def pause_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        self._is_full = True

    def resume_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        self._is_full = False
        if self._on_sent is not None:
            on_sent, self._on_sent = self._on_sent, None
            on_sent()

    # httptools

    def on_message_begin(self) -> None:
        """Called by the parser. Each response of 1xx and the final one begin so."""
        if self._exchange is not None:
            self._exchange.begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser, also for trailers."""
        if self._exchange is not None:
            self._exchange.add_header(name, value)

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        if self._exchange is not None:
            self._exchange.end_head(self._parser.get_status_code())

    def on_body(self, data: bytes) -> None:
        """Called by the parser."""
        if self._exchange is not None:
            self._exchange.add_body(data)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if self._exchange is not None:
            self._exchange.end(keeps_alive=self._parser.should_keep_alive())


class HttpExchange:
    """A response as it comes (EngineResponse)."""

    def __init__(self, connection: HttpConnection, loop: asyncio.AbstractEventLoop) -> None:
        self._connection: HttpConnection | None = connection
        self._loop = loop
        self.status = 0
        self.headers: dict[str, str] = {}
        self.head_received: asyncio.Future[None] = loop.create_future()
        self.complete = self.keeps_alive = False
        self.silent_bytes = 0
        self._has_head = self.is_paused = self._discards = self._is_released = False
        self._chunks: list[bytes] = []
        self._size = 0
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    # For its reader

    @property
    def content_type(self) -> str:
        """See EngineResponse."""
        return self.header("content-type").partition(";")[0].strip().lower() or _DEFAULT_TYPE

    def header(self, name: str) -> str:
        """See EngineResponse."""
        return self.headers.get(name, "")

    async def readany(self) -> bytes:
        """See EngineResponse."""
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self.complete:
                return b""
            self._reader = self._loop.create_future()
            await self._reader
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._drop_chunks()
        return data

    def _drop_chunks(self) -> None:
        self._chunks, self._size = [], 0
        if self.is_paused and self._connection is not None:
            self.is_paused = False
            self._connection.set_reading(active=True)

    def finish_soon(self, seconds: float) -> None:
        """See EngineResponse."""
        self._discards = True
        self._drop_chunks()
        if not self.complete and self._error is None and self._timer is None:
            self._timer = self._loop.call_later(seconds, self._give_up)

    def release(self) -> None:
        """See EngineResponse."""
        self._is_released = True
        if self._timer is None or self.complete or self._error is not None:
            self._free()

    def _give_up(self) -> None:
        """Ends a response whose rest did not come in time. Its reader may still hold it, so only `release` frees it."""
        self._timer = None
        if not self.complete:
            self.fail(aiohttp.ClientPayloadError("the rest of the body did not come in time"))
            self.wake()

    def _free(self) -> None:
        """Gives the connection back, once: afterwards it may serve another response, which this one must not touch."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.free(self)

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    # For its connection

    def begin(self) -> None:
        """A message begins. One after the end of the response answers nothing, and ends the connection."""
        self.keeps_alive = False
        if self.complete:
            self._close()
        if not self._has_head:
            self.headers.clear()

    def add_header(self, name: bytes, value: bytes) -> None:
        """Adds a header; the values of one name are joined (RFC 9110, 5.3)."""
        if not self._has_head:
            key, text = name.decode("latin-1").lower(), value.decode("utf-8", "surrogateescape")
            self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text

    def end_head(self, status: int) -> None:
        """The head is complete. Those of 1xx precede another one; there is no status below (RFC 9110, 15)."""
        if status < 100:
            self.fail(MalformedResponse(f"the status {status}"))
        if status >= 200 and not self._has_head:
            self.status, self._has_head = status, True
            self.silent_bytes = 0

    def add_body(self, data: bytes) -> None:
        """Adds bytes of the body."""
        self.silent_bytes = 0
        if self._discards or self.complete:
            return
        self._chunks.append(data)
        self._size += len(data)
        if self._size > _MAX_BUFFERED and not self.is_paused and self._connection is not None:
            self.is_paused = True
            self._connection.set_reading(active=False)

    def end(self, *, keeps_alive: bool) -> None:
        """A message is complete."""
        if self._has_head and not self.complete:
            self.complete, self.keeps_alive = True, keeps_alive

    def connection_ended(self, error: Exception | None) -> None:
        """The end of the connection ends a body without a length, and breaks off others (RFC 9112, 6.3 and 8)."""
        if not self._has_head:
            self.fail(aiohttp.ClientOSError(*error.args) if isinstance(error, OSError) else aiohttp.ServerDisconnectedError())
        elif self._has_length():
            self.fail(aiohttp.ClientPayloadError("the connection ended within the body"))
        else:
            self.complete = True
        self.wake()

    def _has_length(self) -> bool:
        return "content-length" in self.headers or "chunked" in self.header("transfer-encoding").lower()

    def fail(self, error: Exception) -> None:
        """Ends the response with an error, unless it is complete. The connection is not used again."""
        self.keeps_alive = False
        if not self.complete and self._error is None:
            self._error = error
            self._close()

    def wake(self) -> None:
        """Lets its reader see what came."""
        if not self.head_received.done():
            if self._error is not None and not self._has_head:
                self.head_received.set_exception(self._error)
            elif self._has_head:
                self.head_received.set_result(None)
        if self._reader is not None and (self._chunks or self.complete or self._error is not None):
            if not self._reader.done():
                self._reader.set_result(None)
            self._reader = None
        if self._is_released and (self.complete or self._error is not None):
            self._free()
