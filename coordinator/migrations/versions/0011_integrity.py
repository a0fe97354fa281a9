"""Creates the tables of reports of audits, and of the integrity that they make.

Revision ID: 0011
"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    """Creates the tables."""
    op.create_table(
        "audit_reports",
        sa.Column("job", sa.LargeBinary, primary_key=True),
        sa.Column("provider", sa.String(42), primary_key=True),
        sa.Column("convicts", sa.Boolean, primary_key=True),
        sa.Column("payer", sa.String(42), nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("precision", sa.String(32), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("leaf", sa.BigInteger, nullable=False),
        sa.Column("report_hash", sa.LargeBinary, nullable=False),
        sa.Column("leaf_hash", sa.LargeBinary, nullable=False),
    )
    op.create_index("audit_reports_of_payer", "audit_reports", ["payer", "provider"])
    op.create_index("audit_reports_at", "audit_reports", ["at"])
    op.create_table(
        "integrity",
        sa.Column("provider", sa.String(42), primary_key=True),
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("precision", sa.String(32), primary_key=True),
        sa.Column("passes", sa.Float(53), nullable=False),
        sa.Column("failures", sa.Float(53), nullable=False),
        sa.Column("audits", sa.BigInteger, nullable=False),
        sa.Column("probe_failures", sa.BigInteger, nullable=False),
        sa.Column("leaf", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    """Deletes the tables."""
    op.drop_table("integrity")
    op.drop_index("audit_reports_at", "audit_reports")
    op.drop_index("audit_reports_of_payer", "audit_reports")
    op.drop_table("audit_reports")
