"""The end of a single job that a replica left which is gone: at once if its payer cancels it, else after a while."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import sqlalchemy as sa

from coordinator.storage.recovery import MAX_GAP_SECONDS, MAX_MISSED, MISSED_SECONDS, REASON, Recovery
from coordinator.storage.schema import jobs, open_jobs, replicas
from coordinator.storage.store import Store
from tallystick.protocol.errors import Unavailable
from tallystick.protocol.jobs import State
from tests.coordinator.harness import START, unchecked
from tests.coordinator.storage.replicas import BOB, Job, beat, count, database, opened, shared
from tests.postgres import POSTGRES

pytestmark = pytest.mark.skipif(not POSTGRES, reason="needs PostgreSQL, which scripts/test starts")


class Ticks:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def recovery_of(store: Store, ticks: Ticks) -> Recovery:
    """What a replica ends jobs with."""
    return Recovery(store.database, shared(store).shared_rows, now=lambda: START + 50.0, tick=ticks)


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Store, Store]]:
    """Two replicas, of which neither has a connection for roles."""
    async with database() as url, opened(url, "one", "two") as (first, second):
        yield first, second


@asynccontextmanager
async def living(store: Store, other: Store) -> AsyncIterator[None]:
    """A replica that has its connection for roles, as the other one sees."""
    roles = asyncio.create_task(store.roles.run({}))
    rows = shared(other).shared_rows
    try:
        async with asyncio.timeout(120):
            while await other.database.read(lambda c: rows.missed_owner(c, "one")) is not None:  # noqa: ASYNC110 - no event for it
                await asyncio.sleep(0.02)
        yield
    finally:
        roles.cancel()
        await asyncio.wait({roles})


async def test_a_payers_cancel_ends_the_job_at_once(pair: tuple[Store, Store]) -> None:
    """Once the replica's connection has ended, whatever its last beat was. Its other jobs, and those of others, go on."""
    first, second = pair
    job, other, own = Job(1), Job(2), Job(3)
    await job.place(first)
    await other.place(first)
    await own.place(second)
    await beat(second, "one", "two")
    recovery = recovery_of(second, Ticks())
    assert not await recovery.end_job(job.id, "one", cancelled=False)
    assert await recovery.end_job(job.id, "one", cancelled=True)
    assert not await recovery.end_job(job.id, "one", cancelled=True), "it has ended"
    assert not await recovery.end_job(own.id, "two", cancelled=True), "who asks lives"
    known = await second.job(job.id)
    assert known is not None
    assert (known.record.state, known.record.finished_at, known.replica) == (State.FAILED, START + 50, "")
    assert (known.record.attempts[0].unseen, known.record.attempts[0].reason) == (True, REASON)
    for running in (other, own):
        known = await second.job(running.id)
        assert known is not None
        assert known.record == running.begun
    assert (await count(second, jobs), await count(second, open_jobs)) == (1, 2)


async def test_a_replica_that_lives_keeps_its_jobs(pair: tuple[Store, Store]) -> None:
    """Its connection shows that it lives, although it beats no more."""
    first, second = pair
    job, ticks = Job(1), Ticks()
    await job.place(first)
    await beat(second, "two")
    recovery = recovery_of(second, ticks)
    async with living(first, second):
        for _ in range(9):
            ticks.now += MAX_GAP_SECONDS / 2
            for cancelled in (False, True):
                assert not await recovery.end_job(job.id, "one", cancelled=cancelled)
    assert await count(second, jobs) == 0


async def test_without_a_cancel_the_replica_has_to_be_missed_for_a_while(pair: tuple[Store, Store]) -> None:
    """It beats no more, its connection has ended, and both stays so from question to question."""
    first, second = pair
    job, ticks = Job(1), Ticks()
    await job.place(first)
    recovery = recovery_of(second, ticks)

    async def asked(after: float) -> bool:
        ticks.now += after
        return await recovery.end_job(job.id, "one", cancelled=False)

    await beat(second, "two")
    assert not await asked(0)
    assert not await asked(MISSED_SECONDS - 0.1)
    assert not await asked(MAX_GAP_SECONDS + 0.1), "nobody knows what was in between"
    async with living(first, second):
        assert not await asked(MISSED_SECONDS)
    assert not await asked(MISSED_SECONDS / 2), "it lived meanwhile"
    await beat(second, "one", "two")
    await second.database.write(lambda c: c.execute(sa.update(replicas).values(beat_at=replicas.c.beat_at + 3_600)))
    assert not await asked(MISSED_SECONDS), "it has beaten"
    await beat(second, "two")
    assert await asked(0.1)
    assert await count(second, jobs) == 1


async def test_the_role_and_questions_do_not_disturb_each_other(pair: tuple[Store, Store]) -> None:
    """Questions about one replica do not make the role count it as missed for longer, nor the other way round."""
    first, second = pair
    job, ticks = Job(1), Ticks()
    await job.place(first)
    await beat(second, "two")
    recovery = recovery_of(second, ticks)
    await recovery.look()
    ticks.now += MISSED_SECONDS
    assert not await recovery.end_job(job.id, "one", cancelled=False)
    assert await count(second, jobs) == 0
    await recovery.look()
    assert await count(second, jobs) == 1


async def test_a_replica_that_was_only_paused(pair: tuple[Store, Store]) -> None:
    """A job that was ended meanwhile gets no further provider from it; what its provider's receipt says replaces the end."""
    first, second = pair
    job = Job(1)
    await job.place(first)
    assert await recovery_of(second, Ticks()).end_job(job.id, "one", cancelled=True)
    with pytest.raises(Unavailable, match="was ended by another replica"):
        await job.place(first, job.with_attempt(BOB))
    await job.finish(first)
    known = await second.job(job.id)
    assert known is not None
    assert (known.record, known.receipt) == (job.ended, unchecked(job.receipt))
    assert await count(second, jobs) == 1


async def test_receipts_of_the_ended_job_are_taken_anywhere(pair: tuple[Store, Store]) -> None:
    """As for any job that has ended."""
    first, second = pair
    job = Job(1)
    await job.place(first)
    with pytest.raises(Unavailable, match="runs at another replica"):
        await second.put_receipt(job.id, job.receipt, job.total)
    assert await shared(second).end_lost(job.id, "one", cancelled=True)
    await second.put_receipt(job.id, job.receipt, job.total)
    known = await second.job(job.id)
    assert known is not None
    assert known.receipt == unchecked(job.receipt)
    await Job(2).place(second)
    assert not await shared(second).end_lost(Job(2).id, "one", cancelled=True), "it runs here"


async def test_questions_take_bounded_memory(pair: tuple[Store, Store]) -> None:
    """Ids of replicas come from the database; the oldest are forgotten."""
    recovery = recovery_of(pair[1], Ticks())
    for number in range(MAX_MISSED + 9):
        assert not await recovery.end_job(Job(1).id, f"gone {number}", cancelled=False)
    assert len(recovery._asked) == MAX_MISSED
