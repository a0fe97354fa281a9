"""Jobs and their receipts as one binary row each, indexed by segments; receipts of a tab by number; responses by number.

Revision ID: 0010
"""

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from alembic import op

from coordinator.storage.former_schema import downgrade_jobs, upgrade_jobs

revision = "0010"
down_revision = "0009"
_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_NEW = ("open_jobs", "jobs", "job_segments", "job_index", "tabs", "tab_receipts", "kept_receipts")


def upgrade() -> None:
    """Creates the tables and copies jobs, receipts and responses into them."""
    op.drop_index("receipts_tab")
    op.drop_index("receipts_of_tab")
    op.drop_index("ix_jobs_created_at")
    op.rename_table("jobs", "old_jobs")
    op.rename_table("receipts", "old_receipts")
    _create_jobs()
    _create_tabs()
    upgrade_jobs(op.get_bind())
    op.drop_table("old_jobs")
    op.drop_table("old_receipts")
    _rebuild_responses()


def _create_jobs() -> None:
    op.create_table(
        "open_jobs",
        sa.Column("number", _NUMBER, primary_key=True, autoincrement=False),
        sa.Column("job", sa.LargeBinary, nullable=False),
        sa.Column("doc", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "jobs",
        sa.Column("number", _NUMBER, primary_key=True, autoincrement=False),
        sa.Column("job", sa.LargeBinary, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("finished_at", sa.BigInteger),
        sa.Column("doc", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "job_segments",
        sa.Column("segment", _NUMBER, primary_key=True, autoincrement=False),
        sa.Column("first", sa.BigInteger, nullable=False),
        sa.Column("newest_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "job_index",
        sa.Column("segment", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("job", sa.LargeBinary, primary_key=True),
        sa.Column("number", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )


def _create_tabs() -> None:
    op.create_table(
        "tabs",
        sa.Column("tab", _NUMBER, primary_key=True, autoincrement=False),
        sa.Column("provider", sa.String(42), nullable=False),
        sa.Column("payer", sa.String(42), nullable=False),
        sa.Column("total", sa.LargeBinary, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
    )
    op.create_index("tabs_of_provider", "tabs", ["provider", "payer"], unique=True)
    op.create_table(
        "tab_receipts",
        sa.Column("tab", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("total", sa.LargeBinary, primary_key=True),
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "kept_receipts",
        sa.Column("tab", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("total", sa.LargeBinary, nullable=False),
        sa.Column("doc", sa.LargeBinary, nullable=False),
        sqlite_with_rowid=False,
    )


_COLUMNS = ("job", "fingerprint", "payer", "ended_at", "size", "frames")


def _rebuild_responses() -> None:
    op.drop_index("answers_of_payer")
    op.drop_index("ix_answers_ended_at")
    op.rename_table("responses", "old_responses")
    op.create_table(
        "responses",
        sa.Column("number", _NUMBER, primary_key=True),
        sa.Column("job", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("fingerprint", sa.LargeBinary, nullable=False),
        sa.Column("payer", sa.String(42), nullable=False),
        sa.Column("ended_at", sa.BigInteger, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("frames", sa.LargeBinary, nullable=False),
    )
    op.create_index("responses_of_payer", "responses", ["payer", "number", "size"])
    _copy("old_responses", "responses", bytes.fromhex)


def _hex(data: bytes) -> str:
    return bytes(data).hex()


def _copy(source: str, target: str, convert: Callable[[Any], object]) -> None:
    connection = op.get_bind()
    names = list(connection.execute(sa.text(f"SELECT job FROM {source} ORDER BY ended_at, job")).scalars())  # noqa: S608 - constants
    for name in names:
        read = sa.text(f"SELECT {', '.join(_COLUMNS)} FROM {source} WHERE job = :job")  # noqa: S608 - constants
        row = dict(connection.execute(read, {"job": name}).mappings().one())
        row |= {column: convert(row[column]) for column in ("job", "fingerprint")}
        values = ", ".join(f":{column}" for column in _COLUMNS)
        connection.execute(sa.text(f"INSERT INTO {target} ({', '.join(_COLUMNS)}) VALUES ({values})"), row)  # noqa: S608
    op.drop_table(source)


def downgrade() -> None:
    """Restores the former tables. Receipts that were kept without their job get a row for it again."""
    op.create_table(
        "old_jobs",
        sa.Column("job", sa.String(32), primary_key=True),
        sa.Column("payer", sa.String(42), nullable=False),
        sa.Column("provider", sa.String(42), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("finished_at", sa.BigInteger),
        sa.Column("attempts_doc", sa.Text, nullable=False),
    )
    op.create_table(
        "old_receipts",
        sa.Column("job", sa.String(32), primary_key=True),
        sa.Column("provider", sa.String(42), primary_key=True),
        sa.Column("payer", sa.String(42), nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("total", sa.String(29), nullable=False),
        sa.Column("receipt_doc", sa.Text, nullable=False),
    )
    downgrade_jobs(op.get_bind())
    for table in _NEW:
        op.drop_table(table)
    op.rename_table("old_jobs", "jobs")
    op.rename_table("old_receipts", "receipts")
    op.create_index("ix_jobs_created_at", "jobs", ["created_at"])
    op.create_index("receipts_tab", "receipts", ["payer", "provider", "total"])
    op.create_index("receipts_of_tab", "receipts", ["provider", "payer", "seq"])
    op.drop_index("responses_of_payer")
    op.rename_table("responses", "old_responses")
    op.create_table(
        "responses",
        sa.Column("job", sa.String(32), primary_key=True),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("ended_at", sa.BigInteger, nullable=False),
        sa.Column("frames", sa.LargeBinary, nullable=False),
        sa.Column("payer", sa.String(42), nullable=False, server_default=""),
        sa.Column("size", sa.BigInteger, nullable=False, server_default="0"),
    )
    op.create_index("ix_answers_ended_at", "responses", ["ended_at"])
    op.create_index("answers_of_payer", "responses", ["payer", "ended_at", "size"])
    _copy("old_responses", "responses", _hex)
