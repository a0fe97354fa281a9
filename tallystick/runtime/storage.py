"""Durable storage with group commit: many writers, one transaction, one sync.

`Database.write(fn)` runs `fn(connection)` and returns once its effects are synced to disk. Writes that arrive while a
transaction is being synced wait for the next one and share it: a synced transaction costs milliseconds, a row in it
microseconds. If one of a group fails, the group is rolled back and each runs alone, so that only the bad one fails. (Where the
transaction could not even begin, nobody's work is at fault, and all fail at once.)

`fn` is synchronous SQLAlchemy code in both cases: SQLite runs it in one writer thread, PostgreSQL through asyncpg with
`run_sync`. It must have no effects but the connection's, since it may run twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote

import structlog
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, create_engine, event, make_url, pool
from sqlalchemy.exc import DatabaseError, DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import create_async_engine

from tallystick.protocol.errors import Code, Unavailable

R = TypeVar("R")
Work = Callable[[Connection], R]
GROUP = 256
QUEUE = 4_096
BUSY_SECONDS = 5.0
"""How long a transaction waits for another process that has SQLite's write lock."""
MIGRATION_LOCK = 0x7A11
"""Of replicas that start together on one PostgreSQL, one migrates and the others wait for it."""
_MIGRATING = threading.Lock()
"""Alembic keeps what it migrates in module globals: one database of a process at a time, or one's tables end in another."""
log = structlog.get_logger()


class _Backend(Protocol):
    """Runs work in one transaction."""

    async def run(self, work: Work[R], *, write: bool) -> R: ...
    async def close(self) -> None: ...


class _Sqlite:
    """One thread that writes, another that reads; write-ahead log, fully synced.

    Its driver begins a transaction late, at the first change, and none for DDL. Begun here instead, a write holds the file's
    write lock before it reads, so that processes that share the file do not overwrite each other; a read sees one snapshot.
    """

    def __init__(self, url: str) -> None:
        file = sqlite_file(url)
        if file is not None:
            _keep_private(file)
        # Each thread has a connection of its own; that others may touch it is for `close`, when both threads have ended.
        # Rows hold what logs must not: errors are told without their parameters.
        connect = {"check_same_thread": False, "timeout": BUSY_SECONDS}
        self._engine = create_engine(url, poolclass=pool.SingletonThreadPool, connect_args=connect, hide_parameters=True)
        event.listen(self._engine, "connect", _pragmas)
        self._writer = ThreadPoolExecutor(1, "sqlite-writer")
        in_memory = make_url(url).database in {None, "", ":memory:"}
        self._reader = self._writer if in_memory else ThreadPoolExecutor(1, "sqlite-reader")

    async def run(self, work: Work[R], *, write: bool) -> R:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._writer if write else self._reader, self._transact, work, write)

    def _transact(self, work: Work[R], write: bool) -> R:
        with self._engine.begin() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                return work(connection)
            except StopIteration as error:  # no future can carry it: whoever awaits one would wait for ever
                raise RuntimeError("StopIteration out of a transaction") from error

    async def close(self) -> None:
        await asyncio.to_thread(self._writer.shutdown)
        await asyncio.to_thread(self._reader.shutdown)
        self._engine.dispose()


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite database, named by its path or by a URI (file:PATH with uri=true); None for one in memory, and for
    other databases.
    """
    made = make_url(url)
    path = made.database or ""
    if "uri" in made.query and path.startswith("file:"):
        path = unquote(path.removeprefix("file:"))
        if path.startswith("//"):  # an authority, which SQLite lets be empty or localhost
            path = "/" + path[2:].partition("/")[2]
    in_memory = path in {"", ":memory:"} or made.query.get("mode") == "memory"
    return None if in_memory or not made.drivername.startswith("sqlite") else Path(path)


def _keep_private(path: Path) -> None:
    """Lets only their owner read a database's files, whatever the umask says: new ones and those that are there. SQLite gives a
    write-ahead log the mode of its database. Folders that are made for it are the owner's too; others are left as they are.
    """
    for folder in (*reversed(path.parent.parents), path.parent):
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    for suffix in ("", "-wal", "-shm", "-journal"):  # never opened here: closing a file would drop SQLite's locks on it
        file = path.with_name(path.name + suffix)
        try:
            if file.stat().st_mode & 0o077:
                file.chmod(0o600)
        except FileNotFoundError:
            continue
        except OSError as error:
            log.warning("database file can be read by others", path=str(file), error=str(error))


def _pragmas(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


class _Postgres:
    def __init__(self, url: str) -> None:
        self._engine = create_async_engine(url, pool_size=4, pool_pre_ping=True, hide_parameters=True)

    async def run(self, work: Work[R], *, write: bool) -> R:  # noqa: ARG002 - one pool serves both
        async with self._engine.begin() as connection:
            return await connection.run_sync(work)

    async def close(self) -> None:
        await self._engine.dispose()


class Database:
    """A store's connection to its tables. `await start()` before use, `await close()` after: it finishes what is queued."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._backend: _Backend = _Sqlite(url) if url.startswith("sqlite") else _Postgres(url)
        self._queue: asyncio.Queue[tuple[Work[Any], asyncio.Future[Any]] | None] = asyncio.Queue(QUEUE)
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def start(self, migrations: Path) -> None:
        """Migrates to the head of `migrations`/versions and starts the writer. Raises Unavailable without a database."""
        while not _MIGRATING.acquire(blocking=False):  # noqa: ASYNC110 - other loops may hold it, and no event crosses loops
            await asyncio.sleep(0.01)
        try:
            await self._backend.run(lambda c: _migrate(c, migrations), write=True)
        except (DatabaseError, OSError, CommandError) as error:
            if _damaged(error) or _locked(error):
                raise _translate(error, self.url) from error
            raise Unavailable(Code.DATABASE_UNAVAILABLE, f"database: {error}") from error
        finally:
            _MIGRATING.release()
        self._task = asyncio.create_task(self._commit_groups(), name="group-commit")

    async def write(self, work: Work[R]) -> R:
        """Runs `work` and returns its result once it is durable. Raises what it raised, or Unavailable: nothing is written."""
        self._check_open()
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        await self._queue.put((work, future))
        return await future

    def enqueue(self, work: Work[Any]) -> None:
        """Queues `work` and returns: it is durable before any later write is. Raises Unavailable if it cannot be queued."""
        self._check_open()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        future.add_done_callback(_log_lost)
        try:
            self._queue.put_nowait((work, future))
        except asyncio.QueueFull:
            future.cancel()
            raise Unavailable(Code.DATABASE_UNAVAILABLE, "the database is too far behind") from None

    async def read(self, work: Work[R]) -> R:
        """Runs `work`, which only reads. Raises Unavailable without a database."""
        self._check_open()
        try:
            return await self._backend.run(work, write=False)
        except (SQLAlchemyError, OSError) as error:
            translated = _translate(error, self.url)
            if translated is error:
                raise
            raise translated from error

    async def close(self) -> None:
        """Writes what is queued, then lets go of the database. Whatever comes later is refused."""
        self._closed = True
        if self._task is not None:
            await self._queue.put(None)
            await self._task
            self._task = None
        await self._backend.close()

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable(Code.DATABASE_UNAVAILABLE, "the database is closed")

    async def _commit_groups(self) -> None:
        closing = False
        while not (closing and self._queue.empty()):  # writers that were let in before the end may queue behind its mark
            taken = [await self._queue.get()]
            while len(taken) < GROUP and not self._queue.empty():
                taken.append(self._queue.get_nowait())
            group = [entry for entry in taken if entry is not None]
            closing = closing or len(group) < len(taken)
            if group:
                await self._commit(group)

    async def _commit(self, group: list[tuple[Work[Any], asyncio.Future[Any]]]) -> None:
        begun = False

        def together(connection: Connection) -> list[Any]:
            nonlocal begun
            begun = True
            return [work(connection) for work, _ in group]

        try:
            results = await self._backend.run(together, write=True)
        except Exception as error:  # noqa: BLE001 - whatever one writer raised is that writer's, found by running it alone
            if begun and len(group) > 1:
                for entry in group:
                    await self._commit([entry])
                return
            for _, future in group:
                _settle(future, error=_translate(error, self.url))
            return
        for (_, future), result in zip(group, results, strict=True):
            _settle(future, result)


def _log_lost(future: asyncio.Future[Any]) -> None:
    if not future.cancelled() and future.exception() is not None:
        log.error("a noted write was lost", error=str(future.exception()))


def _settle(future: asyncio.Future[Any], result: object = None, error: Exception | None = None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _damaged(error: Exception) -> bool:
    """Whether SQLite says that the file itself is at fault."""
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _locked(error: Exception) -> bool:
    """Whether SQLite says that another process has the file's lock."""
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", None)
    return code is not None and code & 0xFF == sqlite3.SQLITE_BUSY


def _translate(error: Exception, url: str) -> Exception:
    if _locked(error):
        path = make_url(url).database
        text = (
            f"another process has held the lock of {path} for more than {BUSY_SECONDS:g} s: it hangs or was stopped. "
            f"`fuser -v {path}` shows who uses the file; let that process go on, or end it. Nothing was written"
        )
        log.error("database locked", path=path)
        return Unavailable(Code.DATABASE_UNAVAILABLE, text)
    if _damaged(error):
        log.error("database damaged", error=str(error))
        text = (
            f"the database file is damaged ({getattr(error, 'orig', error)}): stop what uses it, keep a copy of it with its -wal "
            "and -shm files, and restore a backup or save what can be read with `sqlite3 FILE .recover | sqlite3 NEW`"
        )
        return Unavailable(Code.DATABASE_UNAVAILABLE, text)
    gone = isinstance(error, OperationalError | PoolTimeout | OSError)
    if gone or (isinstance(error, DBAPIError) and error.connection_invalidated):
        log.error("database failed", error=str(error))
        return Unavailable(Code.DATABASE_UNAVAILABLE, f"the database does not answer: {getattr(error, 'orig', None) or error}")
    return error


def _migrate(connection: Connection, migrations: Path) -> None:
    if connection.dialect.name == "postgresql":  # SQLite's write lock is held already
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "alembic"))
    config.set_main_option("version_locations", str(migrations / "versions"))
    config.set_main_option("path_separator", "newline")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
