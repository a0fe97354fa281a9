"""Adds written-off debt to each tab, and the URL of the coordinator to each completed state recovery.

Coordinators are asked again after this migration, because earlier answers have no URL.

Revision ID: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Adds the column and recreates `completed_recoveries`."""
    op.add_column("tabs", sa.Column("written_off", sa.String(29), nullable=False, server_default="0" * 29))
    op.drop_table("recalled")
    op.create_table(
        "recalled",
        sa.Column("coordinator", sa.String(42), primary_key=True),
        sa.Column("url", sa.String, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    """Reverts both changes."""
    op.drop_table("recalled")
    op.create_table(
        "recalled",
        sa.Column("coordinator", sa.String(42), primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
    )
    op.drop_column("tabs", "written_off")
