"""Jobs and receipts of several replicas on one PostgreSQL: none is placed twice, lost, counted twice or ended by another one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from coordinator.domain.reputation import ProviderRecord, RecordChange
from coordinator.domain.speeds import SpeedRecord
from coordinator.ports import StoredResponse
from coordinator.storage import job_store
from coordinator.storage.recovery import MISSED_SECONDS, REASON, Recovery
from coordinator.storage.schema import jobs, open_jobs, placed_jobs, tab_receipts, tabs
from coordinator.storage.store import Store
from tallystick.protocol.errors import Code, Refusal, Unavailable
from tallystick.protocol.jobs import State
from tallystick.protocol.messages import Outcome
from tallystick.protocol.types import Amount
from tests.coordinator.harness import PAYER, START, person, unchecked
from tests.coordinator.storage.replicas import ANN, BOB, Job, beat, count, database, opened, shared
from tests.postgres import POSTGRES

pytestmark = pytest.mark.skipif(not POSTGRES, reason="needs PostgreSQL, which scripts/test starts")


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """An empty database."""
    async with database() as address:
        yield address


@pytest.fixture
async def pair(url: str) -> AsyncIterator[tuple[Store, Store]]:
    """Two replicas."""
    async with opened(url, "one", "two") as (first, second):
        yield first, second


async def recover(store: Store, *ticks: float) -> None:
    """Looks for jobs of lost replicas as the role does, at these times."""
    clock = iter(ticks or (0.0, MISSED_SECONDS))
    recovery = Recovery(store.database, shared(store).shared_rows, now=lambda: START + 50.0, tick=lambda: next(clock))
    for _ in ticks or range(2):
        await recovery.look()


async def test_a_job_is_placed_once_whichever_replica_is_asked(pair: tuple[Store, Store]) -> None:
    """The second replica refuses it as a replay, while it runs and after its end, and changes nothing of it."""
    first, second = pair
    job = Job(1)
    await job.place(first)
    for _ in range(2):
        with pytest.raises(Refusal, match="was placed before, here or at another replica") as caught:
            await job.place(second)
        assert caught.value.code is Code.ORDER_REPLAYED
        second.enqueue_job(replace(job.ended, state=State.FAILED))  # as the relay ends a job that it could not place
        known = await second.job(job.id)
        assert known is not None
        assert (known.record.state, known.replica) == (State.MATCHED, "one")
        assert await shared(second).is_placed(job.id)
    await job.finish(first)
    with pytest.raises(Refusal):
        await job.place(second)
    with pytest.raises(Refusal):
        await job.place(first)
    known = await second.job(job.id)
    assert known is not None
    assert (known.record, known.receipt, known.replica) == (job.ended, unchecked(job.receipt), "")
    assert not await shared(second).is_placed(Job(2).id)


async def test_of_two_replicas_that_place_a_job_at_once_one_does(pair: tuple[Store, Store]) -> None:
    """Of many jobs that both get at the same time, each is placed by one of them, with one leaf."""
    listed = [Job(number) for number in range(1, 41)]
    results = await asyncio.gather(*(job.place(store) for job in listed for store in pair), return_exceptions=True)
    numbers = [result for result in results if isinstance(result, int)]
    assert sorted(numbers) == list(range(len(listed)))
    assert all(isinstance(result, int | Refusal) for result in results)
    assert await count(pair[0], placed_jobs) == await count(pair[0], open_jobs) == len(listed)


async def test_a_receipt_of_a_job_that_another_replica_runs_waits(pair: tuple[Store, Store]) -> None:
    """That replica alone knows what it relayed. Once the job has ended, any replica takes the receipt."""
    first, second = pair
    job = Job(1)
    await job.place(first)
    with pytest.raises(Unavailable, match="runs at another replica of this coordinator; send it there, or again"):
        await second.put_receipt(job.id, job.receipt, job.total)
    assert await count(second, tabs) == 0
    first.enqueue_job(job.ended)
    assert await first.job(job.id) is not None  # its end is written
    await second.put_receipt(job.id, job.receipt, job.total)
    await second.put_receipt(job.id, job.receipt, job.total)
    await first.put_receipt(job.id, job.receipt, job.total)
    known = await first.job(job.id)
    assert known is not None
    assert (known.record, known.receipt) == (job.ended, unchecked(job.receipt))
    assert await count(first, tab_receipts) == await count(first, jobs) == 1


async def test_receipts_of_one_tab_through_all_replicas(pair: tuple[Store, Store]) -> None:
    """Each counts once and the total only rises, in whatever order and wherever they come."""
    listed = [Job(number) for number in range(1, 31)]
    for place, job in enumerate(listed):
        await job.place(pair[place % 2])
    order = [*listed[::-1], *listed]
    await asyncio.gather(*(job.finish(pair[place % 2]) for place, job in enumerate(order) if place % 2 == listed.index(job) % 2))
    for store in pair:
        assert await store.load_totals(PAYER.address) == [(ANN.address, listed[-1].total, Amount(0))]
        receipts = await store.receipts_of(PAYER.address, ANN.address, 99)
        assert [late.receipt.message.seq for late in receipts] == list(range(30, 0, -1))
        (last,) = await store.last_receipts(ANN.address, "", 9)
        assert last.receipt.message.seq == 30
    state = await pair[0].load_state(START, 0)
    assert state.totals == {(PAYER.address, ANN.address): listed[-1].total}
    assert (state.jobs, state.follows) == ((), True)
    assert await count(pair[0], tabs) == 1


async def test_a_lower_total_never_replaces_a_higher_one(pair: tuple[Store, Store]) -> None:
    """A replica that knew less of the tab writes a lower total; the tab keeps the higher one, and the last seq."""
    high, low = Job(1, seq=9), Job(2, seq=4)
    for job, store in ((high, pair[0]), (low, pair[1])):
        await job.place(store)
        await job.finish(store)
    assert await pair[1].load_totals(PAYER.address) == [(ANN.address, high.total, Amount(0))]
    (last,) = await pair[1].last_receipts(ANN.address, "", 9)
    assert last.receipt.message.seq == 9
    assert await pair[0].load_totals(person("nobody").address) == []


async def test_a_failover_is_stored_with_its_former_attempt(pair: tuple[Store, Store]) -> None:
    """Each attempt is a leaf of its own, and the newest row of the job has them all with their receipts."""
    first, second = pair
    job = Job(1)
    leaf = await job.place(first)
    await first.put_receipt(job.id, job.receipt, job.total)  # a void one, say
    failover = job.with_attempt(BOB)
    assert await job.place(first, failover) == leaf + 1
    known = await second.job(job.id)
    assert known is not None
    assert known.record == failover
    assert known.receipts == {ANN.address: unchecked(job.receipt)}


async def test_jobs_of_a_lost_replica_are_ended_and_those_of_a_live_one_are_not(url: str) -> None:
    """After two looks. The receipt that comes later is stored with the failed job, and counts."""
    lost, live = Job(1), Job(2)
    async with opened(url, "one", "two", "three") as (one, two, three):
        await lost.place(one)
        await live.place(two)
        await beat(three, "one", "two", "three")
        await recover(three)
        assert await count(three, jobs) == 0
        await beat(three, "two", "three")
        await recover(three, 0.0, 0.5, 1.1)
        assert await count(three, jobs) == 0, "a moment proves nothing: all beats are old after an outage of the database"
        await recover(three)
        known = await three.job(lost.id)
        assert known is not None
        assert (known.record.state, known.record.finished_at, known.replica) == (State.FAILED, START + 50, "")
        (attempt,) = known.record.attempts
        assert (attempt.unseen, attempt.reason) == (True, REASON)
        running = await three.job(live.id)
        assert running is not None
        assert (running.record, running.replica) == (live.begun, "two")
        await three.put_receipt(lost.id, lost.receipt, lost.total)
        await lost.finish(one)  # it was only silent, and knows the end
        known = await two.job(lost.id)
        assert known is not None
        assert (known.record, known.receipt) == (lost.ended, unchecked(lost.receipt))
        late = replace(lost.ended, state=State.CANCELLED, attempts=(replace(lost.ended.attempts[0], state=State.CANCELLED),))
        await three.put_receipt(lost.id, lost.receipt, lost.total, late)
        known = await two.job(lost.id)
        assert known is not None
        assert known.record == lost.ended, "a known end stays"
        assert await count(three, tab_receipts) == 1
        assert await count(three, open_jobs) == 1
        with pytest.raises(Unavailable, match="was ended by another replica"):
            await lost.place(one, lost.with_attempt(BOB))


async def test_the_jobs_of_a_stopping_replica_end_by_themselves(pair: tuple[Store, Store]) -> None:
    """It has left the list, and lives until its last job has ended: its connection for roles shows that."""
    first, second = pair
    job = Job(1)
    await job.place(first)
    await beat(second, "two")
    roles = asyncio.create_task(first.roles.run({}))
    rows = shared(second).shared_rows
    async with asyncio.timeout(120):
        while await second.database.read(rows.missed_owners):  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.02)
    await recover(second)
    assert await count(second, jobs) == 0
    roles.cancel()
    await asyncio.wait({roles})
    async with asyncio.timeout(120):
        while not await second.database.read(rows.missed_owners):  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.02)
    await recover(second)
    assert await count(second, jobs) == 1


async def test_a_replica_never_ends_its_own_jobs(pair: tuple[Store, Store]) -> None:
    """Although its beats are missing: whoever ends jobs lives."""
    await Job(1).place(pair[0])
    await beat(pair[0])
    await recover(pair[0])
    assert await count(pair[0], jobs) == 0


async def test_what_a_lost_replica_left_is_cleaned_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of jobs that it did end are deleted; their ends stay as they are. A batch at a time."""
    monkeypatch.setattr("coordinator.storage.shared_rows.FORGOTTEN_AT_ONCE", 3)
    monkeypatch.setattr(job_store, "STALE_ROWS", 999)
    listed = [Job(number) for number in range(1, 11)]
    async with opened(url, "two") as (two,):
        async with opened(url, "one") as (one,):
            for job in listed:
                await job.place(one)
            for job in listed[:5]:
                await job.finish(one)
        assert await count(two, open_jobs) == len(listed)
        await beat(two, "two")
        await recover(two)
        assert await count(two, open_jobs) == 0
        states = [known.record.state for job in listed if (known := await two.job(job.id))]
        assert states == [State.COMPLETED] * 5 + [State.FAILED] * 5


async def test_rows_of_attempts_are_deleted_after_the_end(pair: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the replica that ran the job, a batch at a time."""
    monkeypatch.setattr(job_store, "STALE_ROWS", 3)
    for number in range(1, 7):
        job = Job(number)
        await job.place(pair[0])
        await job.finish(pair[0])
    await pair[0].job(job.id)
    assert await count(pair[0], open_jobs) == 0


async def test_old_jobs_are_deleted_by_any_replica(pair: tuple[Store, Store]) -> None:
    """With the ids that detect their replays; the receipts with the highest seq and total of each tab are kept."""
    first, second = pair
    listed = [Job(number) for number in range(1, 9)]
    for place, job in enumerate(listed):
        await job.place(pair[place % 2])
        await job.finish(pair[place % 2])
    assert not await second.forget_jobs(START + 1)
    while await second.forget_jobs(START + 6):
        pass
    assert [await store.job(job.id) is None for store in pair for job in listed] == [number < 6 for number in range(1, 9)] * 2
    assert await count(first, jobs) == await count(first, placed_jobs) == 3
    while await first.forget_jobs(START + 99):
        pass
    assert await count(first, jobs) == await count(first, placed_jobs) == 0
    (kept,) = await first.receipts_of(PAYER.address, ANN.address, 9)
    assert kept.receipt.message.seq == 8
    assert await first.load_totals(PAYER.address) == [(ANN.address, listed[-1].total, Amount(0))]


async def test_reputations_are_changed_by_all_replicas(pair: tuple[Store, Store]) -> None:
    """No replica overwrites the jobs that another one counted; each gets the record that results."""
    change = RecordChange().after(Outcome.COMPLETED).after(Outcome.PROVIDER_ERROR)
    other = RecordChange().after(Outcome.COMPLETED)
    slow, fast = SpeedRecord(first_token_ms=9.0, first_tokens=1), SpeedRecord(first_token_ms=4.0, first_tokens=2)
    both = {ANN.address: change, BOB.address: other}
    changed = await shared(pair[0]).change_records(both, {(ANN.address, "m"): slow})
    assert changed == {provider: each.of(ProviderRecord()) for provider, each in both.items()}
    await asyncio.gather(*(shared(store).change_records({ANN.address: other, BOB.address: other}, {}) for store in pair * 9))
    changed = await shared(pair[1]).change_records({ANN.address: other}, {(ANN.address, "m"): fast})
    expected = change.of(ProviderRecord())
    for _ in range(19):
        expected = other.of(expected)
    assert changed[ANN.address].jobs == expected.jobs == 21
    assert [changed[ANN.address].good, changed[ANN.address].bad] == pytest.approx([expected.good, expected.bad])
    state = await pair[0].load_state(START, 0)
    assert state.records[ANN.address] == changed[ANN.address]
    assert state.records[BOB.address].jobs == 19
    assert state.speeds == {(ANN.address, "m"): fast}


async def test_answers_and_claims_are_everybodys(pair: tuple[Store, Store]) -> None:
    """What one replica stored, another one finds."""
    stored = StoredResponse(Job(1).id, b"print", b"frames", START, PAYER.address)
    await pair[0].put_response(stored, since=0, max_bytes=99)
    found = await pair[1].response(stored.job, 0)
    assert found is not None
    assert (found.frames, found.payer) == (b"frames", PAYER.address)


async def test_a_lone_coordinators_database_is_taken_over_and_back(url: str) -> None:
    """Replicas find the jobs, totals and replays of the lone coordinator before them, and it theirs."""
    old, left, mine, again = Job(1), Job(2), Job(3), Job(4)
    async with opened(url, "") as (lone,):
        lone.enqueue_job(old.begun)
        await old.finish(lone)
        for number in range(101, 107):  # a segment and more
            lone.enqueue_job(Job(number).ended)
        lone.enqueue_job(left.begun)
    async with opened(url, "one", "two") as (one, two):
        with pytest.raises(Refusal, match="placed before"):
            await old.place(one)
        with pytest.raises(Refusal, match="placed before"):
            await left.place(two)
        await mine.place(two)
        await mine.finish(two)
        await again.place(two)
        known = await one.job(old.id)
        assert known is not None
        assert known.record == old.ended
        assert await one.job(Job(103).id) is not None
        await beat(one, "one", "two")
        await recover(one)
        ended = await two.job(left.id)
        assert ended is not None
        assert ended.record.state is State.FAILED
    async with opened(url, "") as (lone,):
        state = await lone.load_state(START, 0)
        assert set(state.jobs) == {old.id, left.id, mine.id, again.id, *(Job(number).id for number in range(101, 107))}
        assert state.totals == {(PAYER.address, ANN.address): Amount(60)}
        for job, expected in (
            (old, State.COMPLETED),
            (mine, State.COMPLETED),
            (again, State.FAILED),
            (Job(104), State.COMPLETED),
        ):
            known = await lone.job(job.id)
            assert known is not None
            assert known.record.state is expected
        while await lone.forget_jobs(START + 999):
            pass
        assert await count(lone, placed_jobs) == 0
    async with opened(url, "one") as (one,):
        with pytest.raises(Refusal, match="placed before"):
            await again.place(one)  # the newest segment of a lone coordinator is not complete, so it is not deleted


async def test_a_replica_takes_its_lock_again(url: str) -> None:
    """After the database cut its connections, it goes on; a lone coordinator that was faster ends it."""
    import sqlalchemy as sa
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with opened(url, "one") as (one,):
        guard = asyncio.create_task(one.guard())
        await asyncio.sleep(0)
        async with engine.connect() as connection:
            kill = "SELECT count(pg_terminate_backend(pid)) FROM pg_locks WHERE locktype = 'advisory' AND pid <> pg_backend_pid()"
            await connection.execute(
                sa.text(kill + " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())")
            )
            held = sa.text(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock' AND granted"
                " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            )
            async with asyncio.timeout(120):
                while not (await connection.execute(held)).scalar_one():  # noqa: ASYNC110 - the server has no event for it
                    await asyncio.sleep(0.05)
        assert not guard.done()
        guard.cancel()
        await asyncio.wait({guard})
    await engine.dispose()
