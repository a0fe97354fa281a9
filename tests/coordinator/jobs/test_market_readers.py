"""A slow reader: no deadline runs against a provider while the reader of its job has a frame."""

from __future__ import annotations

import pytest

from coordinator.domain.limits import JobLimits
from coordinator.domain.reputation import UNKNOWN_PROVIDER
from coordinator.jobs.relay import GONE
from tallystick.protocol.errors import Code
from tallystick.protocol.jobs import State
from tallystick.protocol.messages import Outcome
from tallystick.protocol.wire import Kind, pack_link
from tests.coordinator.harness import COST, PAYER, Client, FakeNode, World, quiet


async def _held_up(world: World, node: FakeNode) -> Client:
    """Places a job whose reader stops after the first chunk; its node has sent all of the response but the end."""
    client = await world.started(node)
    node.accept(client.job.id)
    await quiet()
    client.reads.clear()
    for _ in range(3):
        node.chunk(client.job.id)
    await quiet()
    return client


async def _pass(world: World, seconds: int, step: int = 5) -> None:
    for _ in range(0, seconds, step):
        await world.pass_time(step)


@pytest.mark.parametrize("seconds", [70, 110, 290])
async def test_a_slow_reader_does_not_make_a_response_free(seconds: int) -> None:
    """However long the reader waits within its allowance, the response is delivered, billed and counted as good."""
    world = World(limits=JobLimits(total=300, reader=300))
    node = world.node("ann")
    client = await _held_up(world, node)
    await _pass(world, seconds)
    node.complete(client.job.id)
    await _pass(world, 5)
    client.reads.set()
    await quiet()
    assert await world.stored(client) is State.COMPLETED
    assert world.market.reputation.score(node.address) > UNKNOWN_PROVIDER.score
    tab = world.market.exposure.known(PAYER.address, node.address)
    assert tab is not None
    assert tab.cumulative == COST


async def test_the_readers_time_is_not_the_providers_total() -> None:
    """A job's total time excludes the reader's time, and is still bounded."""
    world = World(limits=JobLimits(total=100, reader=100))
    node = world.node("ann")
    client = await _held_up(world, node)
    await _pass(world, 95)
    client.reads.set()
    await quiet()
    for _ in range(18):
        node.chunk(client.job.id)
        await world.pass_time(5)
    assert Kind.FAIL not in client.kinds, "185 seconds after its start, of which 90 are the provider's"
    await _pass(world, 15)
    assert client.failure.code is Code.TIMED_OUT
    assert await world.stored(client) is State.EXPIRED


async def test_a_reader_that_never_comes_back_cancels_its_own_job() -> None:
    """When the reader's allowance is used up, its job is cancelled; the provider bills its work and loses no reputation."""
    world = World(limits=JobLimits(total=300, reader=300))
    node = world.node("ann")
    client = await _held_up(world, node)
    await _pass(world, 300)
    assert node.got(Kind.CANCEL) == []
    await world.pass_time(1)
    assert node.got(Kind.CANCEL) == [b"client"]
    node.complete(client.job.id, outcome=Outcome.CLIENT_CANCELLED)
    await _pass(world, 60)
    assert set(node.got(Kind.CANCEL)) <= {b"client", b"timed_out"}
    client.reads.set()
    await quiet()
    assert client.kinds[-1] is Kind.RECEIPT
    assert await world.stored(client) is State.CANCELLED
    assert world.market.reputation.score(node.address) == UNKNOWN_PROVIDER.score
    world.assert_idle()


async def test_many_short_waits_are_one_long_one() -> None:
    """Many short waits use up the reader's allowance like one long wait."""
    world = World(limits=JobLimits(total=100, reader=100))
    node = world.node("ann")
    client = await world.started(node)
    node.accept(client.job.id)
    for _ in range(11):
        client.reads.clear()
        node.chunk(client.job.id)
        await quiet()
        await _pass(world, 10)
        client.reads.set()
        await quiet()
    assert node.got(Kind.CANCEL) == [b"client"]
    node.complete(client.job.id, outcome=Outcome.CLIENT_CANCELLED)
    await quiet()
    assert await world.stored(client) is State.CANCELLED


async def test_a_slow_reader_does_not_excuse_a_silent_node() -> None:
    """Once the reader asks for more, a silent node is late after its idle time."""
    world = World()
    node = world.node("ann")
    client = await _held_up(world, node)
    await _pass(world, 500)
    client.reads.set()
    await quiet()
    await _pass(world, 60)
    assert Kind.FAIL not in client.kinds
    await _pass(world, 5)
    assert client.failure.code is Code.TIMED_OUT
    assert world.market.reputation.score(node.address) < UNKNOWN_PROVIDER.score


async def test_a_reader_that_is_slow_at_the_match_takes_no_time_from_the_node() -> None:
    """The time to accept does not run while the reader has the match, and a failover does not restart the job's time."""
    world = World(limits=JobLimits(total=100, reader=100))
    ann, bob = world.node("ann"), world.node("bob", output_price=9_000_000)
    client = await world.place(ann, bob)
    client.reads.clear()
    await quiet()
    await _pass(world, 50)
    assert ann.got(Kind.CANCEL) == []
    client.reads.set()
    ann.accept(client.job.id)
    await quiet()
    await _pass(world, 95)
    ann.fail(client.job.id)
    await quiet()
    assert bob.got(Kind.DISPATCH) != [], "95 of its 100 seconds are used"
    world.market.cancel(client.job.id)
    await _pass(world, 20)


async def test_a_cancelled_job_does_not_wait_for_its_reader() -> None:
    """A node that was told to stop has fifteen seconds, whether anybody reads or not."""
    world = World()
    node = world.node("ann")
    client = await _held_up(world, node)
    await _pass(world, 100)
    world.market.cancel(client.job.id)
    await world.pass_time(14)
    assert node.got(Kind.CANCEL) == [b"client"]
    await world.pass_time(2)
    assert node.got(Kind.CANCEL) == [b"client", b"timed_out"]
    client.reads.set()
    await quiet()
    assert await world.stored(client) is State.CANCELLED
    world.assert_idle()


async def _unread(world: World, *nodes: FakeNode) -> Client:
    """Places a job whose reader does not take the match; its first node has output."""
    client = await world.place(*nodes)
    client.reads.clear()
    await quiet()
    nodes[0].accept(client.job.id)
    nodes[0].chunk(client.job.id)
    await quiet()
    assert client.kinds == [Kind.MATCH]
    return client


async def test_a_reader_does_not_keep_a_node_from_knowing_that_it_is_paid() -> None:
    """A node learns that its output arrived, once, even if the reader takes nothing; the response is then billed as usual."""
    world = World()
    node = world.node("ann")
    client = await _unread(world, node)
    assert node.got(Kind.CREDIT) == [bytes(4)]
    node.chunk(client.job.id)
    world.market.cancel(client.job.id)
    node.complete(client.job.id, outcome=Outcome.CLIENT_CANCELLED)
    await _pass(world, 50)
    client.reads.set()
    await quiet()
    assert node.got(Kind.CREDIT) == [bytes(4)]
    assert await world.stored(client) is State.CANCELLED
    tab = world.market.exposure.known(PAYER.address, node.address)
    assert tab is not None
    assert tab.cumulative == COST


async def test_output_behind_the_end_of_an_attempt_is_not_told_to_be_there() -> None:
    """Output that arrives after the attempt was interrupted gets no such credit: another attempt begins."""
    world = World(limits=JobLimits(reader=10_000))
    ann, bob = world.node("ann"), world.node("bob", output_price=9_000_000)
    client = await world.place(ann, bob)
    client.reads.clear()
    await quiet()
    client.job.interrupt(client.job.current, pack_link(GONE, client.job.id))
    ann.chunk(client.job.id)
    client.reads.set()
    await quiet()
    assert ann.got(Kind.CREDIT) == []
    assert bob.got(Kind.DISPATCH) != []
    bob.accept(client.job.id)
    bob.complete(client.job.id)
    await quiet()
    assert bob.got(Kind.CREDIT) == [bytes(4)]
    assert await world.stored(client) is State.COMPLETED
