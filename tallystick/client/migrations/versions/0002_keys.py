"""Idempotency keys: which job a key stands for, and what takes that job up again.

Revision ID: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Makes the table."""
    op.create_table(
        "keys",
        sa.Column("payer", sa.String(42), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("job", sa.String(32), nullable=False),
        sa.Column("content_key", sa.LargeBinary, nullable=False),
        sa.Column("header", sa.LargeBinary, nullable=False),
        sa.Column("made_at", sa.BigInteger, nullable=False, index=True),
    )


def downgrade() -> None:
    """Drops it."""
    op.drop_table("keys")
