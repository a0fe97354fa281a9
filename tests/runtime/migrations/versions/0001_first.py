"""The only table of the storage tests."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table("facts", sa.Column("id", sa.Integer, primary_key=True), sa.Column("word", sa.Text, unique=True))
    op.execute("INSERT INTO facts (id, word) VALUES (0, 'first')")
