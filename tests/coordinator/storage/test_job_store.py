"""How often a job is written, and that nothing of it is lost while its database fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection

from coordinator.ports import AttemptRecord, JobRecord
from coordinator.storage import job_store
from coordinator.storage.schema import jobs, open_jobs
from coordinator.storage.store import Store
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.jobs import State
from tallystick.protocol.messages import Receipt
from tallystick.protocol.types import Amount, JobId
from tests.coordinator.harness import PAYER, START, make_ask, make_order, make_receipt, make_terms, person, unchecked

ANN = person("ann")
FAILURE = Unavailable(Code.DATABASE_UNAVAILABLE, "the disk is full")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    """An empty store."""
    opened = Store(f"sqlite:///{tmp_path}/coordinator.db", segment_jobs=4)
    await opened.start()
    yield opened
    await opened.close()


def _job(number: int) -> tuple[JobRecord, JobRecord, Verified[Receipt]]:
    """A job as it begins, as it ends, and its receipt."""
    job = JobId(number.to_bytes(16, "big"))
    terms = make_terms(make_ask(ANN), job)
    order = make_order(terms, ANN.address)
    attempt = AttemptRecord(unchecked(order), terms, State.MATCHED)
    begun = JobRecord(job, PAYER.address, State.MATCHED, START, None, (attempt,))
    ended = replace(begun, state=State.COMPLETED, finished_at=START + 1, attempts=(replace(attempt, state=State.COMPLETED),))
    return begun, ended, make_receipt(ANN, order, terms, seq=number)


async def _count(store: Store, table: sa.Table) -> int:
    count: int = await store.database.read(lambda c: c.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())
    return count


def _fail(store: Store, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets all writes fail until the returned function is called."""
    write = store.database.write

    async def fail(_work: Callable[[Connection], Any], *, synced: bool = True) -> Any:
        await asyncio.sleep(0)
        raise FAILURE

    monkeypatch.setattr(store.database, "write", fail)
    monkeypatch.setattr(store.database, "commit_now", lambda _work: False)
    return lambda: monkeypatch.setattr(store.database, "write", write)


async def test_a_short_job_is_one_row(store: Store) -> None:
    """What begins and ends between two transactions is stored by its end alone."""
    begun, ended, receipt = _job(1)
    store.enqueue_job(begun)
    await store.put_receipt(begun.job, receipt, Amount(1), ended)
    assert await _count(store, open_jobs) == 0
    assert await _count(store, jobs) == 1


async def test_rows_of_open_jobs_are_deleted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once their jobs ended, a batch at a time."""
    monkeypatch.setattr(job_store, "STALE_ROWS", 3)
    for number in range(1, 7):
        begun, ended, receipt = _job(number)
        store.enqueue_job(begun)
        await store.job(begun.job)  # commits it
        await store.put_receipt(begun.job, receipt, Amount(number), ended)
    await store.job(begun.job)
    assert await _count(store, open_jobs) == 0


async def test_an_end_that_could_not_be_written_is_written_later(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the next write, and its receipt is not acknowledged until then."""
    begun, ended, receipt = _job(1)
    store.enqueue_job(begun)
    await store.job(begun.job)
    work = _fail(store, monkeypatch)
    with pytest.raises(Unavailable, match="the disk is full"):
        await store.put_receipt(begun.job, receipt, Amount(1), ended)
    work()
    other, _, _ = _job(2)
    store.enqueue_job(other)
    known = await store.job(begun.job)
    assert known is not None
    assert known.record == ended
    assert await _count(store, jobs) == 1
    await store.put_receipt(begun.job, receipt, Amount(1), ended)
    assert await _count(store, jobs) == 1, "the same receipt again"


async def test_so_many_ends_wait_for_the_database_and_no_more(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then no job begins, until they are written."""
    monkeypatch.setattr(job_store, "MAX_UNWRITTEN", 2)
    work = _fail(store, monkeypatch)
    for number in (1, 2):
        begun, ended, receipt = _job(number)
        store.enqueue_job(begun)
        with pytest.raises(Unavailable):
            await store.put_receipt(begun.job, receipt, Amount(1), ended)
    begun, _, _ = _job(3)
    with pytest.raises(Unavailable, match="does not take the ends of jobs"):
        store.enqueue_job(begun)
    work()
    await store.job(begun.job)
    store.enqueue_job(begun)
    assert await store.job(begun.job) is not None
    assert await _count(store, jobs) == 2


async def test_jobs_are_found_in_and_behind_segments(store: Store, tmp_path: Path) -> None:
    """By their ids, in this process and the next one, whichever segment has them; a receipt that comes later is added."""
    numbers = range(1, 11)
    for number in numbers:
        begun, ended, receipt = _job(number)
        store.enqueue_job(begun)
        store.enqueue_job(ended)
        await store.job(begun.job)
    await store.close()
    again = Store(f"sqlite:///{tmp_path}/coordinator.db", segment_jobs=4)
    await again.start()
    for number in numbers:
        begun, ended, receipt = _job(number)
        known = await again.job(begun.job)
        assert known is not None
        assert (known.record, known.receipts) == (ended, {})
        await again.put_receipt(begun.job, receipt, Amount(number))
        known = await again.job(begun.job)
        assert known is not None
        assert (known.record, known.receipt) == (ended, unchecked(receipt))
    assert await _count(again, jobs) == len(numbers)
    assert len(await again.receipts_of(PAYER.address, ANN.address, 99)) == len(numbers)
    await again.close()


async def test_a_receipt_of_a_job_that_is_gone(store: Store) -> None:
    """It is not acknowledged; its provider sends it with its order then."""
    begun, _, receipt = _job(1)
    with pytest.raises(Unavailable, match="is not stored any more; send the receipt again"):
        await store.put_receipt(begun.job, receipt, Amount(1))


async def test_a_provider_that_lost_its_state_gets_receipts_of_running_jobs(store: Store) -> None:
    """A job that goes on with another provider has the free receipt of the first, whose number must not be used twice."""
    begun, _, receipt = _job(7)
    store.enqueue_job(begun)
    await store.put_receipt(begun.job, receipt, Amount(1))
    assert [late.receipt.message.seq for late in await store.last_receipts(ANN.address, "", 9)] == [7]
    assert [late.receipt.message.seq for late in await store.receipts_of(PAYER.address, ANN.address, 9)] == [7]
    assert await store.last_receipts(ANN.address, PAYER.address, 9) == []
