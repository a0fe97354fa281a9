"""Audits that could not decide because of what their provider did, and how much of an answer its evidence covers.

Revision ID: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Adds the columns. Earlier audits count as they did."""
    op.add_column("audits", sa.Column("unverifiable", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("audits", sa.Column("coverage", sa.Float))


def downgrade() -> None:
    """Drops the columns."""
    op.drop_column("audits", "coverage")
    op.drop_column("audits", "unverifiable")
