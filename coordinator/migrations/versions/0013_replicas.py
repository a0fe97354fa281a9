"""Replicas that share the database: who they are, who runs which job, and the end of the match log.

Revision ID: 0013
"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    """Creates the tables. A lone coordinator writes none of them."""
    op.create_table(
        "replicas",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("beat_at", sa.Float(53), nullable=False),
    )
    op.create_table(
        "placed_jobs",
        sa.Column("job", sa.LargeBinary, primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("placed_at", sa.BigInteger, nullable=False),
        sa.Column("number", sa.BigInteger),
    )
    op.create_table(
        "log_tail",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("edge", sa.LargeBinary, nullable=False),
        sa.Column("last_at", sa.BigInteger, nullable=False),
    )
    op.add_column("open_jobs", sa.Column("owner", sa.String(64)))
    owned = sa.text("owner IS NOT NULL")
    op.create_index("open_jobs_of_replicas", "open_jobs", ["job"], sqlite_where=owned, postgresql_where=owned)
    op.create_index("integrity_by_leaf", "integrity", ["leaf"])
    if op.get_bind().dialect.name == "postgresql":
        op.execute("CREATE SEQUENCE job_numbers")


def downgrade() -> None:
    """Deletes the tables. No replica may run."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP SEQUENCE job_numbers")
    op.drop_index("integrity_by_leaf", "integrity")
    op.drop_index("open_jobs_of_replicas", "open_jobs")
    op.drop_column("open_jobs", "owner")
    for table in ("log_tail", "placed_jobs", "replicas"):
        op.drop_table(table)
