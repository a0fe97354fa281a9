"""Routes without ASGI, over raw sockets: whatever clients send, and in whatever order, these routes do as the others do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send
from structlog.testing import capture_logs

from tallystick.runtime import connection_limiter
from tallystick.runtime.access_log import CLIENT_GONE, Access, record
from tallystick.runtime.connection_limiter import PIPELINED, ConnectionLimits
from tallystick.runtime.http_direct import ClientStalled, DirectApp, DirectRequest, DirectRoutes
from tallystick.runtime.serving import serving

TARGET = b"/direct"
BODY = b'{"text":"' + b"x" * 300 + b'"}'
BIG = bytes(range(256)) * 4_096
SECONDS = 60


async def _app(scope: Scope, _receive: Receive, send: Send) -> None:
    """Answers what is not for the direct route."""
    body = f"app {scope['method']} {scope['path']}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def _body(request: DirectRequest) -> bytes | None:
    """The body of a request; None if its client left before its end."""
    whole = request.take_body()
    if whole is not None:
        return whole
    parts = b""
    while True:
        event = await request.receive()
        if event["type"] == "http.disconnect":
            return None
        parts += bytes(event["body"])
        if not event["more_body"]:
            return parts


class Site:
    """A server with a direct route, whose handler a test sets, and what was measured of its requests."""

    def __init__(self) -> None:
        self.handler: Callable[[DirectRequest], Awaitable[None]] = self.echo
        self.measured: list[Access] = []
        self.left: list[bytes | None] = []
        self.running = 0
        self.port = 0
        self.begun = asyncio.Event()

    async def serve(self, request: DirectRequest) -> None:
        """See DirectRoutes."""
        self.running += 1
        try:
            await self.handler(request)
        finally:
            self.running -= 1

    async def echo(self, request: DirectRequest) -> None:
        """Answers with the body."""
        self.begun.set()
        body = await _body(request)
        if body is None:
            self.left.append(body)
            return
        record(job="j")
        await request.respond(200, {"content-type": "text/plain", "x-scope": request.scope["path"]}, body)

    async def until_left(self, request: DirectRequest) -> None:
        """Answers nothing until the client leaves."""
        left = asyncio.Event()
        stop = request.watch(left.set)
        self.begun.set()
        await left.wait()
        stop()
        self.left.append(request.take_body())

    @contextlib.asynccontextmanager
    async def opened(
        self, *, of_pages: bool = False, limits: ConnectionLimits | None = None, send_seconds: float = SECONDS
    ) -> AsyncIterator[Site]:
        """Serves."""
        routes = DirectRoutes(frozenset({TARGET}), self.serve, of_pages, self.measured.append, send_seconds)
        async with serving(DirectApp(_app, routes), "127.0.0.1", 0, limits=limits, ws_max_size=None) as port:
            self.port = port
            yield self


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    """A server with the echo handler."""
    async with Site().opened() as opened:
        yield opened


class Caller:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def call(cls, site: Site) -> Caller:
        """Connects."""
        return cls(*await asyncio.open_connection("127.0.0.1", site.port))

    def send(self, *parts: bytes) -> None:
        """Sends bytes."""
        self.writer.write(b"".join(parts))

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The next answer: status, headers, body."""
        async with asyncio.timeout(SECONDS):
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines[1:] if line)
            if "content-length" in headers:
                return int(lines[0].split()[1]), headers, await self.reader.readexactly(int(headers["content-length"]))
            body = b""
            while size := int(await self.reader.readline(), 16):
                body += await self.reader.readexactly(size)
                assert await self.reader.readexactly(2) == b"\r\n"
            assert await self.reader.readexactly(2) == b"\r\n"
            return int(lines[0].split()[1]), headers, body

    async def closed(self) -> bool:
        """Whether the server closes the connection."""
        async with asyncio.timeout(SECONDS):
            with contextlib.suppress(ConnectionResetError):
                return not await self.reader.read(1)
        return True


def post(body: bytes, *headers: bytes, target: bytes = TARGET, version: bytes = b"1.1") -> bytes:
    """A request with a body."""
    lines = (b"POST %b HTTP/%b" % (target, version), b"host: x", b"content-length: %d" % len(body), *headers)
    return b"\r\n".join((*lines, b"", body))


def chunked(body: bytes, size: int) -> bytes:
    """A body in chunks."""
    chunks = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x;a=b\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\nx-trailer: 1\r\n\r\n"


async def until(condition: Callable[[], object]) -> None:
    """Waits until a condition holds."""
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 - conditions of many kinds
            await asyncio.sleep(0.01)


async def test_requests_of_one_connection_are_answered_in_turn(site: Site) -> None:
    """Direct routes and others take turns on a connection that stays open, and each request is measured and logged."""
    caller = await Caller.call(site)
    with capture_logs() as lines:
        for number in range(3):
            caller.send(post(b"%d" % number))
            status, headers, body = await caller.answer()
            assert (status, body, headers["content-type"], headers["x-scope"]) == (200, b"%d" % number, "text/plain", "/direct")
            assert {"date", "server"} <= headers.keys()
            assert "connection" not in headers
            caller.send(b"GET /other HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await caller.answer())[2] == b"app GET /other"
        await until(lambda: len(site.measured) == 3)
    assert [(access.status, access.method, access.path, access.sent_bytes) for access in site.measured] == [
        (200, "POST", "/direct", 1)
    ] * 3
    assert all(0 <= (access.first_seconds or -1) <= access.seconds for access in site.measured)
    logged = [line for line in lines if line["event"] == "request"]
    assert [(line["status"], line["path"], line["job"]) for line in logged] == [(200, "/direct", "j")] * 3
    caller.writer.close()


@pytest.mark.parametrize("pause", [False, True])
@pytest.mark.parametrize(
    "request_bytes",
    [
        post(BODY),
        post(b""),
        post(BIG),
        b"POST /direct HTTP/1.1\r\nHOST: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(BODY, 7),
        b"POST /direct HTTP/1.1\r\nHOST: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(BIG, 65_000),
        b"POST http://name:1/direct HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY,
        post(BODY, b"connection: Upgrade, HTTP2-Settings", b"upgrade: h2c", b"http2-settings: AAEAAEAAAAIAAAAB"),
    ],
    ids=["length", "empty", "big", "chunked", "big chunks", "absolute target", "h2c offer"],
)
async def test_a_body_comes_whole_however_it_is_sent(site: Site, request_bytes: bytes, pause: bool) -> None:
    """In one piece or in several, with a length or in chunks, to a target in any form, twice on one connection."""
    caller = await Caller.call(site)
    expected = BIG if len(request_bytes) > 10_000 else (b"" if request_bytes.endswith(b"\r\n\r\n0") else BODY)
    expected = b"" if b"content-length: 0\r\n" in request_bytes else expected
    for _ in range(2):
        if pause:
            site.begun.clear()
            cut = request_bytes.index(b"\r\n\r\n") + 4
            caller.send(request_bytes[:cut])
            await asyncio.wait_for(site.begun.wait(), SECONDS)
            caller.send(request_bytes[cut : cut + 5])
            await caller.writer.drain()
            caller.send(request_bytes[cut + 5 :])
        else:
            caller.send(request_bytes)
        status, _, body = await caller.answer()
        assert (status, body) == (200, expected)
    caller.writer.close()


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"GET /direct HTTP/1.1", b"app GET /direct"),
        (b"PUT /direct HTTP/1.1", b"app PUT /direct"),
        (b"OPTIONS /direct HTTP/1.1", b"app OPTIONS /direct"),
        (b"POST /direct/ HTTP/1.1", b"app POST /direct/"),
        (b"POST /direct?a=b HTTP/1.1", b"app POST /direct"),
        (b"POST /Direct HTTP/1.1", b"app POST /Direct"),
        (b"POST /%64irect HTTP/1.1", b"app POST /direct"),
        (b"POST /direct HTTP/1.0", b"app POST /direct"),
    ],
)
async def test_what_is_not_exactly_a_direct_route_is_the_apps(site: Site, head: bytes, expected: bytes) -> None:
    """Another method, path, query or version of HTTP goes by ASGI."""
    caller = await Caller.call(site)
    caller.send(head, b"\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
    assert (await caller.answer())[2] == expected
    caller.send(b"HEAD /direct HTTP/1.1\r\nhost: x\r\n\r\n")
    caller.writer.close()
    assert not site.measured


@pytest.mark.parametrize(("of_pages", "expected"), [(False, b"body"), (True, b"app POST /direct")])
async def test_the_app_judges_web_pages(of_pages: bool, expected: bytes) -> None:
    """If pages may use a server, a request with an Origin goes by ASGI, where the rules for pages are."""
    async with Site().opened(of_pages=of_pages) as site:
        caller = await Caller.call(site)
        caller.send(post(b"body", b"Origin: https://page.example"))
        assert (await caller.answer())[2] == expected
        caller.send(post(b"body"))
        assert (await caller.answer())[2] == b"body"
        caller.writer.close()


async def test_a_client_that_waits_is_told_to_continue(site: Site) -> None:
    """Expect: 100-continue gets its answer before the body is sent, and none if the request is refused before."""
    caller = await Caller.call(site)
    request = post(BODY, b"expect: 100-continue")
    caller.send(request[: -len(BODY)])
    async with asyncio.timeout(SECONDS):
        assert await caller.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    caller.send(BODY)
    assert (await caller.answer())[2] == BODY
    caller.send(request)  # a client that does not wait needs no such answer
    assert (await caller.answer())[2] == BODY

    async def refuse(request: DirectRequest) -> None:
        await request.respond(401, {}, b"no")

    site.handler = refuse
    caller.send(request[: -len(BODY)])
    assert (await caller.answer())[::2] == (401, b"no")
    caller.writer.close()


async def test_pipelined_requests_are_answered_in_their_order(site: Site) -> None:
    """The second request waits for the first one's answer, whichever of them is direct."""
    release = asyncio.Event()

    async def slow_first(request: DirectRequest) -> None:
        body = await _body(request)
        if body == b"first":
            await release.wait()
        await request.respond(200, {}, body or b"")

    site.handler = slow_first
    caller = await Caller.call(site)
    caller.send(post(b"first"), post(b"second"), b"GET /other HTTP/1.1\r\nhost: x\r\n\r\n", post(b"last"))
    await until(lambda: site.running == 1)
    release.set()
    assert [(await caller.answer())[2] for _ in range(4)] == [b"first", b"second", b"app GET /other", b"last"]
    caller.writer.close()


async def test_a_connection_has_only_so_many_waiting_requests(site: Site) -> None:
    """Beyond that it is refused, and the request that was being served is told that its client left."""
    site.handler = site.until_left
    caller = await Caller.call(site)
    caller.send(*[post(b"x")] * (PIPELINED + 2))
    assert (await caller.answer())[0] == 429
    assert await caller.closed()
    caller.writer.close()
    await until(lambda: site.left)
    assert site.running == 0


async def test_a_client_that_leaves_is_noticed(site: Site) -> None:
    """At once, while its answer is made; its line has the status 499."""
    site.handler = site.until_left
    caller = await Caller.call(site)
    caller.send(post(b"x"))
    await asyncio.wait_for(site.begun.wait(), SECONDS)
    caller.writer.transport.abort()
    await until(lambda: site.measured)
    assert (site.measured[0].status, site.left, site.running) == (CLIENT_GONE, [None], 0)


async def test_a_client_that_leaves_before_its_body_came_is_noticed(site: Site) -> None:
    """Nothing is answered then."""
    caller = await Caller.call(site)
    caller.send(post(BODY)[:-5])
    await asyncio.wait_for(site.begun.wait(), SECONDS)
    caller.writer.transport.abort()
    await until(lambda: site.measured)
    assert (site.measured[0].status, site.left) == (CLIENT_GONE, [None])


async def test_a_client_that_left_before_the_watch_is_noticed(site: Site) -> None:
    """The watch calls at once then."""

    async def late(request: DirectRequest) -> None:
        self_left = asyncio.Event()
        request.watch(self_left.set)
        site.begun.set()
        await self_left.wait()
        again: list[bool] = []
        request.watch(lambda: again.append(True))
        assert again == [True]
        await request.respond(200, {}, b"nobody reads this")
        site.left.append(b"late")

    site.handler = late
    caller = await Caller.call(site)
    caller.send(post(b"x"))
    await asyncio.wait_for(site.begun.wait(), SECONDS)
    caller.writer.transport.abort()
    await until(lambda: site.measured)
    assert site.left == [b"late"]


async def test_a_stream_comes_part_by_part(site: Site) -> None:
    """In chunks, each as it is sent, after which the connection goes on; empty parts are no chunks."""
    more = asyncio.Event()

    async def stream(request: DirectRequest) -> None:
        await request.begin(200, {"content-type": "text/event-stream"})
        await request.send(b"first")
        await request.send(b"")
        await more.wait()
        await request.send(b"second")
        await request.end()

    site.handler = stream
    caller = await Caller.call(site)
    caller.send(post(b""))
    async with asyncio.timeout(SECONDS):
        head = await caller.reader.readuntil(b"\r\n\r\n")
        assert b"transfer-encoding: chunked" in head
        assert await caller.reader.readexactly(10) == b"5\r\nfirst\r\n"
        more.set()
        assert await caller.reader.readexactly(16) == b"6\r\nsecond\r\n0\r\n\r\n"
    assert site.measured[0].sent_bytes == 11
    site.handler = site.echo
    caller.send(post(b"next"))
    assert (await caller.answer())[2] == b"next"
    caller.writer.close()


async def test_messages_of_asgi_are_the_same(site: Site) -> None:
    """What wraps an ASGI `send` wraps a direct request too: with a length, in parts, or whole."""

    async def by_messages(request: DirectRequest) -> None:
        body = await _body(request) or b""
        length = [(b"Content-Length", b"%d" % len(body))] if body.startswith(b"l") else []
        await request({"type": "http.response.start", "status": 201, "headers": [(b"X-Name", b"\xe9"), *length]})
        await request({"type": "http.response.body", "body": body[:3], "more_body": True})
        await request({"type": "http.response.body", "body": body[3:]})

    site.handler = by_messages
    caller = await Caller.call(site)
    for body in (b"length", b"chunks", b""):
        caller.send(post(body))
        status, headers, got = await caller.answer()
        assert (status, headers["x-name"], got) == (201, "\xe9", body)
    caller.writer.close()


@pytest.mark.parametrize("how", ["connection: close", "shutdown"])
async def test_a_connection_closes_after_its_last_answer(site: Site, how: str) -> None:
    """If the client asks for it, or the server stops meanwhile, the answer says so."""
    caller = await Caller.call(site)
    if how == "shutdown":

        async def last(request: DirectRequest) -> None:
            request.keep_alive = False  # as the server does
            await request.respond(200, {}, b"body")

        site.handler = last
    caller.send(post(b"body", *([how.encode()] if "close" in how else [])))
    _, headers, body = await caller.answer()
    assert (headers["connection"], body) == ("close", b"body")
    assert await caller.closed()
    caller.writer.close()


async def _raise_early(_request: DirectRequest) -> None:
    raise LookupError("a bug")


async def _raise_late(request: DirectRequest) -> None:
    await request.begin(200, {})
    await request.send(b"x")
    raise LookupError("a bug")


async def _no_answer(_request: DirectRequest) -> None:
    pass


async def _no_end(request: DirectRequest) -> None:
    await request.begin(200, {})


async def _twice(request: DirectRequest) -> None:
    await request.begin(200, {})
    await request.begin(200, {})


async def _too_long(request: DirectRequest) -> None:
    await request.begin(200, {}, 3)
    await request.send(b"four")


async def _too_short(request: DirectRequest) -> None:
    await request.begin(200, {}, 3)
    await request.end(b"x")


async def _no_head(request: DirectRequest) -> None:
    await request.send(b"x")


async def _forged(request: DirectRequest) -> None:
    await request.respond(200, {"content-type": "text/plain\r\nset-cookie: a=b"}, b"x")


@pytest.mark.parametrize("handler", [_raise_early, _no_answer, _no_head, _forged])
async def test_a_failure_before_the_answer_is_an_error_500(site: Site, handler: Any) -> None:
    """The client gets an answer without details, the log has the traceback, and the connection closes."""
    site.handler = handler
    caller = await Caller.call(site)
    with capture_logs() as lines:
        caller.send(post(b"body"))
        status, headers, body = await caller.answer()
        assert (status, headers["connection"], body) == (500, "close", b"Internal Server Error")
        assert await caller.closed()
        await until(lambda: site.measured)
    assert site.measured[0].status == 500
    assert [line["log_level"] for line in lines if line["event"] == "request failed"] == ["error"]
    caller.writer.close()


@pytest.mark.parametrize("handler", [_raise_late, _no_end, _twice, _too_long, _too_short])
async def test_a_failure_within_the_answer_cuts_it_off(site: Site, handler: Any) -> None:
    """A client must not take half an answer for a whole one."""
    site.handler = handler
    caller = await Caller.call(site)
    caller.send(post(b"body"))
    async with asyncio.timeout(SECONDS):
        received = await caller.reader.read()
    assert received.startswith(b"HTTP/1.1 200 OK\r\n")
    assert not received.endswith(b"0\r\n\r\n")
    caller.writer.close()


async def test_a_part_after_the_end_is_a_bug(site: Site) -> None:
    """It is not sent, and the connection, whose next answer it would spoil, closes."""

    async def more(request: DirectRequest) -> None:
        await request.respond(200, {}, b"whole")
        await request.send(b"more")

    site.handler = more
    caller = await Caller.call(site)
    caller.send(post(b"body"))
    assert (await caller.answer())[2] == b"whole"
    assert await caller.closed()
    caller.writer.close()


async def test_a_client_that_does_not_read_stalls_its_answer(site: Site) -> None:
    """No more than the write buffer is held for it, and after `send_seconds` it is given up."""
    stalled = asyncio.Event()
    sent = 0

    async def endless(request: DirectRequest) -> None:
        nonlocal sent
        await request.begin(200, {})
        try:
            while True:
                await request.send(BIG)
                sent += len(BIG)
        except ClientStalled:
            stalled.set()
            raise

    async with Site().opened(send_seconds=0.2) as slow:
        slow.handler = endless
        caller = await Caller.call(slow)
        caller.send(post(b"body"))
        await asyncio.wait_for(stalled.wait(), SECONDS)
        assert sent < 64 * len(BIG)
        caller.writer.transport.abort()


async def test_a_slow_reader_gets_everything(site: Site) -> None:
    """Its answer waits for it, and goes on."""

    async def long(request: DirectRequest) -> None:
        await request.begin(200, {})
        for _ in range(16):
            await request.send(BIG)
        await request.end()

    site.handler = long
    caller = await Caller.call(site)
    caller.send(post(b"body"))
    await until(lambda: site.running)
    assert (await caller.answer())[2] == BIG * 16
    caller.writer.close()


async def test_a_refused_body_is_not_waited_for() -> None:
    """A request that is answered before its body came must finish it soon, or its connection closes."""

    async def refuse(request: DirectRequest) -> None:
        await request.respond(413, {}, b"too large")

    async with Site().opened(limits=ConnectionLimits(stall_seconds=0.2)) as site:
        site.handler = refuse
        caller = await Caller.call(site)
        caller.send(post(BODY)[:-5])
        assert (await caller.answer())[::2] == (413, b"too large")
        assert await caller.closed()
        patient = await Caller.call(site)
        patient.send(post(BODY)[:-5])
        assert (await patient.answer())[0] == 413
        patient.send(BODY[-5:], post(b"next"))
        assert (await patient.answer())[0] == 413
        for other in (caller, patient):
            other.writer.close()


async def test_the_head_has_the_limits_of_all_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of size and of time."""
    monkeypatch.setattr(connection_limiter, "_LINGER_SECONDS", 0.05)
    async with Site().opened(limits=ConnectionLimits(head_seconds=0.3, head_bytes=2_000)) as site:
        large, slow = await Caller.call(site), await Caller.call(site)
        large.send(post(b"", b"x: " + b"y" * 3_000))
        slow.send(b"POST /direct HTTP/1.1\r\n")
        assert (await large.answer())[0] == 431
        assert (await slow.answer())[0] == 408
        for caller in (large, slow):
            caller.writer.close()
    assert not site.measured
