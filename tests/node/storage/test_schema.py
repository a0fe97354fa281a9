"""State of earlier versions opens and keeps its contents."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from node.ports import CoordinatorHour
from node.storage.earnings import read_lines, read_payouts
from node.storage.schema import IS_UNACKNOWLEDGED, IS_UNFINISHED
from node.storage.store import MIGRATIONS, SqlStore
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Order, Receipt, Terms
from tallystick.protocol.stored import load_signed, load_struct
from tallystick.protocol.tab import ProviderTab
from tallystick.protocol.types import Amount
from tallystick.protocol.wire import dumps
from tallystick.runtime import storage
from tests.node.harness import COORDINATOR, DOMAIN, NOW, PROVIDER, Client, admitted
from tests.node.storage.test_store import ASK, finish, receipt_record


def _migrate(path: Path, revision: str) -> None:
    """Makes a state of a revision, or takes one back to it."""
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


async def test_state_from_before_the_renaming_of_tables(tmp_path: Path) -> None:
    """The earned and unpaid credit of coordinators is kept."""
    path = tmp_path / "node.db"
    _migrate(path, "0004")
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("INSERT INTO dealings VALUES ('coordinator.example:443', 5, ?, ?)", (f"{7:029}", f"{3:029}"))
    store = SqlStore(f"sqlite:///{path}", PROVIDER.address, DOMAIN)
    await store.start()
    assert await store.coordinator_hours(0) == [CoordinatorHour("coordinator.example:443", 5, Amount(7), Amount(3))]
    await store.close()


async def test_state_from_before_payouts(tmp_path: Path) -> None:
    """Jobs lose the number of the attempt, tabs the time of a look, and both nothing else; payouts and fees are empty."""
    path = tmp_path / "node.db"
    _migrate(path, "0005")
    tab = ("0xp", 2, f"{9:029}", f"{4:029}", f"{1:029}", 10, 11, f"{9:029}")
    job, order = ("d1", "j1", "0xc", "model", 3, 10, 20, 0), ("d1", "0xp", f"{9:029}", 30, 40, "{}", "{}")
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?, ?)", job)
        database.execute("INSERT INTO orders VALUES (?, ?, ?, ?, ?, ?, ?)", order)
        names = "payer, seq, cumulative, settled, reserved, since, claimed_at, claimed"
        database.execute(
            f"INSERT INTO tabs ({names}, observed_at, written_off) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 5, ?)", (*tab, f"{0:029}")
        )
    store = SqlStore(f"sqlite:///{path}", PROVIDER.address, DOMAIN)
    await store.start()
    assert await store.fee_total() is None
    assert await store.read(lambda c: read_payouts(c, 5)) == []
    await store.close()
    with closing(sqlite3.connect(path)) as database:
        columns = "digest, job, coordinator, model, admitted_at, ended_at, outcome"
        assert database.execute(f"SELECT {columns} FROM orders").fetchall() == [job[:4] + job[5:]]
        assert database.execute(f"SELECT {names} FROM tabs").fetchall() == [tab]


async def test_state_from_before_an_order_and_its_job_were_one_row(tmp_path: Path) -> None:
    """A finished job, an unfinished one and a recovered order keep their meaning, there and back."""
    path, client = tmp_path / "node.db", Client()
    store = SqlStore(f"sqlite:///{path}", PROVIDER.address, DOMAIN)
    await store.start()
    done = await finish(store, client)
    running = admitted(client.order(ASK))
    await store.begin(running, NOW)
    elsewhere = receipt_record(client.order(ASK), ProviderTab(5, Amount(200)))
    receipt, order = elsewhere.receipt, elsewhere.matched.order
    await store.record_recovered(receipt, order, LateReceipt(receipt, order, elsewhere.matched.terms))
    expected = await _meaning(store)
    await store.close()
    for _ in range(2):
        _migrate(path, "0008")
        with closing(sqlite3.connect(path)) as database:
            _write_json(database)
            digests = {row[0] for row in database.execute("SELECT order_digest FROM jobs")}
        assert digests == {done.matched.order.digest.hex(), running.order.digest.hex()}
        store = SqlStore(f"sqlite:///{path}", PROVIDER.address, DOMAIN)
        await store.start()
        assert await _meaning(store) == expected
        await store.close()


def _write_json(database: sqlite3.Connection) -> None:
    """Writes the documents as the release of that schema did."""
    for digest, order, terms in database.execute("SELECT digest, order_doc, terms_doc FROM orders").fetchall():
        docs = load_signed(Order, order).dumps(), dumps(load_struct(Terms, terms).to_json()).decode()
        database.execute("UPDATE orders SET order_doc = ?, terms_doc = ? WHERE digest = ?", (*docs, digest))
    for digest, receipt in database.execute("SELECT order_digest, receipt_doc FROM receipts").fetchall():
        document = load_signed(Receipt, receipt).dumps()
        database.execute("UPDATE receipts SET receipt_doc = ? WHERE order_digest = ?", (document, digest))
    database.commit()


async def _meaning(store: SqlStore) -> list[object]:
    """Returns what the node and its reports read of a state."""
    return [
        await store.tabs(NOW),
        await store.unfinished_orders(NOW),
        sorted(await store.consumed_orders(0)),
        await store.unacknowledged(COORDINATOR.address, NOW + 1_000, 0, 10),
        await store.claimable(NOW, 10),
        await store.read(lambda c: read_lines(c, 0)),
    ]


@pytest.mark.parametrize(
    ("query", "index"),
    [
        (f"SELECT job FROM orders WHERE {IS_UNFINISHED} AND claim_by > 5", "orders_unfinished"),
        (
            f"SELECT job FROM receipts WHERE coordinator = 'a' AND {IS_UNACKNOWLEDGED}",
            "receipts_unacknowledged",
        ),
    ],
)
def test_the_few_open_rows_have_an_index_of_their_own(tmp_path: Path, query: str, index: str) -> None:
    """A partial index is used only if a query has its condition verbatim."""
    _migrate(tmp_path / "node.db", "head")
    with closing(sqlite3.connect(tmp_path / "node.db")) as database:
        plan = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {query}")]
    assert [step for step in plan if index in step]


def test_no_index_is_ordered_by_a_digest(tmp_path: Path) -> None:
    """Each entry of an index in random order takes a page to write, so rows are found by what grows with time."""
    _migrate(tmp_path / "node.db", "head")
    with closing(sqlite3.connect(tmp_path / "node.db")) as database:
        indexes = database.execute("SELECT name, tbl_name FROM sqlite_master WHERE type = 'index'").fetchall()
        first = {
            database.execute(f"PRAGMA index_info('{name}')").fetchone()[2]
            for name, table in indexes
            if table in {"orders", "receipts"}
        }
    assert first == {"job", "payer", "deadline", "claim_by", "finished_at", "coordinator"}
