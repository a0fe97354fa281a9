"""Signed documents are one compressed column. Open orders and the ceilings of claims have tables of their own.

Revision ID: 0010
"""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

from node.storage.rows import pack_address, pack_order, pack_receipt
from tallystick.protocol.messages import Order, Receipt, Terms
from tallystick.protocol.stored import load_signed, load_struct
from tallystick.protocol.types import Address

revision = "0010"
down_revision = "0009"

_PAGE = 500
_MAX_INT64 = (1 << 63) - 1


def upgrade() -> None:
    """Packs the documents, and takes what is open or backs claims out of the large tables. It cannot be undone."""
    for table in ("orders", "receipts"):
        op.rename_table(table, f"old_{table}")
    _create()
    connection = op.get_bind()
    for page in _pages(connection, "old_orders"):
        _pack_orders(connection, page)
    for page in _pages(connection, "old_receipts"):
        _pack_receipts(connection, page)
    op.execute(
        "INSERT INTO open_orders SELECT orders.job, orders.id, old_orders.coordinator, NULL FROM orders "
        "JOIN old_orders ON old_orders.id = orders.id WHERE old_orders.admitted_at IS NOT NULL AND old_orders.ended_at IS NULL"
    )
    _take_ceilings(connection)
    for table in ("old_orders", "old_receipts"):
        op.drop_table(table)


def _take_ceilings(connection: sa.Connection) -> None:
    """Takes over the orders of each payer that no other one covers, in one pass from the highest."""
    query = (
        "SELECT payer, ceiling, claim_by, id FROM old_orders "  # noqa: S608 - constants of this file
        f"WHERE ceiling > '{0:029}' ORDER BY payer, ceiling DESC, claim_by DESC, id"
    )
    payer, longest, kept = "", 0, []
    for row in connection.exec_driver_sql(query):
        longest = longest if row.payer == payer else -1
        payer = row.payer
        if row.claim_by > longest:
            longest = row.claim_by
            kept.append(tuple(row))
    if kept:
        connection.exec_driver_sql("INSERT INTO ceilings VALUES (?, ?, ?, ?)", kept)


def _create() -> None:
    op.create_table(
        "orders",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("job", sa.LargeBinary, nullable=False),
        sa.Column("deadline", sa.BigInteger, nullable=False),
        sa.Column("admitted_at", sa.BigInteger),
        sa.Column("document", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "receipts",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("order_id", sa.Integer, nullable=False),
        sa.Column("payer", sa.LargeBinary, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("model", sa.String(256)),
        sa.Column("finished_at", sa.BigInteger, nullable=False),
        sa.Column("outcome", sa.SmallInteger, nullable=False),
        sa.Column("input_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_tokens", sa.BigInteger, nullable=False),
        sa.Column("cost", sa.BigInteger, nullable=False),
        sa.Column("document", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("payer", "seq", name="receipts_seq"),
    )
    op.create_table(
        "open_orders",
        sa.Column("job", sa.LargeBinary, primary_key=True),
        sa.Column("order_id", sa.Integer, primary_key=True),
        sa.Column("coordinator", sa.String(42), nullable=False),
        sa.Column("receipt_id", sa.Integer),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "ceilings",
        sa.Column("payer", sa.String(42), primary_key=True),
        sa.Column("ceiling", sa.String(29), primary_key=True),
        sa.Column("claim_by", sa.BigInteger, primary_key=True),
        sa.Column("order_id", sa.Integer, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "earned_days",
        sa.Column("day", sa.String(10), primary_key=True),
        sa.Column("model", sa.String(256), primary_key=True),
        sa.Column("payer", sa.LargeBinary, primary_key=True),
        sa.Column("jobs", sa.BigInteger, nullable=False),
        sa.Column("input_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_tokens", sa.BigInteger, nullable=False),
        sa.Column("revenue", sa.BigInteger, nullable=False),
    )


def _pages(connection: sa.Connection, table: str) -> Any:
    """The rows of a table, in pages by their number."""
    after = 0
    while page := connection.exec_driver_sql(
        f"SELECT * FROM {table} WHERE id > ? ORDER BY id LIMIT {_PAGE}",  # noqa: S608 - constants of this file
        (after,),
    ).all():
        yield page
        after = page[-1].id


def _pack_orders(connection: sa.Connection, page: Sequence[Any]) -> None:
    rows = []
    for row in page:
        document = pack_order(load_signed(Order, row.order_doc), load_struct(Terms, row.terms_doc))
        rows.append((row.id, bytes.fromhex(row.digest), bytes.fromhex(row.job), row.deadline, row.admitted_at, document))
    connection.exec_driver_sql("INSERT INTO orders VALUES (?, ?, ?, ?, ?, ?)", rows)


def _pack_receipts(connection: sa.Connection, page: Sequence[Any]) -> None:
    find = "SELECT id, model, admitted_at, outcome FROM old_orders WHERE job = ? AND digest = ?"
    rows, unconfirmed = [], []
    for row in page:
        order = connection.exec_driver_sql(find, (row.job, row.order_digest)).one()
        receipt = load_signed(Receipt, row.receipt_doc)
        model = None if order.admitted_at is None else order.model
        usage = row.input_tokens, row.output_tokens, min(int(row.cost), _MAX_INT64)
        payer = pack_address(Address(row.payer))
        outcome = receipt.message.outcome if order.outcome is None else order.outcome
        rows.append((row.id, order.id, payer, row.seq, model, row.finished_at, outcome, *usage, pack_receipt(receipt)))
        if not row.acknowledged:
            unconfirmed.append((bytes.fromhex(row.job), order.id, row.coordinator, row.id))
    connection.exec_driver_sql(f"INSERT INTO receipts VALUES ({', '.join('?' * 11)})", rows)  # noqa: S608 - constants
    if unconfirmed:
        connection.exec_driver_sql("INSERT INTO open_orders VALUES (?, ?, ?, ?)", unconfirmed)
