"""Audits, what their referees said, the referees' disputes, and the reports to the coordinator.

Revision ID: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Creates the tables."""
    op.create_table(
        "audits",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("origin", sa.String(16), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("job", sa.String(32), nullable=False),
        sa.Column("provider", sa.String(42), nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("precision", sa.String(32), nullable=False),
        sa.Column("verdict", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("due_at", sa.BigInteger, nullable=False),
        sa.Column("finished_at", sa.BigInteger),
        sa.Column("cost", sa.BigInteger, nullable=False),
        sa.Column("kept", sa.LargeBinary),
        sa.Column("tokens", sa.LargeBinary),
    )
    op.create_index("audits_by_provider", "audits", ["provider", "model"])
    op.create_index("audits_open", "audits", ["due_at"], sqlite_where=sa.text("state = 'pending'"))
    op.create_table(
        "opinions",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("audit", sa.Integer, nullable=False),
        sa.Column("referee", sa.String(64), nullable=False),
        sa.Column("verdict", sa.String(16), nullable=False),
        sa.Column("findings", sa.Text, nullable=False),
        sa.Column("pool", sa.Text, nullable=False),
        sa.Column("billed", sa.BigInteger, nullable=False),
        sa.Column("counted", sa.BigInteger, nullable=False),
        sa.Column("cost", sa.BigInteger, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("scores", sa.LargeBinary),
    )
    op.create_index("opinions_of_audit", "opinions", ["audit"])
    op.create_table(
        "disputes",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("referee", sa.String(64), nullable=False),
        sa.Column("audit", sa.Integer, nullable=False),
        sa.Column("lost", sa.Boolean, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
    )
    op.create_index("disputes_of_referee", "disputes", ["referee", "audit"], unique=True)
    op.create_table(
        "pardons",
        sa.Column("provider", sa.String(42), primary_key=True),
        sa.Column("audit", sa.Integer, nullable=False),
    )
    op.create_table(
        "reports",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("audit", sa.Integer, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("answer", sa.Text, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("due_at", sa.BigInteger, nullable=False),
    )
    op.create_index("reports_open", "reports", ["due_at"], sqlite_where=sa.text("state = 'pending'"))


def downgrade() -> None:
    """Drops the tables."""
    for name in ("reports", "pardons", "disputes", "opinions", "audits"):
        op.drop_table(name)
