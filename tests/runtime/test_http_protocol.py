"""Clients as they are, over raw sockets: offers of other protocols, HTTP/1.0, targets and framing of every form."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tallystick.runtime.http_protocol import HttpProtocol, explain_malformed
from tallystick.runtime.serving import serving

BODY = b'{"model":"m","text":"' + b"x" * 300 + b'"}'
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
OFFERS = {
    "h2c": H2C,
    "h2c, lower case": H2C.lower().replace(
        b"aaeaaeaaaaiaaaabaamaaabkaaqbaaaaaauaaeaa", b"AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA"
    ),
    "two connection headers": b"Connection: keep-alive\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n",
    "websocket": b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
    "tls": b"CONNECTION: UPGRADE\r\nUPGRADE: TLS/1.0\r\n",
    "several": b"Connection: upgrade\r\nUpgrade: h2c, websocket\r\nUpgrade: IRC/6.9\r\n",
}


async def _app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with what it got, as JSON: with a length, or in parts without one at /stream."""
    if scope["type"] != "http":
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close"})
        return
    body = b""
    while True:
        event = await receive()
        body += event.get("body", b"")
        if not event.get("more_body"):
            break
    names = [name.decode() for name, _ in scope["headers"]]
    got = {"method": scope["method"], "path": scope["path"], "query": scope["query_string"].decode(), "body": body.decode()}
    answer = json.dumps(got | {"headers": names}).encode()
    parts = [answer[:5], answer[5:9], answer[9:]] if scope["path"] == "/stream" else [answer]
    length = [] if scope["path"] == "/stream" else [(b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": length})
    for part in parts:
        await send({"type": "http.response.body", "body": part, "more_body": True})
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """A server with the app."""
    async with serving(_app, "127.0.0.1", 0) as bound:
        yield bound


class Connection:
    """One connection to the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        """Connects."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def head(self) -> tuple[int, dict[str, str]]:
        """The next answer's status and headers."""
        async with asyncio.timeout(60):
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        return int(lines[0].split()[1]), dict(line.split(": ", 1) for line in lines[1:] if line)

    async def answer(self) -> dict[str, Any]:
        """The JSON of the next answer, which has a length."""
        status, headers = await self.head()
        async with asyncio.timeout(60):
            document: dict[str, Any] = json.loads(await self.reader.readexactly(int(headers["content-length"])))
        return document | {"status": status}

    async def rest(self) -> bytes:
        """All that comes until the server closes the connection."""
        async with asyncio.timeout(60):
            return await self.reader.read()


def _post(body: bytes, headers: bytes = b"", target: bytes = b"/echo", version: bytes = b"1.1") -> bytes:
    length = b"" if b"chunked" in headers.lower() else b"Content-Length: %d\r\n" % len(body)
    return b"POST " + target + b" HTTP/" + version + b"\r\nHost: x\r\n" + headers + length + b"\r\n" + body


def _chunked(body: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(body[at : at + 7]), body[at : at + 7]) for at in range(0, len(body), 7)) + b"0\r\n\r\n"


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
@pytest.mark.parametrize("size", [10_000, 100, 1])
async def test_an_offered_protocol_is_ignored(port: int, offer: bytes, size: int) -> None:
    """A POST that offers another protocol is served whole as HTTP/1.1, in segments of any size, and its connection lives on."""
    connection = await Connection.open(port)
    chunked = _post(_chunked(BODY), offer + b"Transfer-Encoding: chunked\r\n")
    for sent, body in ((_post(BODY, offer), BODY), (chunked, BODY), (_post(b"", offer), b"")):
        for at in range(0, len(sent), size):
            connection.writer.write(sent[at : at + size])
            await connection.writer.drain()
            await asyncio.sleep(0)
        answer = await connection.answer()
        assert (answer["method"], answer["body"]) == ("POST", body.decode())
        assert "upgrade" not in answer["headers"]
    connection.writer.write(b"GET /after HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await connection.answer())["path"] == "/after"


async def test_offers_in_a_pipeline(port: int) -> None:
    """Requests with and without offers that arrive at once are answered in order."""
    connection = await Connection.open(port)
    bodies = [b"%d" % number * 50 for number in range(8)]
    connection.writer.write(b"".join(_post(body, H2C if number % 2 else b"") for number, body in enumerate(bodies)))
    assert [(await connection.answer())["body"] for _ in bodies] == [body.decode() for body in bodies]


async def test_an_offer_with_close(port: int) -> None:
    """The connection still ends if the client asks for that beside its offer."""
    connection = await Connection.open(port)
    connection.writer.write(_post(BODY, b"Connection: Upgrade, close\r\nUpgrade: h2c\r\n"))
    assert (await connection.answer())["body"] == BODY.decode()
    assert await connection.rest() == b""


async def test_a_websocket_still_opens(port: int) -> None:
    """A GET that asks for a WebSocket gets one, except from an HTTP/1.0 client."""
    for version, status in ((b"1.1", 101), (b"1.0", 200)):
        connection = await Connection.open(port)
        connection.writer.write(b"GET / HTTP/" + version + b"\r\nHost: x\r\n" + OFFERS["websocket"] + b"\r\n")
        assert (await connection.head())[0] == status


async def test_smuggling_stays_refused(port: int) -> None:
    """A request whose length is told in two ways is refused with and without an offer."""
    for offer in (b"", H2C):
        connection = await Connection.open(port)
        both = b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n"
        connection.writer.write(b"POST / HTTP/1.1\r\nHost: x\r\n" + offer + both + b"\r\n0\r\n\r\n")
        assert (await connection.head())[0] == 400


@pytest.mark.parametrize("headers", [b"", b"Connection: keep-alive\r\n", H2C])
async def test_http_1_0_streams_are_unchunked(port: int, headers: bytes) -> None:
    """An answer without a length goes to an HTTP/1.0 client as it is, and ends with the connection."""
    connection = await Connection.open(port)
    connection.writer.write(_post(BODY, headers, b"/stream", b"1.0"))
    status, sent = await connection.head()
    assert (status, sent.get("transfer-encoding"), sent.get("connection")) == (200, None, "close")
    assert json.loads(await connection.rest())["body"] == BODY.decode()


async def test_http_1_0_whole_answers_have_a_length(port: int) -> None:
    """An answer with a length keeps it, a HEAD has no body, and the connection is closed."""
    for method, length in ((b"GET", None), (b"HEAD", 0)):
        connection = await Connection.open(port)
        connection.writer.write(method + b" /echo HTTP/1.0\r\n\r\n")
        _, sent = await connection.head()
        rest = await connection.rest()
        assert "transfer-encoding" not in sent
        assert len(rest) == (int(sent["content-length"]) if length is None else length)


async def test_http_1_1_streams_are_chunked(port: int) -> None:
    """An HTTP/1.1 client gets a stream in chunks on a connection that lives on."""
    connection = await Connection.open(port)
    connection.writer.write(_post(BODY, b"", b"/stream"))
    assert (await connection.head())[1]["transfer-encoding"] == "chunked"


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"http://127.0.0.1:8421/v1/x?a=b", "/v1/x", "a=b"),
        (b"HTTPS://host/v1/x", "/v1/x", ""),
        (b"http://host", "/", ""),
        (b"http://host?a=b", "/", "a=b"),
        (b"//v1//x?api-version=1&beta=true", "//v1//x", "api-version=1&beta=true"),
        (b"/v1/%63hat%2Fx", "/v1/chat/x", ""),
        (b"*", "/", ""),
    ],
)
async def test_request_targets(port: int, target: bytes, path: str, query: str) -> None:
    """Absolute URLs, doubled slashes, queries and escapes reach the app as path and query."""
    connection = await Connection.open(port)
    connection.writer.write(_post(BODY, b"", target))
    answer = await connection.answer()
    assert (answer["path"], answer["query"], answer["body"]) == (path, query, BODY.decode())


async def test_expect_100_continue(port: int) -> None:
    """A client that waits for leave to send its body gets it, with an offer too, in any case of letters."""
    for headers in (b"Expect: 100-continue\r\n", b"EXPECT: 100-Continue\r\n" + H2C):
        connection = await Connection.open(port)
        connection.writer.write(_post(BODY, headers)[: -len(BODY)])
        assert (await connection.head())[0] == 100
        connection.writer.write(BODY)
        assert (await connection.answer())["body"] == BODY.decode()


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01", "got a TLS handshake; use an http:// address"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "got HTTP/2 without negotiation"),
        (b"CONNECT host:443 HTTP/1.1\r\nHost: host\r\n\r\n", "CONNECT: this server is not a proxy"),
        (b"nonsense\r\n\r\n", "does not parse"),
    ],
)
async def test_what_is_not_http_1_1(port: int, sent: bytes, reason: str) -> None:
    """Other protocols are refused with status 400 and the reason, as JSON."""
    connection = await Connection.open(port)
    connection.writer.write(sent)
    answer = await connection.answer()
    assert (answer["status"], answer["error"]["code"]) == (400, "bad_message")
    assert reason in answer["error"]["message"]
    assert await connection.rest() == b""


def test_the_parsers_reason_is_told() -> None:
    """An error of the parser itself is told in its own words."""
    assert "too odd" in explain_malformed(b"GET", ValueError("too odd"))


def _connections() -> set[int]:
    return {id(entry) for entry in gc.get_objects() if issubclass(type(entry), HttpProtocol)}


@pytest.mark.parametrize(
    "requests",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 3,
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nnot whole",
        b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n" + OFFERS["websocket"] + b"\r\n",
    ],
    ids=["one", "pipelined", "body", "no body", "then a WebSocket"],
)
async def test_a_closed_connection_is_freed_without_the_collector(port: int, requests: bytes) -> None:
    """The collector looks at old objects seldom, so strangers could fill the memory with the heads of their requests."""
    gc.collect()
    gc.disable()
    try:
        former = _connections()
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(requests)
            await reader.read(1)
            writer.close()
        async with asyncio.timeout(60):
            while _connections() - former:  # noqa: ASYNC110 - that an object is freed has no event
                await asyncio.sleep(0.01)
    finally:
        gc.enable()
