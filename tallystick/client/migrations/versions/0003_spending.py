"""What was spent, by day, workload label, model and provider, and how long jobs took.

Revision ID: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Makes the table."""
    op.add_column("jobs", sa.Column("label", sa.String(64), nullable=False, server_default=""))
    op.add_column("jobs", sa.Column("took_ms", sa.BigInteger))
    op.create_table(
        "spent",
        sa.Column("payer", sa.String(42), primary_key=True),
        sa.Column("day", sa.BigInteger, primary_key=True),
        sa.Column("label", sa.String(64), primary_key=True),
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("provider", sa.String(42), primary_key=True),
        *(
            sa.Column(name, sa.BigInteger, nullable=False)
            for name in ("requests", "failed", "cost", "input_tokens", "cached_tokens", "output_tokens")
        ),
    )


def downgrade() -> None:
    """Drops it."""
    op.drop_table("spent")
    op.drop_column("jobs", "took_ms")
    op.drop_column("jobs", "label")
