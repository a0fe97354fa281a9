"""An order and its job are one small row; documents are apart from what changes. A job writes fewer pages.

Revision ID: 0012
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"

_ORDER = "tab, seq, cap, claim_by, digest, delivered_doc, undelivered_quarters, undelivered_at"
_JOB = "workload, reason, created_at, finished_at, duration_ms, cancelled, asked_at, reader"
_RECEIPT = "id, tab, seq, receipt_doc, whole, recorded_at"
UPGRADE = f"""
INSERT INTO order_docs (id, commitment_key, order_doc, terms_doc)
    SELECT o.id, j.commitment_key, o.order_doc, o.terms_doc FROM old_orders o JOIN old_jobs j ON j.id = o.job ORDER BY o.id;
INSERT INTO orders (id, job, job_state, state, receipt, {_JOB}, {_ORDER})
    SELECT o.id, j.job, j.state, o.state, (SELECT r.id FROM old_receipts r WHERE r.order_id = o.id LIMIT 1), {_JOB}, {_ORDER}
    FROM old_orders o JOIN old_jobs j ON j.id = o.job ORDER BY o.id;
INSERT INTO receipts ({_RECEIPT}) SELECT {_RECEIPT} FROM old_receipts ORDER BY id
"""  # noqa: S608 - columns from above
DOWNGRADE = f"""
INSERT INTO jobs (job, state, commitment_key, {_JOB})
    SELECT o.job, o.job_state, d.commitment_key, {_JOB} FROM old_orders o JOIN order_docs d USING (id)
    WHERE NOT EXISTS (SELECT 1 FROM old_orders e WHERE e.job = o.job AND e.id < o.id) ORDER BY o.id;
INSERT INTO orders (id, job, state, order_doc, terms_doc, {_ORDER})
    SELECT o.id, j.id, o.state, d.order_doc, d.terms_doc, {_ORDER}
    FROM old_orders o JOIN order_docs d USING (id) JOIN jobs j ON j.job = o.job ORDER BY o.id;
INSERT INTO receipts ({_RECEIPT}, order_id)
    SELECT r.id, r.tab, r.seq, r.receipt_doc, r.whole, r.recorded_at, o.id
    FROM old_receipts r LEFT JOIN old_orders o ON o.receipt = r.id ORDER BY r.id
"""  # noqa: S608 - columns from above
_ORDER_INDEXES = ("orders_job", "orders_seq", "orders_collectable", "orders_counted")


def _run(statements: str) -> None:
    for statement in statements.split(";"):
        op.execute(statement)


def _bytes(*names: str) -> list[sa.Column[Any]]:
    return [sa.Column(name, sa.LargeBinary, nullable=False) for name in names]


def _integers(*names: str, default: str | None = None) -> list[sa.Column[Any]]:
    return [sa.Column(name, sa.BigInteger, nullable=False, server_default=default) for name in names]


def _job_columns(state: str) -> list[sa.Column[Any]]:
    return [
        sa.Column("workload", sa.Integer, nullable=False),
        sa.Column(state, sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        *_integers("created_at"),
        *(sa.Column(name, sa.BigInteger) for name in ("finished_at", "duration_ms")),
        sa.Column("cancelled", sa.Boolean, nullable=False, server_default=sa.false()),
        *_integers("asked_at", default="0"),
        sa.Column("reader", sa.String(16), nullable=False, server_default=""),
    ]


def _create_orders(*more: sa.Column[Any]) -> None:
    """`more`: the columns that only one of both revisions has."""
    op.create_table(
        "orders",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("tab", sa.Integer, nullable=False),
        *_integers("seq", "cap", "claim_by"),
        sa.Column("state", sa.String(16), nullable=False),
        *_bytes("digest"),
        *more,
        sa.Column("delivered_doc", sa.Text),
        sa.Column("undelivered_quarters", sa.Integer, nullable=False, server_default="0"),
        *_integers("undelivered_at", default="0"),
    )
    op.create_index("orders_job", "orders", ["job"])
    op.create_index("orders_seq", "orders", ["seq"])
    collectable, open_states = ["tab", "seq", "cap", "claim_by", "state"], "state IN ('open', 'dispatched', 'disputed')"
    op.create_index("orders_collectable", "orders", collectable, sqlite_where=sa.text(open_states))
    op.create_index("orders_counted", "orders", ["tab", "undelivered_at"], sqlite_where=sa.text("undelivered_at > 0"))


def _create_receipts(*more: sa.Column[Any]) -> None:
    op.create_table(
        "receipts",
        sa.Column("id", sa.Integer, primary_key=True),
        *more,
        sa.Column("tab", sa.Integer, nullable=False),
        *_integers("seq"),
        *_bytes("receipt_doc"),
        sa.Column("whole", sa.Boolean, nullable=False),
        *_integers("recorded_at"),
    )
    op.create_index("receipts_tab", "receipts", ["tab", "seq"], unique=True)


def _rename(*tables: str) -> None:
    for table in tables:
        op.rename_table(table, f"old_{table}")
    for index in (*_ORDER_INDEXES, "receipts_tab"):
        op.drop_index(index)


def _drop(*tables: str) -> None:
    for table in tables:
        op.drop_table(table)


def upgrade() -> None:
    """Makes one row of an order and its job, and moves the documents to a table of their own."""
    _rename("jobs", "orders", "receipts")
    op.create_table(
        "order_docs", sa.Column("id", sa.Integer, primary_key=True), *_bytes("commitment_key", "order_doc", "terms_doc")
    )
    _create_orders(*_bytes("job"), *_job_columns("job_state"), sa.Column("receipt", sa.Integer))
    unresolved = sa.text("job_state IN ('open', 'lost')")
    op.create_index("orders_unresolved", "orders", ["created_at"], sqlite_where=unresolved)
    _create_receipts()
    _run(UPGRADE)
    _drop("old_jobs", "old_orders", "old_receipts")


def downgrade() -> None:
    """Makes rows of jobs again, with the documents in those of orders."""
    _rename("orders", "receipts")
    op.create_table(
        "jobs",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("job", sa.LargeBinary, nullable=False, unique=True),
        *_bytes("commitment_key"),
        *_job_columns("state"),
    )
    op.create_index("jobs_unresolved", "jobs", ["created_at"], sqlite_where=sa.text("state IN ('open', 'lost')"))
    _create_orders(sa.Column("job", sa.Integer, nullable=False), *_bytes("order_doc", "terms_doc"))
    _create_receipts(sa.Column("order_id", sa.Integer))
    op.create_index("receipts_order", "receipts", ["order_id"])
    _run(DOWNGRADE)
    _drop("old_orders", "old_receipts", "order_docs")
