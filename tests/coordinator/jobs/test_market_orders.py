"""Refusals before anything is dispatched: each is typed, costs nothing and leaves no trace."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from coordinator.domain.limits import JobLimits
from coordinator.ports import Backing, JobRecord
from coordinator.storage.memory import MemoryFunds, MemoryStore
from tallystick.protocol.errors import BadSignature, Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.jobs import State
from tallystick.protocol.link import Capacity
from tallystick.protocol.messages import Order
from tallystick.protocol.types import Address, Amount, JobId
from tallystick.protocol.wire import Kind, Submission
from tests.coordinator.harness import (
    CAP,
    COST,
    PAYER,
    START,
    Client,
    FakeNode,
    World,
    altered,
    make_ask,
    make_submission,
    person,
    quiet,
    with_orders,
)


async def _refused(world: World, submission: Submission) -> TallyError:
    """Returns the refusal of a job, and asserts that it left no trace."""
    before = world.market.exposure.size
    with pytest.raises(TallyError) as caught:
        await world.market.place_order(submission)
    assert all(node.got(Kind.DISPATCH) == [] for node in world.nodes)
    assert await world.store.job(submission.job) is None
    assert world.market.exposure.size == before
    world.assert_idle()
    return caught.value


def _forged(order: Order) -> Order:
    return replace(order, ceiling=order.ceiling + 1)


@pytest.mark.parametrize("change", [_forged, lambda order: replace(order, payer=person("rich").address)])
async def test_a_forged_or_altered_order(world: World, change: Callable[[Order], Order]) -> None:
    """An order that its payer did not sign is refused, even if the named payer has money."""
    world.funds.free[person("rich").address] = Amount(10**9)
    submission = with_orders(world.submission(world.node("ann")), lambda order: altered(order, change))
    error = await _refused(world, submission)
    assert isinstance(error, BadSignature)
    assert (error.status, error.retry) == (401, False)


@pytest.mark.parametrize(
    ("order", "code", "status"),
    [
        ({"deadline": START}, Code.ORDER_EXPIRED, 400),
        ({"deadline": START + 3_601}, Code.ORDER_TERMS, 400),
        ({"claim_by": START}, Code.ORDER_TERMS, 400),
        ({"coordinator": PAYER.address}, Code.ORDER_MISDIRECTED, 400),
        ({"ceiling": Amount(1)}, Code.UNAUTHORISED_TAB, 402),
        ({"terms": {"output_price": 1}}, Code.ORDER_TERMS, 400),
        ({"terms": {"max_output_tokens": 1_025}}, Code.ORDER_TERMS, 400),
    ],
)
async def test_orders_with_invalid_members(world: World, order: dict[str, Any], code: Code, status: int) -> None:
    """Expired, too far ahead, for another coordinator, above its ceiling, or at other terms than the ask's: refused for good."""
    error = await _refused(world, world.submission(world.node("ann"), **order))
    assert isinstance(error, Refusal)
    assert (error.code, error.status) == (code, status)


async def test_every_candidates_order_is_held_to_the_rules(world: World) -> None:
    """A valid first order does not excuse an invalid second one."""
    ann, bob = world.node("ann"), world.node("bob")
    good, bad = world.submission(ann), make_submission(bob.ask, deadline=START - 1)
    error = await _refused(world, replace(good, candidates=good.candidates + bad.candidates))
    assert error.code is Code.ORDER_EXPIRED


async def test_an_ask_that_is_gone(world: World) -> None:
    """If no ask of the shortlist is listed any more, the client gets the reason for each provider and may retry."""
    gone = make_ask(person("ann"))
    error = await _refused(world, make_submission(gone))
    assert (type(error), error.code, error.fault) == (Unavailable, Code.NO_PROVIDER, Fault.PROVIDER)
    assert f"{gone.message.provider}: its ask was replaced or withdrawn" in str(error)


async def test_a_busy_node(world: World) -> None:
    """A node without a free slot does not get the job; the client may retry."""
    node = world.node("ann")
    world.market.matchmaker.set_capacity(node.address, Capacity(0, 4))
    error = await _refused(world, replace(world.submission(node), wait=0))
    assert (error.code, error.retry) == (Code.NODE_BUSY, True)
    assert "no free slot now" in str(error)


async def test_a_payer_runs_only_so_many_jobs() -> None:
    """One job more gets rate_limited until one ends; other payers are not affected."""
    world = World(limits=JobLimits(jobs_per_payer=2))
    node = world.node("ann", slots=8)
    world.funds.free[person("other").address] = Amount(10 * CAP)
    clients = [await world.started(node) for _ in range(2)]
    with pytest.raises(Unavailable, match=r"2 jobs here.*\(max_jobs_per_payer\)") as caught:
        await world.market.place_order(world.submission(node))
    assert caught.value.retry_after == 1
    assert (caught.value.code, caught.value.status, caught.value.fault) == (Code.RATE_LIMITED, 429, Fault.CLIENT)
    clients.append(await world.started(node, payer=person("other")))
    node.complete(clients[0].job.id)
    await quiet()
    clients.append(await world.started(node))
    for client in clients[1:]:
        node.complete(client.job.id)
    await quiet()
    world.assert_idle()


async def test_a_payer_with_too_many_jobs_is_told_when_to_come_again() -> None:
    """When half of those that wait are served, at the pace that was measured."""
    world = World(limits=JobLimits(jobs_per_payer=5))
    world.funds.free[PAYER.address] = Amount(100 * CAP)
    node = world.node("ann", slots=1)
    clients = [await world.started(node) for _ in range(5)]
    for _ in range(2):
        await world.pass_time(8)
        running = next(client for client in clients if client.job.at_node)
        node.complete(running.job.id)
        await quiet()
        clients.append(await world.started(node))
    with pytest.raises(Unavailable) as caught:
        await world.market.place_order(world.submission(node))
    assert caught.value.retry_after == 8, "4 jobs wait, and two slots became free in 8 s after the first"


async def test_a_node_is_given_only_so_many_jobs() -> None:
    """The limit holds for any number of slots that a node reports."""
    world = World(limits=JobLimits(jobs_per_node=1))
    node = world.node("ann", slots=1_000)
    client = await world.started(node)
    with pytest.raises(Unavailable, match="no free slot") as caught:
        await world.market.place_order(replace(world.submission(node), wait=0))
    assert caught.value.code is Code.NODE_BUSY
    node.complete(client.job.id)
    await quiet()


async def test_a_placed_job_is_not_placed_again(world: World) -> None:
    """A job id is good for one job: while it runs, after it ended, and for another payer too."""
    node = world.node("ann")
    world.funds.free[person("other").address] = Amount(CAP)
    client = await world.started(node)
    for _ in range(2):
        for payer in (PAYER, person("other")):
            with pytest.raises(Refusal, match="placed before") as caught:
                await world.market.place_order(make_submission(node.ask, job=client.job.id, payer=payer))
            assert (caught.value.code, caught.value.status) == (Code.ORDER_REPLAYED, 409)
        node.complete(client.job.id)
        await quiet()
    assert len(node.got(Kind.DISPATCH)) == 1


async def test_two_at_the_same_time_are_one(world: World) -> None:
    """Of the same submission posted twice at the same time, one is admitted."""
    node = world.node("ann")
    submission = world.submission(node)
    placed = await asyncio.gather(
        world.market.place_order(submission), world.market.place_order(submission), return_exceptions=True
    )
    refused = [each for each in placed if isinstance(each, TallyError)]
    assert [error.code for error in refused] == [Code.ORDER_REPLAYED]


async def test_replays_are_remembered_as_long_as_an_order_can_live(world: World) -> None:
    """A replay is refused for as long as its order's deadline may lie ahead; then the id is forgotten."""
    node = world.node("ann")
    submission = world.submission(node, deadline=START + 3_600)
    world.read(await world.market.place_order(submission))
    await quiet()
    node.complete(submission.job)
    await world.pass_time(3_599)
    with pytest.raises(Refusal) as caught:
        await world.market.place_order(submission)
    assert caught.value.code is Code.ORDER_REPLAYED
    await world.pass_time(3_600 // 8)
    with pytest.raises(Refusal) as caught:
        await world.market.place_order(submission)
    assert caught.value.code is Code.ORDER_EXPIRED
    assert world.market.admission.known == 0


async def test_a_refused_job_may_be_placed_again(world: World) -> None:
    """A refused job was never placed: it is admitted once the reason is gone."""
    node = world.node("ann")
    world.funds.free[PAYER.address] = Amount(0)
    submission = world.submission(node)
    assert (await _refused(world, submission)).code is Code.INSUFFICIENT_FUNDS
    world.funds.free[PAYER.address] = Amount(CAP)
    await world.market.place_order(submission)


# Funds


class _CountedFunds(MemoryFunds):
    """Counts its reads."""

    reads = 0

    async def backing(self, payer: Address, provider: Address, *, fresh: bool = False) -> Backing:
        self.reads += 1
        return await super().backing(payer, provider, fresh=fresh)


async def test_a_payer_without_funds(world: World) -> None:
    """A purse that does not cover the worst case is refused for good; the error says what to do."""
    world.funds.free[PAYER.address] = Amount(CAP - 1)
    error = await _refused(world, world.submission(world.node("ann")))
    assert isinstance(error, Refusal)
    assert (error.code, error.status) == (Code.INSUFFICIENT_FUNDS, 402)
    assert "tally deposit" in str(error)


async def test_strangers_leave_no_trace(world: World) -> None:
    """Orders of keys without a purse do not fill the memory."""
    node = world.node("ann")
    for number in range(20):
        await _refused(world, world.submission(node, payer=person(f"stranger {number}")))
    assert world.market.exposure.size == 0


async def test_a_stranger_is_looked_up_once() -> None:
    """A key without a purse is refused after two reads for one candidate, however many candidates it names."""
    world, funds = World(), _CountedFunds()
    world.funds = funds
    world.market = world.make_market()
    nodes = [world.node(f"node {number}") for number in range(8)]
    for node in nodes:
        node.market = world.market
    error = await _refused(world, world.submission(*nodes, payer=person("stranger")))
    assert (error.code, funds.reads) == (Code.INSUFFICIENT_FUNDS, 2)
    assert "tally deposit" in str(error)


async def test_jobs_in_flight_use_up_the_purse(world: World) -> None:
    """The caps of the jobs in flight and the receipts not settled count together, and cost less than the cap gives room again."""
    node = world.node("ann")
    world.funds.free[PAYER.address] = Amount(2 * CAP)
    first, _ = await world.started(node), await world.started(node)
    with pytest.raises(Refusal):
        await world.place(node)
    node.complete(first.job.id)
    await quiet()
    with pytest.raises(Refusal):
        await world.place(node)
    world.funds.free[PAYER.address] = Amount(2 * CAP + COST)
    await world.place(node)


class _SlowFunds(MemoryFunds):
    """Returns old figures unless a fresh read is requested. `reads`: the requests."""

    def __init__(self, old: int, new: int | None) -> None:
        super().__init__()
        self.old, self.new, self.reads = old, new, list[bool]()
        self.asked = asyncio.Event()

    async def backing(self, payer: Address, provider: Address, *, fresh: bool = False) -> Backing:
        self.reads.append(fresh)
        self.asked.set()
        await asyncio.sleep(0)
        if fresh and self.new is None:
            raise Unavailable(Code.CHAIN_UNAVAILABLE, "the chain does not answer")
        free = self.new if fresh and self.new is not None else self.old
        return Backing(free=Amount(free), reserved=Amount(0), settled=Amount(0))


def _with_funds(old: int, new: int | None) -> tuple[World, _SlowFunds, FakeNode]:
    funds = _SlowFunds(old, new)
    world = World(funds=funds)
    return world, funds, world.node("ann")


async def test_a_deposit_made_just_now_counts() -> None:
    """A payer who has just deposited is not refused on old figures."""
    world, funds, node = _with_funds(0, CAP)
    await world.place(node)
    assert funds.reads == [False, True]


async def test_a_known_payer_does_not_wait_for_the_chain() -> None:
    """If the known figures are enough, no fresh ones are read."""
    world, funds, node = _with_funds(CAP, None)
    await world.place(node)
    assert funds.reads == [False]


async def test_a_chain_that_is_down_is_not_called_a_lack_of_funds() -> None:
    """If the chain cannot say whether the payer deposited, the client may retry; nothing is held meanwhile."""
    world, _, node = _with_funds(0, None)
    error = await _refused(world, world.submission(node))
    assert (type(error), error.code, error.status) == (Unavailable, Code.CHAIN_UNAVAILABLE, 503)


async def test_another_providers_reservation_helps(world: World) -> None:
    """If the payer cannot pay the cheapest provider but has reserved for another one, that one gets the job."""
    cheap, secured = world.node("ann"), world.node("bob", output_price=9_000_000)
    world.funds.free[PAYER.address] = Amount(0)
    world.funds.reserved[PAYER.address, secured.address] = Amount(CAP)
    client = await world.started(cheap, secured)
    assert client.job.provider == secured.address
    assert cheap.sent == []


async def test_an_order_that_is_dropped_while_funds_are_read_holds_nothing() -> None:
    """A placement that is cancelled while it waits leaves no slot taken and no job behind."""
    world, funds, node = _with_funds(CAP, CAP)
    submission = world.submission(node)
    placing = asyncio.create_task(world.market.place_order(submission))
    await funds.asked.wait()
    placing.cancel()
    await asyncio.gather(placing, return_exceptions=True)
    world.assert_idle()
    await world.market.place_order(submission)


async def test_a_node_that_leaves_while_funds_are_read() -> None:
    """A job whose node left during its admission goes to the next candidate."""
    world, funds, ann = _with_funds(CAP * 9, None)
    bob = world.node("bob", output_price=9_000_000)
    placing = asyncio.create_task(world.place(ann, bob))
    await funds.asked.wait()
    ann.leave()
    client: Client = await placing
    await quiet()
    assert ann.sent == []
    assert client.kinds == [Kind.MATCH, Kind.MATCH]
    assert bob.got(Kind.DISPATCH, client.job.id) != []


class _FullStore(MemoryStore):
    full = True

    def enqueue_job(self, record: JobRecord) -> None:
        if self.full:
            raise Unavailable(Code.DATABASE_UNAVAILABLE, "the database is too slow")
        super().enqueue_job(record)


async def test_the_store_must_remember_before_a_node_is_asked() -> None:
    """A job that cannot be stored is not dispatched, and until the store can write again no orders are accepted."""
    store = _FullStore()
    world = World(store=store)
    node = world.node("ann")
    client = await world.started(node)
    assert client.failure.code is Code.COORDINATOR_UNAVAILABLE
    assert node.sent == []
    world.assert_idle()
    with pytest.raises(Unavailable, match="cannot write to its database"):
        await world.place(node)
    store.full = False
    await world.pass_time(1)
    assert await world.stored(client) is State.FAILED
    await world.place(node)


async def test_job_ids_are_the_clients_choice(world: World) -> None:
    """Any 16 bytes make a job id, zeros too."""
    client = await world.started(world.node("ann"), job=JobId(bytes(16)))
    assert client.kinds == [Kind.MATCH]
