"""Appends to the one match log of all replicas.

A transaction locks the row of the log's tail, gives each leaf the next number and a time that is not before the last one, and
writes leaves and tail. So a kill leaves no gap, and no replica waits for another but for such a transaction. It is synced: client
and node learn the number of a leaf, and a crash of the database must not give it to another one.

Leaves that wait at the same time share a transaction. It locks jobs before the tail and nothing of another replica after it, and
runs alone on a connection of its own, so no two replicas wait for each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa
import structlog
from sqlalchemy import Connection

from coordinator.jobs.shared_store import MakeHead, MakeLeaf
from coordinator.ports import LogRow
from coordinator.storage.job_codec import JobDoc
from coordinator.storage.log_store import insert_head, insert_leaves, newest_head
from coordinator.storage.schema import log_tail
from coordinator.storage.shared_rows import SharedJobRows
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.merkle import HASH_SIZE, Edge, leaf_hash
from tallystick.protocol.messages import LogHead
from tallystick.protocol.types import Hash, JobId
from tallystick.runtime.storage import Database

R = TypeVar("R")
log = structlog.get_logger()
MAX_WAITING = 4_096
"""Leaves that wait for a transaction."""
MAX_TOGETHER = 256
"""Leaves of one transaction."""
_TAIL = "SELECT size, edge, last_at FROM log_tail WHERE id = 1 FOR UPDATE"


@dataclass(frozen=True, slots=True)
class Appended:
    """A leaf that was written. `open_row`: the number of the row of its job among the open ones; 0 without one."""

    row: LogRow
    open_row: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Append:
    """A leaf that waits. `doc`: the job that it is of, which is stored with it, as it is and as bytes."""

    at: int
    make: MakeLeaf
    doc: tuple[JobDoc, bytes] | None
    future: asyncio.Future[Appended | None]


class SharedLog:
    """See the module's docstring. `database`: for these transactions alone."""

    def __init__(self, database: Database, rows: SharedJobRows) -> None:
        self._db, self._rows = database, rows
        self._waiting: list[_Append] = []
        self._turn = asyncio.Lock()
        """Held during a transaction."""
        self._writing: asyncio.Task[None] | None = None

    async def append(self, at: int, make: MakeLeaf, doc: tuple[JobDoc, bytes] | None = None) -> Appended | None:
        """Appends a leaf, and stores its job with it. Returns once both are synced; None if the job was placed or ended before.

        `at`: Unix seconds, at which the leaf is if no earlier one is later. Raises Unavailable. A caller that is cancelled cannot
        know whether the leaf was written.
        """
        if len(self._waiting) >= MAX_WAITING:
            raise Unavailable(Code.DATABASE_UNAVAILABLE, "the database is too slow: too many leaves of the match log wait for it")
        future: asyncio.Future[Appended | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Append(at, make, doc, future))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write(), name="shared-log")
        return await future

    async def decide(self, at: int, work: Callable[[Connection, int, int], tuple[R, bytes | None]]) -> R:
        """Runs work that decides about one leaf while the tail is locked. Returns what it returns beside the leaf.

        It gets the leaf's time and number, and returns its bytes; None for no leaf. Raises Unavailable.
        """
        async with self._turn:
            return await self._db.write(partial(_decide, at=at, work=work))

    async def sign_head(self, make: MakeHead) -> Signed[LogHead] | None:
        """Stores a head for all leaves, unless there is one. Returns the newest head. Raises Unavailable."""
        async with self._turn:
            return await self._db.write(partial(_sign_head, make=make))

    async def state(self) -> tuple[Signed[LogHead] | None, int]:
        """Returns the newest head of any replica, and the number of leaves. Raises Unavailable."""

        def read(connection: Connection) -> tuple[Signed[LogHead] | None, int]:
            size = connection.execute(sa.select(log_tail.c.size)).scalar_one_or_none()
            return newest_head(connection), size or 0

        return await self._db.read(read)

    async def run(self, work: Callable[[Connection], R]) -> R:
        """Runs other work in a transaction of its own, which shares no locks with those of leaves. Raises Unavailable."""
        async with self._turn:
            return await self._db.write(work, synced=False)

    async def close(self) -> None:
        """Waits for the transaction that runs."""
        if self._writing is not None:
            await asyncio.wait({self._writing})

    async def _write(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:MAX_TOGETHER], self._waiting[MAX_TOGETHER:]
                await self._write_batch([item for item in batch if not item.future.done()])
        finally:
            self._writing = None

    async def _write_batch(self, batch: Sequence[_Append]) -> None:
        if not batch:
            return
        try:
            async with self._turn:
                results = await self._db.write(partial(self._append_all, batch=batch))
        except Exception as error:  # noqa: BLE001 - whoever waits gets it
            if len(batch) > 1 and not isinstance(error, Unavailable):
                for item in batch:
                    await self._write_batch([item])
                return
            for item in batch:
                if not item.future.done():
                    item.future.set_exception(error)
            return
        for item, result in zip(batch, results, strict=True):
            if not item.future.done():
                item.future.set_result(result)

    def _append_all(self, connection: Connection, batch: Sequence[_Append]) -> list[Appended | None]:
        docs = {item.doc[0].record.job: item.doc for item in batch if item.doc is not None}
        open_rows = self._rows.place(connection, docs) if docs else dict[JobId, int]()
        edge, last_at = _lock_tail(connection)
        results, written = list[Appended | None](), list[LogRow]()
        for item in batch:
            number = 0 if item.doc is None else open_rows.get(item.doc[0].record.job)
            if number is None:
                results.append(None)
                continue
            last_at = max(last_at, item.at)
            row = _append(edge, last_at, item.make(last_at))
            written.append(row)
            results.append(Appended(row, number))
        _write_leaves(connection, edge, written)
        return results


def _lock_tail(connection: Connection) -> tuple[Edge, int]:
    tail: Any = connection.exec_driver_sql(_TAIL).one_or_none()
    if tail is None:
        raise Unavailable(Code.DATABASE_UNAVAILABLE, "db: the database has no tail of the match log: a lone coordinator used it")
    roots = bytes(tail.edge)
    return Edge(tail.size, [Hash(roots[at : at + HASH_SIZE]) for at in range(0, len(roots), HASH_SIZE)]), tail.last_at


def _append(edge: Edge, at: int, data: bytes) -> LogRow:
    number = edge.size
    return LogRow(number, at, b"".join(edge.append(leaf_hash(data))), data)


def _write_leaves(connection: Connection, edge: Edge, rows: Sequence[LogRow]) -> None:
    """Writes the leaves after the last one, and the tail with them."""
    if rows:
        insert_leaves(connection, rows)
        values = {"size": edge.size, "edge": b"".join(edge.roots), "last_at": rows[-1].at}
        connection.execute(sa.update(log_tail), values)


def _decide(connection: Connection, at: int, work: Callable[[Connection, int, int], tuple[R, bytes | None]]) -> R:
    edge, last_at = _lock_tail(connection)
    at = max(at, last_at)
    result, data = work(connection, at, edge.size)
    _write_leaves(connection, edge, [] if data is None else [_append(edge, at, data)])
    return result


def _sign_head(connection: Connection, make: MakeHead) -> Signed[LogHead] | None:
    edge, last_at = _lock_tail(connection)
    newest = newest_head(connection)
    if newest is not None and newest.message.size >= edge.size:
        return newest
    head = make(edge.size, edge.root(), last_at, newest)
    insert_head(connection, head)
    return head
