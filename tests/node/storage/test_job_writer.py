"""Writes of jobs that run at the same time share transactions, in order, and a transaction that fails takes only its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from node.storage import job_writer
from node.storage.job_rows import JobWrite, to_beginning, to_ending
from node.storage.job_writer import JobWriter
from node.storage.store import MIGRATIONS
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.tab import ProviderTab
from tallystick.protocol.types import Amount
from tallystick.runtime import group_writer
from tallystick.runtime.group_writer import GroupWriter
from tallystick.runtime.storage import Database
from tests.node.harness import NOW, Client, admitted
from tests.node.storage.test_store import ASK, receipt_record


class CountingDatabase(Database):
    """A database that notes its transactions, and fails those that the test says."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.transactions: list[tuple[int, bool]] = []
        """Number of writes and whether they were synced, of each."""
        self.faults: list[Exception] = []

    def commit_now(self, _work: Callable[[Connection], Any]) -> bool:
        """See Database: what the tests count takes the other way."""
        return False

    async def write(self, work: Callable[[Connection], Any], *, synced: bool = True, brief: bool = False) -> Any:
        """See Database."""
        self.transactions.append((len(getattr(work, "keywords", {}).get("entries", ())), synced))
        if self.faults:
            raise self.faults.pop(0)
        return await super().write(work, synced=synced, brief=brief)


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[CountingDatabase]:
    """Provides an empty state."""
    database = CountingDatabase(f"sqlite:///{tmp_path / 'node.db'}")
    await database.start(MIGRATIONS)
    yield database
    await database.close()


def writes(count: int) -> list[JobWrite]:
    """Returns writes of some jobs of one payer that begin and end."""
    client, jobs = Client(), list[JobWrite]()
    for number in range(1, count + 1):
        placed = client.order(ASK)
        record = receipt_record(placed, ProviderTab(number - 1, Amount(40 * (number - 1))))
        beginning = to_beginning(number, admitted(placed), NOW, placed.order.message.ceiling)
        jobs.append(JobWrite(beginning, to_ending(number, number, record)))
    return jobs


async def test_jobs_that_run_together_share_a_transaction(database: CountingDatabase) -> None:
    """While many jobs run, a transaction waits a moment for others, and never longer than the limit."""
    timers: list[tuple[float, Callable[[], None]]] = []
    jobs = writes(6)

    def later(seconds: float, begin: Callable[[], None]) -> asyncio.TimerHandle:
        timers.append((seconds, begin))
        return asyncio.get_running_loop().call_later(3_600, print)

    group = GroupWriter(database, lambda: 1_000, job_writer.PATIENCE, later=later, tick=lambda: 5.0)
    writer = JobWriter(database, lambda: 1_000, group)
    await writer.add(jobs[0])
    waiting = [writer.add(job) for job in jobs[1:]]
    ((seconds, begin),) = timers
    begin()
    await asyncio.gather(*waiting)
    assert database.transactions == [(1, True), (5, True)], "the first one had nobody to wait for"
    assert seconds == job_writer.PATIENCE.most == 0.01
    await writer.close()


async def test_few_jobs_wait_for_nobody(database: CountingDatabase) -> None:
    """A job that runs alone is written at once; an order alone is committed without a sync."""

    def later(_seconds: float, _begin: Callable[[], None]) -> asyncio.TimerHandle:
        pytest.fail("waited for writes that may come")

    group = GroupWriter(database, lambda: 4, job_writer.PATIENCE, later=later, tick=lambda: 5.0)
    writer = JobWriter(database, lambda: 4, group)
    (job,) = writes(1)
    await writer.add(JobWrite(job.beginning))
    await writer.add(JobWrite(None, job.ending))
    assert database.transactions == [(1, False), (1, True)]


async def test_a_database_that_fails_fails_the_whole_transaction(database: CountingDatabase) -> None:
    """All writes of the transaction fail, and what builds on them; the next one on the stored tab is written."""
    writer, jobs = JobWriter(database, lambda: 1), writes(5)
    database.faults = [Unavailable(Code.DATABASE_UNAVAILABLE, "disk full")]
    first = await asyncio.gather(*map(writer.add, jobs[:2]), return_exceptions=True)
    assert [isinstance(error, Unavailable) for error in first] == [True, True]
    assert len(database.transactions) == 1
    later = await asyncio.gather(*map(writer.add, (jobs[2], jobs[0], jobs[1])), return_exceptions=True)
    assert [type(error).__name__ for error in later] == ["TabConflict", "NoneType", "NoneType"]


async def test_a_write_with_a_bug_fails_alone(database: CountingDatabase) -> None:
    """A write whose rows the database refuses is left out, and the others of its transaction are written."""
    writer, jobs = JobWriter(database, lambda: 1), writes(2)
    twice = JobWrite(jobs[0].beginning)
    results = await asyncio.gather(*map(writer.add, (jobs[0], twice, jobs[1])), return_exceptions=True)
    assert [result is None for result in results] == [True, False, True]


async def test_the_queue_is_bounded_and_closes(database: CountingDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that finds the queue full fails, as one after the end does; what was queued is written at the end."""
    monkeypatch.setattr(group_writer, "MAX_QUEUED", 2)
    writer, jobs = JobWriter(database, lambda: 1), writes(4)
    queued = [writer.add(job) for job in jobs[:2]]
    with pytest.raises(Unavailable, match="too slow"):
        await writer.add(jobs[2])
    await writer.close()
    assert all(future.done() and future.exception() is None for future in queued)
    with pytest.raises(Unavailable, match="closed"):
        await writer.add(jobs[3])
