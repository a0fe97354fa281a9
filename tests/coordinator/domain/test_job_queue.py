from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from coordinator.domain.job_queue import GRANT_SECONDS, MAX_RETRY_SECONDS, MIN_WEIGHT, JobQueue, QueuedJob
from coordinator.domain.listed_ask import ConnectedNode, SlotGroup
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.link import Capacity
from tallystick.protocol.types import Address
from tests.coordinator.harness import MODEL, person

ANN, BOB, CAT = (SlotGroup(ConnectedNode(person(name).address), 0, Capacity(1, 1)) for name in ("ann", "bob", "cat"))
ALICE, FLOOD = person("alice").address, person("flood").address


def _enter(queue: JobQueue, payer: Address, *nodes: SlotGroup, model: str = MODEL, **values: int) -> QueuedJob:
    groups = [node.key for node in nodes or (ANN,)]
    cost, weight, tick = (values.get(name, default) for name, default in (("cost", 100), ("weight", 0), ("tick", 0)))
    return queue.enter(model, payer, groups, cost=cost, weight=weight, tick=tick, wake=lambda: None)


def _serve(queue: JobQueue, node: SlotGroup = ANN, tick: float = 0) -> QueuedJob | None:
    """Returns the job that gets the node's only slot, which it uses and frees at once."""
    queue.offer(node, tick)
    granted = [job for job in queue.granted_jobs if job.granted == node.key]
    assert len(granted) <= 1
    if granted:
        queue.leave(granted[0])
    return granted[0] if granted else None


def test_a_flood_does_not_delay_others() -> None:
    """Of two payers, one of which sends many jobs, each gets every other slot: the other waits as if alone, twice as long."""
    queue = JobQueue()
    for _ in range(100):
        _enter(queue, FLOOD)
    mine = [_enter(queue, ALICE) for _ in range(10)]
    served = [_serve(queue) for _ in range(22)]
    assert set(mine) <= set(served)
    assert served.index(mine[0]) <= 1


@pytest.mark.parametrize(("weight", "share"), [(MIN_WEIGHT, 0.5), (3 * MIN_WEIGHT, 0.75), (0, 0.5)])
def test_slots_are_shared_by_what_payers_reserve(weight: int, share: float) -> None:
    """The share of a payer grows with its reservation; without one it counts as a small one."""
    queue = JobQueue()
    for _ in range(200):
        _enter(queue, FLOOD, weight=MIN_WEIGHT)
        _enter(queue, ALICE, weight=weight)
    payers = Counter(job.payer for job in (_serve(queue) for _ in range(200)) if job is not None)
    assert payers[ALICE] / 200 == pytest.approx(share, abs=0.02)


def test_costly_jobs_count_for_more() -> None:
    """A payer whose jobs cost ten times as much gets a tenth of the jobs."""
    queue = JobQueue()
    for _ in range(110):
        _enter(queue, FLOOD, cost=1_000)
        _enter(queue, ALICE, cost=100)
    payers = Counter(job.payer for job in (_serve(queue) for _ in range(110)) if job is not None)
    assert payers[ALICE] == pytest.approx(100, abs=2)


def test_a_newcomer_is_not_punished_and_not_preferred_for_its_absence() -> None:
    """A payer that comes late begins at the present: it neither catches up nor waits for what others had before."""
    queue = JobQueue()
    for _ in range(50):
        _enter(queue, FLOOD)
    for _ in range(20):
        _serve(queue)
    late = [_enter(queue, ALICE) for _ in range(20)]
    served = [_serve(queue) for _ in range(20)]
    assert 9 <= len(set(late) & set(served)) <= 11


def test_a_slot_goes_to_the_first_job_that_wants_its_provider() -> None:
    """Jobs that wait for other providers keep their place and lose nothing."""
    queue = JobQueue()
    first, second, third = _enter(queue, ALICE, BOB), _enter(queue, ALICE, ANN, BOB), _enter(queue, ALICE, ANN)
    assert [_serve(queue, node) for node in (ANN, CAT, ANN, BOB, BOB)] == [second, None, third, first, None]
    assert len(queue) == 0


def test_a_granted_slot_is_kept_for_its_job() -> None:
    """Until the job takes it, a granted slot is nobody else's; a job that finds it taken returns to its place."""
    queue = JobQueue()
    first, second = _enter(queue, ALICE), _enter(queue, ALICE)
    assert not queue.is_open(ANN, None)
    queue.offer(ANN, 0)
    assert (first.granted, second.granted) == (ANN.key, None)
    assert queue.is_open(ANN, first)
    assert not queue.is_open(ANN, second)
    queue.offer(ANN, 0)
    assert second.granted is None
    queue.enter_again(first, first.groups)
    assert queue.place(first, 0)[0] == 1
    assert _serve(queue) is first
    queue.leave(second)
    assert queue.is_open(ANN, None)


def test_grants_that_nobody_uses_expire() -> None:
    """A job whose client does not read loses its slot, which goes to the next one."""
    queue = JobQueue()
    stuck, next_job = _enter(queue, FLOOD), _enter(queue, ALICE)
    queue.offer(ANN, 10)
    assert queue.expire_grants(10 + GRANT_SECONDS) == []
    assert queue.expire_grants(10.1 + GRANT_SECONDS) == [ANN.key]
    assert (stuck.ended, stuck.granted) == (True, None)
    queue.leave(stuck)
    assert _serve(queue) is next_job


def test_the_queue_is_bounded_and_says_when_to_come_back() -> None:
    """A full queue refuses with the time in which about half of it is served; the estimate is bounded."""
    queue = JobQueue(max_waiting=20)
    for _ in range(20):
        _enter(queue, ALICE)
    for tick in range(4):
        _serve(queue, tick=3 * tick)
        _enter(queue, ALICE)
    for tick, seconds in ((12, 30), (10_000, MAX_RETRY_SECONDS)):
        with pytest.raises(Unavailable) as caught:
            _enter(queue, FLOOD, tick=tick)
        assert (caught.value.code, caught.value.status, caught.value.retry_after) == (Code.RATE_LIMITED, 429, seconds)
    with pytest.raises(Unavailable) as caught:
        _enter(queue, FLOOD, model="another")
    assert caught.value.retry_after == 1


def test_a_job_is_told_its_place() -> None:
    """The place counts the jobs of its model before it; the wait follows from the pace of the last grants."""
    queue = JobQueue()
    _enter(queue, ALICE, BOB, model="another")
    jobs = [_enter(queue, ALICE) for _ in range(5)]
    assert [queue.place(job, 0) for job in jobs] == [(place, None) for place in range(1, 6)]
    for tick in (0, 2, 4):
        _serve(queue, tick=tick)
    assert [queue.place(job, 6) for job in jobs[3:]] == [(1, 2.0), (2, 4.0)]


def test_jobs_without_any_provider_end() -> None:
    """A job ends when all providers that it waits for are gone, and not before."""
    queue = JobQueue()
    woken: list[str] = []
    both = queue.enter(MODEL, ALICE, [ANN.key, BOB.key], cost=1, weight=1, tick=0, wake=lambda: woken.append("both"))
    one = queue.enter(MODEL, ALICE, [BOB.key], cost=1, weight=1, tick=0, wake=lambda: woken.append("one"))
    queue.end_without(lambda key: key == ANN.key)
    assert (both.ended, one.ended, woken) == (False, True, ["one"])
    for job in (both, one):
        queue.leave(job)
    assert len(queue) == 0
    assert queue.is_open(BOB, None)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_kept_of_jobs_that_left(seed: int) -> None:
    """After any walk, a queue that everybody left is as good as new."""
    random, queue, jobs = Random(seed), JobQueue(), list[QueuedJob]()
    nodes = [ANN, BOB, CAT]
    for tick in range(500):
        match random.randrange(4):
            case 0 | 1:
                payer = random.choice((ALICE, FLOOD))
                jobs.append(_enter(queue, payer, *random.sample(nodes, 2), model=random.choice("ab"), tick=tick))
            case 2 if jobs:
                job = jobs.pop(random.randrange(len(jobs)))
                if job.granted is not None and random.random() < 0.3:
                    queue.enter_again(job, job.groups)
                    jobs.append(job)
                else:
                    queue.leave(job)
            case _:
                queue.offer(random.choice(nodes), tick)
                queue.expire_grants(tick)
                queue.end_without(lambda key: key != CAT.key)
        jobs = [job for job in jobs if not job.ended]
        assert len(queue) == sum(job.granted is None for job in jobs)
    for job in jobs:
        queue.leave(job)
    assert (len(queue), queue.granted_jobs, [queue.waiting_for(node) for node in nodes]) == (0, set(), [0, 0, 0])
    assert all(queue.is_open(node, None) for node in nodes)


def test_jobs_that_left_unserved_cost_their_payer_nothing() -> None:
    """A payer that cancels a burst stands where it would without it; the queue keeps nothing of payers that left."""
    queue = JobQueue()
    for _ in range(3):
        _enter(queue, FLOOD)
    for burst in ([_enter(queue, ALICE) for _ in range(50)], [_enter(queue, person(f"{n}").address) for n in range(300)]):
        for job in burst:
            queue.leave(job)
    assert set(queue._models[MODEL].finish_tags) == {FLOOD}
    assert queue.place(_enter(queue, ALICE), 0)[0] == 2


def test_models_of_one_provider_share_its_slots_fairly() -> None:
    """A model that was not asked for until now does not take the slots of a provider's other models."""
    queue = JobQueue()
    for _ in range(60):
        _enter(queue, FLOOD, model="old")
    for _ in range(50):
        _serve(queue)
    mine = _enter(queue, ALICE, model="old")
    for _ in range(20):
        _enter(queue, FLOOD, model="new")
    assert mine in [_serve(queue) for _ in range(3)]


def test_a_job_that_could_not_use_its_slot_is_first_again() -> None:
    """It keeps its place before jobs that came meanwhile, even if nobody else waited."""
    queue = JobQueue()
    jobs = [_enter(queue, FLOOD) for _ in range(5)]
    for _ in range(4):
        _serve(queue)
    queue.offer(ANN, 0)
    visitor = _enter(queue, ALICE)
    queue.leave(visitor)
    later = _enter(queue, ALICE)
    queue.enter_again(jobs[4], [BOB.key])
    assert [queue.place(job, 0)[0] for job in (jobs[4], later)] == [1, 2]
    assert (queue.waiting_for(BOB), jobs[4].granted) == (1, None)
    assert _serve(queue) is later


def test_a_job_whose_grant_expired_may_wait_again() -> None:
    """Returned to the queue, it waits like any other and leaves nothing behind."""
    queue = JobQueue()
    job = _enter(queue, ALICE)
    queue.offer(ANN, 0)
    assert queue.expire_grants(1 + GRANT_SECONDS) == [ANN.key]
    queue.leave(_enter(queue, FLOOD))
    queue.enter_again(job, job.groups)
    assert (job.ended, len(queue)) == (False, 1)
    queue.leave(job)
    assert (len(queue), queue.waiting_for(ANN), queue._models) == (0, 0, {})
