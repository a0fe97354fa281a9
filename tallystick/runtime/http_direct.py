"""Routes that a server serves without ASGI: a request comes with its whole body, and its answer goes straight to the connection.

ASGI costs each request several coroutines, a task that waits for the client to leave, and a dictionary and a turn for each part
of the answer. What bounds a connection (connection_limiter.py) bounds these routes too: nothing here reads or writes past it.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

import structlog

from tallystick.runtime.access_log import Access, begin_access, log_access
from tallystick.runtime.deadlines import wait_within
from tallystick.runtime.lean_event import LeanEvent

log = structlog.get_logger()
MAX_RECURSION = 12_288
"""The recursion limit, which py-evm needs. Importing eth-account's libraries raises Python's limit to 100,000. The standard
library's JSON parser, which FastAPI uses, would then overflow the stack on a deeply nested body, and one request could kill the
process.
"""
_FORBIDDEN: Final = re.compile("[\x00-\x08\x0a-\x1f\x7f]")
"""What no header's value may have: with a line break it could forge a header, or an answer."""
_PHRASES: Final = {status.value: f" {status.phrase}" for status in HTTPStatus}
_CLOSE: Final = "connection: close\r\n"
_INTERNAL_ERROR: Final = b"Internal Server Error"


class ClientStalled(Exception):
    """The caller does not read its answer."""


@dataclass(frozen=True, slots=True)
class DirectRoutes:
    """The routes of a server that `serve` answers. `targets`: their request targets, without a query.

    `of_pages`: whether web pages may use them; then a request with an Origin goes to the app, which knows the rules for pages.
    `observe` gets what was measured of each request. `send_seconds`: after which a caller that reads nothing is disconnected.
    """

    targets: Collection[bytes]
    serve: Callable[[DirectRequest], Awaitable[None]]
    of_pages: bool
    observe: Callable[[Access], None]
    send_seconds: float

    def take(self, method: bytes, target: bytes, http_version: str, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether a request is served here. HTTP/1.0, whose answers may end with the connection, is the app's."""
        if target not in self.targets or method != b"POST" or http_version != "1.1":
            return False
        return not self.of_pages or all(name != b"origin" for name, _ in headers)


class DirectApp:
    """An ASGI app with routes that its server may serve directly."""

    def __init__(self, app: Any, routes: DirectRoutes) -> None:
        self._app, self.routes = app, routes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serves a request by ASGI."""
        await self._app(scope, receive, send)


class DirectRequest:
    """One request of a DirectRoute, in the place of uvicorn's cycle, whose members the connection uses.

    It is also an ASGI `send` for its answer. `scope`: the members of an ASGI scope that describe the request.
    """

    __slots__ = (
        "_access",
        "_begun_at",
        "_left",
        "_on_left",
        "_routes",
        "_server_headers",
        "body",
        "chunked_encoding",
        "disconnected",
        "expected_content_length",
        "flow",
        "keep_alive",
        "message_event",
        "more_body",
        "on_response",
        "response_complete",
        "response_started",
        "scope",
        "transport",
        "waiting_for_100_continue",
    )

    def __init__(self, routes: DirectRoutes, connection: Any) -> None:
        """`connection`: the uvicorn protocol that has read the request's head."""
        self._routes, self.scope = routes, connection.scope
        self.transport, self.flow = connection.transport, connection.flow
        self.on_response: Callable[[], None] = connection.on_response_complete
        self._server_headers: list[tuple[bytes, bytes]] = connection.server_state.default_headers
        self.keep_alive: bool = connection.parser.should_keep_alive()
        self.waiting_for_100_continue: bool = connection.expect_100_continue
        self.message_event = LeanEvent()
        self.body, self.more_body = bytearray(), True
        self.response_started = self.response_complete = self.disconnected = False
        self.chunked_encoding: bool | None = None
        self.expected_content_length = 0
        self._access = Access("", "")
        self._begun_at = 0.0
        self._left = False
        self._on_left: Callable[[], None] | None = None

    @property
    def status(self) -> int:
        """The status of the answer; that of a client who left before one began."""
        return self._access.status

    # Called by the connection

    async def run_asgi(self, _app: object) -> None:
        """Serves the request: the entry that uvicorn calls."""
        scope, self._begun_at = self.scope, time.monotonic()
        access = self._access = begin_access(scope["method"], scope["path"])
        if sys.getrecursionlimit() > MAX_RECURSION:
            sys.setrecursionlimit(MAX_RECURSION)
        try:
            await self._routes.serve(self)
            self._check_answered()
        except Exception as error:
            log.exception("request failed", path=scope["path"], reason=str(error))
            self._fail()
        except BaseException:
            self._fail()
            raise
        finally:
            self.on_response = _nothing
            access.seconds = time.monotonic() - self._begun_at
            self._routes.observe(access)
            log_access(access)

    def leave(self) -> None:
        """The client has disconnected."""
        self._left = True
        if self._on_left is not None:
            self._on_left()

    def _check_answered(self) -> None:
        if not self.response_complete and not self.disconnected:
            raise RuntimeError("a request was not answered completely")

    def _fail(self) -> None:
        if self.response_started or self.transport.is_closing():
            self.transport.close()
            return
        self.keep_alive = False
        self._write_head(500, {"content-type": "text/plain; charset=utf-8"}, len(_INTERNAL_ERROR))
        self._write(_INTERNAL_ERROR)
        self._complete()

    # Reading

    def take_body(self) -> bytes | None:
        """The whole body if it is here and nothing of it was received yet, else None; then `receive` gives it in parts."""
        if self.more_body or self.disconnected:
            return None
        self.waiting_for_100_continue = False
        body, self.body = bytes(self.body), bytearray()
        return body

    async def receive(self) -> MutableMapping[str, Any]:
        """An ASGI `receive` for the body: waits for some more of it, or for the client to leave."""
        if self.waiting_for_100_continue and not self.transport.is_closing():
            self.waiting_for_100_continue = False
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not self.body and self.more_body and not self.disconnected:
            self.flow.resume_reading()
            self.message_event.clear()
            await self.message_event.wait()
        if self.disconnected:
            return {"type": "http.disconnect"}
        part, self.body = bytes(self.body), bytearray()
        return {"type": "http.request", "body": part, "more_body": self.more_body}

    def watch(self, left: Callable[[], None]) -> Callable[[], None]:
        """Calls `left` once the client disconnects, at once if it has. Returns what ends that."""
        self._on_left = left
        if self._left:
            left()
        return self._unwatch

    def _unwatch(self) -> None:
        self._on_left = None

    # Answering

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        """See ASGI's `send`. Raises ClientStalled for a client that reads too slowly."""
        if message["type"] == "http.response.start":
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in message["headers"]}
            length = headers.pop("content-length", None)
            await self.begin(message["status"], headers, None if length is None else int(length))
        elif message.get("more_body"):
            await self.send(message.get("body", b""))
        else:
            await self.end(message.get("body", b""))

    async def respond(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Sends a whole answer. `headers`: without a length. Raises ClientStalled."""
        await self.begin(status, headers, len(body))
        self._write(body)
        self._complete()

    async def begin(self, status: int, headers: Mapping[str, str], length: int | None = None) -> None:
        """Sends the head of an answer. `length`: the bytes of its body; None if it ends with `end`. Raises ClientStalled."""
        if self.flow.write_paused:
            await self._drain()
        if self.response_started:
            raise RuntimeError("an answer was begun twice")
        self._write_head(status, headers, length)

    async def send(self, part: bytes) -> None:
        """Sends a part of the body. Raises ClientStalled."""
        if self.flow.write_paused:
            await self._drain()
        self._write(part)

    @property
    def ready(self) -> bool:
        """Whether a part of the body can be sent at once, by `send_now`: the client reads, and the answer has begun."""
        return self.response_started and not (self.flow.write_paused or self.response_complete)

    def send_now(self, part: bytes) -> None:
        """Sends a part of the body while `ready`."""
        self._write(part)

    async def end(self, part: bytes = b"") -> None:
        """Sends the last part of the body. Raises ClientStalled."""
        await self.send(part)
        if self.chunked_encoding and not self.disconnected:
            self.transport.write(b"0\r\n\r\n")
        self._complete()

    async def _drain(self) -> None:
        try:
            await wait_within(self._routes.send_seconds, self.flow.drain())
        except TimeoutError:
            raise ClientStalled(f"the caller read nothing for {self._routes.send_seconds:g} seconds") from None

    def _write_head(self, status: int, headers: Mapping[str, str], length: int | None) -> None:
        if _FORBIDDEN.search("\t".join(headers.values())):
            raise ValueError("answer: expected header values without control characters")
        self.response_started, self.waiting_for_100_continue = True, False
        self.chunked_encoding, self.expected_content_length = length is None, length or 0
        self._access.status = status
        if self.disconnected:
            return
        framing = "transfer-encoding: chunked\r\n" if length is None else f"content-length: {length}\r\n"
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        server = b"".join([b"%b: %b\r\n" % header for header in self._server_headers])
        text = f"{lines}{framing}{'' if self.keep_alive else _CLOSE}\r\n"
        status_line = f"HTTP/1.1 {status}{_PHRASES.get(status, ' ')}\r\n".encode()
        self.transport.write(b"".join((status_line, server, text.encode("latin-1", "replace"))))

    def _write(self, part: bytes) -> None:
        if not self.response_started or self.response_complete:
            raise RuntimeError("a part of an answer was sent before its head, or after its end")
        if not part:
            return
        access = self._access
        access.sent_bytes += len(part)
        if access.first_seconds is None:
            access.first_seconds = time.monotonic() - self._begun_at
        if self.chunked_encoding:
            part = b"%x\r\n%b\r\n" % (len(part), part)
        else:
            self.expected_content_length -= len(part)
            if self.expected_content_length < 0:
                raise RuntimeError("an answer is longer than its content-length")
        if not self.disconnected:
            self.transport.write(part)

    def _complete(self) -> None:
        if self.expected_content_length:
            raise RuntimeError("an answer is shorter than its content-length")
        self.response_complete = True
        if self.disconnected:
            return
        if not self.keep_alive:
            self.transport.close()
        self.on_response()


def _nothing() -> None:
    """What an ended request calls."""
