"""Indexes on the times of wallets' sessions.

Revision ID: 0017
"""

from alembic import op

revision = "0017"
down_revision = "0016"


def upgrade() -> None:
    """Creates the indexes by which sessions that are over, and the oldest ones, are found."""
    op.create_index("wallet_sessions_by_end", "wallet_sessions", ["until"])
    op.create_index("wallet_sessions_by_start", "wallet_sessions", ["opened_at"])


def downgrade() -> None:
    """Drops the indexes."""
    op.drop_index("wallet_sessions_by_start", "wallet_sessions")
    op.drop_index("wallet_sessions_by_end", "wallet_sessions")
