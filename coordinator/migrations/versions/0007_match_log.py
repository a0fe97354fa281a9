"""Creates the match log: its leaves and its signed heads.

Revision ID: 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Creates the tables."""
    number = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "match_log",
        sa.Column("number", number, primary_key=True, autoincrement=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("hashes", sa.LargeBinary, nullable=False),
        sa.Column("leaf", sa.LargeBinary),
    )
    op.create_table(
        "log_heads",
        sa.Column("size", number, primary_key=True, autoincrement=False),
        sa.Column("head_doc", sa.Text, nullable=False),
    )


def downgrade() -> None:
    """Deletes the tables."""
    op.drop_table("log_heads")
    op.drop_table("match_log")
