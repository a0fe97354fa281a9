"""Files, batches and their lines.

Revision ID: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Creates the tables."""
    op.create_table(
        "files",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("id", sa.String(48), nullable=False, unique=True),
        sa.Column("caller", sa.Text, nullable=False),
        sa.Column("filename", sa.Text, nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "batches",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("id", sa.String(48), nullable=False, unique=True),
        sa.Column("caller", sa.Text, nullable=False),
        sa.Column("create_key", sa.Text),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("input_file", sa.String(48), nullable=False),
        sa.Column("window", sa.String(8), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.Column("stamps", sa.JSON, nullable=False),
        sa.Column("metadata", sa.JSON),
        sa.Column("options", sa.Text, nullable=False),
        sa.Column("model", sa.Text),
        sa.Column("total", sa.Integer, nullable=False),
        sa.Column("completed", sa.Integer, nullable=False),
        sa.Column("failed", sa.Integer, nullable=False),
        sa.Column("input_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_tokens", sa.BigInteger, nullable=False),
        sa.Column("reasoning_tokens", sa.BigInteger, nullable=False),
        sa.Column("cost", sa.BigInteger, nullable=False),
        sa.Column("errors", sa.JSON, nullable=False),
        sa.Column("output_file", sa.String(48)),
        sa.Column("error_file", sa.String(48)),
        sa.Column("output_seconds", sa.BigInteger),
        sa.Column("result_bytes", sa.BigInteger, nullable=False),
    )
    op.create_index("batches_by_key", "batches", ["caller", "create_key"], unique=True)
    op.create_table(
        "lines",
        sa.Column("batch", sa.Integer, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("offset", sa.BigInteger, nullable=False),
        sa.Column("length", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("result", sa.LargeBinary),
    )


def downgrade() -> None:
    """Drops the tables."""
    for name in ("lines", "batches", "files"):
        op.drop_table(name)
