"""Rows are found by job, or by provider and seq: no index is ordered by a digest, since each entry of it takes a page to write.

Revision ID: 0009
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def _order_columns() -> tuple[sa.Column[Any], ...]:
    return (
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("job", sa.String(32), sa.ForeignKey("jobs.job"), nullable=False),
        sa.Column("deployment_id", sa.String(64), nullable=False),
        sa.Column("payer", sa.String(42), nullable=False),
        sa.Column("provider", sa.String(42), nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("cap", sa.BigInteger, nullable=False),
        sa.Column("ceiling", sa.BigInteger, nullable=False),
        sa.Column("claim_by", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("order_doc", sa.Text, nullable=False),
        sa.Column("terms_doc", sa.Text, nullable=False),
        sa.Column("delivered_doc", sa.Text),
        sa.Column("undelivered_quarters", sa.Integer, nullable=False, server_default="0"),
        sa.Column("undelivered_at", sa.BigInteger, nullable=False, server_default="0"),
    )


def _receipt_columns() -> tuple[sa.Column[Any], ...]:
    return (
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("deployment_id", sa.String(64), nullable=False),
        sa.Column("payer", sa.String(42), nullable=False),
        sa.Column("provider", sa.String(42), nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("order_digest", sa.String(64), nullable=False),
        sa.Column("receipt_doc", sa.Text, nullable=False),
        sa.Column("whole", sa.Boolean, nullable=False),
        sa.Column("recorded_at", sa.BigInteger, nullable=False),
    )


JOB_OF_RECEIPT = "(SELECT orders.job FROM orders WHERE orders.digest = receipts.order_digest)"
COLLECTABLE, UNRESOLVED, COUNTED = (
    "state IN ('open', 'dispatched', 'disputed')",
    "state IN ('open', 'lost')",
    "undelivered_at > 0",
)


def _replace(table: str, columns: tuple[sa.Column[Any], ...], *others: sa.schema.SchemaItem, **values: str) -> None:
    """Makes a table anew with `columns` and `others`. `values`: SQL expressions that fill further columns from the old rows."""
    op.create_table(f"new_{table}", *columns, *others)
    names = ", ".join(column.name for column in columns)
    into, of = ", ".join([*values, names]), ", ".join([*values.values(), names])
    op.execute(f"INSERT INTO new_{table} ({into}) SELECT {of} FROM {table} ORDER BY rowid")  # noqa: S608 - names from above
    op.drop_table(table)
    op.rename_table(f"new_{table}", table)


def upgrade() -> None:
    """Gives orders and receipts a number as their key, and receipts their job."""
    _replace(
        "receipts",
        _receipt_columns(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("job", sa.String(32), nullable=False),
        job=JOB_OF_RECEIPT,
    )
    op.create_index("receipts_tab", "receipts", ["deployment_id", "payer", "provider", "seq"], unique=True)
    op.create_index("receipts_job", "receipts", ["job"])
    _replace("orders", _order_columns(), sa.Column("id", sa.Integer, primary_key=True))
    op.create_index("orders_job", "orders", ["job"])
    op.create_index("orders_seq", "orders", ["provider", "seq"])
    op.create_index("orders_collectable", "orders", ["payer", "provider"], sqlite_where=sa.text(COLLECTABLE))
    _index_counted()
    op.drop_index("ix_jobs_created_at", "jobs")
    op.drop_index("jobs_state", "jobs")
    op.create_index("jobs_unresolved", "jobs", ["payer", "created_at"], sqlite_where=sa.text(UNRESOLVED))


def downgrade() -> None:
    """Gives orders and receipts their digests as keys again."""
    op.drop_index("jobs_unresolved", "jobs")
    op.create_index("jobs_state", "jobs", ["payer", "state", "created_at"])
    op.create_index("ix_jobs_created_at", "jobs", ["created_at"])
    _replace("orders", _order_columns(), sa.PrimaryKeyConstraint("digest"))
    op.create_index("ix_orders_job", "orders", ["job"])
    op.create_index("orders_open", "orders", ["payer", "state", "provider"])
    op.create_index("orders_state", "orders", ["state", "claim_by"])
    _index_counted()
    to_order = sa.ForeignKeyConstraint(["order_digest"], ["orders.digest"])
    _replace("receipts", _receipt_columns(), sa.PrimaryKeyConstraint("digest"), to_order, sa.UniqueConstraint("order_digest"))
    op.create_index("receipts_tab", "receipts", ["deployment_id", "payer", "provider", "seq"], unique=True)


def _index_counted() -> None:
    columns = ["deployment_id", "payer", "provider", "undelivered_at"]
    op.create_index("orders_counted", "orders", columns, sqlite_where=sa.text(COUNTED))
