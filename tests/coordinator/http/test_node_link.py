"""Frames to a node: sent at once while it reads, else queued within bounds, and always in their order."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, cast

from coordinator.http.node_link import NodeLink
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import Kind, pack_link
from tests.coordinator.live_server import until

JOB = JobId(bytes(16))


def _frame(number: int) -> bytes:
    return pack_link(Kind.CREDIT, JOB, bytes([number]))


class Wire:
    """A connection that may be sent to at once while `reads`; a frame that is sent by the app waits for that."""

    def __init__(self) -> None:
        self.reads, self.sent, self.queued = True, list[bytes](), Counter[str]()
        self.link = NodeLink(cast(Any, None), self._send, "192.0.2.1", self.queued, self._try_send)
        self.room = asyncio.Event()

    def _try_send(self, frame: bytes) -> bool:
        if self.reads:
            self.sent.append(frame)
        return self.reads

    async def _send(self, event: Any) -> None:
        await self.room.wait()
        if event["type"] == "websocket.send":
            self.sent.append(event["bytes"])


async def test_frames_are_sent_at_once_to_a_node_that_reads() -> None:
    """They wait for no task, and nothing counts as queued."""
    wire = Wire()
    assert wire.link.enqueue(_frame(1))
    assert wire.link.enqueue(_frame(2))
    assert wire.sent == [_frame(1), _frame(2)]
    assert not wire.queued


async def test_no_frame_overtakes_a_queued_one() -> None:
    """While a frame waits, in the queue or in the writer's hand, all later ones wait behind it."""
    wire = Wire()
    wire.reads = False
    assert wire.link.enqueue(_frame(1))
    wire.reads = True
    assert wire.link.enqueue(_frame(2))
    assert wire.sent == []
    assert wire.queued.total() == len(_frame(1)) + len(_frame(2))
    await asyncio.sleep(0)
    assert wire.link.enqueue(_frame(3))  # the writer holds the first one now
    assert wire.sent == []
    wire.room.set()
    await until(lambda: not wire.queued)
    assert wire.link.enqueue(_frame(4))
    assert wire.sent == [_frame(number) for number in (1, 2, 3, 4)]


async def test_a_link_of_which_no_frame_waits_has_no_queue() -> None:
    """Neither the queue nor the task that sends from it outlives the frames that waited."""
    wire = Wire()
    before = asyncio.all_tasks()
    wire.link.enqueue(_frame(1))
    assert asyncio.all_tasks() == before
    wire.reads = False
    wire.link.enqueue(_frame(2))
    assert len(asyncio.all_tasks() - before) == 1
    wire.room.set()
    await until(lambda: not wire.queued and asyncio.all_tasks() == before)
    assert wire.link._outbox is None


async def test_a_link_that_ends_sends_nothing_more() -> None:
    """What it had queued is not counted any more."""
    wire = Wire()
    before = asyncio.all_tasks()
    wire.reads = False
    wire.link.enqueue(_frame(1))
    await asyncio.sleep(0)
    wire.link.enqueue(_frame(2))
    wire.link.discard_queue()
    assert not wire.queued
    await until(lambda: asyncio.all_tasks() == before)
    assert (wire.sent, wire.queued.total()) == ([], 0)


async def test_nothing_is_sent_after_the_close() -> None:
    """A link that is being closed sends no more frames, although its connection would take them."""
    wire = Wire()
    wire.room.set()
    await wire.link.close()
    wire.link.enqueue(_frame(1))
    assert wire.sent == []
