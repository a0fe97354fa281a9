"""The hash of the last block whose events were read, which detects reorganisations of the chain.

Revision ID: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Adds the column; empty for an unknown hash."""
    op.add_column("cursors", sa.Column("tip", sa.String(66), nullable=False, server_default=""))


def downgrade() -> None:
    """Drops the column."""
    op.drop_column("cursors", "tip")
