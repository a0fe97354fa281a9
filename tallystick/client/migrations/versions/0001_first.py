"""Tabs, jobs, orders, receipts, and evidence against dishonest providers.

Revision ID: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Makes the tables."""
    op.create_table(
        "tabs",
        sa.Column("venue", sa.String(64), primary_key=True),
        sa.Column("payer", sa.String(42), primary_key=True),
        sa.Column("provider", sa.String(42), primary_key=True),
        sa.Column("accepted", sa.BigInteger, nullable=False),
        sa.Column("total", sa.BigInteger, nullable=False),
        sa.Column("total_mark", sa.BigInteger, nullable=False),
        sa.Column("ceiling", sa.BigInteger, nullable=False),
        sa.Column("order_seq", sa.BigInteger, nullable=False),
        sa.Column("frozen", sa.Text, nullable=False),
    )
    op.create_table(
        "jobs",
        sa.Column("job", sa.String(32), primary_key=True),
        sa.Column("venue", sa.String(64), nullable=False),
        sa.Column("payer", sa.String(42), nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("commitment_key", sa.LargeBinary, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False, index=True),
        sa.Column("finished_at", sa.BigInteger),
    )
    op.create_index("jobs_state", "jobs", ["payer", "state", "created_at"])
    op.create_table(
        "orders",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("job", sa.String(32), sa.ForeignKey("jobs.job"), nullable=False, index=True),
        sa.Column("venue", sa.String(64), nullable=False),
        sa.Column("payer", sa.String(42), nullable=False),
        sa.Column("provider", sa.String(42), nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("cap", sa.BigInteger, nullable=False),
        sa.Column("ceiling", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("order_doc", sa.Text, nullable=False),
        sa.Column("terms_doc", sa.Text, nullable=False),
    )
    op.create_index("orders_open", "orders", ["payer", "state", "provider"])
    op.create_table(
        "receipts",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("venue", sa.String(64), nullable=False),
        sa.Column("payer", sa.String(42), nullable=False),
        sa.Column("provider", sa.String(42), nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("order_digest", sa.String(64), sa.ForeignKey("orders.digest"), nullable=False, unique=True),
        sa.Column("receipt_doc", sa.Text, nullable=False),
        sa.Column("whole", sa.Boolean, nullable=False),
        sa.Column("booked_at", sa.BigInteger, nullable=False),
    )
    op.create_index("receipts_tab", "receipts", ["venue", "payer", "provider", "seq"], unique=True)
    op.create_table(
        "evidence",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("venue", sa.String(64), nullable=False),
        sa.Column("payer", sa.String(42), nullable=False),
        sa.Column("provider", sa.String(42), nullable=False),
        sa.Column("job", sa.String(32), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("receipt_doc", sa.Text, nullable=False),
        sa.Column("order_doc", sa.Text, nullable=False),
        sa.Column("terms_doc", sa.Text, nullable=False),
        sa.Column("other_doc", sa.Text),
        sa.Column("delivered_doc", sa.Text),
        sa.Column("found_at", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    """Drops them."""
    for table in ("evidence", "receipts", "orders", "jobs", "tabs"):
        op.drop_table(table)
