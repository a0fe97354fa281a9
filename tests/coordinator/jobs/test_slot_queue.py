"""Jobs wait for a free slot at the market: fairly, for a bounded time, and owe nothing if they leave."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from coordinator.domain.job_queue import GRANT_SECONDS
from coordinator.domain.limits import JobLimits
from tallystick.protocol.criteria import Demand
from tallystick.protocol.errors import Code, Refusal, Unavailable
from tallystick.protocol.link import Capacity
from tallystick.protocol.queue_place import QueuePlace
from tallystick.protocol.types import Amount
from tallystick.protocol.wire import Kind, Submission
from tests.coordinator.harness import CAP, MODEL, PAYER, Client, FakeNode, Frames, World, person, quiet


async def _finish(client: Client, node: FakeNode) -> None:
    node.complete(client.job.id)
    await quiet()


def _places(client: Client) -> list[int]:
    return [QueuePlace.loads(payload).position for kind, payload in client.frames if kind is Kind.BEAT and payload]


async def test_a_burst_is_answered_whole() -> None:
    """Two hundred jobs at once on four slots are all answered, each once, and the slots are never overfilled."""
    world = World()
    world.funds.free[PAYER.address] = Amount(1_000 * CAP)
    node = world.node("ann", slots=4)
    clients = [await world.started(node) for _ in range(200)]
    finished: set[bytes] = set()
    while len(finished) < len(clients):
        running = [client for client in clients if client.job.at_node and client.job.id not in finished]
        assert 0 < len(running) <= 4
        for client in running:
            finished.add(client.job.id)
            await _finish(client, node)
    assert all(client.kinds[-1] is Kind.RECEIPT for client in clients)
    assert Counter(job for kind, job, _ in node.sent if kind is Kind.DISPATCH) == Counter({c.job.id: 1 for c in clients})
    world.assert_idle()


async def test_jobs_are_told_their_place(world: World) -> None:
    """A waiting client gets its place at once and every few seconds, and then its match."""
    node = world.node("ann", slots=1)
    first, second, third = [await world.started(node) for _ in range(3)]
    assert [_places(client) for client in (first, second, third)] == [[], [1], [2]]
    await _finish(first, node)
    for _ in range(6):
        await world.pass_time(1)
    assert (second.kinds[-1], third.kinds[-1], _places(third)) == (Kind.MATCH, Kind.BEAT, [2, 1])
    await _finish(second, node)
    await _finish(third, node)
    world.assert_idle()


async def test_a_flood_does_not_keep_another_payer_waiting(world: World) -> None:
    """A payer with one job is served after the jobs under way, however many another payer has waiting."""
    flood, node = person("flood"), world.node("ann", slots=2)
    world.funds.free[flood.address] = Amount(1_000 * CAP)
    flooding = [await world.started(node, payer=flood) for _ in range(50)]
    mine = await world.started(node)
    running = [client for client in flooding if client.job.at_node]
    for client in running:
        await _finish(client, node)
    assert mine.job.at_node
    world.market.cancel(mine.job.id)
    for client in flooding:
        world.market.cancel(client.job.id)


async def test_a_new_node_and_a_freed_slot_are_used_at_once(world: World) -> None:
    """A job is dispatched as soon as a candidate reports a free slot or connects again, without any clock."""
    ann, bob = world.node("ann", slots=1), world.node("bob", slots=1)
    first, second = await world.started(ann), await world.started(bob)
    waiting, later = await world.started(ann, bob), await world.started(ann, bob)
    world.market.matchmaker.set_capacity(ann.address, Capacity(2, 2))
    await quiet()
    assert (waiting.job.provider, later.job.attempts) == (ann.address, [])
    bob.leave()
    bob.connect()
    await quiet()
    assert later.job.provider == bob.address
    for client, node in ((first, ann), (waiting, ann), (later, bob)):
        await _finish(client, node)
    assert second.ended
    world.assert_idle()


async def test_a_failed_job_that_may_not_wait_says_why_it_failed(world: World) -> None:
    """Its first provider's reason tells the client what to do, such as to recover a tab; that the other is busy tells nothing."""
    ann, bob = world.node("ann"), world.node("bob", slots=1, output_price=9_000_000)
    await world.started(bob)
    client = world.read(await world.market.place_order(replace(world.submission(ann, bob), wait=0)))
    await quiet()
    ann.fail(client.job.id, Refusal(Code.UNAUTHORISED_TAB, "order.ceiling: expected more"))
    await quiet()
    assert (client.failure.code, "expected more" in str(client.failure)) == (Code.UNAUTHORISED_TAB, True)


async def test_the_client_says_how_long_it_waits(world: World) -> None:
    """A job whose time is up ends with an error that may be retried; nothing is owed. Zero does not wait at all."""
    node = world.node("ann", slots=1)
    first = await world.started(node)
    with pytest.raises(Unavailable) as caught:
        await world.market.place_order(replace(world.submission(node), wait=0))
    assert caught.value.code is Code.NODE_BUSY
    impatient = world.read(await world.market.place_order(replace(world.submission(node), wait=7)))
    patient = await world.started(node)
    await world.pass_time(7)
    assert (impatient.failure.code, impatient.failure.retry) == (Code.NODE_BUSY, True)
    assert "within 7 s; the job was number 1 in the queue" in str(impatient.failure)
    assert not patient.ended
    await _finish(first, node)
    await _finish(patient, node)
    world.assert_idle()


async def test_no_job_waits_longer_than_the_coordinator_allows() -> None:
    """The limit holds whatever the client says, and whatever it leaves out."""
    world = World(limits=JobLimits(wait=20, max_wait=30))
    node = world.node("ann", slots=1)
    first = await world.started(node)
    clients = [world.read(await world.market.place_order(replace(world.submission(node), wait=wait))) for wait in (None, 9_999)]
    ended = []
    for _ in range(2):
        await world.pass_time(20)
        ended.append([client.ended for client in clients])
    assert ended == [[True, False], [True, True]]
    await _finish(first, node)


async def test_a_client_that_leaves_owes_nothing(world: World) -> None:
    """A cancelled job leaves the queue at once, and the next one takes its place."""
    node = world.node("ann", slots=1)
    first, second, third = [await world.started(node) for _ in range(3)]
    assert world.market.cancel(second.job.id)
    await quiet()
    assert (second.failure.code, len(node.got(Kind.DISPATCH))) == (Code.CANCELLED, 1)
    await _finish(first, node)
    assert third.job.at_node
    await _finish(third, node)
    world.assert_idle()


async def test_a_client_that_does_not_read_keeps_no_slot(world: World) -> None:
    """A slot that was granted to a job whose client takes nothing goes to the next job."""
    node = world.node("ann", slots=1)
    first = await world.started(node)
    stuck = Client(await world.market.place_order(world.submission(node)))
    frames = Frames(world.market, stuck.job)
    assert (await anext(frames))[0] is Kind.BEAT  # and nothing more is taken
    third = await world.started(node)
    await _finish(first, node)
    assert third.job.attempts == []
    await world.pass_time(GRANT_SECONDS + 1)
    assert third.job.at_node
    await _finish(third, node)
    kind, _ = await anext(frames)
    assert kind is Kind.FAIL
    await frames.aclose()
    world.assert_idle()


async def test_a_failed_attempt_waits_for_another_candidate(world: World) -> None:
    """After a failover, a job waits for a candidate that is busy; it does not wait for the one that failed."""
    ann, bob = world.node("ann", slots=1), world.node("bob", slots=1, output_price=9_000_000)
    other = await world.started(bob)
    client = await world.started(ann, bob)
    assert client.job.provider == ann.address
    ann.fail(client.job.id)
    await quiet()
    assert not client.ended
    await _finish(other, bob)
    assert client.job.provider == bob.address
    await _finish(client, bob)
    assert client.kinds[-1] is Kind.RECEIPT
    world.assert_idle()


async def test_a_stopping_coordinator_keeps_nobody(world: World) -> None:
    """At a shutdown, waiting jobs end at once with an error that may be retried; the running ones finish."""
    node = world.node("ann", slots=1)
    first, waiting = await world.started(node), await world.started(node)
    await world.market.drain(0.01)
    await quiet()
    assert (waiting.failure.code, waiting.failure.retry) == (Code.COORDINATOR_UNAVAILABLE, True)
    await _finish(first, node)
    world.assert_idle()


async def test_jobs_do_not_wait_for_providers_that_are_gone(world: World) -> None:
    """When the last provider of a waiting job disconnects, the job ends and may be retried elsewhere."""
    node = world.node("ann", slots=1)
    first, waiting = await world.started(node), await world.started(node)
    node.leave()
    await quiet()
    assert first.ended
    await world.pass_time(1)
    assert (waiting.failure.code, waiting.failure.retry) == (Code.NO_PROVIDER, True)
    world.assert_idle()


async def test_a_waiting_job_without_money_ends(world: World) -> None:
    """A payer whose purse does not cover the job learns so when its turn comes, and the slot goes to the next job."""
    node, poor = world.node("ann", slots=1), person("poor")
    world.funds.free[poor.address] = Amount(CAP)
    first = await world.started(node)
    broke, next_job = await world.started(node, payer=poor), await world.started(node)
    world.funds.free[poor.address] = Amount(CAP // 2)
    await _finish(first, node)
    assert broke.failure.code is Code.INSUFFICIENT_FUNDS
    assert next_job.job.at_node
    await _finish(next_job, node)
    world.assert_idle()


def test_the_wait_is_on_the_wire(world: World) -> None:
    """A submission says how long its job may wait, or nothing."""
    node = world.node("ann")
    for wait in (None, 0, 90):
        submission = replace(world.submission(node), wait=wait, batch=wait == 90)
        assert Submission.loads(submission.dumps()) == submission


async def test_interactive_jobs_are_served_before_batch_jobs(world: World) -> None:
    """The class travels in the submission: a batch job that came first lets interactive ones pass."""
    node = world.node("ann", slots=1)
    first = await world.started(node)
    batch = world.read(await world.market.place_order(replace(world.submission(node), batch=True)))
    await quiet()
    later = await world.started(node)
    assert (_places(batch), _places(later)) == ([1], [1])
    await _finish(first, node)
    assert (later.job.at_node, batch.job.at_node) == (True, False)
    await _finish(later, node)
    await _finish(batch, node)
    world.assert_idle()


@pytest.mark.parametrize(
    "limits", [JobLimits(max_waiting=1), JobLimits(max_waiting_per_model=1), JobLimits(max_waiting_bytes=2 * len(b"sealed"))]
)
async def test_a_full_queue_refuses_with_a_time_to_retry(limits: JobLimits) -> None:
    """However the queue is bounded, a further job is refused with 429 and a Retry-After; nothing of it is kept."""
    world = World(limits=limits)
    node = world.node("ann", slots=1)
    first, waiting = await world.started(node), await world.started(node)
    with pytest.raises(Unavailable) as caught:
        await world.market.place_order(world.submission(node))
    assert (caught.value.code, caught.value.status, caught.value.retry_after) == (Code.RATE_LIMITED, 429, 1)
    await _finish(first, node)
    await _finish(waiting, node)
    world.assert_idle()


async def test_a_failover_does_not_count_a_job_twice(world: World) -> None:
    """A job that was served, failed and waits again is before jobs of other payers that came after it, as it was."""
    other, (ann, bob) = person("other"), (world.node(name, slots=1) for name in ("ann", "bob"))
    world.funds.free[other.address] = Amount(1_000 * CAP)
    busy = [await world.started(ann), await world.started(bob)]
    mine = await world.started(ann, bob)
    theirs = await world.started(bob, payer=other)
    await _finish(busy[0], ann)
    assert mine.job.provider == ann.address
    ann.fail(mine.job.id)
    await quiet()
    assert _places(mine)[-1] == 1
    await _finish(busy[1], bob)
    assert (mine.job.provider, theirs.job.attempts) == (bob.address, [])
    await _finish(mine, bob)
    await _finish(theirs, bob)
    world.assert_idle()


@pytest.mark.parametrize("pinned", [False, True])
async def test_a_slot_that_another_job_was_granted_is_not_free(world: World, pinned: bool) -> None:
    """While a client does not read, the slot that its job was granted draws no other jobs: they wait for all providers alike, and
    those that a free provider can take go there.
    """
    ann, bob = world.node("ann", slots=1, input_price=900_000), world.node("bob", slots=1)
    first, other = await world.started(ann), await world.started(bob)
    deaf = await world.market.place_order(world.submission(ann))
    frames = Frames(world.market, deaf)
    await anext(frames)
    await _finish(first, ann)
    assert deaf.attempts == []
    pin = frozenset({ann.address, bob.address}) if pinned else frozenset()
    maker, demand = world.market.matchmaker, Demand(MODEL, pin=pin)
    assert {entry.provider for entry in maker.shortlist(demand)} == {ann.address, bob.address}
    assert {entry.provider for entry in maker.shortlist(replace(demand, max_input_price=950_000))} == {ann.address}
    await _finish(other, bob)
    assert [entry.provider for entry in maker.shortlist(demand)] == [bob.address]
    await frames.aclose()
    await quiet()
    assert {entry.provider for entry in maker.shortlist(demand)} == {ann.address, bob.address}
    world.assert_idle()
