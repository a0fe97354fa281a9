"""What the cache of answers saved, and how often a tab was raised without a receipt.

Revision ID: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Adds the figures."""
    op.add_column("tabs", sa.Column("unproven", sa.Integer, nullable=False, server_default="0"))
    for name in ("hits", "saved"):
        op.add_column("spent", sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))


def downgrade() -> None:
    """Drops them."""
    op.drop_column("tabs", "unproven")
    op.drop_column("spent", "saved")
    op.drop_column("spent", "hits")
