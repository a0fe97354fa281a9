"""Storage of the match log: one row a leaf, with the hashes that proofs read, and the signed heads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from coordinator.domain.decision_log import MAX_DECISIONS
from coordinator.ports import LogRow, StoredLog
from coordinator.storage.schema import decisions, log_heads, match_log
from tallystick.protocol.eip712 import Signed, loads_signed
from tallystick.protocol.merkle import HASH_SIZE
from tallystick.protocol.messages import LogHead
from tallystick.runtime.group_writer import GroupWriter
from tallystick.runtime.prepared import Prepared
from tallystick.runtime.storage import Database

KEPT_HEADS = 1_024
FORGOTTEN_AT_ONCE = 500
"""Leaves whose contents one write deletes."""
_ROWS_A_QUERY = 500
_LAST_LEAF = sa.select(sa.func.max(match_log.c.number))
_INSERT_LEAF = Prepared(sa.insert(match_log), ("number", "at", "hashes", "leaf"))


class LogGap(Exception):
    """A leaf would leave a gap in the log, or replace another leaf."""


class SqlLogStore:
    """Implements LogStore on a database."""

    def __init__(self, database: Database, writer: GroupWriter) -> None:
        self._db, self._writer = database, writer
        self._forgotten = 0

    def enqueue_leaves(self, rows: Sequence[LogRow]) -> asyncio.Future[None]:
        """See ports.LogStore."""
        return self._writer.add(_append_all, rows, waited=False, brief=True).done

    async def put_head(self, head: Signed[LogHead]) -> None:
        """See ports.LogStore."""
        size = head.message.size

        def work(connection: Connection) -> None:
            newest = connection.execute(sa.select(sa.func.max(log_heads.c.size))).scalar_one()
            stored = connection.execute(sa.select(sa.func.max(match_log.c.number))).scalar_one()
            if (newest is not None and size <= newest) or size > (-1 if stored is None else stored) + 1:
                raise LogGap(f"head of {size} leaves: the newest head is of {newest}, the last leaf is {stored}")
            insert_head(connection, head)

        await self._db.write(work)

    def enqueue_decisions(self, count: int, doc: bytes) -> None:
        """See ports.LogStore."""

        def work(connection: Connection) -> None:
            connection.execute(sa.insert(decisions), {"count": count, "doc": doc})
            newer = 0
            for number, size in connection.execute(sa.select(decisions.c.id, decisions.c.count).order_by(decisions.c.id.desc())):
                if newer >= MAX_DECISIONS:
                    connection.execute(sa.delete(decisions).where(decisions.c.id <= number))
                    break
                newer += size

        self._writer.add(_run_all, work, waited=False)

    async def decisions(self) -> list[bytes]:
        """See ports.LogStore."""
        await self._writer.flush()
        query = sa.select(decisions.c.doc).order_by(decisions.c.id)
        return await self._db.read(lambda connection: list(connection.execute(query).scalars()))

    async def load_log(self) -> StoredLog:
        """See ports.LogStore."""
        last = sa.select(match_log.c.number, match_log.c.at).order_by(match_log.c.number.desc()).limit(1)

        def work(connection: Connection) -> tuple[Any, Signed[LogHead] | None]:
            return connection.execute(last).one_or_none(), newest_head(connection)

        await self._writer.flush()
        row, head = await self._db.write(work)
        number, at = (-1, 0) if row is None else row
        return StoredLog(number + 1, at, head)

    async def log_rows(self, numbers: Sequence[int]) -> list[LogRow]:
        """See ports.LogStore."""

        def work(connection: Connection) -> list[LogRow]:
            rows = list[LogRow]()
            for first in range(0, len(numbers), _ROWS_A_QUERY):
                wanted = sa.select(match_log).where(match_log.c.number.in_(numbers[first : first + _ROWS_A_QUERY]))
                rows += [LogRow(*row) for row in connection.execute(wanted)]
            return rows

        return await self._db.read(work)

    async def log_entries(self, start: int, end: int) -> list[LogRow]:
        """See ports.LogStore."""
        within = sa.and_(match_log.c.number >= start, match_log.c.number < end)
        query = sa.select(match_log).where(within).order_by(match_log.c.number)
        return await self._db.read(lambda connection: [LogRow(*row) for row in connection.execute(query)])

    async def log_hashes(self, start: int, end: int) -> list[bytes]:
        """See ports.LogStore."""
        within = sa.and_(match_log.c.number >= start, match_log.c.number < end)
        query = sa.select(match_log.c.hashes).where(within).order_by(match_log.c.number)
        return await self._db.read(lambda connection: [row[:HASH_SIZE] for row in connection.execute(query).scalars()])

    async def forget_leaves(self, before: int) -> bool:
        """See ports.LogStore."""
        columns, first = match_log.c, self._forgotten
        old = sa.and_(columns.number >= first, columns.leaf.is_not(None), columns.at < before)
        query = sa.select(columns.number).where(old).order_by(columns.number).limit(FORGOTTEN_AT_ONCE)
        numbers = await self._db.read(lambda connection: list(connection.execute(query).scalars()))
        if not numbers:
            return False
        span = sa.and_(columns.number >= numbers[0], columns.number <= numbers[-1])
        await self._db.write(lambda connection: connection.execute(sa.update(match_log).where(span).values(leaf=None)))
        self._forgotten = numbers[-1] + 1
        return len(numbers) == FORGOTTEN_AT_ONCE


def _append_all(connection: Connection, batches: Sequence[Sequence[LogRow]]) -> None:
    for rows in batches:
        _append(connection, rows)


def _run_all(connection: Connection, works: Sequence[Callable[[Connection], None]]) -> None:
    for work in works:
        work(connection)


def _append(connection: Connection, rows: Sequence[LogRow]) -> None:
    """Appends leaves. Those that are stored already, because an answer was lost, must be the same. Raises LogGap."""
    last = connection.execute(_LAST_LEAF).scalar_one()
    size = 0 if last is None else last + 1
    if rows[0].number > size:
        raise LogGap(f"leaf {rows[0].number}: the log has {size} leaves")
    stored = size - rows[0].number
    if stored:
        same = sa.select(match_log.c.hashes).where(match_log.c.number >= rows[0].number).order_by(match_log.c.number)
        if list(connection.execute(same).scalars()) != [row.hashes for row in rows[:stored]]:
            raise LogGap(f"leaf {rows[0].number}: the log has another one")
    insert_leaves(connection, rows[stored:])


def insert_leaves(connection: Connection, rows: Sequence[LogRow]) -> None:
    """Inserts leaves, which must follow the last one."""
    new = [{"number": row.number, "at": row.at, "hashes": row.hashes, "leaf": row.leaf} for row in rows]
    _INSERT_LEAF.run(connection, *new)


def insert_head(connection: Connection, head: Signed[LogHead]) -> None:
    """Inserts a head, which must be the newest, and deletes those that are older than the last KEPT_HEADS."""
    connection.execute(sa.insert(log_heads), {"size": head.message.size, "head_doc": head.dumps()})
    old = sa.select(log_heads.c.size).order_by(log_heads.c.size.desc()).offset(KEPT_HEADS).limit(1)
    oldest = connection.execute(old).scalar_one_or_none()
    if oldest is not None:
        connection.execute(sa.delete(log_heads).where(log_heads.c.size <= oldest))


def newest_head(connection: Connection) -> Signed[LogHead] | None:
    """Returns the newest head, or None."""
    newest = sa.select(log_heads.c.head_doc).order_by(log_heads.c.size.desc()).limit(1)
    doc = connection.execute(newest).scalar_one_or_none()
    return None if doc is None else loads_signed(LogHead, doc)
