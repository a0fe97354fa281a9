"""Ledgers of earlier versions open and keep their contents."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from tallystick.client.ledger.ledger import MIGRATIONS, Ledger
from tallystick.client.ledger.receipt_writes import IncomingReceipt
from tallystick.client.ledger.schema import IS_COLLECTABLE, IS_UNRESOLVED, JobState, OrderState, metadata
from tallystick.client.receipts.delivery_check import Delivery, StreamEnd
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.sealing import ContentKey
from tallystick.protocol.stored import store_signed
from tallystick.protocol.types import ZERO_HASH, Hash, JobId
from tallystick.protocol.wire import dumps
from tallystick.runtime import storage
from tests.client.parties import ALICE, BOB, DOMAIN, NOW_S, PAYER, bill, place, take

KEY = ContentKey(bytes(32))
DEPLOYMENT = f"{DOMAIN.chain_id}:{DOMAIN.contract}"


def _migrate(path: Path, revision: str) -> None:
    """Makes a ledger of a revision, or takes one back to it."""
    config = Config()
    config.set_main_option("script_location", str(Path(storage.__file__).parent / "alembic"))
    config.set_main_option("version_locations", str(MIGRATIONS / "versions"))
    config.set_main_option("path_separator", "newline")
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        if revision == "head" or not sa.inspect(connection).has_table("alembic_version"):
            command.upgrade(config, revision)
        else:
            command.downgrade(config, revision)
    engine.dispose()


def _insert(file: Path, table: str, /, **row: object) -> None:
    with closing(sqlite3.connect(file)) as database, database:
        columns, marks = ", ".join(row), ", ".join("?" * len(row))
        database.execute(f"INSERT INTO {table} ({columns}) VALUES ({marks})", tuple(row.values()))


async def test_a_ledger_from_before_the_renaming_of_columns(tmp_path: Path) -> None:
    """A blocked tab, a recorded order and a stored delivery of an earlier version are read unchanged."""
    path, placed = tmp_path / "state.db", place()
    _migrate(path, "0007")
    owner = {"venue": DEPLOYMENT, "payer": PAYER.address}
    counts = {"accepted": 3, "total": 3, "total_mark": 1, "ceiling": 100, "order_seq": 1}
    _insert(path, "tabs", **owner, provider=ALICE.address, **counts, frozen="it lied", undelivered=5)
    job = {"job": "00" * 16, "model": "m", "path": "/", "state": "completed", "reason": "", "created_at": NOW_S}
    _insert(path, "jobs", **owner, **job, commitment_key=b"k")
    order = {"digest": placed.order.digest.hex(), "job": "00" * 16, "provider": ALICE.address, "seq": 1, "cap": 3, "ceiling": 3}
    delivery = Delivery(1, 2, ZERO_HASH, finished=False, stream=StreamEnd.ABANDONED)
    stored = dumps(delivery.to_json() | {"stream": "left"}).decode()
    docs = {"order_doc": placed.order.dumps(), "terms_doc": dumps(placed.terms.to_json()).decode(), "delivered_doc": stored}
    _insert(path, "orders", **owner, **order, **docs, claim_by=NOW_S, state="booked", quarters=1, counted_at=NOW_S)

    ledger = await Ledger.open(path, PAYER.address)
    tab = await ledger.tab(DOMAIN, ALICE.address, NOW_S)
    assert (tab.accepted, tab.blocked_reason, tab.undelivered_quarters) == (3, "it lied", 5)
    (job_known,) = await ledger.latest_jobs(1)
    assert [(known.state, known.digest) for known in job_known.orders] == [(OrderState.RECORDED, Hash(placed.order.digest))]
    await ledger.close()
    with closing(sqlite3.connect(path)) as database:
        (document,) = database.execute("SELECT delivered_doc FROM orders").fetchone()
    assert document == dumps(delivery.to_json()).decode()


async def test_a_ledger_from_before_rows_were_found_by_job(tmp_path: Path) -> None:
    """Receipts get the job of their order; the tab, its receipts and the job are read unchanged, also after a way back."""
    path, placed = tmp_path / "state.db", place()
    receipt = ALICE.signer.sign(bill(placed), DOMAIN)
    _migrate(path, "0008")
    owner = {"deployment_id": DEPLOYMENT, "payer": PAYER.address}
    job = {"job": "0a" * 16, "model": "m", "path": "/", "state": "completed", "reason": "", "created_at": NOW_S}
    _insert(path, "jobs", **owner, **job, commitment_key=b"k")
    order = {"digest": placed.order.digest.hex(), "job": "0a" * 16, "provider": ALICE.address, "cap": 3, "ceiling": 3}
    order["seq"] = placed.order.message.seq
    docs = {"order_doc": placed.order.dumps(), "terms_doc": dumps(placed.terms.to_json()).decode()}
    _insert(path, "orders", **owner, **order, **docs, claim_by=NOW_S, state="recorded")
    row = {"digest": receipt.digest.hex(), "provider": ALICE.address, "seq": 1, "order_digest": placed.order.digest.hex()}
    _insert(path, "receipts", **owner, **row, receipt_doc=receipt.dumps(), whole=1, recorded_at=NOW_S)
    for _ in range(2):
        ledger = await Ledger.open(path, PAYER.address)
        assert await ledger.known_orders([placed.order]) == {placed.order.digest: JobId(b"\n" * 16)}
        (known,) = await ledger.latest_jobs(1)
        assert known.receipt == Signed(receipt.message, receipt.signature)
        assert await ledger.receipts(DOMAIN, ALICE.address) == [known.receipt]
        await ledger.close()
        _migrate(path, "0008")


def _rows(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """All rows of the tables that revision 0011 made anew, by table, each with its columns in the order of their names."""
    with closing(sqlite3.connect(path)) as database:
        rows: dict[str, list[tuple[object, ...]]] = {}
        for table in ("tabs", "jobs", "orders", "receipts"):
            columns = sorted(row[1] for row in database.execute(f"PRAGMA table_info({table})"))
            rows[table] = database.execute(f"SELECT {', '.join(columns)} FROM {table} ORDER BY rowid").fetchall()
    return rows


async def test_a_ledger_from_before_rows_were_compact(tmp_path: Path) -> None:
    """Jobs, orders, receipts, tabs and spending of revision 0010 are read unchanged, and go back as they were."""
    path = tmp_path / "state.db"
    ledger = await Ledger.open(path, PAYER.address)
    job, (alice, _) = await take(ledger, ALICE, BOB)
    receipt = ALICE.signer.sign(bill(alice), DOMAIN)
    delivery = Delivery(200, 50, ZERO_HASH, finished=True)
    assert await ledger.record_receipt(IncomingReceipt(DOMAIN, job, alice, receipt, delivery, NOW_S, 12)) is None
    failed, (lost,) = await take(ledger, BOB)
    await ledger.end_job(
        failed,
        JobState.FAILED,
        "gone",
        NOW_S,
        deliveries={lost.order.digest: Delivery.empty(KEY, lost.order.digest, 9, bounded=True)},
    )
    running, _ = await take(ledger, ALICE, BOB)

    async def contents() -> list[object]:
        tabs = [await ledger.tab(DOMAIN, provider.address, NOW_S) for provider in (ALICE, BOB)]
        lists = [await ledger.latest_jobs(9), await ledger.receipts(DOMAIN, ALICE.address), await ledger.unresolved_jobs()]
        late = await ledger.jobs_awaiting_receipts(NOW_S + 60, 60)
        return [*tabs, *lists, late, await ledger.spending(0, ("day", "model", "provider"))]

    before = await contents()
    assert running in [known.job for known in await ledger.latest_jobs(9)]
    await ledger.close()
    _migrate(path, "0010")
    wide = _rows(path)
    assert store_signed(receipt) in wide["receipts"][0]
    ledger = await Ledger.open(path, PAYER.address)
    assert await contents() == before
    assert await ledger.record_receipt(IncomingReceipt(DOMAIN, job, alice, receipt, delivery, NOW_S)) is None
    await ledger.close()
    _migrate(path, "0010")
    assert _rows(path) == wide


def test_no_index_is_ordered_by_a_digest(tmp_path: Path) -> None:
    """Each entry of an index in random order takes a page to write, so rows are found by what grows with time."""
    _migrate(tmp_path / "state.db", "head")
    with closing(sqlite3.connect(tmp_path / "state.db")) as database:
        indexes = database.execute("SELECT name, tbl_name FROM sqlite_master WHERE type = 'index'").fetchall()
        first = {
            (table, database.execute(f"PRAGMA index_info('{name}')").fetchone()[2])
            for name, table in indexes
            if table in {"orders", "order_docs", "receipts"}
        }
    assert {column for _, column in first} <= {"job", "tab", "seq", "created_at"}


@pytest.mark.parametrize(
    ("query", "index"),
    [
        (f"SELECT sum(cap) FROM orders WHERE tab = 1 AND claim_by > 5 AND {IS_COLLECTABLE}", "orders_collectable"),
        (f"SELECT job FROM orders WHERE created_at <= 5 AND {IS_UNRESOLVED}", "orders_unresolved"),
    ],
)
def test_the_few_open_rows_have_an_index_of_their_own(tmp_path: Path, query: str, index: str) -> None:
    """A partial index is used only if a query has its condition verbatim; without it, each order would read all earlier ones."""
    _migrate(tmp_path / "state.db", "head")
    with closing(sqlite3.connect(tmp_path / "state.db")) as database:
        plan = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {query}")]
    assert [step for step in plan if index in step]


@pytest.mark.parametrize("table", sorted(metadata.tables))
def test_the_migrations_create_the_tables_of_the_schema(tmp_path: Path, table: str) -> None:
    """The migrated tables have exactly the columns that the code names."""
    _migrate(tmp_path / "state.db", "head")
    with closing(sqlite3.connect(tmp_path / "state.db")) as database:
        columns = {row[1] for row in database.execute(f"PRAGMA table_info({table})")}
    assert columns == set(metadata.tables[table].columns.keys())
