"""What payers' reports of audits added to the integrity of a product, which is bounded in a day.

Revision ID: 0012
"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    """Adds the columns. Earlier reports do not count against the bound."""
    op.add_column("audit_reports", sa.Column("praises", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("audit_reports", sa.Column("effect", sa.BigInteger, nullable=False, server_default="0"))
    op.create_index("audit_reports_of_provider", "audit_reports", ["provider", "at"])


def downgrade() -> None:
    """Drops the columns."""
    op.drop_index("audit_reports_of_provider", "audit_reports")
    op.drop_column("audit_reports", "effect")
    op.drop_column("audit_reports", "praises")
