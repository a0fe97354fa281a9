"""Payer and size of stored responses: the payer that holds most makes room. Deletes earlier responses.

Revision ID: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Adds both columns."""
    op.execute(sa.text("DELETE FROM answers"))
    op.add_column("answers", sa.Column("payer", sa.String(42), nullable=False, server_default=""))
    op.add_column("answers", sa.Column("size", sa.BigInteger, nullable=False, server_default="0"))
    op.create_index("answers_of_payer", "answers", ["payer", "ended_at", "size"])


def downgrade() -> None:
    """Drops both columns."""
    op.drop_index("answers_of_payer")
    op.drop_column("answers", "size")
    op.drop_column("answers", "payer")
