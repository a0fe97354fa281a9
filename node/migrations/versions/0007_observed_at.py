"""Drops the time at which a tab was last seen on chain, which nothing reads.

Revision ID: 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Drops the column."""
    with op.batch_alter_table("tabs") as tabs:
        tabs.drop_column("observed_at")


def downgrade() -> None:
    """Restores the column; nothing was seen yet."""
    with op.batch_alter_table("tabs") as tabs:
        tabs.add_column(sa.Column("observed_at", sa.BigInteger, nullable=False, server_default="0"))
