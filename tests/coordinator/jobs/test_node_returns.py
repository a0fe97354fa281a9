"""Nodes that lose their connection after output had begun: what was lost with it is sent again once they are back."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.domain.reputation import UNKNOWN_PROVIDER
from tallystick.protocol.errors import Code, Fault
from tallystick.protocol.jobs import State
from tallystick.protocol.messages import Outcome
from tallystick.protocol.types import Amount
from tallystick.protocol.wire import CancelReason, Kind
from tests.coordinator.harness import Client, FakeNode, World, quiet


async def _began(world: World) -> tuple[FakeNode, Client]:
    """A job with one chunk at a node that takes RESUME frames."""
    node = world.node("ann")
    world.market.node_connected(node.address, trace=False, resume=True)
    client = await world.started(node)
    node.chunk(client.job.id)
    await quiet()
    return node, client


def _come_back(world: World, node: FakeNode) -> None:
    node.connect()
    world.market.node_connected(node.address, trace=False, resume=True)


async def test_a_last_chunk_that_was_lost_comes_when_its_node_is_back(world: World) -> None:
    """The node is told how many chunks came. The client gets the whole answer with its receipt, as if nothing had happened."""
    node, client = await _began(world)
    node.leave()
    await quiet()
    assert client.kinds == [Kind.MATCH, Kind.CHUNK]
    _come_back(world, node)
    assert node.got(Kind.RESUME, client.job.id) == [(1).to_bytes(4, "big")]
    receipt = node.complete(client.job.id)
    await quiet()
    assert client.kinds == [Kind.MATCH, Kind.CHUNK, Kind.CHUNK, Kind.RECEIPT]
    assert node.got(Kind.RECEIPT_ACK, client.job.id)
    assert receipt.message.cost
    assert await world.stored(client) is State.COMPLETED
    world.assert_idle()


async def test_a_receipt_that_overtakes_the_lost_chunks_is_not_refused(world: World) -> None:
    """A node sends it at once when it is back. It counts when it comes again after the chunks."""
    node, client = await _began(world)
    receipt = node.receipt(client.job.id)
    node.leave()
    _come_back(world, node)
    node.hand_in(client.job.id, receipt)
    await quiet()
    assert (client.ended, node.got(Kind.RECEIPT_REFUSED)) == (False, [])
    node.last_chunk(client.job.id)
    node.hand_in(client.job.id, receipt)
    await quiet()
    assert client.kinds[-1] is Kind.RECEIPT
    assert await world.stored(client) is State.COMPLETED


async def test_a_receipt_between_the_lost_chunks_is_not_refused(world: World) -> None:
    """A node that sends its receipts again does so beside the lost chunks."""
    node, client = await _began(world)
    receipt = node.receipt(client.job.id)
    node.leave()
    _come_back(world, node)
    for send in (node.chunk, node.last_chunk):
        node.hand_in(client.job.id, receipt)
        await quiet()
        assert (client.ended, node.got(Kind.RECEIPT_REFUSED)) == (False, [])
        send(client.job.id)
        await quiet()
    node.hand_in(client.job.id, receipt)
    await quiet()
    assert client.kinds == [Kind.MATCH, *[Kind.CHUNK] * 3, Kind.RECEIPT]
    assert await world.stored(client) is State.COMPLETED


async def test_a_node_that_is_back_has_one_receipt(world: World) -> None:
    """Each one costs a check of its signature, so no node sends others without end."""
    node, client = await _began(world)
    receipts = [node.receipt(client.job.id) for _ in range(2)]
    node.leave()
    _come_back(world, node)
    node.hand_in(client.job.id, receipts[0])
    await quiet()
    assert not client.ended
    node.hand_in(client.job.id, receipts[1])
    await quiet()
    assert client.failure.code is Code.UNDELIVERED
    assert node.got(Kind.RECEIPT_REFUSED, client.job.id)
    world.assert_idle()


async def test_a_node_that_stopped_the_job_says_so_when_it_is_back(world: World) -> None:
    """Its receipt at no cost ends the job, without waiting for more."""
    node, client = await _began(world)
    receipt = node.receipt(client.job.id, outcome=Outcome.PROVIDER_ERROR)
    node.leave()
    _come_back(world, node)
    node.hand_in(client.job.id, receipt)
    await quiet()
    assert client.kinds[-1] is Kind.RECEIPT
    assert await world.stored(client) is State.FAILED
    world.assert_idle()


@pytest.mark.parametrize("comes_back", [True, False])
async def test_a_node_that_sends_nothing_more_has_left(world: World, *, comes_back: bool) -> None:
    """The wait has a limit, which a connection without the lost chunks does not extend. What was not delivered is refused."""
    node, client = await _began(world)
    receipt = node.receipt(client.job.id)
    node.leave()
    if comes_back:
        _come_back(world, node)
        node.hand_in(client.job.id, receipt)
    await world.pass_time(world.limits.node_return)
    assert not client.ended
    await world.pass_time(1)
    assert (client.failure.code, client.failure.fault) == (Code.NODE_GONE, Fault.PROVIDER)
    assert await world.stored(client) is State.FAILED
    world.assert_idle()


async def test_a_second_loss_has_the_same_limit_until_a_chunk_comes(world: World) -> None:
    """A node that connects again and again does not keep its job for ever."""
    node, client = await _began(world)
    for _ in range(2):
        node.leave()
        await world.pass_time(world.limits.node_return / 2)
        _come_back(world, node)
    node.chunk(client.job.id)
    await quiet()
    node.leave()
    await world.pass_time(world.limits.node_return)
    assert not client.ended, "a chunk came, so the wait begins anew"
    await world.pass_time(1)
    assert client.failure.code is Code.NODE_GONE


async def test_a_job_without_output_waits_for_nobody(world: World) -> None:
    """Another provider can have it."""
    ann, bob = world.node("ann"), world.node("bob", output_price=9_000_000)
    world.market.node_connected(ann.address, trace=False, resume=True)
    client = await world.started(ann, bob)
    ann.leave()
    await quiet()
    assert bob.got(Kind.DISPATCH, client.job.id)


async def test_what_came_in_whole_ends_when_the_receipt_is_sent_again(world: World) -> None:
    """If only the receipt was lost, the node is asked for no chunk."""
    node, client = await _began(world)
    node.last_chunk(client.job.id)
    receipt = node.receipt(client.job.id)
    node.leave()
    _come_back(world, node)
    assert node.got(Kind.RESUME, client.job.id) == [(2).to_bytes(4, "big")]
    node.hand_in(client.job.id, receipt)
    await quiet()
    assert client.kinds[-1] is Kind.RECEIPT


async def test_a_stop_reads_what_nodes_had_sent(world: World) -> None:
    """A coordinator that stops tells its nodes, and reads on until they answer: a signed receipt is for an answer that came."""
    node, client = await _began(world)
    stopping = asyncio.create_task(world.market.dismiss_nodes(60))
    await quiet()
    assert node.got(Kind.CANCEL, client.job.id) == [CancelReason.COORDINATOR.value.encode()]
    assert not stopping.done()
    node.complete(client.job.id)
    await quiet()
    assert stopping.done()
    assert client.kinds[-1] is Kind.RECEIPT
    assert await world.stored(client) is State.COMPLETED


@pytest.mark.parametrize("began", [True, False])
async def test_a_node_that_is_told_to_stop_is_not_to_blame(world: World, *, began: bool) -> None:
    """Its receipt at no cost is stored, the client learns that the coordinator stops, and no other node gets the job."""
    node, other = world.node("ann"), world.node("bob", output_price=9_000_000)
    client = await world.started(node, other)
    if began:
        node.chunk(client.job.id)
    stopping = asyncio.create_task(world.market.dismiss_nodes(60))
    await quiet()
    receipt = node.receipt(client.job.id, outcome=Outcome.PROVIDER_ERROR)
    assert receipt.message.cost == Amount(0)
    if began:
        node.hand_in(client.job.id, receipt)
    else:
        node.fail(client.job.id, receipt=receipt)
    await quiet()
    assert stopping.done()
    assert (client.failure.code, client.failure.fault) == (Code.COORDINATOR_UNAVAILABLE, Fault.COORDINATOR)
    assert node.got(Kind.RECEIPT_ACK, client.job.id)
    assert other.sent == []
    assert world.market.reputation.score(node.address) == UNKNOWN_PROVIDER.score
    world.assert_idle()


async def test_a_job_that_its_node_does_not_have_yet_stays_here(world: World) -> None:
    """Its node, which would be told to stop before it has the job, never gets it."""
    node = world.node("ann")
    job = await world.market.place_order(world.submission(node))
    stopping = asyncio.create_task(world.market.dismiss_nodes(60))
    await quiet()
    client = world.read(job)
    await quiet()
    assert (node.got(Kind.DISPATCH), stopping.done()) == ([], True)
    assert client.failure.code is Code.COORDINATOR_UNAVAILABLE
    world.assert_idle()


async def test_a_stop_waits_for_no_node_that_is_away(world: World) -> None:
    """Nobody knows what such a node had sent, so its receipt tells how the job ended."""
    node, client = await _began(world)
    receipt = node.receipt(client.job.id)
    node.leave()
    await world.market.dismiss_nodes(60)
    assert client.failure.code is Code.COORDINATOR_UNAVAILABLE
    await world.restart()
    assert await node.hand_in_late(client.job.id, receipt)


async def test_a_coordinator_that_stops_waits_for_no_return(world: World) -> None:
    """A node that is lost after it was told to stop ends its job at once."""
    node, client = await _began(world)
    stopping = asyncio.create_task(world.market.dismiss_nodes(60))
    await quiet()
    node.leave()
    await quiet()
    assert stopping.done()
    assert client.failure.code is Code.COORDINATOR_UNAVAILABLE
