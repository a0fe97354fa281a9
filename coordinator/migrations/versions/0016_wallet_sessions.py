"""Sessions of wallets that signed in.

Revision ID: 0016
"""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"


def upgrade() -> None:
    """Creates the table and its indexes."""
    op.create_table(
        "wallet_sessions",
        sa.Column("nonce", sa.String(128), primary_key=True),
        sa.Column("digest", sa.LargeBinary),
        sa.Column("account", sa.String(42), nullable=False),
        sa.Column("origin", sa.Text, nullable=False),
        sa.Column("opened_at", sa.Float(53), nullable=False),
        sa.Column("until", sa.Float(53), nullable=False),
    )
    op.create_index("wallet_sessions_by_digest", "wallet_sessions", ["digest"], unique=True)
    op.create_index("wallet_sessions_of_account", "wallet_sessions", ["account"])


def downgrade() -> None:
    """Drops the table."""
    op.drop_table("wallet_sessions")
