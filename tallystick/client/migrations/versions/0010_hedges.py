"""How many requests ran at two providers, and what that cost.

Revision ID: 0010
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Adds the figures."""
    for name in ("hedged", "hedge_cost"):
        op.add_column("spent", sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))


def downgrade() -> None:
    """Drops them."""
    op.drop_column("spent", "hedge_cost")
    op.drop_column("spent", "hedged")
