"""What a client's link sends, and in how many messages."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from coordinator.domain.limits import IntakeLimits
from coordinator.domain.rate_limiter import RateLimiter
from coordinator.http.client_link import MAX_BATCH, ClientLink, LinkStream
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.job_link import read_records
from tallystick.protocol.wire import Kind
from tallystick.runtime.websocket import DirectSocket

TURNS = 4
"""Turns of the event loop after which everything posted has left."""


class Socket:
    """Keeps the messages that it is to send."""

    def __init__(self) -> None:
        self.messages: list[list[tuple[int, Kind, bytes]]] = []

    def send_parts(self, parts: Sequence[bytes]) -> bool:
        """See DirectSocket."""
        self.messages.append(list(read_records(b"".join(parts))))
        return True


def _unused(*_: Any) -> Any:
    raise AssertionError("nothing of the client arrives here")


@pytest.fixture
async def socket() -> Socket:
    """A connection."""
    return Socket()


@pytest.fixture
async def link(socket: Socket) -> ClientLink:
    """A link that only sends."""
    names = ("submit", "left", "cancelled", "ordered", "refused", "greeted")
    link = ClientLink("10.0.0.1", RateLimiter(IntakeLimits(), lambda: 0.0), **dict.fromkeys(names, _unused))
    link.attach(cast("DirectSocket", socket))
    return link


def stream_of(link: ClientLink, number: int) -> LinkStream:
    """A job's stream on the link."""
    link.streams[number] = LinkStream(link, number, None)
    return link.streams[number]


async def _turns() -> None:
    for _ in range(TURNS):
        await asyncio.sleep(0)


async def test_a_chunk_and_the_receipt_behind_it_are_one_message(link: ClientLink, socket: Socket) -> None:
    """The chunk is put as it arrives, the receipt by the job's task, which wakes up in the next turn. The stream ends with it."""
    stream, woken = stream_of(link, 7), asyncio.get_running_loop().create_future()

    async def job() -> None:
        await woken
        assert stream.put_last(Kind.RECEIPT, b"signed")

    task = asyncio.create_task(job())
    await asyncio.sleep(0)
    stream.put(Kind.CHUNK, b"sealed")
    woken.set_result(None)
    await _turns()
    assert socket.messages == [[(7, Kind.CHUNK, b"sealed"), (7, Kind.RECEIPT, b"signed"), (7, Kind.END, b"")]]
    await task


@pytest.mark.parametrize("kind", [Kind.RECEIPT, Kind.FAIL])
async def test_a_stream_ends_once(link: ClientLink, socket: Socket, kind: Kind) -> None:
    """After the frame that ends its job it is over, whatever becomes of the job's task."""
    stream = stream_of(link, 1)
    assert stream.put_last(kind, b"last")
    assert not link.streams
    stream.end()
    stream.fail(Unavailable(Code.COORDINATOR_UNAVAILABLE, "a bug"))
    await _turns()
    assert socket.messages == [[(1, kind, b"last"), (1, Kind.END, b"")]]


async def test_streams_share_messages(link: ClientLink, socket: Socket) -> None:
    """What several jobs put in one turn leaves together; what is large leaves at once."""
    first, second = stream_of(link, 1), stream_of(link, 2)
    first.put(Kind.CHUNK, b"a")
    second.put(Kind.CHUNK, b"b")
    await _turns()
    assert socket.messages == [[(1, Kind.CHUNK, b"a"), (2, Kind.CHUNK, b"b")]]
    first.put(Kind.CHUNK, bytes(MAX_BATCH))
    assert len(socket.messages) == 2
    await _turns()
    assert len(socket.messages) == 2
