"""The frames that one read of a node's connection brought: each reaches the attempt that the node has, in its order."""

from __future__ import annotations

import pytest

from coordinator.domain.limits import JobLimits
from coordinator.domain.resource_bounds import INBOX_FRAMES
from coordinator.jobs.live_job import InboxOverrun
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import NO_JOB, Dispatch, Kind, pack_link
from tests.coordinator.harness import World, quiet


async def test_frames_of_many_jobs_in_one_read(world: World) -> None:
    """Each job gets its own, in their order; what is for no job of the node, or no job at all, is returned in its order."""
    node, other = world.node("ann"), world.node("bob", output_price=9_000_000)
    first, second = await world.started(node), await world.started(node)
    beat = pack_link(Kind.BEAT, NO_JOB, b"{}")
    unknown = pack_link(Kind.RECEIPT, JobId(b"x" * 16), b"late")
    strange = pack_link(Kind.HELLO, first.job.id, b"{}")
    read = [
        pack_link(Kind.ACCEPT, first.job.id),
        beat,
        *(pack_link(Kind.CHUNK, client.job.id, b"%d" % number) for number in range(3) for client in (first, second)),
        unknown,
        b"",
        strange,
    ]
    assert world.market.node_frames.take(other.address, read) == read, "a node has its own jobs alone"
    assert world.market.node_frames.take(node.address, read) == [beat, unknown, b"", strange]
    await quiet()
    for client in (first, second):
        assert [payload for kind, payload in client.frames if kind is Kind.CHUNK] == [b"0", b"1", b"2"]
        node.complete(client.job.id)
    await quiet()
    assert world.market.node_frames.take(node.address, read) == read, "both jobs have ended"
    world.assert_idle()


async def test_an_attempt_has_no_more_frames_than_its_share(world: World) -> None:
    """A node that sends more than its credit is told so, however few reads bring the frames."""
    node = world.node("ann")
    client = await world.started(node)
    client.reads.clear()
    chunk = pack_link(Kind.CHUNK, client.job.id, b"sealed")
    world.market.node_frames.take(node.address, [chunk] * INBOX_FRAMES)
    with pytest.raises(InboxOverrun):
        world.market.node_frames.take(node.address, [chunk])
    client.reads.set()
    await quiet()
    node.complete(client.job.id)
    await quiet()
    world.assert_idle()


async def test_a_job_with_output_holds_its_request_no_longer(world: World) -> None:
    """No other provider can get it then. Until then, it can: a job whose first provider fails goes to the next one."""
    first, second = world.node("ann"), world.node("bob", output_price=9_000_000)
    client = await world.started(first, second)
    request = bytes(client.job.submission.sealed)
    first.fail(client.job.id)
    await quiet()
    assert Dispatch.loads(second.got(Kind.DISPATCH, client.job.id)[0]).sealed == request
    assert (client.job.submission.sealed, len(client.job.submission.candidates)) == (request, 2)
    second.chunk(client.job.id)
    await quiet()
    assert (client.job.submission.sealed, client.job.submission.candidates) == (b"", ())
    second.complete(client.job.id)
    await quiet()
    assert client.kinds[-1] is Kind.RECEIPT
    world.assert_idle()


async def test_a_chunk_gives_its_node_time_for_the_next_one() -> None:
    """From when it arrived on, unless the node was told to stop."""
    world = World(limits=JobLimits(idle=10, cancel=5))
    node = world.node("ann")
    client = await world.started(node)
    node.chunk(client.job.id)
    await quiet()
    assert client.job.current.deadline == world.clock.tick() + 10
    world.market.cancel(client.job.id)
    deadline = client.job.current.deadline
    await world.pass_time(2)
    node.chunk(client.job.id)
    await quiet()
    assert client.job.current.deadline == deadline
    node.complete(client.job.id)
    await quiet()
    world.assert_idle()
