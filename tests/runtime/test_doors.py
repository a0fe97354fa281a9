from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tallystick.runtime.doors import DoorLimits, Doors
from tallystick.runtime.serving import serving

TIGHT = DoorLimits(connections=5, per_address=3, head_seconds=0.2, head_bytes=2_000)
GET = b"GET / HTTP/1.1\r\nhost: x\r\n"


async def _app(scope: Any, _receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """A server behind narrow doors."""
    async with serving(_app, "127.0.0.1", 0, doors=TIGHT) as bound:
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
        """Of the next answer; 0 if the connection was closed without one."""
        async with asyncio.timeout(10):
            line = await self.reader.readline()
            return int(line.split()[1]) if line else 0

    async def ask(self, head: bytes = GET) -> int:
        """Sends a request and reads the status of its answer, and the rest of it."""
        self.writer.write(head + b"\r\n")
        found = await self.status()
        while (await self.reader.readline()).strip():
            pass
        await self.reader.readexactly(2) if found == 200 else None
        return found

    def close(self) -> None:
        """Hangs up."""
        self.writer.close()


async def test_an_address_has_only_so_many_connections(port: int) -> None:
    """One more than its share is told so; one that hangs up makes room."""
    callers = [await Caller.call(port) for _ in range(TIGHT.per_address)]
    assert [await caller.ask() for caller in callers] == [200] * TIGHT.per_address
    late = await Caller.call(port)
    assert await late.status() == 429
    callers[0].close()
    async with asyncio.timeout(10):
        while await (await Caller.call(port)).ask() != 200:
            pass


async def test_all_together_have_only_so_many() -> None:
    """Addresses within their shares fill the server up; the reason says which of the two it is."""
    doors = Doors(TIGHT)
    assert [doors.enter(name) for name in "aaabb"] == [None] * 5
    full = doors.enter("c")
    assert full is not None
    assert full[0] == 503
    own = doors.enter("a")
    assert own is not None
    assert own[0] == 429
    for name in "aaabb":
        doors.leave(name)
    assert doors.inside == 0


@pytest.mark.parametrize("sent", [b"", b"GET", GET, GET + b"x: " + b"y" * 100])
async def test_a_head_that_does_not_end(port: int, sent: bytes) -> None:
    """Slowloris: whoever does not finish asking is told so and closed, whatever was sent by then."""
    caller = await Caller.call(port)
    caller.writer.write(sent)
    assert await caller.status() == 408
    assert await caller.reader.read() != b""


async def test_a_second_request_may_not_dawdle_either(port: int) -> None:
    """The time starts anew with each request of a connection."""
    caller = await Caller.call(port)
    assert await caller.ask() == 200
    caller.writer.write(b"GET / HT")
    assert await caller.status() == 408


@pytest.mark.parametrize("at_once", [True, False])
async def test_too_long_a_head(port: int, at_once: bool) -> None:
    """Headers above the limit are refused, in one piece or in many."""
    caller = await Caller.call(port)
    lines = [b"x-%d: " % n + b"y" * 90 + b"\r\n" for n in range(30)]
    if at_once:
        caller.writer.write(GET + b"".join(lines) + b"\r\n")
    else:
        for line in [GET, *lines]:
            caller.writer.write(line)
            await asyncio.sleep(0)
    assert await caller.status() == 431
    assert b"longer than 2000 bytes" in await caller.reader.read()


async def test_a_body_is_not_a_head(port: int) -> None:
    """Only the head is measured by these limits."""
    caller = await Caller.call(port)
    assert await caller.ask(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\n" + b"z" * 4_998) == 200
