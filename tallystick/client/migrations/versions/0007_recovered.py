"""The part of a tab's total that was proved beyond the ledger, and when an order was last counted as not delivered.

Revision ID: 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Existing tabs keep the total that they were recovered to."""
    op.add_column("tabs", sa.Column("recovered", sa.BigInteger, nullable=False, server_default="0"))
    op.execute("UPDATE tabs SET recovered = max(total - accepted, 0)")
    op.add_column("orders", sa.Column("counted_at", sa.BigInteger, nullable=False, server_default="0"))
    tab = ["venue", "payer", "provider", "counted_at"]
    op.create_index("orders_counted", "orders", tab, sqlite_where=sa.text("counted_at > 0"))


def downgrade() -> None:
    """Takes the columns away again."""
    op.drop_index("orders_counted", "orders")
    op.drop_column("orders", "counted_at")
    op.drop_column("tabs", "recovered")
