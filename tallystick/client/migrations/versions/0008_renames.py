"""Columns and stored words get the names that the code uses: deployment_id, blocked_reason, recorded, abandoned, resumable.

Revision ID: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

COLUMNS = (
    *((table, "venue", "deployment_id") for table in ("tabs", "jobs", "orders", "receipts", "evidence", "asks")),
    ("tabs", "frozen", "blocked_reason"),
    ("tabs", "total_mark", "total_order_seq"),
    ("tabs", "undelivered", "undelivered_quarters"),
    ("tabs", "excused", "settled_at_unblock"),
    ("jobs", "took_ms", "duration_ms"),
    ("orders", "quarters", "undelivered_quarters"),
    ("orders", "counted_at", "undelivered_at"),
    ("receipts", "booked_at", "recorded_at"),
    ("evidence", "found_at", "recorded_at"),
)
STREAM_ENDS = (("read", "ended"), ("left", "abandoned"), ("kept", "resumable"))


def _set_order_state(old: str, new: str) -> None:
    op.execute(sa.text("UPDATE orders SET state = :new WHERE state = :old").bindparams(old=old, new=new))


def _set_stream_end(table: str, old: str, new: str) -> None:
    change = f"UPDATE {table} SET delivered_doc = json_set(delivered_doc, '$.stream', :new)"  # noqa: S608 - of the two below
    where = "WHERE json_extract(delivered_doc, '$.stream') = :old"
    op.execute(sa.text(f"{change} {where}").bindparams(old=old, new=new))


def upgrade() -> None:
    """Renames the columns, and the values of `orders.state` and of the deliveries' `stream`."""
    for table, old, new in COLUMNS:
        op.execute(f"ALTER TABLE {table} RENAME COLUMN {old} TO {new}")
    _set_order_state("booked", "recorded")
    for table in ("orders", "evidence"):
        for old, new in STREAM_ENDS:
            _set_stream_end(table, old, new)


def downgrade() -> None:
    """Gives everything its former name."""
    for table in ("orders", "evidence"):
        for old, new in STREAM_ENDS:
            _set_stream_end(table, new, old)
    _set_order_state("recorded", "booked")
    for table, old, new in COLUMNS:
        op.execute(f"ALTER TABLE {table} RENAME COLUMN {new} TO {old}")
