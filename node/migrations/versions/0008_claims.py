"""Drops the signed claims, which nothing reads: each tab has the highest total that was ever claimed.

Revision ID: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Drops the table."""
    op.drop_table("claims")


def downgrade() -> None:
    """Restores an empty table."""
    op.create_table(
        "claims",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("handed_in_at", sa.BigInteger, nullable=False),
        sa.Column("claim_doc", sa.Text, nullable=False),
    )
