"""Statements that insert a row, or replace the one with the same key; SQLite and PostgreSQL spell them alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
import sqlalchemy.dialects.sqlite
from sqlalchemy import Connection


def inserting(dialect: str, table: sa.Table) -> Any:
    """Returns an INSERT that supports ON CONFLICT."""
    if dialect == "postgresql":
        from sqlalchemy.dialects.postgresql import insert  # noqa: PLC0415 - large, and SQLite's users do not need it

        return insert(table)
    return sa.dialects.sqlite.insert(table)


def upserting(dialect: str, table: sa.Table, names: Iterable[str], key: tuple[str, ...], where: Any = None) -> sa.Insert:
    """Returns an INSERT of these columns that replaces the row with the same key, if that one meets `where`."""
    insert = inserting(dialect, table)
    changed = {name: insert.excluded[name] for name in names if name not in key}
    upsert: sa.Insert = insert.on_conflict_do_update(index_elements=key, set_=changed, where=where)
    return upsert


def upsert(connection: Connection, table: sa.Table, row: dict[str, Any], key: tuple[str, ...]) -> None:
    """Inserts a row, or replaces the one with the same key."""
    connection.execute(upserting(connection.dialect.name, table, row, key), row)
