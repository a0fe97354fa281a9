"""An order and its job are one row, found by the job. No index is ordered by a digest: each entry of it takes a page to write.

Revision ID: 0009
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

UNFINISHED, UNACKNOWLEDGED = "admitted_at IS NOT NULL AND ended_at IS NULL", "NOT acknowledged"
ORDER = "digest, payer, ceiling, deadline, claim_by, order_doc, terms_doc"
RECEIPT = (
    "order_digest, job, payer, coordinator, seq, cumulative, cost, input_tokens, cached_input_tokens, output_tokens, "
    "finished_at, acknowledged, receipt_doc"
)


def _create_orders(name: str, *others: sa.schema.SchemaItem) -> None:
    op.create_table(
        name,
        *others,
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("payer", sa.String(42), nullable=False),
        sa.Column("ceiling", sa.String(29), nullable=False),
        sa.Column("deadline", sa.BigInteger, nullable=False),
        sa.Column("claim_by", sa.BigInteger, nullable=False),
        sa.Column("order_doc", sa.Text, nullable=False),
        sa.Column("terms_doc", sa.Text, nullable=False),
    )


def _create_receipts(name: str, *others: sa.schema.SchemaItem) -> None:
    op.create_table(
        name,
        *others,
        sa.Column("order_digest", sa.String(64), nullable=False),
        sa.Column("job", sa.String(32), nullable=False),
        sa.Column("payer", sa.String(42), nullable=False),
        sa.Column("coordinator", sa.String(42), nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("cumulative", sa.String(29), nullable=False),
        sa.Column("cost", sa.String(29), nullable=False),
        sa.Column("input_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_input_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_tokens", sa.BigInteger, nullable=False),
        sa.Column("finished_at", sa.BigInteger, nullable=False),
        sa.Column("acknowledged", sa.Boolean, nullable=False),
        sa.Column("receipt_doc", sa.Text, nullable=False),
        sa.UniqueConstraint("payer", "seq", name="receipts_seq"),
    )


def _take_over(table: str, columns: str, query: str) -> None:
    op.execute(f"INSERT INTO new_{table} ({columns}) {query}")
    op.drop_table(table)
    op.rename_table(f"new_{table}", table)


def upgrade() -> None:
    """Merges jobs into orders, and gives orders and receipts a number as their key."""
    _create_orders(
        "new_orders",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("job", sa.String(32), nullable=False),
        sa.Column("coordinator", sa.String(42), nullable=False),
        sa.Column("model", sa.String(256), nullable=False),
        sa.Column("admitted_at", sa.BigInteger),
        sa.Column("ended_at", sa.BigInteger),
        sa.Column("outcome", sa.SmallInteger),
    )
    terms, order = "json_extract(terms_doc, '$.{}')", "json_extract(order_doc, '$.message.{}')"
    job = f"coalesce(jobs.job, substr({terms.format('job')}, 3))"
    coordinator = f"coalesce(jobs.coordinator, {order.format('coordinator')})"
    model = f"coalesce(jobs.model, {terms.format('model')})"
    _take_over(
        "orders",
        f"{ORDER}, job, coordinator, model, admitted_at, ended_at, outcome",
        f"SELECT {ORDER}, {job}, {coordinator}, {model}, admitted_at, ended_at, outcome "  # noqa: S608 - constants of this file
        "FROM orders LEFT JOIN jobs ON jobs.order_digest = orders.digest ORDER BY orders.rowid",
    )
    op.drop_table("jobs")
    op.create_index("orders_job", "orders", ["job", "digest"], unique=True)
    op.create_index("orders_deadline", "orders", ["deadline"])
    op.create_index("orders_evidence", "orders", ["payer", "ceiling"])
    op.create_index("orders_unfinished", "orders", ["claim_by"], sqlite_where=sa.text(UNFINISHED))
    _create_receipts("new_receipts", sa.Column("id", sa.Integer, primary_key=True))
    _take_over("receipts", RECEIPT, f"SELECT {RECEIPT} FROM receipts ORDER BY rowid")  # noqa: S608 - constants of this file
    op.create_index("receipts_job", "receipts", ["job", "order_digest"], unique=True)
    op.create_index("receipts_finished", "receipts", ["finished_at"])
    op.create_index("receipts_unacknowledged", "receipts", ["coordinator", "finished_at"], sqlite_where=sa.text(UNACKNOWLEDGED))


def downgrade() -> None:
    """Takes jobs out of orders again, and makes digests the keys."""
    _create_receipts("new_receipts", sa.PrimaryKeyConstraint("order_digest"))
    _take_over("receipts", RECEIPT, f"SELECT {RECEIPT} FROM receipts ORDER BY rowid")  # noqa: S608 - constants of this file
    op.create_index("ix_receipts_finished_at", "receipts", ["finished_at"])
    op.create_index("receipts_open", "receipts", ["coordinator", "acknowledged", "finished_at"])
    op.create_table(
        "jobs",
        sa.Column("order_digest", sa.String(64), primary_key=True),
        sa.Column("job", sa.String(32), nullable=False),
        sa.Column("coordinator", sa.String(42), nullable=False),
        sa.Column("model", sa.String(256), nullable=False),
        sa.Column("admitted_at", sa.BigInteger, nullable=False),
        sa.Column("ended_at", sa.BigInteger),
        sa.Column("outcome", sa.SmallInteger),
    )
    columns = "job, coordinator, model, admitted_at, ended_at, outcome"
    op.execute(
        f"INSERT INTO jobs (order_digest, {columns}) SELECT digest, {columns} FROM orders "  # noqa: S608 - constants of this file
        "WHERE admitted_at IS NOT NULL ORDER BY id"
    )
    _create_orders("new_orders", sa.PrimaryKeyConstraint("digest"))
    _take_over("orders", ORDER, f"SELECT {ORDER} FROM orders ORDER BY id")  # noqa: S608 - constants of this file
    op.create_index("ix_orders_deadline", "orders", ["deadline"])
    op.create_index("orders_evidence", "orders", ["payer", "ceiling"])
