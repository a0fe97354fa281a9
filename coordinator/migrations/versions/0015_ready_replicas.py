"""Whether clients may use a replica yet.

Revision ID: 0015
"""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    """Adds the column. A replica of the former version counts as ready."""
    op.add_column("replicas", sa.Column("ready", sa.Boolean, nullable=False, server_default=sa.true()))


def downgrade() -> None:
    """Drops the column."""
    op.drop_column("replicas", "ready")
