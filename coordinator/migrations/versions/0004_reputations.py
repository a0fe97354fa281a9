"""Reputation records of providers, which survive a restart, and an index for the claims of one provider.

Revision ID: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Adds the table and the index."""
    op.create_table(
        "reputations",
        sa.Column("provider", sa.String(42), primary_key=True),
        sa.Column("good", sa.Float(53), nullable=False),
        sa.Column("bad", sa.Float(53), nullable=False),
        sa.Column("jobs", sa.BigInteger, nullable=False),
    )
    op.create_index("claims_of_provider", "claims", ["provider", "id"])


def downgrade() -> None:
    """Drops the table and the index."""
    op.drop_index("claims_of_provider")
    op.drop_table("reputations")
