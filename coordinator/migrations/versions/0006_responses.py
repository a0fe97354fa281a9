"""Renames the table of stored responses.

Revision ID: 0006
"""

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Renames the table."""
    op.rename_table("answers", "responses")


def downgrade() -> None:
    """Restores the former name."""
    op.rename_table("responses", "answers")
