"""The hash of the last block whose events were read, so that a chain which takes it back is noticed.

Revision ID: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Adds it; empty where it is not known."""
    op.add_column("cursors", sa.Column("tip", sa.String(66), nullable=False, server_default=""))


def downgrade() -> None:
    """Drops it."""
    op.drop_column("cursors", "tip")
