"""The normal life of a job: order, match, credit, beats, cancel."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from coordinator.domain.reputation import UNKNOWN_PROVIDER
from coordinator.jobs.node_frames import CREDIT_STEP
from tallystick.protocol.criteria import Demand
from tallystick.protocol.eip712 import read_signed_bytes
from tallystick.protocol.errors import BadMessage, BadSignature, Code, Unavailable
from tallystick.protocol.jobs import State
from tallystick.protocol.link import Capacity
from tallystick.protocol.match_log import Match
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import Dispatch, Kind
from tests.coordinator.harness import (
    CAP,
    COST,
    DOMAIN,
    LAST_CHUNK,
    MODEL,
    PAYER,
    START,
    Client,
    Frames,
    World,
    make_ask,
    person,
    quiet,
    unchecked,
)


async def test_a_job_from_order_to_receipt(world: World) -> None:
    """Match, output and receipt reach the client in order; the receipt is stored and acknowledged, and nothing is held after."""
    node = world.node("ann")
    client = await world.started(node)
    job = client.job.id
    assert world.market.exposure.in_flight == CAP
    node.accept(job)
    node.chunk(job, b"one")
    node.chunk(job, b"two")
    receipt = node.complete(job)
    await quiet()
    assert client.kinds == [Kind.MATCH, *[Kind.CHUNK] * 3, Kind.RECEIPT]
    assert [payload for kind, payload in client.frames if kind is Kind.CHUNK] == [b"one", b"two", LAST_CHUNK]
    assert read_signed_bytes(Receipt, client.frames[-1][1]) == unchecked(receipt)
    assert await world.stored(client) is State.COMPLETED
    assert node.got(Kind.RECEIPT_ACK, job) == [b""]
    tab = world.market.exposure.known(PAYER.address, node.address)
    assert tab is not None
    assert tab.cumulative == COST
    world.assert_idle()


async def test_client_and_node_get_the_logged_match(world: World) -> None:
    """Client and node get the same match, whose leaf commits to the order; the sealed body is unchanged."""
    node = world.node("ann")
    client = await world.started(node)
    dispatch = Dispatch.loads(node.got(Kind.DISPATCH, client.job.id)[0])
    match = Match.loads(client.frames[0][1])
    assert match == dispatch.match
    match.check(client.job.id, dispatch.candidate.order.verify(DOMAIN).digest, node.address, PAYER.address)
    assert (match.decision.attempt, match.decision.at, match.decision.model) == (0, START, MODEL)
    assert dispatch.sealed == client.job.submission.sealed


async def test_the_cheapest_candidate_gets_the_job(world: World) -> None:
    """Of the orders that a client signed, the one on the cheapest ask is matched, and no other node gets the job."""
    expensive, cheap = world.node("ann", output_price=9_000_000), world.node("bob")
    client = await world.started(expensive, cheap)
    assert client.job.provider == cheap.address
    assert expensive.sent == []


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        (Outcome.COMPLETED, State.COMPLETED),
        (Outcome.LENGTH, State.COMPLETED),
        (Outcome.CLIENT_CANCELLED, State.CANCELLED),
        (Outcome.PROVIDER_ERROR, State.FAILED),
        (Outcome.UPSTREAM_ERROR, State.FAILED),
        (Outcome.TIMED_OUT, State.EXPIRED),
        (Outcome.REFUSED, State.FAILED),
    ],
)
async def test_a_receipts_outcome_ends_the_job(world: World, outcome: Outcome, state: State) -> None:
    """A job ends with the outcome of its receipt."""
    node = world.node("ann")
    client = await world.started(node)
    if outcome is Outcome.CLIENT_CANCELLED:
        world.market.cancel(client.job.id)
    node.complete(client.job.id, outcome=outcome)
    await quiet()
    assert client.kinds[-1] is Kind.RECEIPT
    assert await world.stored(client) is state
    world.assert_idle()


async def test_slots_are_counted(world: World) -> None:
    """A node with two slots gets two jobs, and the next one when one of them ends."""
    node = world.node("ann", slots=2)
    first, _ = await world.started(node), await world.started(node)
    with pytest.raises(Unavailable) as caught:
        await world.market.place_order(replace(world.submission(node), wait=0))
    assert "no free slot" in str(caught.value)
    await world.started(node)
    assert len(node.got(Kind.DISPATCH)) == 2
    node.complete(first.job.id)
    await quiet()
    assert len(node.got(Kind.DISPATCH)) == 3


async def test_a_reconnected_node_starts_with_its_own_count(world: World) -> None:
    """The end of a job of a lost connection does not free a slot of the new connection."""
    node, other = world.node("ann", slots=1), world.node("bob", output_price=9_000_000)
    old = await world.started(node, other)
    node.bus.detach(f"node.{node.address}", node.receive)
    world.market.book.drop(node.address)  # the job has no notice of this yet
    node.connect()
    new = await world.started(node)
    assert new.job.provider == node.address
    node.fail(old.job.id)
    await quiet()
    known = world.market.book.node(node.address)
    assert known is not None
    assert known.assigned == 1


# Credit and beats


NOTHING = bytes(4)
"""Credit for no more chunks, which tells the node that its output arrived."""


async def _stream(world: World, chunks: int) -> Client:
    node = world.nodes[0]
    client = await world.started(node)
    for _ in range(chunks):
        node.chunk(client.job.id)
    await quiet()
    return client


async def test_credit_is_granted_as_the_client_reads(world: World) -> None:
    """For every 32 chunks that the client took, the node gets credit for 32 more."""
    node = world.node("ann")
    client = await _stream(world, CREDIT_STEP - 1)
    assert node.got(Kind.CREDIT) == [NOTHING]
    node.chunk(client.job.id)
    await quiet()
    assert node.got(Kind.CREDIT, client.job.id) == [NOTHING, CREDIT_STEP.to_bytes(4, "big")]


async def test_a_node_is_told_that_its_output_came(world: World) -> None:
    """With its first chunk, the node is told that no other attempt will begin: from then on it may charge."""
    node = world.node("ann")
    client = await world.started(node)
    node.accept(client.job.id)
    await quiet()
    assert node.got(Kind.CREDIT) == []
    node.chunk(client.job.id)
    await quiet()
    assert node.got(Kind.CREDIT, client.job.id) == [NOTHING]
    node.chunk(client.job.id)
    await quiet()
    assert len(node.got(Kind.CREDIT)) == 1


async def test_a_client_that_does_not_read_grants_no_credit(world: World) -> None:
    """Chunks that wait for the client stay in the inbox and earn the node no credit."""
    node = world.node("ann")
    client = await world.started(node)
    client.reads.clear()
    for _ in range(2 * CREDIT_STEP):
        node.chunk(client.job.id)
    await quiet()
    assert node.got(Kind.CREDIT) == [NOTHING]
    assert client.kinds == [Kind.MATCH, Kind.CHUNK]
    client.reads.set()
    await quiet()
    assert len(node.got(Kind.CREDIT)) == 3


async def test_silence_beats_for_the_client(world: World) -> None:
    """While a node is silent, the client gets a BEAT every ten seconds, not at every sweep."""
    node = world.node("ann")
    client = await world.started(node)
    node.accept(client.job.id)
    for _ in range(22):
        await world.pass_time(1)
    assert client.kinds == [Kind.MATCH, Kind.BEAT, Kind.BEAT]
    node.chunk(client.job.id)
    for _ in range(10):
        await world.pass_time(1)
    assert client.kinds == [Kind.MATCH, Kind.BEAT, Kind.BEAT, Kind.CHUNK]


# Cancelling


async def test_a_cancelled_job_ends_with_its_receipt(world: World) -> None:
    """A cancel tells the node once; the job then ends with the receipt for the work done."""
    node = world.node("ann")
    client = await world.started(node)
    node.chunk(client.job.id)
    await quiet()
    assert world.market.cancel(client.job.id)
    assert world.market.cancel(client.job.id)
    assert len(node.got(Kind.CANCEL)) == 1
    node.complete(client.job.id, outcome=Outcome.CLIENT_CANCELLED)
    await quiet()
    assert client.kinds[-1] is Kind.RECEIPT
    assert await world.stored(client) is State.CANCELLED
    assert not world.market.cancel(client.job.id)
    world.assert_idle()


async def test_a_node_that_ignores_cancelling_is_given_up(world: World) -> None:
    """Fifteen seconds after its node was told to stop, a job ends, even if the node still streams."""
    node = world.node("ann")
    client = await world.started(node)
    world.market.cancel(client.job.id)
    for _ in range(16):
        node.accept(client.job.id)
        node.chunk(client.job.id)
        await world.pass_time(1)
    assert await world.stored(client) is State.CANCELLED
    assert (client.failure.code, client.kinds.count(Kind.FAIL)) == (Code.TIMED_OUT, 1)
    world.assert_idle()


async def test_a_job_cancelled_before_it_left_is_not_dispatched(world: World) -> None:
    """A client that leaves before its job was dispatched costs no provider any work."""
    node = world.node("ann")
    job = await world.market.place_order(world.submission(node))
    assert world.market.cancel(job.id)
    client = world.read(job)
    await quiet()
    assert node.got(Kind.DISPATCH) == []
    assert client.failure.code is Code.CANCELLED
    assert await world.stored(client) is State.CANCELLED
    world.assert_idle()


async def test_a_cancelled_job_does_not_fail_over(world: World) -> None:
    """When a node fails a cancelled job, no other node gets it."""
    ann, bob = world.node("ann"), world.node("bob", output_price=9_000_000)
    client = await world.started(ann, bob)
    world.market.cancel(client.job.id)
    ann.fail(client.job.id)
    await quiet()
    assert bob.sent == []
    assert await world.stored(client) is State.CANCELLED
    world.assert_idle()


async def test_an_unknown_job_cannot_be_cancelled(world: World) -> None:
    """Cancelling an unknown job returns False."""
    assert not world.market.cancel(JobId(bytes(16)))


async def test_a_run_that_is_closed_early_fails_its_job(world: World) -> None:
    """If the run is closed early, the node is told to stop, the job ends as failed, and nothing is held."""
    node = world.node("ann")
    job = await world.market.place_order(world.submission(node))
    frames = Frames(world.market, job)
    assert (await anext(frames))[0] is Kind.MATCH
    await frames.aclose()
    assert node.got(Kind.CANCEL, job.id) == [b"coordinator"]
    known = await world.store.job(job.id)
    assert known is not None
    assert (known.record.state, known.record.last.state) == (State.FAILED, State.FAILED)
    assert "stopped relaying" in known.record.last.reason
    world.assert_idle()


# Asks


async def test_forged_asks_do_not_stand(world: World) -> None:
    """An ask that its provider did not sign, or of another provider, is refused and changes nothing."""
    node = world.node("ann")
    forged = unchecked(node.ask)
    with pytest.raises(BadSignature):
        world.market.matchmaker.replace_asks(node.address, [replace(forged, message=replace(forged.message, output_price=1))])
    with pytest.raises(BadMessage, match="another provider"):
        world.market.matchmaker.replace_asks(node.address, [make_ask(person("bob"))])
    assert world.market.book.find(node.ask.digest) is not None


async def test_capacity_of_a_stranger_is_ignored(world: World) -> None:
    """A capacity of a node that is not connected changes nothing."""
    world.market.matchmaker.set_capacity(person("ann").address, Capacity(9, 9))
    assert world.market.book.node(person("ann").address) is None


async def test_shortlists_come_from_the_book(world: World) -> None:
    """The market ranks the currently listed asks."""
    node = world.node("ann")
    assert [s.node.provider for s in world.market.matchmaker.shortlist(Demand(model=node.ask.message.model))] == [node.address]


async def test_draining_waits_for_live_jobs(world: World) -> None:
    """A coordinator that stops accepts no orders and lets its live jobs end."""
    node = world.node("ann")
    client = await world.started(node)
    drained = asyncio.create_task(world.market.drain(60))
    await quiet()
    with pytest.raises(Unavailable, match="is stopping"):
        await world.place(node)
    assert not drained.done()
    node.complete(client.job.id)
    await quiet()
    assert drained.done()


async def test_jobs_cut_off_by_a_stop_blame_nobody(world: World) -> None:
    """A job that a stopping coordinator ends is its own fault: no provider loses reputation, and no other node gets the job."""
    ann, bob = world.node("ann"), world.node("bob", output_price=9_000_000)
    client = await world.started(ann, bob)
    await world.market.drain(0)
    ann.leave()
    await quiet()
    assert client.failure.code is Code.COORDINATOR_UNAVAILABLE
    assert client.failure.retry
    assert bob.sent == []
    assert world.market.reputation.score(ann.address) == UNKNOWN_PROVIDER.score
    assert await world.stored(client) is State.FAILED
    world.assert_idle()
