"""Durable storage with group commit: concurrent writes share one transaction and one sync to disk.

`Database.write(fn)` runs `fn(connection)` and returns once its effects are synced: they survive a power cut. With `synced=False`
it returns once they are committed: they survive the death of the process, and a power cut may undo the last of them, never one
that precedes a synced write. A sync costs milliseconds; docs/explanation/durability.md says who relies on what.

`Database.append(rows)` does the same for rows of prepared statements and is the cheapest write: rows of one group that belong to
one statement are one call of the driver.

Concurrent writes share a transaction, see group_commit.py. `fn` is synchronous SQLAlchemy code. SQLite runs it in one writer
thread, PostgreSQL through asyncpg with `run_sync`. It must have no effects except on the connection, because it may run twice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import structlog
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from tallystick.protocol.errors import Code, Unavailable
from tallystick.runtime.database_errors import START_SECONDS, explain, explain_failed_start, is_locked
from tallystick.runtime.database_migration import MIGRATING, MigrationFailed, migrate
from tallystick.runtime.database_url import describe_database, parse_database_url
from tallystick.runtime.group_commit import GroupCommit, R, Rows, Work, Write
from tallystick.runtime.postgres_backend import PostgresBackend
from tallystick.runtime.sqlite_backend import SqliteBackend, file_identity

_LOCKED_PAUSE = 0.05
"""Seconds before the next attempt to start a database that another process has locked."""
log = structlog.get_logger()


class _Backend(Protocol):
    """Runs functions in transactions."""

    @property
    def commits(self) -> GroupCommit: ...
    async def prepare(self) -> None: ...
    async def migrate(self, work: Work[None]) -> None: ...
    async def read(self, work: Work[R]) -> R: ...
    async def close(self) -> None: ...


class Database:
    """A database with its writer. Call `start` before use and `close` after it; `close` finishes the queued writes."""

    def __init__(self, url: str | URL, setting: str = "db", *, page_size: int = 4_096) -> None:
        """`setting`: the one that has the address, for errors. `page_size`: bytes of a page of an SQLite file that is new.

        Raises BadMessage for an address that is not understood.
        """
        self.url, self._setting = parse_database_url(url, setting) if isinstance(url, str) else url, setting
        sqlite = self.url.drivername.startswith("sqlite")
        self._backend: _Backend = (
            SqliteBackend(self.url, self._translate, page_size) if sqlite else PostgresBackend(self.url, self._translate)
        )
        self._closed = False
        self._file_identity: tuple[int, int] | None = None

    @property
    def on_commit(self) -> Callable[[float], None]:
        """Called with the seconds of each transaction of the writer."""
        return self._backend.commits.on_commit

    @on_commit.setter
    def on_commit(self, observe: Callable[[float], None]) -> None:
        self._backend.commits.on_commit = observe

    async def start(self, migrations: Path) -> None:
        """Migrates to the head of `migrations`/versions and starts the writer. Raises Unavailable (database_unavailable)."""
        try:
            await self._backend.prepare()
        except Exception as error:  # drivers raise errors of many kinds if they cannot connect
            raise explain_failed_start(error, self.url, self._setting) from error
        while not MIGRATING.acquire(blocking=False):  # noqa: ASYNC110 - other loops may hold it, and no event crosses loops
            await asyncio.sleep(0.01)
        try:
            await self._migrate(migrations)
        except (SQLAlchemyError, OSError, MigrationFailed) as error:
            raise explain_failed_start(error, self.url, self._setting) from error
        finally:
            MIGRATING.release()
        self._file_identity = await asyncio.to_thread(file_identity, self.url)
        self._backend.commits.start()

    async def _migrate(self, migrations: Path) -> None:
        """Migrates, and waits meanwhile for other processes that do. SQLite itself waits for no lock while two processes change
        the journal's mode of a new file.
        """
        deadline = time.monotonic() + START_SECONDS
        waits = False
        while True:
            try:
                return await self._backend.migrate(lambda c: migrate(c, migrations))
            except SQLAlchemyError as error:
                if not is_locked(error) or time.monotonic() >= deadline:
                    raise
            if not waits:
                waits = True
                log.info("waiting for another process that has locked the database", path=self.url.database)
            await asyncio.sleep(_LOCKED_PAUSE)

    async def write(self, work: Work[R], *, synced: bool = True, brief: bool = False) -> R:
        """Runs `work` and returns its result once it is durable, see above. Raises the error of `work`, or Unavailable; then
        nothing is written.

        `brief`: `work` takes a fraction of a millisecond, and few other writes come meanwhile, so it may run in the event loop.
        """
        result: R = await self._write(work, synced=synced, brief=brief)
        return result

    def commit_now(self, work: Work[Any]) -> bool:
        """Runs brief `work` in a transaction of its own before this returns, without a sync. Returns False if nothing is written,
        because that would have to wait or failed; `write` it then.
        """
        return not self._closed and self._backend.commits.commit_now(work)

    async def append(self, rows: Rows, *, synced: bool = True) -> None:
        """Runs each statement with its row, all or none, and returns once they are durable.

        Rows of other writers may come between these, and those of one statement come together: no row may depend on one of
        another statement. Raises ValueError for a row that does not fit its statement, the database's error, or Unavailable; then
        nothing is written.
        """
        await self._write(rows, synced=synced)

    async def _write(self, work: Work[Any] | Rows, *, synced: bool, brief: bool = False) -> Any:
        self._check_open()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        write, commits = Write(work, future, synced, brief=brief), self._backend.commits
        if not commits.put(write):
            await commits.put_in_turn(write)
        return await future

    def enqueue(self, work: Work[R] | Rows) -> asyncio.Future[R]:
        """Queues `work`, or rows as for `append`, not synced, and returns at once. It is committed before any later write, and
        when the future is done.

        Raises Unavailable if the queue is full.
        """
        self._check_open()
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        if not self._backend.commits.put(Write(work, future, synced=False, awaited=False)):
            raise Unavailable(Code.DATABASE_UNAVAILABLE, "the database is too slow: its write queue is full")
        return future

    async def read(self, work: Work[R]) -> R:
        """Runs `work`, which must only read. Raises Unavailable if the database does not answer."""
        self._check_open()
        try:
            return await self._backend.read(work)
        except Exception as error:
            translated = self._translate(error)
            if translated is error:
                raise
            raise translated from error

    @property
    def queued(self) -> int:
        """Writes that wait for a transaction."""
        return self._backend.commits.queued

    async def ping(self) -> float:
        """Waits for the writer and an empty transaction; returns the seconds that it took. Raises Unavailable, also if the server
        takes no writes.
        """
        begin = time.monotonic()
        if await asyncio.to_thread(file_identity, self.url) != self._file_identity:
            raise Unavailable(Code.DATABASE_UNAVAILABLE, f"{self._setting}: the file {self.url.database} was deleted or replaced")
        query = "SELECT 'off'" if self.url.drivername.startswith("sqlite") else "SHOW transaction_read_only"
        if await self.write(lambda connection: connection.exec_driver_sql(query).scalar_one(), synced=False) == "on":
            text = f"{self._setting}: {describe_database(self.url)} takes no writes: it is a standby, or was set to read-only"
            raise Unavailable(Code.DATABASE_UNAVAILABLE, text)
        return time.monotonic() - begin

    async def close(self) -> None:
        """Finishes the queued writes and closes the database. Later calls raise Unavailable."""
        self._closed = True
        await self._backend.commits.close()
        await self._backend.close()

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable(Code.DATABASE_UNAVAILABLE, "the database is closed")

    def _translate(self, error: Exception) -> Exception:
        """Unavailable if the database failed, else the error of the work itself."""
        explained = explain(error, self.url, self._setting)
        if explained is None:
            return error
        log.error("database failed", reason=str(explained))
        return explained
