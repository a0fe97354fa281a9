"""Answers that outlive their connection, kept for a while beyond this process; and the last receipt of a tab, found at once.

Revision ID: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Adds them."""
    op.create_table(
        "answers",
        sa.Column("job", sa.String(32), primary_key=True),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("ended_at", sa.BigInteger, nullable=False, index=True),
        sa.Column("frames", sa.LargeBinary, nullable=False),
    )
    op.create_index("receipts_of_tab", "receipts", ["provider", "payer", "seq"])


def downgrade() -> None:
    """Drops them."""
    op.drop_index("receipts_of_tab")
    op.drop_table("answers")
