"""Stored reports and integrity: the same from SQLite and PostgreSQL, and after a restart."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.domain.integrity_records import IntegrityRecord, ProductKey, RecordChange
from coordinator.jobs.report_store import StoredReport
from coordinator.ports import Cursor, Settlement
from coordinator.storage.store import Store
from tallystick.audit.integrity import Integrity
from tallystick.protocol.types import Amount, Hash, JobId
from tests.coordinator.harness import PAYER, person
from tests.postgres import POSTGRES, empty_database

ANN, BOB = person("ann").address, person("bob").address
PRODUCT = ProductKey(ANN, "model/€", "fp8")
REPORT = StoredReport(
    (JobId(bytes(range(16))), ANN, False), PAYER.address, PRODUCT, 1_000, 7, Hash(b"\x01" * 32), Hash(b"\x02" * 32), True, 9
)
RECORD = IntegrityRecord(Integrity(12.123456789012345, 0.1, 13), 2, 7)
CHANGE = RecordChange(PRODUCT, RECORD)


@pytest.fixture(params=["sqlite", "postgres"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database."""
    if request.param == "postgres" and not POSTGRES:
        pytest.skip("needs PostgreSQL, which scripts/test starts")
    return await empty_database() if request.param == "postgres" else f"sqlite:///{tmp_path}/coordinator.db"


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    """An empty store."""
    opened = Store(url)
    await opened.start()
    yield opened
    await opened.close()


async def test_what_was_stored_is_there_in_the_next_process(store: Store, url: str) -> None:
    """Reports and records survive, to the last digit."""
    await store.reports.put_report(REPORT, CHANGE, 0)
    await store.close()
    later = Store(url)
    await later.start()
    try:
        assert await later.reports.report(REPORT.finding) == REPORT
        assert await later.reports.integrity() == [(PRODUCT, RECORD)]
    finally:
        await later.close()


async def test_findings_and_products_are_apart(store: Store) -> None:
    """A conviction over a job is another finding; another precision is another product; a newer record replaces the former."""
    job, _, _ = REPORT.finding
    await store.reports.put_report(REPORT, CHANGE, 0)
    convicts = replace(REPORT, finding=(job, ANN, True), index=9)
    await store.reports.put_report(convicts, RecordChange(PRODUCT, replace(RECORD, leaf=9)), 0)
    other = replace(REPORT, finding=(job, BOB, False), product=ProductKey(BOB, "m", "f16"), payer=BOB)
    await store.reports.put_report(other, RecordChange(other.product, replace(RECORD, leaf=8)), 0)
    assert await store.reports.report(convicts.finding) == convicts
    assert await store.reports.report((job, BOB, True)) is None
    assert [key for key, _ in await store.reports.integrity()] == [other.product, PRODUCT]
    counts = [await store.reports.count_reports(payer, PRODUCT) for payer in (PAYER.address, BOB)]
    assert counts == [2, 0]


async def test_forgotten_products_and_reports_that_count_nothing_leave_no_record(store: Store) -> None:
    """Otherwise a restart would bring back what made way, and in another order."""
    others = [ProductKey(ANN, "m", "f16"), ProductKey(ANN, PRODUCT.model, "f16"), ProductKey(BOB, *PRODUCT[1:])]
    for number, key in enumerate(others):
        await store.reports.put_report(REPORT, RecordChange(key, replace(RECORD, leaf=number)), 0)
    await store.reports.put_report(REPORT, RecordChange(PRODUCT, RECORD, tuple(others[:1])), 0)
    await store.reports.put_report(REPORT, RecordChange(others[0], None), 0)
    assert [key for key, _ in await store.reports.integrity()] == [*others[1:], PRODUCT]


async def test_effects_of_a_product_are_summed_by_direction(store: Store) -> None:
    """From a moment on, that moment included; other products and directions do not count."""
    rows = [
        replace(REPORT, at=999, effect=1),
        replace(REPORT, at=1_000, effect=10),
        replace(REPORT, at=1_001, effect=1 << 40),
        replace(REPORT, praises=False, effect=100),
        replace(REPORT, product=PRODUCT._replace(precision="f16"), effect=1_000),
        replace(REPORT, product=PRODUCT._replace(model="m"), effect=1_000),
    ]
    for number, row in enumerate(rows):
        finding = (JobId(bytes((number,)) * 16), ANN, False)
        await store.reports.put_report(replace(row, finding=finding), CHANGE, 0)
    assert await store.reports.sum_effects(PRODUCT, 1_000, praises=True) == 10 + (1 << 40)
    assert await store.reports.sum_effects(PRODUCT, 1_000, praises=False) == 100
    assert await store.reports.sum_effects(ProductKey(BOB, *PRODUCT[1:]), 0, praises=True) == 0


async def test_old_reports_are_deleted_and_their_integrity_stays(store: Store) -> None:
    """A job that cannot be reported any more need not be remembered."""
    await store.reports.put_report(REPORT, CHANGE, 0)
    newer = replace(REPORT, finding=(JobId(bytes(16)), ANN, False), at=1_001, index=8)
    await store.reports.put_report(newer, RecordChange(PRODUCT, replace(RECORD, leaf=8)), 1_001)
    assert await store.reports.report(REPORT.finding) is None
    assert await store.reports.report(newer.finding) == newer
    assert len(await store.reports.integrity()) == 1


async def test_settlements_of_a_payer(store: Store) -> None:
    """What each provider was paid on chain."""
    settled = [Settlement(PAYER.address, ANN, Amount(5), "0x1", 1), Settlement(PAYER.address, BOB, Amount(1 << 70), "0x1", 1)]
    await store.put_settlements([*settled, Settlement(BOB, ANN, Amount(9), "0x1", 1)], Cursor(2))
    assert await store.reports.settled_by(PAYER.address) == {ANN: 5, BOB: 1 << 70}
    assert await store.reports.settled_by(ANN) == {}
