"""Old jobs leave the database: its size stays, and so do the totals and the last receipts of each tab."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from coordinator.ports import AttemptRecord, JobRecord
from coordinator.storage.schema import job_index, jobs, kept_receipts, tab_receipts
from coordinator.storage.store import Store
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.jobs import State
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.types import Amount, JobId
from tests.coordinator.harness import PAYER, START, make_ask, make_order, make_receipt, make_terms, person, unchecked
from tests.postgres import POSTGRES, empty_database

ANN, BOB = person("ann"), person("bob")
SEGMENT = 8


@pytest.fixture(params=["sqlite", "postgres"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """An empty store with short segments."""
    if request.param == "postgres" and not POSTGRES:
        pytest.skip("needs PostgreSQL, which scripts/test starts")
    url = await empty_database() if request.param == "postgres" else f"sqlite:///{tmp_path}/coordinator.db"
    opened = Store(url, segment_jobs=SEGMENT)
    await opened.start()
    yield opened
    await opened.close()


def _name(number: int) -> JobId:
    return JobId(number.to_bytes(16, "big"))


async def _end(
    store: Store, number: int, provider: Signer = ANN, *, seq: int | None = None, total: int | None = None
) -> LateReceipt:
    """Stores an ended job and its receipt; `number` is also the seq and the second of its end, if nothing else is given."""
    terms = make_terms(make_ask(provider), _name(number))
    order = make_order(terms, provider.address)
    seq, total = number if seq is None else seq, 10 * number if total is None else total
    receipt = make_receipt(provider, order, terms, seq=seq, cumulative_cost=Amount(total))
    attempt = AttemptRecord(unchecked(order), terms, State.COMPLETED)
    at = START + number
    record = JobRecord(_name(number), PAYER.address, State.MATCHED, at, None, (replace(attempt, state=State.MATCHED),))
    store.enqueue_job(record)
    ended = replace(record, state=State.COMPLETED, finished_at=at, attempts=(attempt,))
    await store.put_receipt(_name(number), receipt, Amount(total), ended)
    return LateReceipt(unchecked(receipt), unchecked(order), terms)


async def _forget(store: Store, before: int) -> None:
    while await store.forget_jobs(START + before):
        pass


async def _count(store: Store, table: sa.Table) -> int:
    count: int = await store.database.read(lambda c: c.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())
    return count


async def test_old_jobs_go_and_newer_ones_stay(store: Store) -> None:
    """A segment goes when its last job is old enough. What is younger is found as before, also by the next process."""
    for number in range(1, 3 * SEGMENT + 3):
        await _end(store, number)
    await store.job(_name(1))
    await _forget(store, 2 * SEGMENT + 1)
    assert [await store.job(_name(number)) is None for number in (1, SEGMENT, 2 * SEGMENT)] == [True] * 3
    for number in range(2 * SEGMENT + 1, 3 * SEGMENT + 3):
        known = await store.job(_name(number))
        assert known is not None
        assert known.receipt is not None
    state = await store.load_state(START + 99, START)
    assert set(state.jobs) == {_name(number) for number in range(2 * SEGMENT + 1, 3 * SEGMENT + 3)}
    assert not await store.forget_jobs(START + 2 * SEGMENT + 1), "nothing is left to delete"


async def test_a_tab_keeps_its_last_receipts_and_its_total(store: Store) -> None:
    """Those with the highest seq and the highest total, which may be two; until newer ones are deleted in their place."""
    last = {}
    for number in range(1, SEGMENT):
        last[number] = await _end(store, number, seq=number, total=100 - number)
    other = await _end(store, SEGMENT, BOB)
    await store.job(_name(1))
    await _forget(store, 1_000)
    assert await _count(store, jobs) == await _count(store, tab_receipts) == await _count(store, job_index) == 0
    assert await store.last_receipts(ANN.address, "", 9) == [last[SEGMENT - 1]]
    assert await store.receipts_of(PAYER.address, ANN.address, 9) == [last[1], last[SEGMENT - 1]]
    assert await store.last_receipts(BOB.address, "", 9) == await store.receipts_of(PAYER.address, BOB.address, 9) == [other]
    state = await store.load_state(START, START)
    assert state.totals == {(PAYER.address, ANN.address): 99, (PAYER.address, BOB.address): 80}
    newer = [await _end(store, number, seq=number, total=number) for number in range(SEGMENT + 1, 2 * SEGMENT + 1)]
    assert await store.receipts_of(PAYER.address, ANN.address, 2) == [last[1], last[SEGMENT - 1]]
    assert await store.last_receipts(ANN.address, "", 9) == [newer[-1]]
    await _forget(store, 1_000)
    assert await store.receipts_of(PAYER.address, ANN.address, 9) == [last[1], newer[-1]]
    assert await store.last_receipts(ANN.address, "", 9) == [newer[-1]]
    assert await _count(store, kept_receipts) == 3


async def test_a_late_receipt_of_a_deleted_job_is_a_new_one(store: Store) -> None:
    """Its provider sends it with its order then; the tab's total does not fall."""
    for number in range(1, SEGMENT + 1):
        await _end(store, number)
    await store.job(_name(1))
    await _forget(store, 1_000)
    late = await _end(store, 1)
    known = await store.job(_name(1))
    assert known is not None
    assert known.receipt == late.receipt
    assert (await store.load_state(START, START)).totals == {(PAYER.address, ANN.address): 10 * SEGMENT}
    assert [entry.receipt.message.seq for entry in await store.last_receipts(ANN.address, "", 9)] == [SEGMENT]


def _page_count(connection: sa.Connection) -> int:
    return connection.exec_driver_sql("PRAGMA page_count").scalar_one() if connection.dialect.name == "sqlite" else 0


async def test_the_size_is_flat(store: Store) -> None:
    """Once the limit bites, as many rows go as come, and SQLite reuses their pages; PostgreSQL frees space when it vacuums."""
    pages = []
    for number in range(1, 40 * SEGMENT + 1):
        await _end(store, number)
        if number % (4 * SEGMENT) == 0:
            await _forget(store, number - 4 * SEGMENT)
            pages.append(await store.database.read(_page_count))
    assert await _count(store, jobs) <= 6 * SEGMENT
    assert pages[-1] <= pages[4] + 1, pages
