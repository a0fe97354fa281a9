"""Creates the table of hourly earnings and unpaid work by coordinator.

Revision ID: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Creates the table. A coordinator is identified by its dialled address; amounts are 29 digits as text."""
    op.create_table(
        "dealings",
        sa.Column("endpoint", sa.String(300), primary_key=True),
        sa.Column("hour", sa.BigInteger, primary_key=True),
        sa.Column("earned", sa.String(29), nullable=False),
        sa.Column("written_off", sa.String(29), nullable=False),
    )


def downgrade() -> None:
    """Drops the table."""
    op.drop_table("dealings")
