"""Measured speeds of providers, which survive a restart.

Revision ID: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Adds the table."""
    op.create_table(
        "speeds",
        sa.Column("provider", sa.String(42), primary_key=True),
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("first_token_ms", sa.Float(53), nullable=False),
        sa.Column("token_us", sa.Float(53), nullable=False),
        sa.Column("output_tokens", sa.Float(53), nullable=False),
        sa.Column("first_tokens", sa.BigInteger, nullable=False),
        sa.Column("outputs", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    """Drops the table."""
    op.drop_table("speeds")
