"""Jobs of strangers, and jobs that can never be served, take no place in the queue from others."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import pytest

from coordinator.domain.limits import JobLimits
from coordinator.ports import Backing
from coordinator.storage.memory import MemoryFunds
from tallystick.protocol.criteria import Demand
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.errors import BadSignature, Code, Refusal, TallyError, Unavailable
from tallystick.protocol.link import Capacity
from tallystick.protocol.queue_place import QueuePlace
from tallystick.protocol.types import Address, Amount
from tallystick.protocol.wire import Kind, Submission
from tests.coordinator.harness import CAP, DOMAIN, Client, World, person, quiet, with_orders


def _joined(first: Submission, *others: Submission) -> Submission:
    return replace(first, candidates=tuple(candidate for each in (first, *others) for candidate in each.candidates))


def _place(client: Client) -> int:
    return next(QueuePlace.loads(payload).position for kind, payload in reversed(client.frames) if kind is Kind.BEAT)


async def test_nobody_waits_in_the_name_of_another_payer() -> None:
    """Orders that their payer did not sign are refused at once; the payer's own jobs are neither counted nor delayed."""
    world = World(limits=JobLimits(jobs_per_payer=2))
    node, thief = world.node("ann", slots=1), person("thief")
    running = await world.started(node)
    for _ in range(3):
        forged = with_orders(
            world.submission(node), lambda order: Signed(order.message, thief.sign_digest(order.message.digest(DOMAIN)))
        )
        with pytest.raises(BadSignature):
            await world.market.place_order(forged)
    mine = await world.started(node)
    node.complete(running.job.id)
    await quiet()
    assert mine.job.at_node
    node.complete(mine.job.id)
    await quiet()
    world.assert_idle()


async def test_payers_without_money_take_no_place(world: World) -> None:
    """Keys are free: a job whose payer could not pay for it now does not wait."""
    node, poor = world.node("ann", slots=1), person("poor")
    running = await world.started(node)
    for free in (None, Amount(CAP - 1)):
        if free is not None:
            world.funds.free[poor.address] = free
        with pytest.raises(Refusal) as caught:
            await world.market.place_order(world.submission(node, payer=poor))
        assert caught.value.code is Code.INSUFFICIENT_FUNDS
    assert len(world.market.matchmaker.queue) == 0
    node.complete(running.job.id)
    await quiet()
    world.assert_idle()


async def test_one_candidate_that_can_be_paid_is_enough(world: World) -> None:
    """A payer whose money covers one of the busy candidates may wait."""
    ann, bob = world.node("ann", slots=1), world.node("bob", slots=1)
    running = [await world.started(node) for node in (ann, bob)]
    poor = person("poor")
    world.funds.free[poor.address], world.funds.reserved[poor.address, bob.address] = Amount(0), Amount(CAP)
    client = await world.started(ann, bob, payer=poor)
    node = bob if running[1].job.provider == bob.address else ann
    node.complete(running[1].job.id)
    await quiet()
    assert client.job.provider == bob.address
    bob.complete(client.job.id)
    ann.complete(running[0].job.id)
    await quiet()
    world.assert_idle()


async def test_a_slot_that_its_job_cannot_use_goes_to_the_next_job(world: World) -> None:
    """A job whose order on a provider expired keeps no slot of it from others, and still gets one of another provider."""
    ann, bob = world.node("ann", slots=1), world.node("bob", slots=1)
    running = [await world.started(node) for node in (ann, bob)]
    both = world.submission(bob)
    expiring = world.submission(ann, job=both.job, deadline=int(world.clock.now()) + 5)
    stale = world.read(await world.market.place_order(_joined(expiring, both)))
    other = await world.started(ann)
    await world.pass_time(6)
    ann.complete(running[0].job.id)
    await quiet()
    assert (other.job.at_node, stale.ended) == (True, False)
    bob.complete(running[1].job.id)
    await quiet()
    assert stale.job.provider == bob.address
    for node, client in ((ann, other), (bob, stale)):
        node.complete(client.job.id)
    await quiet()
    world.assert_idle()


async def test_a_cheap_candidate_buys_no_better_place(world: World) -> None:
    """A job counts with its highest cap: naming an absent provider at a low cap beside the others changes nothing."""
    node, gone, flood = world.node("ann", slots=1), world.node("gone"), person("flood")
    gone.leave()
    world.funds.free[flood.address] = Amount(100 * CAP)
    running = await world.started(node)
    flooding = []
    for _ in range(4):
        dear = world.submission(node, payer=flood)
        cheap = world.submission(gone, payer=flood, job=dear.job, terms={"max_cost": Amount(1)})
        flooding.append(world.read(await world.market.place_order(_joined(dear, cheap))))
    mine = [await world.started(node) for _ in range(2)]
    await world.pass_time(5)
    assert [_place(client) for client in mine] == [2, 4]
    for client in (*flooding, *mine):
        world.market.cancel(client.job.id)
    node.complete(running.job.id)
    await quiet()
    world.assert_idle()


async def test_no_job_waits_longer_than_its_orders_are_good(world: World) -> None:
    """When the last order of a job has expired, its wait is over."""
    node = world.node("ann", slots=1)
    running = await world.started(node)
    node.accept(running.job.id)
    await quiet()
    client = await world.started(node, deadline=int(world.clock.now()) + 30)
    await world.pass_time(29)
    assert not client.ended
    await world.pass_time(1)
    assert client.failure.code is Code.NODE_BUSY
    node.complete(running.job.id)
    await quiet()
    world.assert_idle()


@dataclass
class SlowFunds(MemoryFunds):
    """Answers when `answers` is set."""

    answers: asyncio.Event = field(default_factory=asyncio.Event)
    fails: bool = False

    async def backing(self, payer: Address, provider: Address, *, fresh: bool = False) -> Backing:
        await self.answers.wait()
        if self.fails:
            raise Unavailable(Code.CHAIN_UNAVAILABLE, "the chain does not answer")
        return await super().backing(payer, provider, fresh=fresh)


async def test_a_payers_jobs_count_while_the_chain_is_read() -> None:
    """Jobs that are sent at once are within the limit too, however slow the chain is."""
    world = World(limits=JobLimits(jobs_per_payer=2), funds=SlowFunds())
    assert isinstance(world.funds, SlowFunds)
    node = world.node("ann")
    placing = [asyncio.create_task(world.market.place_order(world.submission(node))) for _ in range(5)]
    await quiet()
    world.funds.answers.set()
    results = await asyncio.gather(*placing, return_exceptions=True)
    assert [isinstance(result, TallyError) and result.code for result in results] == [False, False, *[Code.RATE_LIMITED] * 3]
    clients = [world.read(job) for job in (placing[0].result(), placing[1].result())]
    await quiet()
    for client in clients:
        node.complete(client.job.id)
    await quiet()
    world.assert_idle()
    assert world.market.admission.jobs_by_payer == {}


async def test_a_job_that_enters_while_the_coordinator_stops_does_not_wait() -> None:
    """A shutdown that begins while a job's funds are read keeps the job out of the queue."""
    world = World(funds=SlowFunds())
    assert isinstance(world.funds, SlowFunds)
    world.funds.answers.set()
    node = world.node("ann", slots=1)
    running = await world.started(node)
    world.funds.answers.clear()
    placing = asyncio.create_task(world.market.place_order(world.submission(node)))
    await quiet()
    await world.market.drain(0.01)
    world.funds.answers.set()
    with pytest.raises(Unavailable) as caught:
        await placing
    assert caught.value.code is Code.COORDINATOR_UNAVAILABLE
    node.complete(running.job.id)
    await quiet()
    world.assert_idle()


async def test_a_granted_slot_survives_a_chain_that_fails() -> None:
    """A job that was granted a slot ends if its funds cannot be read, and the slot goes to the next one."""
    world = World(funds=SlowFunds())
    assert isinstance(world.funds, SlowFunds)
    world.funds.answers.set()
    node = world.node("ann", slots=1)
    running, unlucky, lucky = [await world.started(node) for _ in range(3)]
    world.funds.answers.clear()
    node.complete(running.job.id)
    await quiet()
    world.funds.fails = True
    world.funds.answers.set()
    await asyncio.sleep(0)
    world.funds.fails = False
    await quiet()
    assert (unlucky.failure.code, lucky.job.at_node) == (Code.CHAIN_UNAVAILABLE, True)
    node.complete(lucky.job.id)
    await quiet()
    world.assert_idle()


async def test_slots_that_a_node_only_claims_attract_no_jobs(world: World) -> None:
    """Of busy providers, one that works for this coordinator comes before one that says that its many slots are taken."""
    ann, _ = world.node("ann", slots=1), world.node("claims", slots=0, output_price=1)
    world.market.matchmaker.set_capacity(world.nodes[1].address, Capacity(0, 10**9))
    running = [await world.started(ann), await world.started(ann), await world.started(ann)]
    chosen = world.market.matchmaker.shortlist(Demand(ann.ask.message.model, limit=1))
    assert [entry.provider for entry in chosen] == [ann.address]
    for client in running:
        ann.complete(client.job.id)
        await quiet()
    world.assert_idle()
