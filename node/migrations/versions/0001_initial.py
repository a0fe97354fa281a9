"""Creates the tables of identity, orders with their jobs, receipts, tabs and claims.

Revision ID: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Creates the tables. Amounts are 29 digits as text, which sorts and holds 96 bits."""
    op.create_table(
        "identity",
        sa.Column("provider", sa.String(42), primary_key=True),
        sa.Column("chain_id", sa.BigInteger, nullable=False),
        sa.Column("contract", sa.String(42), nullable=False),
    )
    op.create_table(
        "orders",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("payer", sa.String(42), nullable=False),
        sa.Column("ceiling", sa.String(29), nullable=False),
        sa.Column("deadline", sa.BigInteger, nullable=False, index=True),
        sa.Column("claim_by", sa.BigInteger, nullable=False),
        sa.Column("order_doc", sa.Text, nullable=False),
        sa.Column("terms_doc", sa.Text, nullable=False),
    )
    op.create_index("orders_evidence", "orders", ["payer", "ceiling"])
    op.create_table(
        "jobs",
        sa.Column("order_digest", sa.String(64), primary_key=True),
        sa.Column("job", sa.String(32), nullable=False),
        sa.Column("coordinator", sa.String(42), nullable=False),
        sa.Column("model", sa.String(256), nullable=False),
        sa.Column("attempt", sa.BigInteger, nullable=False),
        sa.Column("admitted_at", sa.BigInteger, nullable=False),
        sa.Column("ended_at", sa.BigInteger),
        sa.Column("outcome", sa.SmallInteger),
    )
    op.create_table(
        "receipts",
        sa.Column("order_digest", sa.String(64), primary_key=True),
        sa.Column("job", sa.String(32), nullable=False),
        sa.Column("payer", sa.String(42), nullable=False),
        sa.Column("coordinator", sa.String(42), nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("cumulative", sa.String(29), nullable=False),
        sa.Column("cost", sa.String(29), nullable=False),
        sa.Column("input_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_input_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_tokens", sa.BigInteger, nullable=False),
        sa.Column("finished_at", sa.BigInteger, nullable=False, index=True),
        sa.Column("acknowledged", sa.Boolean, nullable=False),
        sa.Column("receipt_doc", sa.Text, nullable=False),
        sa.UniqueConstraint("payer", "seq", name="receipts_seq"),
    )
    op.create_index("receipts_open", "receipts", ["coordinator", "acknowledged", "finished_at"])
    op.create_table(
        "tabs",
        sa.Column("payer", sa.String(42), primary_key=True),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("cumulative", sa.String(29), nullable=False),
        sa.Column("settled", sa.String(29), nullable=False),
        sa.Column("reserved", sa.String(29), nullable=False),
        sa.Column("since", sa.BigInteger, nullable=False),
        sa.Column("claimed_at", sa.BigInteger, nullable=False),
        sa.Column("claimed", sa.String(29), nullable=False),
        sa.Column("observed_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "claims",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("handed_in_at", sa.BigInteger, nullable=False),
        sa.Column("claim_doc", sa.Text, nullable=False),
    )
