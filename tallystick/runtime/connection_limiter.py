"""The front door of a server: how many connections there may be, in all and of one address; how long and how large a request's
head may be; how many requests may wait on a connection; how long a client may leave what it was sent unread, or go on sending
to a request that was answered. uvicorn bounds none of these by itself; the rest is uvicorn's.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
from collections import Counter
from dataclasses import dataclass
from typing import Any

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tallystick.protocol.errors import Code, Refusal, TallyError, Unavailable
from tallystick.protocol.wire import dumps
from tallystick.runtime.buffered_transport import buffered
from tallystick.runtime.websocket import FastPathWebSocket

_LINGER_SECONDS = 1.0
LINGERING = 256
"""Refused connections that are kept open at once until their clients have read why; further ones are cut."""
PIPELINED = 16
"""Requests of one connection that may wait for the answer to an earlier one."""
LEAST_READ = 64 * 1024
"""Bytes that a client must take in `stall_seconds`, where more than that waits for it."""
UNREAD_PONGS = 64 * 1024
"""Bytes that may wait for a WebSocket's client before its pings are no longer answered."""
log = structlog.get_logger()
_REASONS = {408: "Request Timeout", 429: "Too Many Requests", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}


@functools.lru_cache(4_096)
def address_key(host: str) -> str:
    """What counts as one address where strangers have shares: an IPv4 address, or the /64 network of an IPv6 address, since a
    single household has all of that. An IPv4 address inside an IPv6 one is the IPv4 address. Anything else counts as it is.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Connections in all and of one address (of a proxy, where one stands before this server); seconds and bytes of a head;
    seconds in which a client must take some of what waits for it, and in which the rest of an answered request must arrive.
    """

    connections: int = 10_000
    per_address: int = 1_000
    head_seconds: float = 15
    head_bytes: int = 64 * 1024
    stall_seconds: float = 45


class ConnectionLimiter:
    """Who is in. One instance a server."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self._open: Counter[str] = Counter()
        self.lingering = 0
        """Refused connections that are still open."""

    @property
    def open_connections(self) -> int:
        """Connections that are open."""
        return self._open.total()

    def acquire(self, address: str) -> tuple[int, TallyError] | None:
        """Counts a connection; status and reason where there is no room for it. See `address_key` for what an address is."""
        limits, address = self.limits, address_key(address)
        if self._open[address] >= limits.per_address:
            text = f"{address} has {limits.per_address} connections open, which is all that one address may have"
            return 429, Unavailable(Code.RATE_LIMITED, text)
        if self.open_connections >= limits.connections:
            return 503, Unavailable(Code.RATE_LIMITED, f"this server has {limits.connections} connections open and takes no more")
        self._open[address] += 1
        return None

    def release(self, address: str) -> None:
        """A connection is closed."""
        address = address_key(address)
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]

    def protocols(self) -> tuple[type[HttpToolsProtocol], type[FastPathWebSocket]]:
        """Uvicorn's protocols, counted and limited by this limiter."""
        limiter = self

        class Http(_Http):
            """Bound to this limiter."""

            LIMITER = limiter

        class WebSocket(_WebSocket):
            """Bound to this limiter."""

            LIMITER = limiter

        return Http, WebSocket


class _Stall:
    """Watches a connection whose client does not take what is written to it; aborts it where that goes on."""

    def __init__(self, transport: Any, seconds: float) -> None:
        self._transport, self._seconds = transport, seconds
        self._timer: asyncio.TimerHandle | None = None
        self._taken = 0

    def begin(self) -> None:
        """Much waits for the client."""
        if self._timer is None:
            self._taken = self._transport.taken
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._look)

    def end(self) -> None:
        """Little waits for it, or it is gone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._transport.taken - self._taken >= LEAST_READ:
            self.begin()
        else:
            self._transport.abort()


class _Http(HttpToolsProtocol):
    """One connection. `_address` is set while it is counted."""

    LIMITER: ConnectionLimiter
    _address: str | None = None
    _timer: asyncio.TimerHandle | None = None
    _rest: asyncio.TimerHandle | None = None
    _stall: _Stall | None = None
    _head = 0
    _refused = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(buffered(transport))
        address = self.client[0] if self.client else ""
        refused = self.LIMITER.acquire(address)
        if refused is not None:
            self._refuse(*refused)
            return
        self._address = address
        self._stall = _Stall(self.transport, self.LIMITER.limits.stall_seconds)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._end_rest()
        self._leave()
        if self._stall is not None:
            self._stall.end()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        if self._timer is not None:
            self._head += len(data)
        super().data_received(data)
        if self._timer is not None and self._head > self.LIMITER.limits.head_bytes:
            self._refuse_large()

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= PIPELINED:
            self._refuse(429, Unavailable(Code.RATE_LIMITED, f"more than {PIPELINED} requests wait on one connection"))
            raise ValueError("too many requests at once")  # the parser stops here
        super().on_message_begin()
        if self._timer is None:
            self._begin_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > self.LIMITER.limits.head_bytes:
            self._refuse_large()
            raise ValueError("head too long")  # the parser stops here
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body and self._rest is None:
            self._rest = self.loop.call_later(self.LIMITER.limits.stall_seconds, self.transport.close)

    def on_message_complete(self) -> None:
        self._end_rest()
        super().on_message_complete()

    def pause_writing(self) -> None:
        if self._stall is not None:
            self._stall.begin()
        super().pause_writing()

    def resume_writing(self) -> None:
        if self._stall is not None:
            self._stall.end()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        if not self._refused:
            super().send_400_response(msg)

    def handle_websocket_upgrade(self) -> None:
        self._end_head()
        self._leave()  # the WebSocket's protocol counts the connection from here on
        super().handle_websocket_upgrade()

    def _begin_head(self) -> None:
        self._head = 0
        self._timer = self.loop.call_later(self.LIMITER.limits.head_seconds, self._too_slow)

    def _end_head(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end_rest(self) -> None:
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None

    def _leave(self) -> None:
        if self._address is not None:
            self.LIMITER.release(self._address)
            self._address = None

    def _too_slow(self) -> None:
        self._timer = None
        text = f"the request's head did not arrive within {self.LIMITER.limits.head_seconds:g} s"
        self._refuse(408, Refusal(Code.TIMED_OUT, text))

    def _refuse_large(self) -> None:
        text = f"the request's head is longer than {self.LIMITER.limits.head_bytes} bytes"
        self._refuse(431, Refusal(Code.BODY_TOO_LARGE, text))

    def _refuse(self, status: int, error: TallyError) -> None:
        self._end_head()
        body = dumps(error.as_json())
        head = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"retry-after: 1\r\nconnection: close\r\n\r\n"
        )
        log.info("connection refused", address=self.client and self.client[0], status=status, reason=str(error))
        self._refused = True
        self.transport.write(head.encode() + body)
        if self.LIMITER.lingering >= LINGERING:
            self.transport.close()
            return
        if self.transport.can_write_eof():  # closed at once, whoever still sends would lose the answer
            self.transport.write_eof()
        self.LIMITER.lingering += 1
        self.loop.call_later(_LINGER_SECONDS, self._depart)

    def _depart(self) -> None:
        self.LIMITER.lingering -= 1
        self.transport.close()


class _WebSocket(FastPathWebSocket):
    """One node link. It was counted as an HTTP connection a moment ago, so there is room."""

    LIMITER: ConnectionLimiter
    _address: str | None = None
    _stall: _Stall | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(buffered(transport))
        self._stall = _Stall(self.transport, self.LIMITER.limits.stall_seconds)
        address = self.client[0] if self.client else ""
        if self.LIMITER.acquire(address) is None:
            self._address = address

    def connection_lost(self, exc: Exception | None) -> None:
        if self._address is not None:
            self.LIMITER.release(self._address)
            self._address = None
        if self._stall is not None:
            self._stall.end()
        super().connection_lost(exc)

    def handle_ping(self) -> None:
        """Answers, unless its client does not read what it is sent: pongs would fill the memory as fast as pings come."""
        if self.transport.get_write_buffer_size() <= UNREAD_PONGS:
            super().handle_ping()
        else:
            self.conn.data_to_send()

    def pause_writing(self) -> None:
        if self._stall is not None:
            self._stall.begin()
        super().pause_writing()

    def resume_writing(self) -> None:
        if self._stall is not None:
            self._stall.end()
        super().resume_writing()
