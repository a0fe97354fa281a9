"""Chunks that go to the client's sink at once: in the same order, and noted as those that pass through the job's task."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.domain.limits import JobLimits
from coordinator.jobs.live_job import LiveJob
from coordinator.jobs.node_frames import CREDIT_STEP
from tallystick.protocol.jobs import State
from tallystick.protocol.messages import Outcome
from tallystick.protocol.wire import Kind, pack_link
from tests.coordinator.harness import FakeNode, World, hedged, quiet


class Sink:
    """Takes chunks at once while `open`, and all that the job's task gives it."""

    def __init__(self) -> None:
        self.open = True
        self.frames: list[tuple[Kind, bytes]] = []
        self.direct: list[bytes] = []
        self.reads = asyncio.Event()
        self.reads.set()

    def take_chunk(self, payload: bytes) -> bool:
        if self.open:
            self.frames.append((Kind.CHUNK, payload))
            self.direct.append(payload)
        return self.open

    def put_last(self, kind: Kind, payload: bytes) -> bool:
        self.put(kind, payload)
        return True

    def put(self, kind: Kind, payload: bytes, *, more: bool = False) -> bool:
        self.frames.append((kind, payload))
        return True

    async def wait(self) -> None:
        await self.reads.wait()

    @property
    def chunks(self) -> list[bytes]:
        return [payload for kind, payload in self.frames if kind is Kind.CHUNK]


async def _started(world: World, *nodes: FakeNode, hedge: float | None = None) -> tuple[LiveJob, Sink, asyncio.Task[None]]:
    submission = world.submission(*nodes)
    job = await world.market.place_order(submission if hedge is None else hedged(submission, hedge))
    sink = Sink()
    reading = asyncio.create_task(world.market.run(job, sink))
    await quiet()
    return job, sink, reading


async def test_chunks_of_a_running_response_wait_for_no_task() -> None:
    """All arrive within the node's own call. The first one decides, and the node gets to know that."""
    world = World()
    node = world.node("ann")
    job, sink, reading = await _started(world, node)
    node.accept(job.id)
    assert (job.state, job.ended) == (State.RUNNING, False), "nor does the node's consent"
    node.chunk(job.id, b"first")
    assert (job.state, node.got(Kind.CREDIT, job.id)) == (State.STREAMING, [bytes(4)])
    node.chunk(job.id, b"second")
    node.accept(job.id)
    assert sink.direct == [b"first", b"second"]
    node.complete(job.id)
    assert job.current.delivered, "the last chunk is noted, whichever way it goes"
    assert len(sink.direct) == 3
    await reading
    assert [kind for kind, _ in sink.frames] == [Kind.MATCH, *[Kind.CHUNK] * 3, Kind.RECEIPT]
    assert len(node.got(Kind.CREDIT, job.id)) == 1
    assert job.state is State.COMPLETED
    world.assert_idle()


@pytest.mark.parametrize("why", ["the sink is full", "the reader has a frame", "a frame waits"])
async def test_a_chunk_that_must_wait_keeps_its_place(why: str) -> None:
    """No chunk overtakes another, and a reader that takes nothing holds its job up as ever."""
    world = World(limits=JobLimits(beat=8))
    node = world.node("ann")
    job, sink, reading = await _started(world, node)
    if why == "the reader has a frame":
        sink.reads.clear()
        await world.pass_time(9)  # a sign of life is what it has
    elif why == "a frame waits":
        job.post(job.current, pack_link(Kind.BEAT, job.id))
    sink.open = why != "the sink is full"
    node.accept(job.id)
    node.chunk(job.id, b"0")
    sink.open = True
    node.chunk(job.id, b"1")
    assert sink.direct == []
    assert node.got(Kind.CREDIT, job.id) == [bytes(4)], "its node gets to know at once that it may charge"
    sink.reads.set()
    await quiet()
    node.chunk(job.id, b"2")
    assert sink.direct == [b"2"]
    node.complete(job.id)
    await reading
    assert sink.chunks[:3] == [b"0", b"1", b"2"]
    assert (job.state, job.ended) == (State.COMPLETED, True)
    world.assert_idle()


async def test_credit_is_granted_for_chunks_that_went_at_once() -> None:
    """The node gets as much credit as for any other chunks."""
    world = World()
    node = world.node("ann")
    job, sink, reading = await _started(world, node)

    def granted() -> list[bytes]:
        return [payload for payload in node.got(Kind.CREDIT, job.id) if any(payload)]

    for _ in range(CREDIT_STEP - 1):
        node.chunk(job.id)
    assert granted() == []
    node.chunk(job.id)
    assert granted() == [CREDIT_STEP.to_bytes(4, "big")]
    assert len(sink.direct) == CREDIT_STEP
    node.complete(job.id)
    await reading
    world.assert_idle()


async def test_each_chunk_is_a_sign_of_life() -> None:
    """It moves the deadline of the node, and the client gets no sign of life in its place."""
    world = World(limits=JobLimits(idle=10, beat=8))
    node = world.node("ann")
    job, sink, reading = await _started(world, node)
    for _ in range(5):
        await world.pass_time(6)
        node.chunk(job.id)
    assert job.state is State.STREAMING
    assert len(sink.direct) == 5
    assert Kind.BEAT not in [kind for kind, _ in sink.frames]
    await world.pass_time(11)
    await reading
    assert sink.frames[-1][0] is Kind.FAIL
    world.assert_idle()


async def test_only_the_attempt_that_had_output_first_is_passed_on() -> None:
    """The other one's chunks are dropped, though its node has not stopped yet."""
    world = World()
    late, quick = world.node("ann"), world.node("bob")
    job, sink, reading = await _started(world, late, quick, hedge=1)
    await world.pass_time(2)
    nodes = {node.address: node for node in (late, quick)}
    assert len(job.open_attempts) == 2
    winner, loser = nodes[job.open_attempts[1].provider], nodes[job.open_attempts[0].provider]
    winner.chunk(job.id, b"good")
    await quiet()
    loser.chunk(job.id, b"bad")
    winner.chunk(job.id, b"more")
    assert sink.direct == [b"more"], "its first one follows the MATCH that names the provider"
    assert sink.chunks == [b"good", b"more"]
    winner.complete(job.id)
    await reading
    assert b"bad" not in sink.chunks


async def test_the_first_of_two_is_passed_on_at_once() -> None:
    """The late provider may still have output first. Then the other one is told to stop, as the task would tell it."""
    world = World()
    late, other = world.node("ann"), world.node("bob")
    job, sink, reading = await _started(world, late, other, hedge=1)
    await world.pass_time(2)
    nodes = {node.address: node for node in (late, other)}
    first, second = (nodes[attempt.provider] for attempt in job.open_attempts)
    assert job.current.provider == first.address
    first.chunk(job.id, b"late")
    assert (sink.direct, job.state) == ([b"late"], State.STREAMING)
    assert [len(node.got(Kind.CANCEL, job.id)) for node in (first, second)] == [0, 1]
    second.chunk(job.id, b"bad")
    first.complete(job.id)
    await reading
    assert b"bad" not in sink.chunks
    assert job.state is State.COMPLETED


async def test_a_cancelled_job_takes_what_is_under_way() -> None:
    """The client left, and the node's receipt says what it charges: its output is noted until then."""
    world = World()
    node = world.node("ann")
    job, sink, reading = await _started(world, node)
    world.market.cancel(job.id)
    node.chunk(job.id, b"under way")
    assert (sink.direct, job.state) == ([b"under way"], State.STREAMING)
    node.last_chunk(job.id)
    node.finish(job.id, outcome=Outcome.CLIENT_CANCELLED)
    await reading
    assert job.state is State.CANCELLED
    world.assert_idle()


async def test_nothing_follows_the_last_chunk() -> None:
    """A node that sends on after the end of its response does not reach the client."""
    world = World()
    node = world.node("ann")
    job, sink, reading = await _started(world, node)
    node.chunk(job.id)
    await quiet()
    node.last_chunk(job.id)
    node.chunk(job.id, b"beyond")
    node.finish(job.id)
    await reading
    assert b"beyond" not in sink.chunks
    assert len(sink.chunks) == 2
    world.assert_idle()


async def test_no_chunk_passes_the_end_of_its_attempt() -> None:
    """After the loss of a node, what it still seems to send reaches nobody."""
    world = World()
    node = world.node("ann")
    job, sink, reading = await _started(world, node)
    node.chunk(job.id)
    await quiet()
    world.market.node_gone(node.address)
    node.chunk(job.id, b"from the grave")
    assert b"from the grave" not in sink.chunks
    await reading
    assert sink.frames[-1][0] is Kind.FAIL
    assert job.state is State.FAILED
