"""What a server's answer tells of clock and certificate, from real sockets and from servers that answer nonsense."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import formatdate
from pathlib import Path

import pytest

from tallystick.protocol.health import Health
from tallystick.runtime import peer_probe
from tallystick.runtime.peer_probe import PeerState, probe_peer
from tests.node.engines.test_http_client import certificate_of

NOTHING = PeerState(None, None)


@asynccontextmanager
async def _answering(
    answer: bytes, context: ssl.SSLContext | None = None, requests: list[bytes] | None = None
) -> AsyncIterator[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        if requests is not None:
            requests.append(request)
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1]


def _dated(at: float) -> bytes:
    return f"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nDATE: {formatdate(at, usegmt=True)}\r\n\r\n".encode()


@pytest.mark.parametrize(("ahead", "status"), [(0, Health.PASS), (-10, Health.PASS), (600, Health.WARN), (-600, Health.WARN)])
async def test_the_clock(ahead: float, status: Health) -> None:
    """Clocks that differ by minutes are a warning that says which way."""
    at, requests = time.time(), list[bytes]()
    async with _answering(_dated(at + ahead), requests=requests) as port:
        state = await probe_peer(f"ws://127.0.0.1:{port}/v1/node", now=lambda: at)
    assert state.ahead == pytest.approx(ahead, abs=1)
    assert requests[0].startswith(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:")
    (check,) = state.checks().values()
    assert check.status is status
    if status is Health.WARN:
        assert ("behind" if ahead > 0 else "ahead of") in check.output


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nDate: yesterday\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nDate:\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nDate: Mon, 01 Jan 99999 00:00:00 GMT\r\n\r\n",
        b"\xff" * 100 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nDate: Mon, 01 Jan 2024",
    ],
    ids=range(9),
)
async def test_answers_that_tell_nothing(answer: bytes) -> None:
    """Whatever comes, the probe ends and claims nothing."""
    async with _answering(answer) as port:
        assert await probe_peer(f"http://127.0.0.1:{port}") == NOTHING


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://", "nonsense", "http://127.0.0.1:99999", "https://127.0.0.1:9/x"])
async def test_servers_that_cannot_be_reached(url: str) -> None:
    """They tell nothing: another check says why."""
    assert await probe_peer(url) == NOTHING


async def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe has a deadline."""
    monkeypatch.setattr(peer_probe, "PROBE_SECONDS", 0.05)

    async def serve(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert await asyncio.wait_for(probe_peer(f"http://127.0.0.1:{port}"), 60) == NOTHING


@pytest.mark.parametrize(("days", "status"), [(0, Health.WARN), (-20, Health.PASS)])
async def test_the_certificate(tmp_path: Path, days: int, status: Health) -> None:
    """A certificate of one day is a warning; seen from three weeks earlier it is none. One that nobody trusts tells nothing."""
    certificate = certificate_of("localhost", tmp_path / "server.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    trusting, at = ssl.create_default_context(cafile=certificate), time.time() + days * 86_400
    async with _answering(_dated(at), context) as port:
        state = await probe_peer(f"https://localhost:{port}", now=lambda: at, context=trusting)
        assert await probe_peer(f"https://localhost:{port}") == NOTHING
    checks = state.checks()
    assert {name: check.status for name, check in checks.items()} == {"clock": Health.PASS, "certificate": status}
    assert checks["certificate"].value == 0 - days


async def test_behind_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a proxy configured for it, a server is not asked directly."""
    requests: list[bytes] = []
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    async with _answering(_dated(time.time()), requests=requests) as port:
        assert await probe_peer(f"http://127.0.0.1:{port}") == NOTHING
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert (await probe_peer(f"http://127.0.0.1:{port}")).ahead is not None
    assert len(requests) == 1
