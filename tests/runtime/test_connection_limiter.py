from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tallystick.runtime import connection_limiter as module
from tallystick.runtime.connection_limiter import ConnectionLimiter, ConnectionLimits, address_key
from tallystick.runtime.serving import serving

TIGHT = ConnectionLimits(connections=5, per_address=3, head_seconds=0.2, head_bytes=2_000)
GET = b"GET / HTTP/1.1\r\nhost: x\r\n"


async def _app(scope: Any, _receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        if scope["path"] == "/long":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"8000000")]})
            await send({"type": "http.response.body", "body": bytes(8_000_000)})
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """A server with low limits."""
    async with serving(_app, "127.0.0.1", 0, limits=TIGHT) as bound:
        yield bound


class Caller:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def call(cls, port: int) -> Caller:
        """Connects."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def status(self) -> int:
        """Reads the next answer's status; 0 if the connection was closed without an answer."""
        async with asyncio.timeout(60):
            line = await self.reader.readline()
            return int(line.split()[1]) if line else 0

    async def ask(self, head: bytes = GET) -> int:
        """Sends a request and reads its answer. Returns the status."""
        self.writer.write(head + b"\r\n")
        status = await self.status()
        while (await self.reader.readline()).strip():
            pass
        await self.reader.readexactly(2) if status == 200 else None
        return status

    def close(self) -> None:
        """Closes the connection."""
        self.writer.close()


async def test_an_address_has_only_so_many_connections(port: int) -> None:
    """One connection above an address's share is refused with the reason; a closed connection makes room."""
    callers = [await Caller.call(port) for _ in range(TIGHT.per_address)]
    assert [await caller.ask() for caller in callers] == [200] * TIGHT.per_address
    refused = await Caller.call(port)
    assert await refused.status() == 429
    callers[0].close()
    async with asyncio.timeout(60):
        while await (await Caller.call(port)).ask() != 200:
            pass


async def test_all_together_have_only_so_many() -> None:
    """Addresses within their shares fill the server; the reason tells which of the two limits was reached."""
    limiter = ConnectionLimiter(TIGHT)
    assert [limiter.acquire(name) for name in "aaabb"] == [None] * 5
    full = limiter.acquire("c")
    assert full is not None
    assert full[0] == 503
    own = limiter.acquire("a")
    assert own is not None
    assert own[0] == 429
    for name in "aaabb":
        limiter.release(name)
    assert limiter.open_connections == 0


@pytest.mark.parametrize("sent", [b"", b"GET", GET, GET + b"x: " + b"y" * 100])
async def test_a_head_that_does_not_end(port: int, sent: bytes) -> None:
    """Slowloris: a request head that is not finished in time is refused and closed, whatever was sent until then."""
    caller = await Caller.call(port)
    caller.writer.write(sent)
    assert await caller.status() == 408
    assert await caller.reader.read() != b""


async def test_the_time_limit_holds_for_each_request(port: int) -> None:
    """The time limit starts again with each request of a connection."""
    caller = await Caller.call(port)
    assert await caller.ask() == 200
    caller.writer.write(b"GET / HT")
    assert await caller.status() == 408


@pytest.mark.parametrize("at_once", [True, False])
async def test_too_long_a_head(port: int, at_once: bool) -> None:
    """Headers above the limit are refused, in one part or in many."""
    caller = await Caller.call(port)
    lines = [b"x-%d: " % n + b"y" * 90 + b"\r\n" for n in range(30)]
    if at_once:
        caller.writer.write(GET + b"".join(lines) + b"\r\n")
    else:
        for line in [GET, *lines]:
            caller.writer.write(line)
            await asyncio.sleep(0)
    assert await caller.status() == 431
    assert b"at most 2000 bytes" in await caller.reader.read()


async def test_a_body_is_not_a_head(port: int) -> None:
    """These limits apply only to the head."""
    caller = await Caller.call(port)
    assert await caller.ask(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\n" + b"z" * 4_998) == 200


@pytest.mark.parametrize(
    ("host", "key"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8:0:0:ffff:ffff:ffff:ffff", "2001:db8::/64"),
        ("2001:db8:0:1::1", "2001:db8:0:1::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("not an address", "not an address"),
    ],
)
def test_what_counts_as_one_address(host: str, key: str) -> None:
    """An IPv4 address counts as one however it is written; an IPv6 address counts with its whole /64."""
    assert address_key(host) == key


def test_an_ipv6_network_shares_one_limit() -> None:
    """Connections of one /64 share one limit."""
    limiter = ConnectionLimiter(TIGHT)
    assert [limiter.acquire(f"2001:db8::{n}") for n in range(TIGHT.per_address)] == [None] * TIGHT.per_address
    refused = limiter.acquire("2001:db8::ffff")
    assert refused is not None
    assert refused[0] == 429
    assert limiter.acquire("2001:db8:0:1::1") is None
    for number in range(TIGHT.per_address):
        limiter.release(f"2001:db8::{number}")
    assert limiter.open_connections == 1


async def test_requests_do_not_pile_up_on_a_connection(port: int) -> None:
    """A connection with more than a few pipelined requests is refused and closed."""
    caller = await Caller.call(port)
    caller.writer.write((GET + b"\r\n") * 3_000)
    async with asyncio.timeout(60):
        answers = await caller.reader.read()
    assert answers.count(b"HTTP/1.1 ") <= module.PIPELINED + 2
    assert b"429 Too Many Requests" in answers


async def test_a_few_requests_may_wait(port: int) -> None:
    """A client that sends further requests before the first answer gets all answers, in order."""
    caller = await Caller.call(port)
    caller.writer.write((GET + b"\r\n") * 10)
    async with asyncio.timeout(60):
        for _ in range(10):
            assert (await caller.reader.readuntil(b"ok")).count(b"200 OK") == 1


async def test_an_answer_that_is_not_read_is_not_held_for_ever() -> None:
    """A client that does not read its answer is disconnected; one that reads slowly gets all of it."""
    limits = ConnectionLimits(stall_seconds=1.5)
    async with serving(_app, "127.0.0.1", 0, limits=limits) as port:
        lazy, slow = await Caller.call(port), await Caller.call(port)
        lazy.writer.transport.pause_reading()  # type: ignore[attr-defined]
        for caller in (lazy, slow):
            caller.writer.write(b"GET /long HTTP/1.1\r\nhost: x\r\n\r\n")
        got = 0
        async with asyncio.timeout(60):
            while got < 8_000_000:
                data = await slow.reader.read(100_000)
                assert data, "it was cut although it reads"
                got += len(data)
                await asyncio.sleep(0.04)
            lazy.writer.transport.resume_reading()  # type: ignore[attr-defined]
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await lazy.reader.readexactly(8_000_000)


async def test_a_body_after_the_answer_is_not_taken_for_ever() -> None:
    """A request body that continues after its answer is read only for a limited time."""
    async with serving(_app, "127.0.0.1", 0, limits=ConnectionLimits(stall_seconds=0.2)) as port:
        caller = await Caller.call(port)
        assert await caller.ask(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n") == 200

        async def drip() -> None:
            while True:
                caller.writer.write(b"z")
                await caller.writer.drain()
                await asyncio.sleep(0.02)

        with pytest.raises(ConnectionError):
            await asyncio.wait_for(drip(), 60)


async def test_refused_connections_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limited number of refused connections stays open until the clients have read the reason; further ones are closed at
    once.
    """
    monkeypatch.setattr(module, "LINGERING", 2)
    monkeypatch.setattr(module, "_LINGER_SECONDS", 0.3)
    limiter = ConnectionLimiter(ConnectionLimits(per_address=0))
    http, _ = limiter.protocols()
    seen: list[int] = []

    class Watched(http):  # type: ignore[misc, valid-type]
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            seen.append(limiter.lingering)

    monkeypatch.setattr(ConnectionLimiter, "protocols", lambda _limiter: (Watched, _))
    async with serving(_app, "127.0.0.1", 0) as port:
        refused = [await Caller.call(port) for _ in range(6)]
        assert [await caller.status() for caller in refused] == [429] * 6
        assert max(seen) == 2
        await asyncio.sleep(0.5)
        assert limiter.lingering == 0
