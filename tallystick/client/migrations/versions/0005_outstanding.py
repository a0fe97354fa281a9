"""Orders that may still be collected: until when they count, what arrived for them, and what their providers owe.

Revision ID: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def _added() -> dict[str, tuple[sa.Column[object], ...]]:
    return {
        "orders": (
            sa.Column("delivered_doc", sa.Text),
            sa.Column("quarters", sa.Integer, nullable=False, server_default="0"),
        ),
        "jobs": (
            sa.Column("cancelled", sa.Boolean, nullable=False, server_default=sa.false()),
            sa.Column("asked_at", sa.BigInteger, nullable=False, server_default="0"),
            sa.Column("reader", sa.String(16), nullable=False, server_default=""),
        ),
        "tabs": (
            sa.Column("undelivered", sa.Integer, nullable=False, server_default="0"),
            sa.Column("settled", sa.BigInteger, nullable=False, server_default="0"),
            sa.Column("excused", sa.BigInteger, nullable=False, server_default="0"),
        ),
    }


def upgrade() -> None:
    """An open order counted until its job could no longer run; now it counts until it can no longer be collected."""
    op.execute("ALTER TABLE orders RENAME COLUMN expires_at TO claim_by")
    op.execute("UPDATE orders SET claim_by = CAST(json_extract(order_doc, '$.message.claimBy') AS INTEGER)")
    op.create_index("orders_state", "orders", ["state", "claim_by"])
    for table, columns in _added().items():
        for column in columns:
            op.add_column(table, column)
    op.drop_column("tabs", "unproven")


def downgrade() -> None:
    """Takes the columns away again."""
    op.add_column("tabs", sa.Column("unproven", sa.Integer, nullable=False, server_default="0"))
    for table, columns in _added().items():
        for column in columns:
            op.drop_column(table, column.name)
    op.drop_index("orders_state", "orders")
    op.execute("ALTER TABLE orders RENAME COLUMN claim_by TO expires_at")
