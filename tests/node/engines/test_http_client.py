"""The connections of one engine: when one serves again, what is sent on it, and when aiohttp's client takes over."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gzip
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from node.engines import http_client
from node.engines.engine_settings import EngineSettings
from node.engines.http_client import EngineClient
from node.engines.http_connection import EngineResponse, HttpConnection, HttpExchange, MalformedResponse
from tallystick.protocol.errors import Code, Unavailable

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@dataclass
class Server:
    """Answers the requests of all connections with the next of `answers`; None closes the connection instead."""

    answers: list[bytes | None] = field(default_factory=list)
    requests: list[bytes] = field(default_factory=list)
    connections: list[asyncio.StreamWriter] = field(default_factory=list)
    port: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.connections.append(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
                self.requests.append(head + await reader.readexactly(length))
                answer = self.answers.pop(0) if self.answers else OK
                if answer is None:
                    break
                writer.write(answer)
        except (asyncio.IncompleteReadError, OSError):
            pass
        writer.close()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"


class CancelOnConnection:
    """Stands for `connection_made`, and cancels all of `sending` once a connection is made for one of them."""

    def __init__(self, original: Callable[[HttpConnection, asyncio.BaseTransport], None]) -> None:
        self._original = original
        self.sending: list[asyncio.Task[EngineResponse]] = []

    def __get__(self, connection: HttpConnection, kind: type[HttpConnection]) -> Callable[[asyncio.BaseTransport], None]:
        return functools.partial(self, connection)

    def __call__(self, connection: HttpConnection, transport: asyncio.BaseTransport) -> None:
        self._original(connection, transport)
        for request in self.sending:
            request.cancel()


@asynccontextmanager
async def serving(*answers: bytes | None) -> AsyncIterator[Server]:
    """A server that gives these answers first."""
    state = Server(list(answers))
    server = await asyncio.start_server(state.serve, "127.0.0.1", 0)
    state.port = server.sockets[0].getsockname()[1]
    try:
        yield state
    finally:
        server.close()
        for writer in state.connections:
            writer.close()


@asynccontextmanager
async def client_of(url: str, *, trust_env: bool = False, limit: int = 1_000) -> AsyncIterator[EngineClient]:
    """A client, within a minute."""
    client = EngineClient(EngineSettings(url, trust_env=trust_env, connect_seconds=50.0, max_answer_bytes=limit))
    try:
        async with asyncio.timeout(60):
            yield client
    finally:
        await client.close()


async def body_of(response: EngineResponse) -> bytes:
    """The whole body of a response, which is then released."""
    body = b""
    with response:
        while data := await response.readany():
            body += data
    return body


async def post(client: EngineClient, server: Server, on_sent: Callable[[], None] = lambda: None) -> bytes:
    """The body of the answer to a POST."""
    return await body_of(await client.send("POST", server.url + "/v1/x", {"content-type": "a/b"}, b"{}", on_sent))


async def test_requests_as_they_are_sent() -> None:
    """A request has its host, its length, and no coding that the answer could have; a GET has no body."""
    async with serving() as server, client_of(server.url) as client:
        await post(client, server)
        await body_of(await client.send("GET", server.url + "/v1/models?a=b%20c", {"authorization": "Bearer key"}))
        await body_of(await client.send("POST", server.url, {}))
    first, second, third = (request.decode().split("\r\n") for request in server.requests)
    assert first[0] == "POST /v1/x HTTP/1.1"
    assert f"host: 127.0.0.1:{server.port}" in first
    assert {"accept-encoding: identity", "content-type: a/b", "content-length: 2"} <= set(first)
    assert first[-2:] == ["", "{}"]
    assert second[0] == "GET /v1/models?a=b%20c HTTP/1.1"
    assert "authorization: Bearer key" in second
    assert not any(line.startswith("content-length") for line in second)
    assert third[0] == "POST / HTTP/1.1"
    assert "content-length: 0" in third


async def test_one_connection_serves_requests_one_after_another() -> None:
    """Requests at one time have connections of their own, which later ones share."""
    async with serving() as server, client_of(server.url) as client:
        assert await post(client, server) == await post(client, server) == b"ok"
        assert len(server.connections) == 1
        responses = [await client.send("POST", server.url, {}) for _ in range(3)]
        assert len(server.connections) == 3
        assert [await body_of(response) for response in responses] == [b"ok"] * 3
        await asyncio.gather(*(post(client, server) for _ in range(3)))
        assert len(server.connections) == 3


async def test_a_request_on_a_dead_connection_is_sent_again() -> None:
    """A connection that its engine closed silently fails no job; a new connection that fails does."""
    sent: list[str] = []
    async with serving(OK, OK, None, None) as server, client_of(server.url) as client:
        responses = [await client.send("POST", server.url, {}) for _ in range(2)]
        for response in responses:
            await body_of(response)
        assert await post(client, server, lambda: sent.append("sent")) == b"ok"
        assert (len(server.requests), len(server.connections), len(sent)) == (5, 3, 3)
        server.answers.extend([None, None])
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await post(client, server)
        assert len(server.requests) == 7


async def test_a_connection_that_timed_out_idle_fails_no_job() -> None:
    """A load balancer closes an idle connection with 408 just as the next request leaves: it is sent again, once."""
    late = b"HTTP/1.1 408 Request Timeout\r\nConnection: Close\r\ncontent-length: 4\r\n\r\nlate"
    async with serving() as server, client_of(server.url) as client:
        responses = [await client.send("POST", server.url, {}) for _ in range(3)]
        for response in responses:
            await body_of(response)
        server.answers.append(late)
        assert await post(client, server) == b"ok"
        assert (len(server.requests), len(server.connections)) == (5, 4)
        server.answers.extend([late, late])
        assert await post(client, server) == b"late"
        assert len(server.requests) == 7
        server.answers.append(late.replace(b"Connection: Close\r\n", b""))  # the engine's own answer
        assert await post(client, server) == b"late"
        assert len(server.requests) == 8


async def test_a_connection_that_opens_while_the_client_closes() -> None:
    """It serves no request, and does not stay open."""
    async with serving() as server, client_of(server.url) as client:
        sending = asyncio.create_task(client.send("POST", server.url, {}))
        await asyncio.sleep(0)
        await client.close()
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await sending
        assert not server.requests


async def test_a_reader_that_holds_its_answer_ends_no_other() -> None:
    """A response whose rest was discarded in time is released late: the request that came meanwhile gets its whole answer."""
    start, end = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nfour\r\n", b"0\r\n\r\n"
    async with serving(start, start, start) as server, client_of(server.url) as client:
        held = await client.send("POST", server.url, {})
        assert await held.readany() == b"four"
        held.finish_soon(0.05)
        server.connections[0].write(end)
        with contextlib.suppress(aiohttp.ClientError):  # a machine so slow that the timer came first
            assert await held.readany() == b""
        passed = asyncio.Event()
        asyncio.get_running_loop().call_later(0.1, passed.set)
        await passed.wait()
        second = await client.send("POST", server.url, {})
        assert len(server.connections) == 2
        assert await second.readany() == b"four"
        held.release()
        third = await client.send("POST", server.url, {})
        assert await third.readany() == b"four"
        for writer in server.connections:
            writer.write(end)
        assert [await second.readany(), await third.readany()] == [b"", b""]
        for response in (second, third, held):
            response.release()


async def test_closed_and_stale_connections_serve_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that was idle for too long is closed, whether or not another request comes."""
    async with serving() as server, client_of(server.url) as client:
        monkeypatch.setattr(http_client, "_KEEPALIVE_SECONDS", 0.0)
        await post(client, server)
        await post(client, server)
        assert len(server.connections) == 2
        for writer in server.connections:
            await writer.wait_closed()


async def test_closing_ends_the_answers_of_all_requests() -> None:
    """A response that still comes is broken off, and nothing is kept open."""
    async with serving(OK[:-1]) as server, client_of(server.url) as client:
        response = await client.send("POST", server.url, {})
        assert await response.readany() == b"o"
        await client.close()
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.readany()
        response.release()
        await server.connections[0].wait_closed()


async def test_a_host_with_an_address_that_refuses() -> None:
    """Each address of a host is tried: localhost also stands for ::1, where nothing listens."""
    async with serving() as server, client_of(server.url) as client:
        assert await body_of(await client.send("GET", f"http://localhost:{server.port}/", {})) == b"ok"
        assert f"host: localhost:{server.port}".encode() in server.requests[0]


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/", "http://[::1]:1/", "http://no-such-host.invalid/", "http://127.0.0.1:0/"])
async def test_engines_that_do_not_listen(url: str) -> None:
    """A connection that cannot be opened is an OSError."""
    async with client_of(url) as client:
        with pytest.raises(OSError):  # noqa: PT011 - several kinds
            await client.send("GET", url, {})


def certificate_of(host: str, file: Path) -> Path:
    """A file with a key and a certificate that it signed itself."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    signed = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False).sign(key, hashes.SHA256())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file.write_bytes(private + signed.public_bytes(Encoding.PEM))
    return file


async def test_tls(tmp_path: Path) -> None:
    """An engine's certificate is checked: one that nobody trusts is refused before the request, and its key, are sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate = certificate_of("localhost", tmp_path / "engine.pem")
    context.load_cert_chain(certificate)
    state = Server()
    server = await asyncio.start_server(state.serve, "127.0.0.1", 0, ssl=context)
    url = f"https://localhost:{server.sockets[0].getsockname()[1]}/"
    trusting = ssl.create_default_context(cafile=certificate)
    async with client_of(url) as client:
        with pytest.raises(ssl.SSLCertVerificationError):
            await client.send("GET", url, {"authorization": "Bearer key"})
        assert not state.requests
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(http_client, "_tls_context", lambda: trusting)
            assert await body_of(await client.send("GET", url, {})) == b"ok"
            assert await body_of(await client.send("GET", url, {})) == b"ok"
            with pytest.raises(ssl.SSLCertVerificationError):
                await client.send("GET", url.replace("localhost", "127.0.0.1"), {})
    assert len(state.requests) == 2
    server.close()


async def test_requests_that_are_cancelled_while_tls_begins(tmp_path: Path) -> None:
    """However far a connection is when its request is cancelled, later requests are answered."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate = certificate_of("localhost", tmp_path / "engine.pem")
    context.load_cert_chain(certificate)
    server = await asyncio.start_server(Server().serve, "127.0.0.1", 0, ssl=context)
    url = f"https://localhost:{server.sockets[0].getsockname()[1]}/"
    trusting = ssl.create_default_context(cafile=certificate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_client, "_tls_context", lambda: trusting)
        patch.setattr(HttpConnection, "connection_made", cancelling := CancelOnConnection(HttpConnection.connection_made))
        for _ in range(5):
            async with client_of(url) as client:
                cancelling.sending = [asyncio.create_task(client.send("GET", url, {})) for _ in range(5)]
                await asyncio.wait(cancelling.sending)
                assert all(request.cancelled() for request in cancelling.sending)
                cancelling.sending = []
                responses = await asyncio.gather(*(client.send("GET", url, {}) for _ in range(5)))
                assert [await body_of(response) for response in responses] == [b"ok"] * 5
    server.close()


@pytest.mark.parametrize("value", ["a\r\nx: y", "a\nb", "a\x00", "\x7f"])
async def test_headers_that_would_break_the_request(value: str) -> None:
    """A key file with two lines must not add headers."""
    async with serving() as server, client_of(server.url) as client:
        with pytest.raises(Unavailable, match=r"authorization.*one line") as caught:
            await client.send("GET", server.url, {"authorization": value})
        assert caught.value.code is Code.ENGINE_UNAVAILABLE
        assert not server.requests


async def test_answers_that_are_compressed_unasked() -> None:
    """They are decoded within the limit; from then on aiohttp's client decodes them as they come."""
    packed = gzip.compress(b"hello " * 20)
    answer = (
        b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-type: a/b\r\ncontent-length: %d\r\n\r\n" % len(packed) + packed
    )
    async with serving(answer, answer) as server, client_of(server.url) as client:
        response = await client.send("POST", server.url, {})
        assert (response.status, response.content_type, response.header("content-encoding")) == (200, "a/b", "gzip")
        assert await body_of(response) == b"hello " * 20
        assert await post(client, server) == b"hello " * 20
        assert await post(client, server) == b"ok"
    async with (
        serving(OK.replace(b"\r\n\r\n", b"\r\ncontent-encoding: identity\r\n\r\n")) as server,
        client_of(server.url) as client,
    ):
        assert isinstance(await client.send("POST", server.url, {}), HttpExchange)


@pytest.mark.parametrize(
    "body",
    [b"no gzip", gzip.compress(b"x" * 2_000), gzip.compress(b"hello")[:-4], bytes(1_001)],
    ids=["not gzip", "too large", "cut", "zeros"],
)
@pytest.mark.parametrize("coding", [b"gzip", b"lz4"])
async def test_compressed_answers_that_do_not_decode(body: bytes, coding: bytes) -> None:
    """Neither a bomb nor a coding that is unknown gets past the limit."""
    answer = b"HTTP/1.1 200 OK\r\ncontent-encoding: %b\r\ncontent-length: %d\r\n\r\n" % (coding, len(body)) + body
    async with serving(answer) as server, client_of(server.url) as client:
        with pytest.raises(MalformedResponse):
            await body_of(await client.send("POST", server.url, {}))


async def test_proxies_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine elsewhere is reached through the proxy of its scheme, unless NO_PROXY names it or the engine is local."""
    async with serving() as proxy, serving() as direct:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "localhost")
        async with client_of("http://engine.invalid", trust_env=True) as client:
            sent: list[str] = []
            response = await client.send("POST", "http://engine.invalid/v1", {}, b"{}", lambda: sent.append("sent"))
            assert await body_of(response) == b"ok"
            assert proxy.requests[0].startswith(b"POST http://engine.invalid/v1 HTTP/1.1\r\n")
            assert sent == ["sent"]
            assert await body_of(await client.send("GET", f"http://localhost:{direct.port}/", {})) == b"ok"
        async with client_of(direct.url) as client:
            await post(client, direct)
        assert (len(proxy.requests), len(direct.requests)) == (1, 2)


async def test_credentials_in_the_address() -> None:
    """They become a header, as in other clients."""
    async with serving() as server, client_of(server.url) as client:
        await body_of(await client.send("GET", f"http://name:word@127.0.0.1:{server.port}/", {}))
        assert b"authorization: basic bmftztp3b3jk" in server.requests[0].lower()
