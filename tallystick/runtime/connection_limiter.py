"""Limits on the connections of an HTTP server that uvicorn does not have.

They bound the number of connections (in all and per address), the size and duration of a request's head, the number of
pipelined requests, and the time in which a client must read its response or finish sending a request that was answered.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from typing import Any

import structlog

from tallystick.protocol.errors import BadMessage, Code, Refusal, TallyError, Unavailable, retry_headers
from tallystick.protocol.wire import dumps
from tallystick.runtime.buffered_transport import buffered
from tallystick.runtime.http_direct import DirectRoutes
from tallystick.runtime.http_protocol import HttpProtocol
from tallystick.runtime.trusted_proxies import NO_PROXIES, TrustedProxies, forwarded_scheme
from tallystick.runtime.websocket import FastPathWebSocket

_LINGER_SECONDS = 1.0
LINGERING = 256
"""Refused connections that stay open for a moment so that their clients can read the reason; further ones are closed at once."""
PIPELINED = 16
"""Requests of one connection that may wait for the response to an earlier one."""
MIN_READ_BYTES = 64 * 1024
"""Bytes that a client must read within `stall_seconds` while more than that waits for it."""
MAX_UNREAD_PONG_BYTES = 64 * 1024
"""Unread bytes of a WebSocket above which its pings get no answer."""
_PROXIES = "trusted proxies"
"""The key under which their connections are counted."""
log = structlog.get_logger()
_REASONS = {
    400: "Bad Request",
    408: "Request Timeout",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


@functools.lru_cache(4_096)
def address_key(host: str) -> str:
    """The key under which limits per address count a host: an IPv4 address, or the /64 network of an IPv6 address.

    A single customer usually has a whole /64. An IPv4-mapped IPv6 address counts as the IPv4 address. Any other text is its own
    key.
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
    """The limits of one server.

    `connections`, `per_address`: open connections. `head_seconds`, `head_bytes`: duration and size of a request's head.
    `stall_seconds`: the time in which a client must read MIN_READ_BYTES, and must finish sending an answered request.
    `proxies`: their connections are no client's, so only `connections` bounds them. A WebSocket counts as its client's, and a
    request has its client's address.
    """

    connections: int = 10_000
    per_address: int = 1_000
    head_seconds: float = 15
    head_bytes: int = 64 * 1024
    stall_seconds: float = 45
    proxies: TrustedProxies = NO_PROXIES


class ConnectionLimiter:
    """Counts the open connections of one server, per address. `direct`: its routes without ASGI."""

    def __init__(self, limits: ConnectionLimits, direct: DirectRoutes | None = None) -> None:
        self.limits, self._direct = limits, direct
        self._open: Counter[str] = Counter()
        self.lingering = 0
        """The number of refused connections that are still open."""

    @property
    def open_connections(self) -> int:
        """The number of open connections."""
        return self._open.total()

    def acquire(self, address: str) -> tuple[int, TallyError] | None:
        """Counts a new connection. Returns None, or the HTTP status and the error if a limit is reached. See `address_key`."""
        refused = self.check(address)
        if refused is None:
            self._open[self._key(address)] += 1
        return refused

    def check(self, address: str) -> tuple[int, TallyError] | None:
        """Returns what `acquire` would, and counts nothing."""
        limits, key = self.limits, self._key(address)
        if key != _PROXIES and self._open[key] >= limits.per_address:
            text = f"{key}: expected at most {limits.per_address} open connections of one address; close one and try again"
            return 429, Unavailable(Code.RATE_LIMITED, text)
        if self.open_connections >= limits.connections:
            return 503, Unavailable(
                Code.RATE_LIMITED, f"this server has all {limits.connections} connections in use; try again later"
            )
        return None

    def release(self, address: str) -> None:
        """Counts a closed connection."""
        key = self._key(address)
        self._open[key] -= 1
        if not self._open[key]:
            del self._open[key]

    def _key(self, address: str) -> str:
        return _PROXIES if self.limits.proxies.trust(address) else address_key(address)

    def protocols(self) -> tuple[type[HttpProtocol], type[FastPathWebSocket]]:
        """Subclasses of uvicorn's protocols whose connections this limiter counts and limits."""
        limiter, direct = self, self._direct

        class Http(_Http):
            """Limited by this limiter."""

            LIMITER, DIRECT = limiter, direct

        class WebSocket(_WebSocket):
            """Limited by this limiter."""

            LIMITER = limiter

        return Http, WebSocket


class _StallWatch:
    """Aborts a connection whose client does not read its data."""

    def __init__(self, transport: Any, seconds: float) -> None:
        self._transport, self._seconds = transport, seconds
        self._timer: asyncio.TimerHandle | None = None
        self._sent_bytes = 0

    def begin(self) -> None:
        """Starts the watch: the write buffer is full."""
        if self._timer is None:
            self._sent_bytes = self._transport.sent_bytes
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._check)

    def end(self) -> None:
        """Stops the watch: the client has read, or is gone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        self._timer = None
        if self._transport.sent_bytes - self._sent_bytes >= MIN_READ_BYTES:
            self.begin()
        else:
            self._transport.abort()


class _WatchedProtocol(asyncio.Protocol):
    """Starts the connection's stall watch while the client does not read."""

    _stall: _StallWatch | None = None

    def pause_writing(self) -> None:
        if self._stall is not None:
            self._stall.begin()
        super().pause_writing()

    def resume_writing(self) -> None:
        if self._stall is not None:
            self._stall.end()
        super().resume_writing()


class _Http(_WatchedProtocol, HttpProtocol):
    """One HTTP connection. `_address` is set while the limiter counts it.

    Its own members are slots: with more than 30 in all, each instance would have a whole dictionary of its own (CPython's limit
    for shared keys), which takes 1.2 KB more.
    """

    __slots__ = ("_address", "_head", "_refused", "_rest", "_timer")
    LIMITER: ConnectionLimiter

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._address: str | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._rest: asyncio.TimerHandle | None = None
        self._head = 0
        self._refused = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(buffered(transport))
        address = _host(self.client)
        refused = self.LIMITER.acquire(address)
        if refused is not None:
            self._refuse(*refused)
            return
        self._address = address
        self._stall = _StallWatch(self.transport, self.LIMITER.limits.stall_seconds)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._end_rest()
        self._release()
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
            self._refuse(429, Unavailable(Code.RATE_LIMITED, f"connection: expected at most {PIPELINED} waiting requests"))
            raise ValueError("too many pipelined requests")  # the parser stops here
        super().on_message_begin()
        if self._timer is None:
            self._begin_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        if sum(map(len, chain.from_iterable(self.headers))) + len(self.url) > self.LIMITER.limits.head_bytes:
            self._refuse_large()
            raise ValueError("head too long")  # the parser stops here
        self._name_client()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body and self._rest is None:
            self._rest = self.loop.call_later(self.LIMITER.limits.stall_seconds, self.transport.close)

    def on_message_complete(self) -> None:
        self._end_rest()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if not self._refused:
            self._refuse(400, BadMessage(msg))

    def handle_websocket_upgrade(self) -> None:
        self._end_head()
        self._release()  # from here on the WebSocket protocol counts the connection
        refused = self.LIMITER.check(_host(self.scope["client"]))
        if refused is not None:  # the client of a proxy, whose own connection is not the client's
            self._refuse(*refused)
            return
        super().handle_websocket_upgrade()

    def _name_client(self) -> None:
        """Puts the client and scheme of a request that came from a trusted proxy in its scope."""
        proxies, peer = self.LIMITER.limits.proxies, _host(self.client)
        if proxies.trust(peer):
            self.scope["client"] = proxies.client_address(peer, self.headers), 0
            self.scope["scheme"] = forwarded_scheme(self.headers) or self.scope["scheme"]

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

    def _release(self) -> None:
        if self._address is not None:
            self.LIMITER.release(self._address)
            self._address = None

    def _too_slow(self) -> None:
        self._timer = None
        text = f"request head: expected within {self.LIMITER.limits.head_seconds:g} s"
        self._refuse(408, Refusal(Code.TIMED_OUT, text))

    def _refuse_large(self) -> None:
        text = f"request head: expected at most {self.LIMITER.limits.head_bytes} bytes"
        self._refuse(431, Refusal(Code.BODY_TOO_LARGE, text))

    def _refuse(self, status: int, error: TallyError) -> None:
        self._end_head()
        body = dumps(error.as_json())
        ((name, value),) = (retry_headers(error) or {"x-should-retry": "false"}).items()
        head = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"{name}: {value}\r\nconnection: close\r\n\r\n"
        )
        log.info("connection refused", address=_host(self.client), status=status, reason=str(error))
        self._refused = True
        self.transport.write(head.encode() + body)
        if self.LIMITER.lingering >= LINGERING:
            self.transport.close()
            return
        if self.transport.can_write_eof():  # a full close would lose the response for a client that still sends
            self.transport.write_eof()
        self.LIMITER.lingering += 1
        self.loop.call_later(_LINGER_SECONDS, self._finish_refusal)

    def _finish_refusal(self) -> None:
        self.LIMITER.lingering -= 1
        self.transport.close()


class _WebSocket(_WatchedProtocol, FastPathWebSocket):
    """One WebSocket connection. Its HTTP connection has asked the limiter, so there is room for it."""

    LIMITER: ConnectionLimiter
    _address: str | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(buffered(transport))
        self._stall = _StallWatch(self.transport, self.LIMITER.limits.stall_seconds)

    def handle_connect(self, event: Any) -> None:
        proxies, address = self.LIMITER.limits.proxies, _host(self.client)
        if proxies.trust(address):
            headers = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in event.headers.raw_items()]
            address = proxies.client_address(address, headers)
            self.client = address, 0
        if self.LIMITER.acquire(address) is None:
            self._address = address
        super().handle_connect(event)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._address is not None:
            self.LIMITER.release(self._address)
            self._address = None
        if self._stall is not None:
            self._stall.end()
        super().connection_lost(exc)

    def handle_ping(self) -> None:
        """Answers a ping if the client reads. Without that check, unread pongs would fill the memory."""
        if self.transport.get_write_buffer_size() <= MAX_UNREAD_PONG_BYTES:
            super().handle_ping()
        else:
            self.conn.data_to_send()


def _host(client: Any) -> str:
    """The host of an ASGI scope's client."""
    return client[0] if client else ""
