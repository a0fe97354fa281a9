"""The tabs of a payer, which a replica reads when the payer comes.

Revision ID: 0014
"""

from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    """Creates the index."""
    op.create_index("tabs_of_payer", "tabs", ["payer"])


def downgrade() -> None:
    """Drops the index."""
    op.drop_index("tabs_of_payer", "tabs")
