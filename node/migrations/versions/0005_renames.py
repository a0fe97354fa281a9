"""Renames two tables to the words of the glossary.

Revision ID: 0005
"""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Renames them."""
    op.rename_table("recalled", "completed_recoveries")
    op.rename_table("dealings", "coordinator_hours")


def downgrade() -> None:
    """Restores the former names."""
    op.rename_table("coordinator_hours", "dealings")
    op.rename_table("completed_recoveries", "recalled")
