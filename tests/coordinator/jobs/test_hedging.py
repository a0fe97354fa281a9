"""Hedging: a late job runs at a second provider too; the first output decides, and the other one charges nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from coordinator.domain.limits import JobLimits
from coordinator.domain.reputation import UNKNOWN_PROVIDER
from coordinator.jobs.attempt import OUTRUN
from tallystick.protocol.errors import Code, Fault, Refusal, Unavailable
from tallystick.protocol.jobs import State
from tallystick.protocol.link import Capacity
from tallystick.protocol.messages import Outcome
from tallystick.protocol.types import Amount
from tallystick.protocol.wire import Kind, pack_link
from tests.coordinator.harness import COST, PAYER, Client, FakeNode, World, hedged, quiet

LATE = 2.0
"""Seconds after which a job is hedged."""
VOID = {"outcome": Outcome.REFUSED, "input_tokens": 0, "output_tokens": 0, "cost": Amount(0)}


@pytest.fixture
def world() -> World:
    """A coordinator that may hedge every job."""
    return World(limits=JobLimits(hedge_share=1.0))


@pytest.fixture
def ann(world: World) -> FakeNode:
    """The cheaper of two nodes: jobs for both go to it first."""
    return world.node("ann")


@pytest.fixture
def bob(world: World) -> FakeNode:
    """The more expensive of two nodes."""
    return world.node("bob", output_price=9_000_000)


async def _place(world: World, *nodes: FakeNode, **changes: Any) -> Client:
    submission = hedged(world.submission(*nodes, **changes), LATE)
    client = world.read(await world.market.place_order(submission))
    await quiet()
    return client


async def _hedged(world: World, ann: FakeNode, bob: FakeNode) -> Client:
    """Returns the client of a job that runs at both nodes."""
    client = await _place(world, ann, bob)
    ann.accept(client.job.id)
    await world.pass_time(LATE)
    assert client.kinds == [Kind.MATCH, Kind.HEDGE]
    assert len(ann.got(Kind.DISPATCH)) == len(bob.got(Kind.DISPATCH)) == 1
    return client


def _lose(node: FakeNode, client: Client) -> None:
    """Ends an attempt as an honest node does that was outrun."""
    node.fail(client.job.id, Refusal(Code.CANCELLED, "outrun"), node.receipt(client.job.id, **VOID))


async def _states(world: World, client: Client) -> list[tuple[State, str, bool, bool]]:
    known = await world.store.job(client.job.id)
    assert known is not None
    return [(a.state, a.reason, a.hedged, a.outrun) for a in known.record.attempts]


async def test_the_second_provider_wins(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """The second provider's output decides: the first is told to stop, gives its receipt at no cost, and both slots are free."""
    client = await _hedged(world, ann, bob)
    assert world.market.exposure.in_flight == 2_000
    bob.accept(client.job.id)
    bob.chunk(client.job.id, b"from bob")
    assert ann.got(Kind.CANCEL) == [b"hedged"]
    assert (bob.got(Kind.CREDIT), ann.got(Kind.CREDIT)) == ([bytes(4)], [])
    ann.chunk(client.job.id, b"too late")
    _lose(ann, client)
    await quiet()
    assert client.kinds == [Kind.MATCH, Kind.HEDGE, Kind.MATCH, Kind.CHUNK, Kind.VOID]
    assert client.frames[2][1] == client.frames[1][1], "the match of the second attempt is told again once it counts"
    assert ann.got(Kind.RECEIPT_ACK) == [b""]
    bob.complete(client.job.id)
    await quiet()
    assert client.kinds[5:] == [Kind.CHUNK, Kind.RECEIPT]
    assert await _states(world, client) == [(State.CANCELLED, OUTRUN, False, True), (State.COMPLETED, "", True, False)]
    known = await world.store.job(client.job.id)
    assert known is not None
    assert known.receipt is not None
    assert known.receipt.message.provider == bob.address
    assert known.receipts[ann.address].message.cost == 0
    world.assert_idle()


async def test_the_first_provider_wins_after_all(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """If the late provider still is the first with output, the second one stops; the client gets no further match."""
    client = await _hedged(world, ann, bob)
    ann.chunk(client.job.id)
    assert bob.got(Kind.CANCEL) == [b"hedged"]
    ann.complete(client.job.id)
    await quiet()
    assert client.kinds == [Kind.MATCH, Kind.HEDGE, Kind.CHUNK, Kind.CHUNK, Kind.RECEIPT]
    assert await _states(world, client) == [(State.COMPLETED, "", False, False), (State.CANCELLED, OUTRUN, True, True)]
    world.assert_idle()
    receipt = bob.receipt(client.job.id, **VOID)
    assert await bob.hand_in_late(client.job.id, receipt), "a receipt that comes after the job is accepted"
    assert await world.stored(client) is State.COMPLETED
    assert world.market.hedging.counts == {"started": 1}


async def test_the_output_of_both_never_mixes(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """Output that both had before either was told to stop: the client gets the chunks of one."""
    client = await _hedged(world, ann, bob)
    assert ann.has(client.job.id)
    bob.chunk(client.job.id, b"bob 1")
    ann.chunk(client.job.id, b"ann 1")
    bob.chunk(client.job.id, b"bob 2")
    ann.last_chunk(client.job.id)
    bob.complete(client.job.id)
    await quiet()
    chunks = [payload for kind, payload in client.frames if kind is Kind.CHUNK]
    assert chunks[:2] == [b"bob 1", b"bob 2"]
    assert len(chunks) == 3
    assert client.kinds[-1] is Kind.RECEIPT
    world.assert_idle()


async def test_output_in_time_is_not_hedged(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """A job with output in time, and one whose client did not ask for it, stay with one provider."""
    client = await _place(world, ann, bob)
    ann.chunk(client.job.id)
    other = await world.started(ann, bob)
    await world.pass_time(LATE)
    assert bob.sent == []
    for each in (client, other):
        ann.complete(each.job.id)
    await quiet()
    world.assert_idle()


async def test_a_busy_second_provider(world: World, ann: FakeNode) -> None:
    """No second attempt begins without a free slot, nor on one that another job waits for."""
    cat = world.node("cat", slots=1, output_price=9_000_000)
    taken = await world.started(cat)
    client = await _place(world, ann, cat)
    await world.pass_time(LATE)
    assert client.kinds == [Kind.MATCH]
    assert world.market.hedging.counts == {"no_slot": 1}
    for each, node in ((taken, cat), (client, ann)):
        node.complete(each.job.id)
    await quiet()
    world.assert_idle()


async def test_a_payer_without_funds_for_two(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """Both attempts count against the purse: a payer that cannot pay two caps goes on with one."""
    world.funds.free[PAYER.address] = Amount(1_500)
    client = await _place(world, ann, bob)
    await world.pass_time(LATE)
    assert client.kinds == [Kind.MATCH]
    assert world.market.hedging.counts == {"not_admitted": 1}
    ann.complete(client.job.id)
    await quiet()
    world.assert_idle()


async def test_the_share_of_hedged_jobs() -> None:
    """The first job may be hedged, then one of each twenty."""
    world = World()
    ann, bob = world.node("ann", slots=100), world.node("bob", slots=100, output_price=9_000_000)
    for _ in range(45):
        client = await _place(world, ann, bob)
        await world.pass_time(LATE)
        ann.complete(client.job.id)
        await quiet()
    assert world.market.hedging.counts == {"started": 2, "share": 43}
    world.assert_idle()


async def test_no_hedging_at_all() -> None:
    """With a share of 0 no job is hedged."""
    world = World(limits=JobLimits(hedge_share=0))
    ann, bob = world.node("ann"), world.node("bob", output_price=9_000_000)
    client = await _place(world, ann, bob)
    await world.pass_time(LATE)
    assert client.kinds == [Kind.MATCH]
    assert bob.sent == []


async def test_a_provider_does_not_lose_without_end(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """A provider whose losses reach the limit takes part no more: its node would stop serving this coordinator."""
    world.market.hedging.losses.add_lost(ann.address, 20_001, 0)
    client = await _place(world, ann, bob)
    await world.pass_time(LATE)
    assert client.kinds == [Kind.MATCH]
    ann.complete(client.job.id)
    await quiet()
    world.market.hedging.losses.add_lost(bob.address, 20_001, 0)
    world.market.hedging.losses.add_earned(ann.address, 10**9, 0)
    client = await _place(world, ann, bob)
    await world.pass_time(LATE)
    assert world.market.hedging.counts == {"losses": 2}
    ann.complete(client.job.id)
    await quiet()
    world.assert_idle()


async def test_losses_are_counted_by_the_winners_usage(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """An outrun provider lost what the winner's usage costs at its own prices."""
    client = await _hedged(world, ann, bob)
    bob.complete(client.job.id)
    await quiet()
    losses = world.market.hedging.losses
    assert losses._providers[ann.address].lost == COST
    assert losses._providers[bob.address].earned == 10 + 5 * 9
    assert world.market.hedging.counts == {"started": 1, "won": 1}


async def test_losing_is_no_failure(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """The provider that lost keeps its reputation, whatever its node says in the end."""
    client = await _hedged(world, ann, bob)
    bob.chunk(client.job.id)
    ann.fail(client.job.id, Unavailable(Code.PROVIDER_FAILED, "broken", fault=Fault.PROVIDER))
    bob.complete(client.job.id)
    await quiet()
    assert world.market.reputation.score(ann.address) == UNKNOWN_PROVIDER.score
    assert world.market.reputation.score(bob.address) > UNKNOWN_PROVIDER.score


@pytest.mark.parametrize("how", ["fails", "leaves", "receipt", "bad request"])
async def test_the_first_provider_fails(world: World, ann: FakeNode, bob: FakeNode, how: str) -> None:
    """If the first of two providers fails before any output, the job goes on with the second, which was matched already."""
    client = await _hedged(world, ann, bob)
    if how == "leaves":
        ann.leave()
    elif how == "receipt":
        ann.finish(client.job.id, **(VOID | {"outcome": Outcome.PROVIDER_ERROR}))
    else:
        code = Code.BAD_MESSAGE if how == "bad request" else Code.ENGINE_UNAVAILABLE
        ann.fail(client.job.id, Unavailable(code, "away", fault=Fault.ENGINE))
    await quiet()
    void = [Kind.VOID] if how == "receipt" else []
    assert client.kinds == [Kind.MATCH, Kind.HEDGE, *void, Kind.MATCH]
    bob.complete(client.job.id)
    await quiet()
    assert client.kinds[-2:] == [Kind.CHUNK, Kind.RECEIPT]
    assert [state for state, *_ in await _states(world, client)] == [State.FAILED, State.COMPLETED]
    assert world.market.reputation.score(ann.address) < UNKNOWN_PROVIDER.score
    world.assert_idle()


async def test_a_place_in_an_engines_queue_is_no_hedge(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """A second attempt that would only wait is not begun."""
    world.market.matchmaker.set_capacity(bob.address, Capacity(2, 1, queue=2))
    client = await _place(world, ann, bob)
    ann.accept(client.job.id)
    await world.pass_time(LATE)
    assert (client.kinds, bob.got(Kind.DISPATCH)) == ([Kind.MATCH], [])
    ann.complete(client.job.id)
    await quiet()
    assert client.kinds[-1] is Kind.RECEIPT
    world.assert_idle()


async def test_the_second_provider_fails(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """If the second provider fails, the client gets its receipt at no cost, and the job goes on with the first."""
    client = await _hedged(world, ann, bob)
    bob.fail(client.job.id, receipt=bob.receipt(client.job.id, **VOID))
    await quiet()
    assert client.kinds == [Kind.MATCH, Kind.HEDGE, Kind.VOID]
    ann.complete(client.job.id)
    await quiet()
    assert client.kinds[-2:] == [Kind.CHUNK, Kind.RECEIPT]
    world.assert_idle()


async def test_both_fail_and_a_third_gets_it(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """If both fail before any output, the next candidate gets the job; a job is hedged once."""
    cat = world.node("cat", output_price=10_000_000)
    client = await _place(world, ann, bob, cat)
    await world.pass_time(LATE)
    bob.fail(client.job.id)
    ann.fail(client.job.id)
    await quiet()
    assert client.kinds == [Kind.MATCH, Kind.HEDGE, Kind.MATCH]
    assert client.job.provider == cat.address
    await world.pass_time(LATE)
    cat.complete(client.job.id)
    await quiet()
    assert await world.stored(client) is State.COMPLETED
    world.assert_idle()


async def test_the_winner_fails_after_its_output(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """Whoever wins with its first chunk and does not end properly fails the job and its reputation; nobody is paid."""
    client = await _hedged(world, ann, bob)
    bob.chunk(client.job.id, b"garbage")
    bob.fail(client.job.id)
    await quiet()
    assert client.kinds == [Kind.MATCH, Kind.HEDGE, Kind.MATCH, Kind.CHUNK, Kind.FAIL]
    assert world.market.reputation.score(bob.address) < UNKNOWN_PROVIDER.score
    assert world.market.reputation.score(ann.address) == UNKNOWN_PROVIDER.score
    world.assert_idle()


async def test_the_loser_cannot_charge(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """A receipt with which an outrun provider charges is refused, during the job and after it."""
    client = await _hedged(world, ann, bob)
    bob.chunk(client.job.id)
    ann.last_chunk(client.job.id)
    receipt = ann.receipt(client.job.id)
    ann.hand_in(client.job.id, receipt)
    await quiet()
    assert len(ann.got(Kind.RECEIPT_REFUSED)) == 1
    assert Kind.VOID not in client.kinds
    bob.complete(client.job.id)
    await quiet()
    with pytest.raises(Exception, match="the last chunk of the response never reached"):
        await ann.hand_in_late(client.job.id, receipt)
    known = await world.store.job(client.job.id)
    assert known is not None
    assert list(known.receipts) == [bob.address]
    world.assert_idle()


async def test_a_client_that_leaves(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """If the client leaves while two have the job, the second is outrun, and the first alone may charge the input."""
    client = await _hedged(world, ann, bob)
    world.market.cancel(client.job.id)
    assert (ann.got(Kind.CANCEL), bob.got(Kind.CANCEL)) == ([b"client"], [b"hedged"])
    bob.chunk(client.job.id, b"499")
    ann.chunk(client.job.id, b"499")
    assert (ann.got(Kind.CREDIT), bob.got(Kind.CREDIT)) == ([bytes(4)], [])
    ann.complete(client.job.id, outcome=Outcome.CLIENT_CANCELLED)
    await quiet()
    assert await world.stored(client) is State.CANCELLED
    world.assert_idle()


async def test_a_client_that_leaves_after_the_second_won(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """The winner is told of the cancel even if its first chunk was not relayed yet."""
    client = await _hedged(world, ann, bob)
    bob.chunk(client.job.id)
    world.market.cancel(client.job.id)
    assert (ann.got(Kind.CANCEL), bob.got(Kind.CANCEL)) == ([b"hedged"], [b"client"])
    bob.complete(client.job.id, outcome=Outcome.CLIENT_CANCELLED)
    await quiet()
    assert await world.stored(client) is State.CANCELLED
    world.assert_idle()


async def test_a_client_that_leaves_before_the_second_attempt(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """A cancelled job is not hedged."""
    client = await _place(world, ann, bob)
    world.market.cancel(client.job.id)
    await world.pass_time(LATE)
    assert bob.sent == []
    ann.fail(client.job.id)
    await quiet()
    world.assert_idle()


async def test_a_coordinator_that_stops_hedges_no_job(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """Its log of matches is closed, and the second provider would work for nothing."""
    client = await _place(world, ann, bob)
    ann.accept(client.job.id)
    stopping = asyncio.create_task(world.market.dismiss_nodes(60))
    await quiet()
    await world.pass_time(LATE)
    assert bob.got(Kind.DISPATCH) == []
    ann.fail(client.job.id)
    await quiet()
    assert stopping.done()
    assert client.failure.code is Code.COORDINATOR_UNAVAILABLE
    world.assert_idle()


async def test_a_loser_that_says_nothing(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """An outrun node that never ends its attempt holds its slot for a while, and no longer."""
    client = await _hedged(world, ann, bob)
    bob.chunk(client.job.id)
    await quiet()
    node = world.market.book.node(ann.address)
    assert node is not None
    assert node.assigned == 1
    await world.pass_time(16)
    assert node.assigned == 0
    assert ann.got(Kind.CANCEL) == [b"hedged"]
    bob.complete(client.job.id)
    await quiet()
    world.assert_idle()


async def test_each_attempt_has_a_deadline(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """A late first provider is given up at its own deadline while the second goes on."""
    client = await _place(world, ann, bob)
    await world.pass_time(LATE)
    bob.accept(client.job.id)
    await world.pass_time(9)
    assert ann.got(Kind.CANCEL) == [b"timed_out"]
    assert bob.got(Kind.CANCEL) == []
    bob.complete(client.job.id)
    await quiet()
    assert await world.stored(client) is State.COMPLETED
    world.assert_idle()


async def test_the_reader_goes_away_for_good(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """If nobody drives the job any more, both nodes are told to stop and both slots are free."""
    client = await _hedged(world, ann, bob)
    assert client.task is not None
    client.task.cancel()
    await quiet()
    assert (ann.got(Kind.CANCEL), bob.got(Kind.CANCEL)) == ([b"coordinator"], [b"coordinator"])
    assert await world.stored(client) is State.FAILED
    world.assert_idle()


async def test_the_coordinator_dies_in_between(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """After a restart, both attempts are closed, and each provider's receipt at no cost is still accepted."""
    client = await _hedged(world, ann, bob)
    await world.restart()
    assert [state for state, *_ in await _states(world, client)] == [State.FAILED, State.FAILED]
    for node in (ann, bob):
        receipt = node.receipt(client.job.id, **(VOID | {"outcome": Outcome.PROVIDER_ERROR}))
        assert await node.hand_in_late(client.job.id, receipt)
    known = await world.store.job(client.job.id)
    assert known is not None
    assert {provider: receipt.message.cost for provider, receipt in known.receipts.items()} == {ann.address: 0, bob.address: 0}


async def test_the_store_is_down_for_the_second_attempt(
    world: World, ann: FakeNode, bob: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second attempt that cannot be stored does not begin; the job goes on."""
    client = await _place(world, ann, bob)

    def refuse(_record: object) -> None:
        raise Unavailable(Code.DATABASE_UNAVAILABLE, "too slow", fault=Fault.COORDINATOR)

    with monkeypatch.context() as patched:
        patched.setattr(world.store, "enqueue_job", refuse)
        await world.pass_time(LATE)
    assert bob.sent == []
    ann.complete(client.job.id)
    await quiet()
    assert client.kinds[-1] is Kind.RECEIPT
    world.assert_idle()


async def test_a_hedge_that_comes_too_late(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """Output that arrives while the second provider is being chosen makes it superfluous."""
    client = await _place(world, ann, bob)
    world.clock.seconds += LATE
    world.clock.run_due()
    ann.chunk(client.job.id)
    await quiet()
    assert bob.got(Kind.DISPATCH) == []
    ann.complete(client.job.id)
    await quiet()
    assert client.kinds == [Kind.MATCH, Kind.CHUNK, Kind.CHUNK, Kind.RECEIPT]
    world.assert_idle()


async def test_the_first_fails_while_the_second_is_chosen(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """A failure while the second provider is being chosen is an ordinary failover; no slot is lost."""
    client = await _place(world, ann, bob)
    world.clock.seconds += LATE
    world.clock.run_due()
    ann.fail(client.job.id)
    await quiet()
    assert client.kinds[0] is Kind.MATCH
    assert client.kinds[-1] is Kind.MATCH
    assert len(bob.got(Kind.DISPATCH)) == 1
    bob.complete(client.job.id)
    await quiet()
    world.assert_idle()


async def test_both_are_lost(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """If both nodes disconnect, the job fails once."""
    client = await _hedged(world, ann, bob)
    for node in (ann, bob):
        node.leave()
    await quiet()
    assert client.kinds[-1] is Kind.FAIL
    assert await world.stored(client) is State.FAILED
    world.assert_idle()


async def test_a_queued_job_is_hedged_from_its_match_on(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """The time in the queue does not count; a job that never waited in vain is hedged after its dispatch."""
    cat = world.node("cat", slots=1)
    taken = await world.started(cat)
    client = await _place(world, cat)
    await world.pass_time(LATE)
    assert Kind.HEDGE not in client.kinds
    cat.complete(taken.job.id)
    await quiet()
    assert client.kinds[-1] is Kind.MATCH
    await world.pass_time(LATE)
    cat.complete(client.job.id)
    await quiet()
    world.assert_idle()


async def test_frames_of_a_third_provider_do_not_reach_it(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """What a provider without an attempt at the job sends for it is left to the link's task, as if the job had ended."""
    cat = world.node("cat")
    client = await _hedged(world, ann, bob)
    frame = pack_link(Kind.CHUNK, client.job.id, b"cat")
    assert world.market.node_frames.take(cat.address, (frame,)) == (frame,)
    assert not client.job.current.chunks
    bob.complete(client.job.id)
    await quiet()
    world.assert_idle()


async def _first_output(world: World, ann: FakeNode, bob: FakeNode, *, slow: bool, hedge: bool) -> float:
    """Returns the seconds until the first output of one job, for which the first provider takes 0.1 s or 10 s."""
    submission = world.submission(ann, bob)
    client = world.read(await world.market.place_order(hedged(submission, LATE) if hedge else submission))
    await quiet()
    began = world.clock.seconds
    node, seconds = ann, 10.0 if slow else 0.1
    ann.accept(client.job.id)
    if slow:
        await world.pass_time(LATE)
        seconds -= LATE
        if bob.got(Kind.DISPATCH, client.job.id):
            node, seconds = bob, 0.1
    await world.pass_time(seconds)
    node.complete(client.job.id)
    await quiet()
    assert await world.stored(client) is State.COMPLETED
    return world.clock.seconds - began


async def test_the_tail_is_cut() -> None:
    """One job of 25 is slow at its first provider: with the share of 5 % alone, hedging cuts the slowest from 10 s to 2.1 s."""
    worst = {}
    for hedge in (False, True):
        world = World()
        ann, bob = world.node("ann", slots=8), world.node("bob", slots=8, output_price=9_000_000)
        times = [await _first_output(world, ann, bob, slow=number % 25 == 24, hedge=hedge) for number in range(100)]
        worst[hedge] = max(times)
        assert len(bob.got(Kind.DISPATCH)) == (4 if hedge else 0)
        world.assert_idle()
    assert worst == pytest.approx({False: 10, True: LATE + 0.1})
