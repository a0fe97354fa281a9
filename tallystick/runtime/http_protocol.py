"""uvicorn's HTTP protocol, corrected for clients that it serves wrongly.

An offer to change the protocol (`Upgrade: h2c`, which every Java client makes) is ignored as RFC 9110, 7.8 permits. uvicorn lets
the parser take the request's body for data of the new protocol, and so loses it. Answers without a length go to HTTP/1.0 clients
unchunked and end with the connection (RFC 9112, 6.1 and 6.3). Request targets may be absolute URLs (RFC 9112, 3.2.2).

Thousands of requests may wait at once, so a connection also has lighter events and a lighter pipeline than uvicorn's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from weakref import ref

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tallystick.runtime.http_direct import DirectRequest, DirectRoutes
from tallystick.runtime.lean_event import LeanEvent

_ABSOLUTE = re.compile(rb"https?://[^/?#]*", re.IGNORECASE)
_OFFERS = frozenset({b"upgrade", b"http2-settings"})
"""Headers of an offer to change the protocol."""
_TLS_HANDSHAKE = b"\x16\x03"
_HTTP2_PREFACE = b"PRI * HTTP/2"
GONE_EXTENSION = "tallystick.gone"
"""The ASGI extension that says when a request's client is gone: a reference to the connection, whose `call_when_gone` does.

An app that has read the whole body needs no task for that, which would wait in `receive`. The reference is weak, since the
connection holds the scope, and only the collector would free such a cycle.
"""


class _Pipeline(list[Any]):
    """The requests that wait for the one before them: what uvicorn uses of a deque, which takes 0.8 KB even if it is empty."""

    __slots__ = ()

    def appendleft(self, item: Any) -> None:
        """See collections.deque."""
        self.insert(0, item)


class HttpProtocol(HttpToolsProtocol):
    """One HTTP connection. Requests to DIRECT are served without ASGI."""

    __slots__ = ("_gone", "_serving")
    DIRECT: DirectRoutes | None = None

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._serving: Any = None
        """The request whose answer is being sent; `cycle` is the one that came last."""
        self._gone: Callable[[], None] | None = None
        """What the app of that request wants to be called when its client is gone."""
        self.pipeline = _Pipeline()  # type: ignore[assignment]  # see its docstring

    def connection_made(self, transport: Any) -> None:
        """See asyncio.Protocol."""
        super().connection_made(transport)
        writable = LeanEvent()
        writable.set()
        self.flow._is_writable_event = writable  # type: ignore[assignment]  # noqa: SLF001 - uvicorn has no other way

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol. Tells the request that is being served, which uvicorn does only if no other waits behind it."""
        serving = self._serving
        super().connection_lost(exc)
        if serving is not None and not serving.response_complete:
            serving.disconnected = True
            serving.message_event.set()
            if isinstance(serving, DirectRequest):
                serving.leave()
            elif self._gone is not None:
                self._gone()

    def call_when_gone(self, gone: Callable[[], None] | None) -> None:
        """Calls this function when the client of the request that is served leaves; None ends that."""
        self._gone = gone
        if gone is not None:
            self.flow.resume_reading()  # without that, no end of the connection shows
            if self._serving is None or self._serving.disconnected:
                gone()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._unset_keepalive_if_required()
        received = data
        try:
            while data:
                data = self._feed(data)
        except httptools.HttpParserError as error:
            self.send_400_response(explain_malformed(received, error))

    def _feed(self, data: bytes) -> bytes:
        """Feeds the parser. Returns what is left to feed, which begins with a request again if its offer is ignored."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if not self._should_upgrade():
                return self._without_offer() + data[upgrade.args[0] :]
            self.handle_websocket_upgrade()
            self._forget_requests()
        return b""

    def _forget_requests(self) -> None:
        """Lets go of what holds this object, once a WebSocket's has its connection. That goes on when an earlier answer ends."""
        if self.cycle is not None:
            self.cycle.on_response = _nothing
        self.parser = self.cycle = self._serving = None  # type: ignore[assignment]

    def _without_offer(self) -> bytes:
        """The head of the request that was just parsed, without its offer, for a new parser."""
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b\r\n" % (name, value) for name, value in self.headers if name not in _OFFERS]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        return b"".join(lines) + b"\r\n"

    def _should_upgrade(self) -> bool:
        """Whether the request opens a WebSocket. Only GET and HTTP/1.1 do (RFC 6455, 4.2.1)."""
        return self.parser.get_method() == b"GET" and self.parser.get_http_version() == "1.1" and super()._should_upgrade()

    def _ignores_offer(self) -> bool:
        return bool(self.parser.should_upgrade()) and not self._should_upgrade()

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        if self.parser.get_method() == b"CONNECT":
            raise ValueError("CONNECT: this server is not a proxy")
        self.url = _origin_form(self.url)
        if not self._ignores_offer():
            former = self.cycle
            if self.DIRECT is not None and self.DIRECT.take(*self._request_line(), self.headers):
                self._begin_direct(self.DIRECT, former)
                return
            super().on_headers_complete()
            if self.cycle is not former:  # its app has not begun to run
                self.cycle.message_event = LeanEvent()  # type: ignore[assignment]  # behaves as the event in its place
                self.scope["extensions"] = {GONE_EXTENSION: ref(self)}  # type: ignore[dict-item]  # of this server alone

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if not self._ignores_offer():
            super().on_message_complete()

    def _request_line(self) -> tuple[bytes, bytes, str]:
        return self.parser.get_method(), self.url, self.parser.get_http_version()

    def _begin_direct(self, routes: DirectRoutes, former: Any) -> None:
        """Serves the request whose head was read, once the one before it is answered."""
        self.scope["method"], self.scope["path"] = "POST", self.url.decode("ascii")
        self.cycle = request = DirectRequest(routes, self)  # type: ignore[assignment]  # has all members that a connection uses
        if former is None or former.response_complete:
            self._start_asgi_task(request, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((request, self.app))  # type: ignore[arg-type]  # see above

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._serving = cycle
        super()._start_asgi_task(cycle, app if cycle.scope["http_version"] != "1.0" else _ended_by_closing(cycle, app))


def _nothing() -> None:
    pass


def _origin_form(target: bytes) -> bytes:
    """The path and query of a request target. An absolute URL loses its host, and "*" stands for the server's root."""
    path = _ABSOLUTE.sub(b"", target, count=1)
    return path if path.startswith(b"/") else b"/" + path.removeprefix(b"*")


def _ended_by_closing(cycle: Any, app: Any) -> Any:
    """The app, for a client to which answers without a length must be sent as they are, and end with the connection."""

    async def unchunked(scope: Any, receive: Any, send: Any) -> None:
        has_length = False

        async def send_unchunked(message: Any) -> None:
            nonlocal has_length
            if message["type"] == "http.response.start":
                has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
                if not has_length:
                    cycle.chunked_encoding = False
            elif not has_length:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_unchunked)

    return unchunked


def explain_malformed(data: bytes, error: Exception) -> str:
    """Why `data` is not an HTTP request that this server reads, for its sender."""
    if data.startswith(_TLS_HANDSHAKE):
        return "expected plain HTTP, got a TLS handshake; use an http:// address, or put a TLS proxy in front of this server"
    if data.startswith(_HTTP2_PREFACE):
        return "expected HTTP/1.1, got HTTP/2 without negotiation; this server speaks HTTP/1.1 only"
    cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else error
    return f"expected an HTTP/1.1 request, got one that does not parse: {cause or error}"
