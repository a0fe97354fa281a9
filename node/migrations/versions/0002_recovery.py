"""Creates the tables of completed state recoveries and of gas spent.

Revision ID: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Creates the tables. A fee is in wei, as 29 digits of text."""
    op.create_table(
        "recalled",
        sa.Column("coordinator", sa.String(42), primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "gas",
        sa.Column("tx", sa.String(66), primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("gas_used", sa.BigInteger, nullable=False),
        sa.Column("fee", sa.String(29), nullable=False),
    )


def downgrade() -> None:
    """Drops the tables."""
    op.drop_table("gas")
    op.drop_table("recalled")
