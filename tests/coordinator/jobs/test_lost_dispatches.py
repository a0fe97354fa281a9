"""Jobs that were sent to a node whose connection broke: the node is asked to release orders that it may never have got."""

from __future__ import annotations

import pytest

from coordinator.jobs import lost_dispatches
from coordinator.ports import node_subject
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.protocol.jobs import State
from tallystick.protocol.messages import Outcome
from tallystick.protocol.types import Amount
from tallystick.protocol.wire import CancelReason, Dispatch, Kind
from tests.coordinator.harness import Client, FakeNode, World, quiet


def _come_back(world: World, node: FakeNode) -> None:
    node.connect()
    world.market.node_connected(node.address, trace=False, resume=True)


async def _lost(world: World, node: FakeNode, *others: FakeNode) -> Client:
    """A job that was sent to a node which then lost its connection, without a sign that it got the job."""
    client = await world.started(node, *others)
    node.leave()
    await quiet()
    return client


@pytest.mark.parametrize("others", [0, 1])
async def test_a_node_that_is_back_gets_the_order_without_the_request(world: World, others: int) -> None:
    """Whether the job failed meanwhile or runs elsewhere. The receipt at no cost is stored, and changes nothing else."""
    node, *rest = [world.node(name, output_price=price) for name, price in (("ann", 1_000_000), ("bob", 9_000_000))[: 1 + others]]
    client = await _lost(world, node, *rest)
    (first,) = node.got(Kind.DISPATCH)
    sent = Dispatch.loads(first)
    _come_back(world, node)
    again = Dispatch.loads(node.got(Kind.DISPATCH)[1])
    assert (again.match.dumps(), again.candidate) == (sent.match.dumps(), sent.candidate)
    assert (len(sent.sealed) > 0, len(again.sealed)) == (True, 0)
    assert node.got(Kind.CANCEL, client.job.id) == [CancelReason.COORDINATOR.value.encode()]

    free = node.receipt(client.job.id, outcome=Outcome.REFUSED, cost=Amount(0), cumulative_cost=Amount(0))
    busy = Unavailable(Code.NODE_BUSY, "the job was cancelled before it began", fault=Fault.PROVIDER)
    node.fail(client.job.id, busy, free)
    assert await node.hand_in_late(client.job.id, free)
    for other in rest:
        other.complete(client.job.id)
    await quiet()
    assert client.ended
    known = await world.store.job(client.job.id)
    assert known is not None
    assert known.receipts[node.address].message == free.message
    assert known.record.state is (State.COMPLETED if others else State.FAILED)
    _come_back(world, node)
    assert len(node.got(Kind.DISPATCH)) == 2, "once is enough"
    world.assert_idle()


async def test_a_node_that_was_never_connected_gets_it_when_it_is(world: World) -> None:
    """The dispatch itself found no connection: the client was told of the match nevertheless."""
    node = world.node("ann")
    node.bus.detach(node_subject(node.address), node.receive)
    client = await world.started(node)
    assert client.failure.code is Code.NODE_GONE
    assert node.got(Kind.DISPATCH) == []
    _come_back(world, node)
    (payload,) = node.got(Kind.DISPATCH)
    assert len(Dispatch.loads(payload).sealed) == 0


async def test_a_node_that_offers_nothing_yet_gets_it_again(world: World) -> None:
    """After a kill it may sign no receipts before it knows what it signed before; then it has asks."""
    node = world.node("ann")
    await _lost(world, node)
    asks, node.asks = node.asks, ()
    _come_back(world, node)
    assert len(node.got(Kind.DISPATCH)) == 2
    world.market.matchmaker.replace_asks(node.address, asks)
    for count in (3, 3):
        world.market.node_offers(node.address)
        assert len(node.got(Kind.DISPATCH)) == count


async def test_after_the_deadline_nothing_is_sent(world: World) -> None:
    """A node remembers the orders that it had until then, so it could not tell an old one from one that is new."""
    node = world.node("ann")
    client = await _lost(world, node)
    order, _ = node.dispatch(client.job.id)
    await world.pass_time(order.message.deadline - world.clock.now() + 1)
    _come_back(world, node)
    assert len(node.got(Kind.DISPATCH)) == 1


async def test_an_answer_that_goes_on_is_not_stopped(world: World) -> None:
    """A node that has begun its answer is asked for the rest of it, not for the release of its order."""
    node = world.node("ann")
    world.market.node_connected(node.address, trace=False, resume=True)
    client = await world.started(node)
    node.chunk(client.job.id)
    await quiet()
    node.leave()
    _come_back(world, node)
    assert (len(node.got(Kind.DISPATCH)), len(node.got(Kind.RESUME)), node.got(Kind.CANCEL)) == (1, 1, [])


async def test_what_waits_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest dispatches of a node make room, and the nodes that have been away longest."""
    monkeypatch.setattr(lost_dispatches, "MAX_OF_NODE", 2)
    monkeypatch.setattr(lost_dispatches, "MAX_NODES", 2)
    nodes = [world.node(name) for name in ("ann", "bob", "cid")]
    for node in nodes:
        for _ in range(3):
            client = await world.started(node)
            node.leave()
            await quiet()
            assert client.ended
            node.connect()  # without the notice that would have it sent
        node.leave()
    counts = []
    for node in nodes:
        before = len(node.got(Kind.DISPATCH))
        _come_back(world, node)
        counts.append(len(node.got(Kind.DISPATCH)) - before)
    assert counts == [0, 2, 2]
