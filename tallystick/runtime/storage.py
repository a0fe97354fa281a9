"""Durable storage with group commit: concurrent writes share one transaction and one sync to disk.

`Database.write(fn)` runs `fn(connection)` and returns once its effects are synced: they survive a power cut. With `synced=False`
it returns once they are committed: they survive the death of the process, and a power cut may undo the last of them, never one
that precedes a synced write. A sync costs milliseconds; docs/explanation/durability.md says who relies on what.

Writes that arrive during a transaction wait for the next one and share it: a transaction writes whole pages, and a row in it
costs microseconds. No transaction waits for writes that may come: a job's writes follow each other, so each would wait.
If a write of a group fails, the group is rolled back and each write runs alone, so only the bad one fails. If the transaction
cannot begin at all, every write of the group fails.

`fn` is synchronous SQLAlchemy code. SQLite runs it in one writer thread, PostgreSQL through asyncpg with `run_sync`. It must
have no effects except on the connection, because it may run twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import unquote

import structlog
from sqlalchemy import URL, Connection, create_engine, event, pool
from sqlalchemy.exc import SQLAlchemyError

from tallystick.protocol.errors import Code, Unavailable
from tallystick.runtime.database_errors import BUSY_SECONDS, explain, explain_failed_start
from tallystick.runtime.database_migration import MigrationFailed, migrate
from tallystick.runtime.database_url import parse_database_url, postgres_dsn

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

R = TypeVar("R")
Work = Callable[[Connection], R]
_Write = tuple[Work[Any], asyncio.Future[Any], bool]
"""Its work, its result, and whether it must be synced."""
MAX_GROUP = 256
"""Writes that share one transaction."""
MAX_QUEUED = 4_096
"""Writes that wait for a transaction."""
_MIGRATING = threading.Lock()
"""Held during a migration. Alembic keeps its state in module globals, so a process migrates one database at a time."""
log = structlog.get_logger()


class _Backend(Protocol):
    """Runs functions in transactions."""

    async def prepare(self) -> None: ...
    async def run(self, work: Work[R], *, write: bool, synced: bool = True) -> R: ...
    async def close(self) -> None: ...


class _Sqlite:
    """SQLite with one writer thread, one reader thread, and a fully synced write-ahead log.

    The driver would begin a transaction only at the first change, and none for DDL. It is begun here instead: a write holds the
    file's write lock before it reads, so processes that share the file do not overwrite each other, and a read sees one snapshot.
    """

    def __init__(self, url: URL) -> None:
        self._file = sqlite_file(url)
        # Each thread has its own connection; `close` disposes of both from another thread after they have ended.
        # Parameters may contain secrets, so they are kept out of errors and logs.
        connect = {"check_same_thread": False, "timeout": BUSY_SECONDS}
        self._engine = create_engine(url, poolclass=pool.SingletonThreadPool, connect_args=connect, hide_parameters=True)
        event.listen(self._engine, "connect", _pragmas)
        self._writer = ThreadPoolExecutor(1, "sqlite-writer")
        in_memory = url.database in {None, "", ":memory:"}
        self._reader = self._writer if in_memory else ThreadPoolExecutor(1, "sqlite-reader")
        self._synced = True
        """The mode of the writer's connection."""

    async def prepare(self) -> None:
        """Creates the file and its folders, readable by their owner alone. Raises OSError."""
        if self._file is not None:
            await asyncio.to_thread(_create_for_owner, self._file)

    async def run(self, work: Work[R], *, write: bool, synced: bool = True) -> R:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._writer if write else self._reader, self._transact, work, write, synced)

    def _transact(self, work: Work[R], write: bool, synced: bool) -> R:
        with self._engine.begin() as connection:
            if write and synced != self._synced:  # in WAL mode, NORMAL commits without a sync
                connection.exec_driver_sql(f"PRAGMA synchronous={'FULL' if synced else 'NORMAL'}")
                self._synced = synced
            connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                return work(connection)
            except StopIteration as error:  # a future cannot hold it, and its awaiter would never wake
                raise RuntimeError("StopIteration out of a transaction") from error

    async def close(self) -> None:
        await asyncio.to_thread(self._writer.shutdown)
        await asyncio.to_thread(self._reader.shutdown)
        self._engine.dispose()


def sqlite_file(url: URL) -> Path | None:
    """The file of an SQLite database, given by its path or as a URI (file:PATH with uri=true).

    None for a database in memory, and for other database systems.
    """
    path = url.database or ""
    if "uri" in url.query and path.startswith("file:"):
        path = unquote(path.removeprefix("file:"))
        if path.startswith("//"):  # an authority, which is empty or localhost for SQLite
            path = "/" + path[2:].partition("/")[2]
    in_memory = path in {"", ":memory:"} or url.query.get("mode") == "memory"
    return None if in_memory or not url.drivername.startswith("sqlite") else Path(path)


def _file_identity(url: URL) -> tuple[int, int] | None:
    """Device and inode of an SQLite file; None if there is no file. SQLite makes a new one where the file was deleted."""
    file = sqlite_file(url)
    try:
        status = None if file is None else file.stat()
    except OSError:
        return None
    return None if status is None else (status.st_dev, status.st_ino)


def _create_for_owner(path: Path) -> None:
    """Creates a database's file and folders if they are missing. Its files get mode 0600, also existing ones, new folders 0700.

    SQLite creates the write-ahead log with the mode of its database. Existing folders keep their mode.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    for folder in (*reversed(path.parent.parents), path.parent):
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    for suffix in ("", "-wal", "-shm", "-journal"):  # not opened here: closing a file would drop SQLite's locks on it
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


def postgres_engine(url: URL, **options: Any) -> AsyncEngine:
    """An engine for PostgreSQL. asyncpg reads the address itself, because it knows libpq's parameters, such as sslmode."""
    from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415 - slow to import, and SQLite's users do not need it

    dsn, seconds = postgres_dsn(url)

    async def connect() -> Any:
        import asyncpg  # noqa: PLC0415 - slow to import, and SQLite's users do not need it

        return await asyncpg.connect(dsn, timeout=seconds)

    return create_async_engine("postgresql+asyncpg://", async_creator=connect, hide_parameters=True, **options)


class _Postgres:
    def __init__(self, url: URL) -> None:
        self._engine = postgres_engine(url, pool_size=4, pool_pre_ping=True)

    async def prepare(self) -> None:
        """Connects. Raises what the driver raises."""
        async with self._engine.connect():
            pass

    async def run(self, work: Work[R], *, write: bool, synced: bool = True) -> R:
        async with self._engine.begin() as connection:
            if write and not synced:
                await connection.exec_driver_sql("SET LOCAL synchronous_commit = off")
            return await connection.run_sync(work)

    async def close(self) -> None:
        await self._engine.dispose()


class Database:
    """A database with its writer. Call `start` before use and `close` after it; `close` finishes the queued writes."""

    def __init__(self, url: str | URL, setting: str = "db") -> None:
        """`setting`: the one that has the address, for errors. `pause` waits for a number of seconds.

        Raises BadMessage for an address that is not understood.
        """
        self.url, self._setting = parse_database_url(url, setting) if isinstance(url, str) else url, setting
        sqlite = self.url.drivername.startswith("sqlite")
        self._backend: _Backend = _Sqlite(self.url) if sqlite else _Postgres(self.url)
        self._queue: asyncio.Queue[_Write | None] = asyncio.Queue(MAX_QUEUED)
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._file_identity: tuple[int, int] | None = None
        self.on_commit: Callable[[float], None] = lambda _: None
        """Called with the seconds of each transaction of the writer."""

    async def start(self, migrations: Path) -> None:
        """Migrates to the head of `migrations`/versions and starts the writer. Raises Unavailable (database_unavailable)."""
        try:
            await self._backend.prepare()
        except Exception as error:  # drivers raise errors of many kinds if they cannot connect
            raise explain_failed_start(error, self.url, self._setting) from error
        while not _MIGRATING.acquire(blocking=False):  # noqa: ASYNC110 - other loops may hold it, and no event crosses loops
            await asyncio.sleep(0.01)
        try:
            await self._backend.run(lambda c: migrate(c, migrations), write=True)
        except (SQLAlchemyError, OSError, MigrationFailed) as error:
            raise explain_failed_start(error, self.url, self._setting) from error
        finally:
            _MIGRATING.release()
        self._file_identity = await asyncio.to_thread(_file_identity, self.url)
        self._task = asyncio.create_task(self._commit_groups(), name="group-commit")

    async def write(self, work: Work[R], *, synced: bool = True) -> R:
        """Runs `work` and returns its result once it is durable, see above. Raises the error of `work`, or Unavailable; then
        nothing is written.
        """
        self._check_open()
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        await self._queue.put((work, future, synced))
        return await future

    def enqueue(self, work: Work[R]) -> asyncio.Future[R]:
        """Queues `work`, not synced, and returns at once. It is committed before any later write, and when the future is done.

        Raises Unavailable if the queue is full.
        """
        self._check_open()
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        future.add_done_callback(_log_lost)
        try:
            self._queue.put_nowait((work, future, False))
        except asyncio.QueueFull:
            future.cancel()
            raise Unavailable(Code.DATABASE_UNAVAILABLE, "the database is too slow: its write queue is full") from None
        return future

    async def read(self, work: Work[R]) -> R:
        """Runs `work`, which must only read. Raises Unavailable if the database does not answer."""
        self._check_open()
        try:
            return await self._backend.run(work, write=False)
        except Exception as error:
            translated = self._translate(error)
            if translated is error:
                raise
            raise translated from error

    @property
    def queued(self) -> int:
        """Writes that wait for a transaction."""
        return self._queue.qsize()

    async def ping(self) -> float:
        """Waits for the writer and an empty transaction; returns the seconds that it took. Raises Unavailable."""
        begin = time.monotonic()
        if await asyncio.to_thread(_file_identity, self.url) != self._file_identity:
            raise Unavailable(Code.DATABASE_UNAVAILABLE, f"{self._setting}: the file {self.url.database} was deleted or replaced")
        await self.write(lambda connection: connection.exec_driver_sql("SELECT 1"), synced=False)
        return time.monotonic() - begin

    async def close(self) -> None:
        """Finishes the queued writes and closes the database. Later calls raise Unavailable."""
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
        while not (closing and self._queue.empty()):  # writes accepted before the close may be queued behind its mark
            taken = [await self._queue.get()]
            while len(taken) < MAX_GROUP and not self._queue.empty():
                taken.append(self._queue.get_nowait())
            group = [entry for entry in taken if entry is not None]
            closing = closing or len(group) < len(taken)
            if group:
                await self._commit(group)

    async def _commit(self, group: list[_Write]) -> None:
        begun = False

        def together(connection: Connection) -> list[Any]:
            nonlocal begun
            begun = True
            return [work(connection) for work, _, _ in group]

        since = time.monotonic()
        try:
            results = await self._backend.run(together, write=True, synced=any(synced for _, _, synced in group))
        except Exception as error:  # noqa: BLE001 - each write then runs alone, and the one that failed gets its error
            if begun and len(group) > 1:
                for entry in group:
                    await self._commit([entry])
                return
            for _, future, _ in group:
                _settle(future, error=self._translate(error))
            return
        self.on_commit(time.monotonic() - since)
        for (_, future, _), result in zip(group, results, strict=True):
            _settle(future, result)

    def _translate(self, error: Exception) -> Exception:
        """Unavailable if the database failed, else the error of the work itself."""
        explained = explain(error, self.url, self._setting)
        if explained is None:
            return error
        log.error("database failed", reason=str(explained))
        return explained


def _log_lost(future: asyncio.Future[Any]) -> None:
    if not future.cancelled() and future.exception() is not None:
        log.error("queued write lost", error=str(future.exception()))


def _settle(future: asyncio.Future[Any], result: object = None, error: Exception | None = None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
