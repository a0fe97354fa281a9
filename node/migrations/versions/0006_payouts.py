"""Adds payouts and what coordinators took as fees; drops the number of an attempt, which nothing reads.

Revision ID: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Adds the tables and drops the column."""
    op.create_table(
        "fee_cursor",
        sa.Column("block", sa.BigInteger, primary_key=True),
        sa.Column("tip", sa.String, nullable=False),
        sa.Column("fees", sa.String(29), nullable=False),
    )
    op.create_table(
        "payouts",
        sa.Column("tx", sa.String, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("amount", sa.String(29), nullable=False),
        sa.Column("address", sa.String, nullable=False),
    )
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("attempt")


def downgrade() -> None:
    """Restores the former tables; every attempt is numbered 0."""
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("attempt", sa.BigInteger, nullable=False, server_default="0"))
    op.drop_table("payouts")
    op.drop_table("fee_cursor")
