"""Tables for jobs, receipts, claims, settlements and the cursor of the chain's events.

Revision ID: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Creates the tables."""
    op.create_table(
        "jobs",
        sa.Column("job", sa.String(32), primary_key=True),
        sa.Column("payer", sa.String(42), nullable=False),
        sa.Column("provider", sa.String(42), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False, index=True),
        sa.Column("finished_at", sa.BigInteger),
        sa.Column("attempts_doc", sa.Text, nullable=False),
    )
    op.create_table(
        "receipts",
        sa.Column("job", sa.String(32), primary_key=True),
        sa.Column("provider", sa.String(42), primary_key=True),
        sa.Column("payer", sa.String(42), nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("total", sa.String(29), nullable=False),
        sa.Column("receipt_doc", sa.Text, nullable=False),
    )
    op.create_index("receipts_tab", "receipts", ["payer", "provider", "total"])
    op.create_table(
        "claims",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("digest", sa.String(64), nullable=False, unique=True),
        sa.Column("provider", sa.String(42), nullable=False),
        sa.Column("received_at", sa.BigInteger, nullable=False),
        sa.Column("claim_doc", sa.Text, nullable=False),
        sa.Column("tx", sa.String(66)),
    )
    op.create_index("claims_pending", "claims", ["tx", "id"])
    op.create_table(
        "settlements",
        sa.Column("payer", sa.String(42), primary_key=True),
        sa.Column("provider", sa.String(42), primary_key=True),
        sa.Column("settled", sa.String(29), nullable=False),
        sa.Column("tx", sa.String(66), nullable=False),
        sa.Column("block", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "cursors",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("block", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    """Drops the tables."""
    for table in ("cursors", "settlements", "claims", "receipts", "jobs"):
        op.drop_table(table)
