"""A buffered transport: one write per turn of the event loop, in order, with nothing lost at the end."""

import asyncio
from typing import Any

import pytest

from tallystick.runtime.buffered_transport import buffered


class Wire:
    """A transport that records the calls on it."""

    def __init__(self) -> None:
        self.done: list[Any] = []
        self.closing = False

    def write(self, data: bytes) -> None:
        self.done.append(data)

    def write_eof(self) -> None:
        self.done.append("eof")

    def close(self) -> None:
        self.done.append("close")
        self.closing = True

    def abort(self) -> None:
        self.done.append("abort")

    def is_closing(self) -> bool:
        return self.closing


@pytest.fixture
async def wire() -> Wire:
    """The underlying transport."""
    return Wire()


async def test_what_is_written_in_one_turn_leaves_at_once_and_in_order(wire: Wire) -> None:
    """Parts of one turn are one write; parts of the next turn are another."""
    transport = buffered(wire)
    for part in (b"head", b"", b"body"):
        transport.write(part)
    assert wire.done == []
    await asyncio.sleep(0)
    transport.write(b"more")
    await asyncio.sleep(0)
    assert wire.done == [b"headbody", b"more"]


async def test_large_parts_are_written_at_once(wire: Wire) -> None:
    """A large part is written at once, together with the buffered ones."""
    transport = buffered(wire)
    transport.write(b"x")
    transport.write(bytes(20_000))
    assert wire.done == [b"x" + bytes(20_000)]
    await asyncio.sleep(0)
    assert len(wire.done) == 1


@pytest.mark.parametrize("end", ["close", "write_eof"])
async def test_an_end_comes_after_what_was_written(wire: Wire, end: str) -> None:
    """Closing writes the buffer first."""
    transport = buffered(wire)
    transport.write(b"last")
    getattr(transport, end)()
    await asyncio.sleep(0)
    assert wire.done == [b"last", "eof" if end == "write_eof" else "close"]


async def test_an_abort_drops_it(wire: Wire) -> None:
    """Nothing is written after an abort."""
    transport = buffered(wire)
    transport.write(b"last")
    transport.abort()
    await asyncio.sleep(0)
    assert wire.done == ["abort"]


async def test_a_connection_lost_meanwhile_is_left_alone(wire: Wire) -> None:
    """Nothing is written if the transport closed during the turn."""
    transport = buffered(wire)
    transport.write(b"last")
    wire.closing = True
    await asyncio.sleep(0)
    assert wire.done == []


async def test_a_transport_is_wrapped_once(wire: Wire) -> None:
    """A transport is wrapped only once, and other calls go to the underlying transport."""
    transport = buffered(wire)
    assert buffered(transport) is transport
    assert not transport.is_closing()
