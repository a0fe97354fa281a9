"""What providers are known for, so that a restart forgets neither failures nor good work; and the claims of one provider, found
at once.

Revision ID: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Adds them."""
    op.create_table(
        "reputations",
        sa.Column("provider", sa.String(42), primary_key=True),
        sa.Column("good", sa.Float(53), nullable=False),
        sa.Column("bad", sa.Float(53), nullable=False),
        sa.Column("jobs", sa.BigInteger, nullable=False),
    )
    op.create_index("claims_of_provider", "claims", ["provider", "id"])


def downgrade() -> None:
    """Drops them."""
    op.drop_index("claims_of_provider")
    op.drop_table("reputations")
