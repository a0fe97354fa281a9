from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from coordinator.domain.job_queue import BATCH_EVERY, GRANT_SECONDS, MAX_RETRY_SECONDS, MIN_WEIGHT, JobQueue, QueuedJob
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
    batch, size = bool(values.get("batch", False)), values.get("size", 0)
    return queue.enter(model, payer, groups, cost=cost, weight=weight, tick=tick, wake=lambda: None, batch=batch, size=size)


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


@pytest.mark.parametrize("seed", range(10))
def test_a_newcomer_is_not_behind_a_flood_that_other_slots_served(seed: int) -> None:
    """Jobs of a flood wait for three nodes each, so a node may serve one that is far behind. A newcomer is still the next, or the
    one after it, wherever a slot is free first.
    """
    queue, random = JobQueue(), Random(seed)
    nodes = [SlotGroup(ConnectedNode(person(f"node {number}").address), 0, Capacity(1, 1)) for number in range(30)]
    for _ in range(200):
        _enter(queue, FLOOD, *random.sample(nodes, 3))
    for _ in range(40):
        _serve(queue, random.choice(nodes))
    for _ in range(10):
        chosen = random.sample(nodes, 3)
        mine = _enter(queue, person(f"newcomer {random.random()}").address, *chosen)
        first = random.choice(chosen)
        assert mine in [_serve(queue, first) for _ in range(2)]


def test_a_backlog_is_remembered_although_other_slots_served_it_early() -> None:
    """A payer whose late jobs were served by slots that nobody else waited for has had them: its next jobs come after them."""
    queue = JobQueue()
    waiting = [_enter(queue, FLOOD) for _ in range(3)]
    for _ in range(20):
        _enter(queue, FLOOD, BOB)
    for _ in range(20):
        _serve(queue, BOB)
    late = _enter(queue, FLOOD, BOB)
    mine = [_enter(queue, ALICE, BOB) for _ in range(20)]
    assert [_serve(queue, BOB) for _ in range(21)] == [*mine, late]
    assert [_serve(queue) for _ in range(3)] == waiting


def test_a_job_that_no_slot_serves_holds_the_clock_back_no_longer_than_it_waits() -> None:
    """A newcomer starts where the job stands that waits in vain; when that job left, newcomers start with all others."""
    queue = JobQueue()
    stuck = _enter(queue, person("stuck").address)
    for _ in range(10):
        _enter(queue, FLOOD, BOB)
    _serve(queue, BOB)
    _serve(queue, BOB)
    assert _enter(queue, ALICE, BOB).start == stuck.start
    queue.leave(stuck)
    _serve(queue, BOB)
    served = _serve(queue, BOB)
    assert served is not None
    assert _enter(queue, person("late").address, BOB).start == served.start > stuck.start


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
    assert set(queue._models[MODEL, False].finish_tags) == {FLOOD}
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


def test_interactive_jobs_go_first_and_batch_jobs_are_never_starved() -> None:
    """While both classes wait, one slot in BATCH_EVERY goes to a batch job; alone, either class gets all of them."""
    queue = JobQueue()
    batch = [_enter(queue, ALICE, batch=True) for _ in range(20)]
    interactive = [_enter(queue, FLOOD) for _ in range(8 * BATCH_EVERY)]
    served = [_serve(queue) for _ in range(4 * BATCH_EVERY)]
    assert [job is not None and job.batch for job in served] == ([False] * (BATCH_EVERY - 1) + [True]) * 4
    for job in interactive:
        if job not in served:
            queue.leave(job)
    assert [_serve(queue) for _ in range(16)] == batch[4:]
    assert _serve(queue) is None


@pytest.mark.parametrize("seed", range(10))
def test_the_share_of_batch_jobs_holds_in_any_walk(seed: int) -> None:
    """Whoever comes and leaves: of the slots in a row that batch jobs wait for, at least one in BATCH_EVERY is theirs."""
    random, queue, jobs, without = Random(seed), JobQueue(), list[QueuedJob](), 0
    for tick in range(2_000):
        match random.randrange(5):
            case 0 | 1:
                jobs.append(_enter(queue, random.choice((ALICE, FLOOD)), batch=random.random() < 0.2, tick=tick))
            case 2 if jobs:
                leaving = random.choice(jobs)
                if leaving.granted is None and not leaving.batch:
                    jobs.remove(leaving)
                    queue.leave(leaving)
            case _:
                waits = any(job.batch for job in jobs)
                served = _serve(queue, tick=tick)
                if served is not None:
                    jobs.remove(served)
                without = without + 1 if waits and served is not None and not served.batch else 0
                assert without < BATCH_EVERY
    assert len(queue) == len(jobs)


def test_one_model_does_not_fill_the_queue_for_others() -> None:
    """A model has a bound of its own, and its batch jobs half of that; other models still find room until the whole is full."""
    queue = JobQueue(max_waiting=25, max_per_model=10)
    for _ in range(5):
        _enter(queue, FLOOD, batch=True)
    with pytest.raises(Unavailable, match=r"full for batch jobs.*half of max_waiting_jobs_per_model"):
        _enter(queue, FLOOD, batch=True)
    for _ in range(5):
        _enter(queue, FLOOD)
    with pytest.raises(Unavailable, match=r"queue of .* is full: 10 jobs.*\(max_waiting_jobs_per_model\)") as caught:
        _enter(queue, FLOOD)
    assert (caught.value.code, caught.value.status, caught.value.retry_after) == (Code.RATE_LIMITED, 429, 1)
    others = [_enter(queue, ALICE, model=model) for model in ("b", "c") for _ in range(7)]
    _enter(queue, ALICE, model="d")
    with pytest.raises(Unavailable, match=r"25 jobs wait.*\(max_waiting_jobs\)"):
        _enter(queue, ALICE, model="d")
    queue.leave(others[0])
    _enter(queue, ALICE, model="d")


def test_the_bytes_of_waiting_requests_are_bounded() -> None:
    """All requests together fit the memory for them, and those of one model half of it. Who leaves makes room."""
    queue = JobQueue(max_bytes=100)
    first = _enter(queue, FLOOD, size=50)
    with pytest.raises(Unavailable, match="memory") as caught:
        _enter(queue, FLOOD, size=1)
    assert (caught.value.status, caught.value.retry_after) == (429, 1)
    _enter(queue, ALICE, model="b", size=50)
    with pytest.raises(Unavailable, match="memory"):
        _enter(queue, ALICE, model="c", size=1)
    queue.leave(first)
    _enter(queue, ALICE, model="c", size=50)
    queue.offer(ANN, 0)
    granted = next(iter(queue.granted_jobs))
    _enter(queue, ALICE, model="d", size=granted.size)


def test_a_full_queue_says_when_to_come_back_by_class() -> None:
    """The time to wait comes from how fast the jobs of the same class and model are served."""
    queue = JobQueue(max_waiting=20)
    for number in range(20):
        _enter(queue, ALICE, batch=number < 10)
    for tick in range(8):
        _serve(queue, tick=2 * tick)
        _enter(queue, ALICE)
    waits = []
    for batch in (False, True):
        with pytest.raises(Unavailable) as caught:
            _enter(queue, FLOOD, batch=batch, tick=16)
        waits.append(caught.value.retry_after)
    assert waits == [13, 9]


def test_the_place_of_a_batch_job_counts_the_interactive_ones() -> None:
    """The position of a batch job is behind all interactive ones; the expected wait is that of its own class."""
    queue = JobQueue()
    batch = [_enter(queue, ALICE, batch=True) for _ in range(2)]
    interactive = [_enter(queue, FLOOD) for _ in range(3)]
    assert [queue.place(job, 0)[0] for job in (*interactive, *batch)] == [1, 2, 3, 4, 5]
    assert (queue.count_waiting(MODEL), queue.count_waiting("another")) == (len(interactive) + len(batch), 0)
    assert list(queue.waiting_of(MODEL)) == [*interactive, *batch]


def test_a_failed_attempt_is_counted_once() -> None:
    """A job that returns after a failed attempt has its old place, and its payer's next jobs start where they would have."""
    queue = JobQueue()
    first, second = _enter(queue, ALICE), _enter(queue, FLOOD)
    tag = queue._models[MODEL, False].finish_tags[ALICE]
    assert _serve(queue) is first
    queue.enter_again(first, first.groups)
    assert queue._models[MODEL, False].finish_tags[ALICE] == tag
    assert [queue.place(job, 0)[0] for job in (first, second)] == [1, 2]
