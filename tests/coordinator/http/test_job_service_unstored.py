"""Responses that the store could not take when their jobs ended, such as on a full disk."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from coordinator.http.response_buffer import Retention
from coordinator.ports import StoredResponse
from coordinator.storage.memory import MemoryStore
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import FrameReader, Kind
from tests.coordinator.harness import World, make_submission, person
from tests.coordinator.live_server import LinkNode, Served, served, until

ANN = person("ann")
LINGER = {"x-tally-linger": "30"}


class FullStore(MemoryStore):
    """A store that takes no response until there is room."""

    room = False
    tried = 0

    async def put_response(self, stored: StoredResponse, *, since: int, max_bytes: int) -> None:
        self.tried += 1
        if not self.room:
            raise Unavailable(Code.DATABASE_UNAVAILABLE, "database or disk is full")
        await super().put_response(stored, since=since, max_bytes=max_bytes)


@pytest.fixture
def full() -> FullStore:
    """A full store."""
    return FullStore()


async def _post(at: Served, node: LinkNode, number: int) -> tuple[JobId, bytes, bytes]:
    """Runs a job that lingers. Returns its id, its submission and its response."""
    submission = make_submission(node.asks[0], job=JobId(bytes((number,)) * 16))
    post = asyncio.create_task(at.http.post("/v1/jobs", content=submission.dumps(), headers=LINGER))
    job, receipt = await node.take_job()
    await node.send(Kind.CHUNK, job, b"one")
    await node.finish(job, receipt)
    return job, submission.dumps(), (await post).content


def _kinds(frames: bytes) -> list[Kind]:
    return [kind for kind, _ in FrameReader().feed(frames)]


async def test_a_response_is_stored_once_there_is_room(full: FullStore) -> None:
    """The client gets its response while the disk is full. Once there is room it is stored whole, and the next process has it."""
    world = World(store=full)
    async with served(world) as at:
        node = await LinkNode.join(at, ANN)
        job, body, first = await _post(at, node, 1)
        assert _kinds(first) == [Kind.MATCH, Kind.CHUNK, Kind.CHUNK, Kind.RECEIPT]
        tried = full.tried
        await until(lambda: full.tried > tried + 1)
        assert job not in full.responses
        full.room = True
        await until(lambda: job in full.responses)
        assert full.responses[job].frames == first
        other, _, _ = await _post(at, node, 2)
        assert other in full.responses
        await node.socket.close()
    await world.restart()
    async with served(world) as after:
        again: httpx.Response = await after.http.post("/v1/jobs", content=body, headers=LINGER)
        assert (again.status_code, again.content) == (200, first)


@pytest.mark.parametrize("retention", [Retention(response_bytes=1), Retention(total_bytes=1), Retention(payer_bytes=1)])
async def test_what_memory_does_not_keep_is_not_tried_for_ever(full: FullStore, retention: Retention) -> None:
    """Only responses that memory has can be stored later, so a full disk holds no more memory than its limit."""
    world = World(store=full)
    settings: dict[str, Any] = {"retention": retention}
    async with served(world) as at:
        service = at.app.clients._service
        service.buffers.retention = settings["retention"]
        node = await LinkNode.join(at, ANN)
        await _post(at, node, 1)
        await until(lambda: service._storing is None)
        assert not service._unstored
        tried = full.tried
        full.room = True
        await _post(at, node, 2)
        assert full.tried - tried <= 1
