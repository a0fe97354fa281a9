"""The front door of a server: how many connections there may be, in all and of one address, and how long and how large a
request's head may be. uvicorn bounds none of these by itself; the rest is uvicorn's.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tallystick.protocol.errors import Code, Refusal, TallyError, Unavailable
from tallystick.protocol.wire import dumps
from tallystick.runtime.cork import corked
from tallystick.runtime.websocket import QuickWebSocket

_LINGER_SECONDS = 1.0
log = structlog.get_logger()
_REASONS = {408: "Request Timeout", 429: "Too Many Requests", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}


@dataclass(frozen=True, slots=True)
class DoorLimits:
    """Connections in all and of one address (of a proxy, where one stands before this server); seconds and bytes of a head."""

    connections: int = 10_000
    per_address: int = 1_000
    head_seconds: float = 15
    head_bytes: int = 64 * 1024


class Doors:
    """Who is in. One instance a server."""

    def __init__(self, limits: DoorLimits) -> None:
        self.limits = limits
        self._inside: Counter[str] = Counter()

    @property
    def inside(self) -> int:
        """Connections that are open."""
        return self._inside.total()

    def enter(self, address: str) -> tuple[int, TallyError] | None:
        """Counts a connection; status and reason where there is no room for it."""
        limits = self.limits
        if self._inside[address] >= limits.per_address:
            text = f"{address} has {limits.per_address} connections open, which is all that one address may have"
            return 429, Unavailable(Code.RATE_LIMITED, text)
        if self.inside >= limits.connections:
            return 503, Unavailable(Code.RATE_LIMITED, f"this server has {limits.connections} connections open and takes no more")
        self._inside[address] += 1
        return None

    def leave(self, address: str) -> None:
        """A connection is closed."""
        self._inside[address] -= 1
        if not self._inside[address]:
            del self._inside[address]

    def protocols(self) -> tuple[type[HttpToolsProtocol], type[QuickWebSocket]]:
        """Uvicorn's protocols behind these doors."""
        doors = self

        class Http(_Http):
            """At these doors."""

            DOORS = doors

        class WebSocket(_WebSocket):
            """At these doors."""

            DOORS = doors

        return Http, WebSocket


class _Http(HttpToolsProtocol):
    """One connection. `_address` is set while it is counted."""

    DOORS: Doors
    _address: str | None = None
    _timer: asyncio.TimerHandle | None = None
    _head = 0
    _refused = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(corked(transport))
        address = self.client[0] if self.client else ""
        refused = self.DOORS.enter(address)
        if refused is not None:
            self._refuse(*refused)
            self.transport.close()
            return
        self._address = address
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        if self._timer is not None:
            self._head += len(data)
        super().data_received(data)
        if self._timer is not None and self._head > self.DOORS.limits.head_bytes:
            self._refuse_large()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._timer is None:
            self._begin_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > self.DOORS.limits.head_bytes:
            self._refuse_large()
            raise ValueError("head too long")  # the parser stops here
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        if not self._refused:
            super().send_400_response(msg)

    def handle_websocket_upgrade(self) -> None:
        self._end_head()
        self._leave()  # the WebSocket's protocol counts the connection from here on
        super().handle_websocket_upgrade()

    def _begin_head(self) -> None:
        self._head = 0
        self._timer = self.loop.call_later(self.DOORS.limits.head_seconds, self._too_slow)

    def _end_head(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _leave(self) -> None:
        if self._address is not None:
            self.DOORS.leave(self._address)
            self._address = None

    def _too_slow(self) -> None:
        self._timer = None
        text = f"the request's head did not arrive within {self.DOORS.limits.head_seconds:g} s"
        self._refuse(408, Refusal(Code.TIMED_OUT, text))

    def _refuse_large(self) -> None:
        text = f"the request's head is longer than {self.DOORS.limits.head_bytes} bytes"
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
        if self.transport.can_write_eof():  # closed at once, whoever still sends would lose the answer
            self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)


class _WebSocket(QuickWebSocket):
    """One node link. It was counted as an HTTP connection a moment ago, so there is room."""

    DOORS: Doors
    _address: str | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(corked(transport))
        address = self.client[0] if self.client else ""
        if self.DOORS.enter(address) is None:
            self._address = address

    def connection_lost(self, exc: Exception | None) -> None:
        if self._address is not None:
            self.DOORS.leave(self._address)
            self._address = None
        super().connection_lost(exc)
