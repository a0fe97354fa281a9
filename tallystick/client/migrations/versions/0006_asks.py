"""The newest ask that was seen of each provider for each product.

Revision ID: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Makes the table."""
    op.create_table(
        "asks",
        sa.Column("venue", sa.String(64), primary_key=True),
        sa.Column("provider", sa.String(42), primary_key=True),
        sa.Column("product", sa.String(64), primary_key=True),
        sa.Column("newest_doc", sa.Text, nullable=False),
        sa.Column("seen_at", sa.BigInteger, nullable=False, index=True),
    )


def downgrade() -> None:
    """Drops it."""
    op.drop_table("asks")
