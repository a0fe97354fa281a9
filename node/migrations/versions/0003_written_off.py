"""What of each tab no order can be claimed for any more; and at which address a coordinator told what was signed there last.

Coordinators are asked again after this: what they told before was not kept by address.

Revision ID: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Adds the column, and makes `recalled` anew."""
    op.add_column("tabs", sa.Column("written_off", sa.String(29), nullable=False, server_default="0" * 29))
    op.drop_table("completed_recoveries")
    op.create_table(
        "completed_recoveries",
        sa.Column("coordinator", sa.String(42), primary_key=True),
        sa.Column("url", sa.String, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    """Takes both back."""
    op.drop_table("completed_recoveries")
    op.create_table(
        "completed_recoveries",
        sa.Column("coordinator", sa.String(42), primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
    )
    op.drop_column("tabs", "written_off")
