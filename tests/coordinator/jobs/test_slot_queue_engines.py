"""Slots belong to the engines of a node: models of one engine share them, a full engine keeps no job from another one."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace

import pytest

from coordinator.domain.limits import JobLimits
from tallystick.protocol.criteria import Demand, Reason
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.link import Capacities, Capacity
from tallystick.protocol.messages import Ask
from tallystick.protocol.types import Address, Amount, JobId
from tallystick.protocol.wire import Kind
from tests.coordinator.harness import CAP, PAYER, Client, FakeNode, World, make_ask, make_submission, person, quiet


def _node(world: World, models: dict[str, int], capacities: Capacities, name: str = "ann") -> FakeNode:
    """A connected node that sells these models, each from the engine of this number."""
    world.funds.free[PAYER.address] = Amount(1_000 * CAP)
    node = world.node(name)
    node.asks = tuple(make_ask(node.signer, model=model, seq=2) for model in models)
    world.market.matchmaker.replace_asks(node.address, node.asks, capacities, groups=tuple(models.values()))
    return node


async def _placed(world: World, ask: Verified[Ask]) -> Client:
    world.number += 1
    job = JobId(world.number.to_bytes(16, "big"))
    client = world.read(await world.market.place_order(make_submission(ask, job=job, now=int(world.clock.now()))))
    await quiet()
    return client


def _running(*clients: Client) -> list[bool]:
    return [client.job.at_node for client in clients]


async def _finish(client: Client, node: FakeNode) -> None:
    node.complete(client.job.id)
    await quiet()


async def test_a_full_engine_keeps_no_job_from_an_idle_one(world: World) -> None:
    """While jobs wait for one engine of a node, those of its other engine run at once, and take the other's slots never."""
    node = _node(world, {"big": 0, "small": 1}, {0: Capacity(1, 1), 1: Capacity(2, 2)})
    big, waiting = await _placed(world, node.asks[0]), await _placed(world, node.asks[0])
    small = [await _placed(world, node.asks[1]) for _ in range(3)]
    assert _running(big, waiting, *small) == [True, False, True, True, False]
    await _finish(small[0], node)
    assert _running(waiting, small[2]) == [False, True]
    await _finish(big, node)
    assert _running(waiting) == [True]
    for client in (waiting, *small[1:]):
        await _finish(client, node)
    world.assert_idle()


async def test_models_of_one_engine_share_its_slots(world: World) -> None:
    """A job of one model takes the slot that a job of the other would get; the next one gets it in the fair order."""
    node = _node(world, {"a": 0, "b": 0}, {0: Capacity(1, 1)})
    first, second, third = [await _placed(world, node.asks[number]) for number in (0, 1, 0)]
    assert _running(first, second, third) == [True, False, False]
    await _finish(first, node)
    assert _running(second, third) == [True, False]
    await _finish(second, node)
    await _finish(third, node)
    world.assert_idle()


async def test_places_in_an_engines_queue_are_used_before_a_job_waits_here(world: World) -> None:
    """Free slots anywhere come first, then places in engines' queues, and only then does a job wait at the coordinator."""
    queueing = _node(world, {"m": 0}, {0: Capacity(3, 1, queue=2)}, "queueing")
    plain = _node(world, {"m": 0}, {0: Capacity(1, 1)}, "plain")
    clients: list[Client] = []
    for number in range(5):
        world.number += 1
        job = JobId(world.number.to_bytes(16, "big"))
        submission = make_submission(queueing.asks[0], plain.asks[0], job=job, now=int(world.clock.now()))
        clients.append(world.read(await world.market.place_order(submission)))
        await quiet()
        assert sum(_running(*clients)) == min(number + 1, 4)
    assert {client.job.provider for client in clients[:2]} == {queueing.address, plain.address}, "free slots first"
    assert [client.job.provider for client in clients[2:4]] == [queueing.address] * 2
    assert len(plain.got(Kind.DISPATCH)) == 1
    await _finish(clients[2], queueing)
    assert _running(clients[4]) == [True]
    for client in clients:
        if client.job.at_node:
            await _finish(client, queueing if client.job.provider == queueing.address else plain)
    world.assert_idle()


async def test_a_shortlist_prefers_free_slots_to_queue_places(world: World) -> None:
    """A cheaper ask whose engine would queue the job comes into a shortlist only if no slot is free; explain says busy."""
    queueing = _node(world, {"m": 0}, {0: Capacity(1, 1, queue=1)}, "queueing")
    plain = _node(world, {"m": 0}, {0: Capacity(1, 1)}, "plain")
    maker, demand = world.market.matchmaker, Demand("m")
    assert [entry.provider for entry in maker.shortlist(demand)] == [plain.address]
    reasons = {ranked.listed_ask.provider: reason for ranked, reason in maker.explain(demand)}
    assert reasons == {queueing.address: Reason.BUSY, plain.address: None}
    for chosen in (demand, replace(demand, pin=frozenset({queueing.address}))):
        maker.set_capacity(plain.address, Capacity(0, 1))
        assert [entry.provider for entry in maker.shortlist(chosen)] == [queueing.address]
        assert maker.explain(chosen)[0][0].listed_ask.slot_group.load >= 1
    maker.set_capacity(queueing.address, Capacity(0, 1, queue=1))
    assert {entry.provider for entry in maker.shortlist(demand)} == {queueing.address, plain.address}, "one may wait for both"


async def test_a_slot_counts_once_while_the_chain_is_read(world: World) -> None:
    """A job that uses the slot that it was granted, while its payer's funds are read slowly, takes no second slot from others."""
    node = _node(world, {"m": 0}, {0: Capacity(2, 2)})
    running = [await _placed(world, node.asks[0]) for _ in range(2)]
    waiting = [await _placed(world, node.asks[0]) for _ in range(2)]
    assert _running(*waiting) == [False, False]
    read, reading = world.funds.backing, asyncio.Event()

    async def slow(payer: Address, provider: Address, *, fresh: bool = False) -> object:
        await reading.wait()
        return await read(payer, provider, fresh=fresh)

    world.funds.backing = slow  # type: ignore[method-assign, assignment]
    for client in running:
        await _finish(client, node)
    queue, (group,) = world.market.matchmaker.queue, world.market.book.groups_of((node.address, None))
    assert (group.assigned, group.free, queue.granted_jobs) == (2, 0, set())
    reading.set()
    await quiet()
    assert _running(*waiting) == [True, True]
    for client in waiting:
        await _finish(client, node)
    world.assert_idle()


async def test_jobs_of_an_engine_that_is_gone_end(world: World) -> None:
    """When a node withdraws the asks of one engine, jobs that wait for it end; those of its other engine go on waiting."""
    node = _node(world, {"a": 0, "b": 1}, {0: Capacity(0, 1), 1: Capacity(0, 1)})
    gone, stays = await _placed(world, node.asks[0]), await _placed(world, node.asks[1])
    world.market.matchmaker.replace_asks(node.address, node.asks[1:], {1: Capacity(0, 1)}, groups=(1,))
    await world.pass_time(1)
    assert (gone.ended, stays.ended) == (True, False)
    assert gone.failure.code is Code.NO_PROVIDER
    world.market.matchmaker.set_capacity(node.address, {1: Capacity(1, 1)})
    await quiet()
    assert _running(stays) == [True]
    await _finish(stays, node)
    world.assert_idle()


async def test_a_node_that_comes_back_serves_the_jobs_that_waited_for_its_engine(world: World) -> None:
    """A lost connection costs a waiting job nothing as long as it can wait for another provider too."""
    node = _node(world, {"a": 0, "b": 1}, {0: Capacity(0, 1), 1: Capacity(0, 1)})
    other = _node(world, {"a": 0}, {0: Capacity(0, 1)}, "other")
    job = JobId(bytes(15) + b"\x99")
    client = world.read(await world.market.place_order(make_submission(node.asks[0], other.asks[0], job=job)))
    await quiet()
    node.leave()
    await world.pass_time(1)
    node.connect(Capacity(0, 0))
    world.market.matchmaker.replace_asks(node.address, node.asks, {0: Capacity(1, 1), 1: Capacity(0, 1)}, groups=(0, 1))
    await quiet()
    assert (client.job.at_node, client.job.provider) == (True, node.address)
    await _finish(client, node)
    world.assert_idle()


@pytest.mark.parametrize("slots", [1, 3])
async def test_no_node_gets_more_jobs_than_the_limit_whatever_groups_it_claims(slots: int) -> None:
    """The limit of jobs per node counts over all of its slot groups, also over those that it gave up while they had jobs."""
    world = World(limits=JobLimits(jobs_per_node=slots, wait=0))
    capacity = Capacity(1 << 31, 1 << 31, queue=1 << 31)
    node = _node(world, {f"m{number}": number for number in range(8)}, dict.fromkeys(range(8), capacity))
    placed = 0
    for turn in range(3):
        for ask in node.asks:
            with suppress(Unavailable):
                await _placed(world, ask)
                placed += 1
        numbers = tuple(range(100 * turn + 10, 100 * turn + 18))
        world.market.matchmaker.replace_asks(node.address, node.asks, dict.fromkeys(numbers, capacity), groups=numbers)
    assert placed == slots
    node_now = world.market.book.node(person("ann").address)
    assert node_now is not None
    assert (node_now.assigned, len(node_now.groups), len(node_now.retired) <= slots) == (slots, 8, True)
