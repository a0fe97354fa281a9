"""Old orders and receipts go, and everything that something rests on stays."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from node.storage import retention
from node.storage.earnings import EarningsLine, read_lines
from node.storage.store import SqlStore
from tallystick.protocol.tab import ProviderTab
from tallystick.protocol.types import Amount
from tests.node.harness import COORDINATOR, NOW, PAYER, Client, admitted, signer
from tests.node.storage.test_store import ASK, finish, open_store, receipt_record, refusal

DAY = 86_400
KEEP = 30 * DAY


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqlStore]:
    """Provides a store in a file of its own."""
    sql = open_store(tmp_path)
    await sql.start()
    yield sql
    await sql.close()


def count(folder: Path) -> dict[str, int]:
    """Returns the number of rows of the tables that jobs fill."""
    tables = ("orders", "receipts", "open_orders", "ceilings")
    with closing(sqlite3.connect(folder / "node.db")) as database:
        return {table: database.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables}


async def finish_confirmed(store: SqlStore, client: Client, count: int, *, first: int = 0, at: int = NOW) -> None:
    """Stores some jobs whose coordinator has confirmed their receipts, each with the claimBy that is usual."""
    for seq in range(first, first + count):
        record = await finish(store, client, seq, at=at, deadline=at + 60, claim_by=at + DAY)
        await store.acknowledge(COORDINATOR.address, [record.matched.job])


async def test_what_is_old_goes_and_its_sums_stay(store: SqlStore, tmp_path: Path) -> None:
    """Receipts beyond the time to keep go with their orders, but for the last of their tab; the earnings do not change."""
    client, other = Client(), Client(signer("other"))
    await finish_confirmed(store, client, 5)
    await finish_confirmed(store, other, 2, at=NOW + DAY)
    await finish_confirmed(store, client, 2, first=5, at=NOW + DAY)
    tabs, later = await store.tabs(NOW + KEEP), NOW + DAY + KEEP
    lines = await store.read(lambda c: read_lines(c, 0))
    assert await store.prune(later, KEEP) == 5
    assert count(tmp_path)["receipts"] == count(tmp_path)["orders"] == 4
    assert await store.prune(later, KEEP) == 0, "what was made at the limit is kept"
    assert await store.read(lambda c: read_lines(c, 0)) == lines
    assert await store.prune(later + 1, KEEP) == 2
    assert count(tmp_path) == {"orders": 2, "receipts": 2, "open_orders": 0, "ceilings": 2}
    assert await store.read(lambda c: read_lines(c, 0)) == lines
    assert await store.tabs(NOW + KEEP) == tabs
    day = [line for line in lines if line.payer == PAYER.address and line.jobs == 5]
    assert day == [EarningsLine("2027-01-15", "model", PAYER.address, 5, 0, 500, Amount(200))]


async def test_what_is_needed_stays(store: SqlStore, tmp_path: Path) -> None:
    """Whatever its age: receipts that are not confirmed, orders that back claims or may be sent again, unfinished ones."""
    client = Client()
    unconfirmed = await finish(store, client, 0, deadline=NOW + 60)
    backing = await finish(store, client, 1, deadline=NOW + 60, claim_by=NOW + 100 * KEEP)
    again = await finish(store, client, 2, deadline=NOW + 99 * KEEP, ceiling=Amount(1), claim_by=NOW + 60)
    await finish_confirmed(store, client, 2, first=3)
    running, expired = client.order(ASK, order_with={"claim_by": NOW + 60 * KEEP}), client.order(ASK)
    for placed in (running, expired):
        await store.begin(admitted(placed), NOW)
    await store.acknowledge(COORDINATOR.address, [backing.matched.job, again.matched.job])
    later = NOW + 50 * KEEP
    assert await store.prune(later, KEEP) == 1
    assert count(tmp_path)["receipts"] == 4
    (late,) = await store.unacknowledged(COORDINATOR.address, later, 0, 10)
    assert late.job == unconfirmed.matched.job
    assert {digest for digest, _ in await store.consumed_orders(later)} == {again.matched.order.digest}
    (claimable,) = await store.claimable(later, 10)
    assert claimable.order.digest == running.order.digest
    (claimable,) = await store.claimable(NOW + 61 * KEEP, 10)
    assert claimable.order.digest == backing.matched.order.digest
    (unfinished,) = await store.unfinished_orders(NOW)
    assert unfinished.job == running.job, "an order that can be claimed no more needs no receipt"
    await store.record_receipt(receipt_record(running, ProviderTab(5, Amount(200)), at=later))


async def test_a_wrong_clock_stops_nothing(store: SqlStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A receipt that was made when the clock ran ahead does not keep those after it."""
    monkeypatch.setattr(retention, "PAGE_SIZE", 3)
    client = Client()
    await finish_confirmed(store, client, 2)
    await finish_confirmed(store, client, 1, first=2, at=NOW + 100 * KEEP)
    await finish_confirmed(store, client, 6, first=3)
    assert await store.prune(NOW + KEEP + DAY, KEEP) == 7
    assert count(tmp_path)["receipts"] == 2


async def test_refused_orders_go_without_a_sum(store: SqlStore, tmp_path: Path) -> None:
    """A refused order earned nothing; it goes like any other."""
    client = Client()
    refused = [client.order(ASK, order_with={"deadline": NOW + 60}) for _ in range(3)]
    for seq, placed in enumerate(refused):
        await store.record_refusal(refusal(placed, ProviderTab(seq, Amount(0))))
    await store.acknowledge(COORDINATOR.address, [placed.job for placed in refused])
    assert await store.prune(NOW + KEEP + 100, KEEP) == 2
    assert await store.read(lambda c: read_lines(c, 0)) == []
    assert count(tmp_path)["ceilings"] == 0


async def test_the_file_stays_as_large_as_the_time_to_keep(
    store: SqlStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the first receipts go, new ones take their pages."""
    monkeypatch.setattr(retention, "PAGE_SIZE", 7)
    client, pages = Client(), list[int]()
    for day in range(8):
        await finish_confirmed(store, client, 30, first=30 * day, at=NOW + day * DAY)
        await store.prune(NOW + day * DAY + 1, 2 * DAY)
        with closing(sqlite3.connect(tmp_path / "node.db")) as database:
            pages.append(database.execute("PRAGMA page_count").fetchone()[0])
    assert pages[7] == pages[3]
    assert count(tmp_path)["receipts"] == 60
    assert sum(line.jobs for line in await store.read(lambda c: read_lines(c, 0))) == 240
