"""State of earlier versions opens and keeps its contents."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from node.domain.order_admission import AdmittedJob, MatchedOrder
from node.ports import CoordinatorHour, ReceiptRecord
from node.storage.earnings import read_lines, read_payouts
from node.storage.store import MIGRATIONS, SqlStore
from node.testing.memory import MemoryStore
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Order, Outcome, Receipt, Terms
from tallystick.protocol.stored import load_signed, load_struct, store_signed, store_struct
from tallystick.protocol.tab import ProviderTab
from tallystick.protocol.types import Amount
from tallystick.protocol.wire import dumps
from tallystick.runtime import storage
from tests.node.harness import COORDINATOR, DOMAIN, NOW, OFFER, PAYER, PROVIDER, Client, admitted, signer
from tests.node.storage.test_store import ASK, finish, receipt_record, refusal


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
    placed = Client().order(ASK)
    digest, payer, documents = placed.order.digest.hex(), placed.order.message.payer, (placed.order, placed.terms)
    tab = (payer, 2, f"{9:029}", f"{4:029}", f"{1:029}", 10, 11, f"{9:029}")
    job = (digest, placed.job.hex(), COORDINATOR.address, "model", 3, 10, 20, 0)
    order = (digest, payer, f"{9:029}", 30, 40, documents[0].dumps(), dumps(documents[1].to_json()).decode())
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
        orders = database.execute("SELECT digest, job, deadline, admitted_at FROM orders").fetchall()
        assert orders == [(placed.order.digest, placed.job, 30, 10)]
        assert database.execute(f"SELECT {names} FROM tabs").fetchall() == [tab]


async def test_state_from_before_compact_rows(tmp_path: Path) -> None:
    """Finished, unfinished, refused and recovered orders keep their meaning, from both of the earlier schemas."""
    memory, client = MemoryStore(), Client()
    done = [await finish(memory, client, 0), await finish(memory, client, 1, ceiling=Amount(10), claim_by=NOW + 10**6)]
    running, covered = client.order(ASK), client.order(ASK, order_with={"ceiling": Amount(5)})
    refused = refusal(client.order(ASK), ProviderTab(2, Amount(80)))
    elsewhere = await finish(memory, Client(signer("elsewhere")), 0)
    new = SqlStore(f"sqlite:///{tmp_path / 'new.db'}", PROVIDER.address, DOMAIN)
    await new.start()
    for record in done:
        await new.begin(AdmittedJob(record.matched.job, record.matched.order, record.matched.terms, OFFER), NOW)
        await new.record_receipt(record)
    for placed in (running, covered):
        await new.begin(admitted(placed), NOW)
    await new.record_refusal(refused)
    late = LateReceipt(elsewhere.receipt, elsewhere.matched.order, elsewhere.matched.terms)
    await new.record_recovered(elsewhere.receipt, elsewhere.matched.order, late)
    await new.acknowledge(COORDINATOR.address, [done[0].matched.job])
    expected = await _meaning(new)
    await new.close()
    old = tmp_path / "node.db"
    _migrate(old, "0009")
    with closing(sqlite3.connect(old)) as database, database:
        for record, acknowledged in zip(done, (True, False), strict=True):
            _insert_0009(database, record.matched, record, acknowledged=acknowledged)
        for placed in (running, covered):
            _insert_0009(database, MatchedOrder(placed.job, placed.order, placed.terms))
        _insert_0009(database, refused.matched, refused)
        _insert_0009(database, elsewhere.matched, elsewhere, acknowledged=True, recovered=True)
        names = "payer, seq, cumulative, settled, reserved, since, claimed_at, claimed, written_off"
        for payer, seq, total in ((PAYER.address, 3, 80), (elsewhere.matched.payer, 1, 40)):
            zero = f"{0:029}"
            row = (payer, seq, f"{total:029}", zero, zero, NOW, 0, zero, zero)
            database.execute(f"INSERT INTO tabs ({names}) VALUES ({', '.join('?' * 9)})", row)
    for revision in ("0009", "0008"):
        if revision == "0008":
            _migrate(old, "0008")
            with closing(sqlite3.connect(old)) as database:
                _write_json(database)
        copy = tmp_path / f"{revision}.db"
        copy.write_bytes(old.read_bytes())
        store = SqlStore(f"sqlite:///{copy}", PROVIDER.address, DOMAIN)
        await store.start()
        assert await _meaning(store) == expected
        await store.record_receipt(receipt_record(running, ProviderTab(3, Amount(80))))  # its number is known
        await store.close()


def _insert_0009(
    database: sqlite3.Connection,
    matched: MatchedOrder,
    record: ReceiptRecord | None = None,
    *,
    acknowledged: bool = False,
    recovered: bool = False,
) -> None:
    """Inserts an order, and its receipt if it has one, as the release of that schema did."""
    order, digest, job = matched.order.message, matched.order.digest.hex(), matched.job.hex()
    receipt = record.receipt.message if record is not None else None
    ended = receipt is not None and not recovered
    ceiling = 0 if receipt is not None and receipt.outcome == Outcome.REFUSED else order.ceiling
    values: dict[str, object] = {
        "digest": digest,
        "job": job,
        "payer": order.payer,
        "coordinator": order.coordinator,
        "model": matched.terms.model,
        "ceiling": f"{int(ceiling):029}",
        "deadline": order.deadline,
        "claim_by": order.claim_by,
        "admitted_at": None if recovered else NOW,
        "ended_at": NOW if ended else None,
        "outcome": int(receipt.outcome) if receipt is not None and ended else None,
        "order_doc": store_signed(matched.order),
        "terms_doc": store_struct(matched.terms),
    }
    _insert(database, "orders", values)
    if receipt is None or record is None:
        return
    usage = {name: getattr(receipt, name) for name in ("input_tokens", "cached_input_tokens", "output_tokens")}
    totals = {"cumulative": f"{int(receipt.cumulative_cost):029}", "cost": f"{int(receipt.cost):029}"}
    parties = {"order_digest": digest, "job": job, "payer": receipt.payer, "coordinator": order.coordinator}
    state = {"seq": receipt.seq, "finished_at": receipt.finished_at, "acknowledged": acknowledged}
    _insert(database, "receipts", {**parties, **usage, **totals, **state, "receipt_doc": store_signed(record.receipt)})


def _insert(database: sqlite3.Connection, table: str, values: dict[str, object]) -> None:
    names, places = ", ".join(values), ", ".join(f":{name}" for name in values)
    database.execute(f"INSERT INTO {table} ({names}) VALUES ({places})", values)


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


def test_only_the_number_of_a_receipt_is_indexed(tmp_path: Path) -> None:
    """An index on a table that grows with the jobs costs a page of every transaction, so there is one, and it keeps the stake."""
    _migrate(tmp_path / "node.db", "head")
    with closing(sqlite3.connect(tmp_path / "node.db")) as database:
        indexes = database.execute("SELECT name, tbl_name FROM sqlite_master WHERE type = 'index'").fetchall()
        columns = {
            (table, tuple(row[2] for row in database.execute(f"PRAGMA index_info('{name}')")))
            for name, table in indexes
            if table in {"orders", "receipts"}
        }
    assert columns == {("receipts", ("payer", "seq"))}
