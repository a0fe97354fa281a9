"""Waiting jobs are told of asks that they have no order on, and further orders join them without costing them their place."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.jobs.invitations import ANSWER_SECONDS
from tallystick.protocol.errors import Code, Refusal, TallyError, Unavailable
from tallystick.protocol.link import read_ask
from tallystick.protocol.messages import Spec
from tallystick.protocol.payer_rules import PayerRule
from tallystick.protocol.queue_place import MAX_INVITATIONS, QueuePlace
from tallystick.protocol.types import Address, Amount
from tallystick.protocol.wire import Candidate, Kind
from tests.coordinator.harness import CAP, PAYER, Client, FakeNode, World, make_ask, make_submission, person, quiet


@pytest.fixture
def world() -> World:
    """A market whose payer can pay for many jobs."""
    world = World()
    world.funds.free[PAYER.address] = Amount(1_000 * CAP)
    return world


def _invited(client: Client) -> list[Address]:
    """The providers that a client was told of while its job waited."""
    places = [QueuePlace.loads(payload) for kind, payload in client.frames if kind is Kind.BEAT and payload]
    return [read_ask(ask).message.provider for place in places for ask in place.asks]


def _order(world: World, client: Client, node: FakeNode, **changes: object) -> Candidate:
    """A further order of the client's payer on a node, for the same job."""
    values = {"job": client.job.id, "now": int(world.clock.now())} | changes
    return make_submission(node.ask, **values).candidates[0]  # type: ignore[arg-type]  # of make_submission's own parameters


async def _finish(client: Client, node: FakeNode) -> None:
    node.complete(client.job.id)
    await quiet()
    assert client.kinds[-1] is Kind.RECEIPT


async def test_a_new_node_serves_a_job_that_waits(world: World) -> None:
    """A node that connects while a job waits is named to its client at once; the client's order on it gets the job its slot."""
    ann = world.node("ann", slots=1)
    first, waiting, last = [await world.started(ann) for _ in range(3)]
    bob = world.node("bob", slots=1)
    await quiet()
    assert (_invited(waiting), _invited(last)) == ([bob.address], []), "one job a slot, the first in the queue"
    await world.market.add_orders(waiting.job.id, [_order(world, waiting, bob)])
    await quiet()
    assert (waiting.job.provider, last.job.attempts) == (bob.address, [])
    await _finish(waiting, bob)
    assert _invited(last) == [bob.address], "the slot is free again, and no job has an order on it"
    await world.market.add_orders(last.job.id, [_order(world, last, bob)])
    await quiet()
    await _finish(last, bob)
    await _finish(first, ann)
    world.assert_idle()


async def test_a_further_order_keeps_the_place(world: World) -> None:
    """A job that ordered on another busy provider is still before those that came later, at both providers."""
    ann, bob = world.node("ann", slots=1), world.node("bob", slots=1)
    running = [await world.started(ann), await world.started(bob)]
    waiting = await world.started(ann)
    later = [await world.started(ann), await world.started(bob)]
    carl = world.node("carl", slots=1)
    await quiet()
    for number in range(2):  # posting the same order again changes nothing
        await world.market.add_orders(waiting.job.id, [_order(world, waiting, carl)] * (number + 1))
        await quiet()
        assert waiting.job.provider == carl.address
        if number == 0:
            break
    for client, node in ((running[0], ann), (running[1], bob), (waiting, carl), (later[0], ann), (later[1], bob)):
        await _finish(client, node)
    world.assert_idle()


async def test_a_client_that_does_not_answer_holds_up_nobody(world: World) -> None:
    """If the first job's client does not order on the ask, the next one is told of it after a while."""
    ann = world.node("ann", slots=1)
    first, deaf, next_job = [await world.started(ann) for _ in range(3)]
    bob = world.node("bob", slots=1)
    await quiet()
    for _ in range(int(ANSWER_SECONDS) + 1):
        await world.pass_time(1)
    assert (_invited(deaf), _invited(next_job)) == ([bob.address], [bob.address]), "each of them once"
    await world.market.add_orders(next_job.job.id, [_order(world, next_job, bob)])
    await quiet()
    assert next_job.job.provider == bob.address
    await _finish(first, ann)
    await _finish(deaf, ann)
    await _finish(next_job, bob)
    world.assert_idle()


async def test_a_new_ask_of_the_same_provider(world: World) -> None:
    """A provider that replaced its ask for good, as after a restart, is named anew; the old order is not used any more."""
    ann = world.node("ann", slots=1)
    first, waiting = await world.started(ann), await world.started(ann)
    ann.leave()
    await quiet()
    ann.asks = (make_ask(ann.signer, input_price=900_000),)
    ann.connect()
    await quiet()
    assert first.ended
    assert (_invited(waiting), waiting.ended) == ([ann.address], False)
    await world.pass_time(1)
    await world.market.add_orders(waiting.job.id, [_order(world, waiting, ann)])
    await quiet()
    assert waiting.job.provider == ann.address
    await _finish(waiting, ann)
    world.assert_idle()


@pytest.mark.parametrize("features", [("batch_only",), PayerRule(settled=Amount(1)).to_features()])
async def test_no_invitation_to_an_ask_for_others(world: World, features: tuple[str, ...]) -> None:
    """A job that waits is not invited to an ask for batch jobs or for other payers, whose order would be refused."""
    ann = world.node("ann", slots=1)
    first, waiting = await world.started(ann), await world.started(ann)
    bob = world.node("bob", slots=1, spec=Spec(features=features))
    await world.pass_time(2)
    await quiet()
    assert (_invited(waiting), waiting.ended) == ([], False)
    await _finish(first, ann)
    await _finish(waiting, ann)
    bob.leave()
    world.assert_idle()


async def test_a_client_that_does_not_renew_its_order_waits_no_longer(world: World) -> None:
    """A job whose only ask is gone ends after a few seconds, with an error that may be retried."""
    ann = world.node("ann", slots=1)
    _, waiting = await world.started(ann), await world.started(ann)
    ann.leave()
    ann.asks = (make_ask(ann.signer, input_price=900_000),)
    ann.connect()
    for _ in range(int(ANSWER_SECONDS) + 1):
        assert not waiting.ended
        await world.pass_time(1)
    assert (waiting.failure.code, waiting.failure.retry) == (Code.NO_PROVIDER, True)
    world.assert_idle()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"payer": person("mallory")}, Code.ORDER_TERMS),
        ({"terms": {"job": bytes(16)}}, Code.ORDER_TERMS),
        ({"deadline": 1}, Code.ORDER_EXPIRED),
        ({"coordinator": person("another").address}, Code.ORDER_MISDIRECTED),
        ({"terms": {"input_price": Amount(1)}}, Code.ORDER_TERMS),
    ],
)
async def test_orders_that_are_refused(world: World, change: dict[str, object], code: Code) -> None:
    """An order of another payer or job, an expired one, one through another coordinator, or at another price joins nothing."""
    ann = world.node("ann", slots=1)
    first, waiting = await world.started(ann), await world.started(ann)
    bob = world.node("bob", slots=1)
    await quiet()
    with pytest.raises(TallyError) as caught:
        await world.market.add_orders(waiting.job.id, [_order(world, waiting, bob, **change)])
    assert caught.value.code is code
    assert waiting.job.attempts == []
    await _finish(first, ann)
    await _finish(waiting, ann)
    world.assert_idle()


async def test_only_invited_orders_that_are_signed_and_paid_for_join(world: World) -> None:
    """Orders on asks that nobody named to the job, forged ones, and those beyond the purse are refused; the job waits on."""
    ann, busy = world.node("ann", slots=1), world.node("busy", slots=1)
    first, other = await world.started(ann), await world.started(busy)
    waiting = await world.started(ann)
    with pytest.raises(Refusal, match="invited to"):
        await world.market.add_orders(waiting.job.id, [_order(world, waiting, busy)])
    bob = world.node("bob", slots=1)
    await quiet()
    candidate = _order(world, waiting, bob)
    forged = replace(candidate, order=replace(candidate.order, signature=bytes(65)))
    with pytest.raises(TallyError) as caught:
        await world.market.add_orders(waiting.job.id, [forged])
    assert caught.value.code is Code.BAD_SIGNATURE
    world.funds.free[PAYER.address] = Amount(2 * CAP)
    with pytest.raises(Refusal) as refused:
        await world.market.add_orders(waiting.job.id, [candidate])
    assert refused.value.code is Code.INSUFFICIENT_FUNDS
    world.funds.free[PAYER.address] = Amount(1_000 * CAP)
    bob.leave()
    with pytest.raises(Unavailable, match="withdrew"):
        await world.market.add_orders(waiting.job.id, [candidate])
    await _finish(first, ann)
    with pytest.raises(Refusal, match="waits no more"):
        await world.market.add_orders(waiting.job.id, [candidate])
    await _finish(waiting, ann)
    await _finish(other, busy)
    with pytest.raises(Refusal) as gone:
        await world.market.add_orders(waiting.job.id, [candidate])
    assert gone.value.code is Code.UNKNOWN_JOB
    world.assert_idle()


async def test_invitations_are_bounded(world: World) -> None:
    """A client is told of few asks, none of another model and none that is dearer than all that it ordered on."""
    ann = world.node("ann", slots=1)
    first, waiting = await world.started(ann), await world.started(ann)
    world.node("other model", slots=1, model="another")
    world.node("dear", slots=1, input_price=9_000_000, output_price=9_000_000)
    for number in range(2 * MAX_INVITATIONS):
        world.node(f"new {number}", slots=1)
    await quiet()
    for _ in range(8):
        await world.pass_time(1)
    invited = _invited(waiting)
    assert (len(invited), len(set(invited))) == (MAX_INVITATIONS, MAX_INVITATIONS)
    assert not set(invited) & {person(name).address for name in ("other model", "dear")}
    await _finish(first, ann)
    await _finish(waiting, ann)
    world.assert_idle()
    assert (world.market._slot_queue._invitations._invited, world.market._slot_queue._invitations._jobs) == ({}, {})
    for _ in range(10):
        await world.pass_time(1)
    assert world.market._slot_queue._invitations._unanswered == {}


async def test_a_job_that_would_be_overtaken_is_invited_to_the_busy_slot(world: World) -> None:
    """A slot goes to a job that came later, since the first one has no order on it. It is told of the slot and gets it next."""
    ann, bob = world.node("ann", slots=1), world.node("bob", slots=1)
    running = [await world.started(ann), await world.started(bob)]
    early = await world.started(ann)
    later = [await world.started(bob) for _ in range(3)]
    assert _invited(early) == [], "nothing was granted yet"
    await _finish(running[1], bob)
    assert (_invited(early), [_invited(client) for client in later]) == ([bob.address], [[], [], []])
    await world.market.add_orders(early.job.id, [_order(world, early, bob)])
    await _finish(later[0], bob)
    assert (early.job.provider, later[1].job.attempts) == (bob.address, [])
    for client, node in ((early, bob), (later[1], bob), (later[2], bob), (running[0], ann)):
        await _finish(client, node)
    world.assert_idle()


async def test_invitations_to_busy_slots_leave_room_for_free_ones(world: World) -> None:
    """A job is told of a few busy slots, which its client may refuse, and then still of a node that connects."""
    busy = [world.node(f"busy {number}", slots=1) for number in range(MAX_INVITATIONS)]
    ann = world.node("ann", slots=1)
    running, first = [await world.started(node) for node in busy], await world.started(ann)
    early = await world.started(ann)
    later = [(await world.started(node), await world.started(node)) for node in busy]
    for client, node in zip(running, busy, strict=True):
        await _finish(client, node)
    assert len(_invited(early)) == MAX_INVITATIONS // 2
    carl = world.node("carl", slots=1)
    await quiet()
    assert _invited(early)[-1] == carl.address
    await _finish(first, ann)
    for node, pair in zip((ann, *busy), ((early,), *later), strict=True):
        for client in pair:
            await _finish(client, node)
    world.assert_idle()
