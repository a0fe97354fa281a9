"""Stored responses, which outlive their connection and this process, and an index for the last receipt of a tab.

Revision ID: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Adds the table and the index."""
    op.create_table(
        "answers",
        sa.Column("job", sa.String(32), primary_key=True),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("ended_at", sa.BigInteger, nullable=False, index=True),
        sa.Column("frames", sa.LargeBinary, nullable=False),
    )
    op.create_index("receipts_of_tab", "receipts", ["provider", "payer", "seq"])


def downgrade() -> None:
    """Drops the table and the index."""
    op.drop_index("receipts_of_tab")
    op.drop_table("answers")
