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
import contextlib
import errno
import functools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar
from urllib.parse import unquote

import structlog
from sqlalchemy import URL, Connection, Engine, create_engine, event, pool
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from tallystick.protocol.errors import Code, Unavailable
from tallystick.runtime.database_errors import BUSY_SECONDS, explain, explain_failed_start
from tallystick.runtime.database_migration import MigrationFailed, migrate
from tallystick.runtime.database_url import parse_database_url, postgres_dsn
from tallystick.runtime.group_commit import GroupCommit, LoopCommit, Rows, ThreadCommit, Write

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

R = TypeVar("R")
Work = Callable[[Connection], R]
_ATTEMPTS = 5
"""Of a transaction that PostgreSQL undid because of another process's."""
_CONFLICTS = frozenset({"40001", "40P01"})
"""SQLSTATEs of a serialization failure and a deadlock."""
CHECKPOINT_PAGES = 1_000
"""Pages of SQLite's write-ahead log from which on a commit copies them into the database."""
_MIGRATING = threading.Lock()
"""Held during a migration. Alembic keeps its state in module globals, so a process migrates one database at a time."""
log = structlog.get_logger()


class _Backend(Protocol):
    """Runs functions in transactions."""

    @property
    def commits(self) -> GroupCommit: ...
    async def prepare(self) -> None: ...
    async def migrate(self, work: Work[None]) -> None: ...
    async def read(self, work: Work[R]) -> R: ...
    async def close(self) -> None: ...


class _Mode(NamedTuple):
    """How the writer's connection commits: whether with a sync, and whether it waits for locks and makes checkpoints."""

    synced: bool
    waits: bool

    def set(self, connection: Connection) -> None:
        """Sets the mode, outside a transaction. In WAL mode, NORMAL commits without a sync."""
        driver: Any = connection.connection.dbapi_connection
        driver.execute(f"PRAGMA synchronous={'FULL' if self.synced else 'NORMAL'}")
        driver.execute(f"PRAGMA busy_timeout={BUSY_SECONDS * 1_000 if self.waits else 0:.0f}")
        driver.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES if self.waits else 0}")


_SYNCED, _COMMITTED, _AT_ONCE = _Mode(synced=True, waits=True), _Mode(synced=False, waits=True), _Mode(synced=False, waits=False)


class _Sqlite:
    """SQLite with one writer thread, one reader thread, and a fully synced write-ahead log.

    The driver would begin a transaction only at the first change, and none for DDL. It is begun here instead: a write holds the
    file's write lock before it reads, so processes that share the file do not overwrite each other, and a read sees one snapshot.
    """

    def __init__(self, url: URL, translate: Callable[[Exception], Exception], page_size: int) -> None:
        self._file = sqlite_file(url)
        # Each thread has its own connection; `close` disposes of both from another thread after they have ended. A database in
        # memory has a single one, which its writer uses for reads too. Parameters may contain secrets: no error or log has them.
        self._in_memory = url.database in {None, "", ":memory:"}
        # The writer's is used in two threads and closed in either, which a pool of one connection a thread cannot keep track of.
        self._engine = _sqlite_engine(url, pool.StaticPool if self._in_memory else pool.NullPool, page_size)
        self._readers = self._engine if self._in_memory else _sqlite_engine(url, pool.SingletonThreadPool, page_size)
        self.commits = ThreadCommit(self._write, self._write_at_once, translate)
        self._reader = ThreadPoolExecutor(1, "sqlite-reader")
        self._writing: Connection | None = None
        """The writer's connection, which stays open from one transaction to the next."""
        self._mode: _Mode | None = None
        """The mode of the writer's connection; None: not known."""

    async def prepare(self) -> None:
        """Creates the file and its folders, readable by their owner alone. Raises OSError."""
        if self._file is not None:
            await asyncio.to_thread(_create_for_owner, self._file)

    async def migrate(self, work: Work[None]) -> None:
        """Runs `work` in a synced transaction, before the writer starts."""
        await asyncio.get_running_loop().run_in_executor(self._reader, self._transact, work, "BEGIN IMMEDIATE")

    async def read(self, work: Work[R]) -> R:
        """Runs `work` on one snapshot."""
        if self._in_memory:
            future = asyncio.get_running_loop().create_future()
            await self.commits.put_in_turn(Write(work, future, synced=False))
            return await future  # type: ignore[no-any-return]  # the result of `work`
        return await asyncio.get_running_loop().run_in_executor(self._reader, self._transact, work, "BEGIN")

    def _transact(self, work: Work[R], begin: str) -> R:
        with self._readers.begin() as connection:
            connection.exec_driver_sql(begin)
            return _run(work, connection)

    def _write(self, work: Work[Any], synced: bool) -> None:
        self._commit(work, _SYNCED if synced else _COMMITTED)

    def _write_at_once(self, work: Work[Any]) -> None:
        """Raises an error where it would have to wait for another process. It leaves checkpoints to `_write`."""
        self._commit(work, _AT_ONCE)

    def _commit(self, work: Work[Any], mode: _Mode) -> None:
        if self._writing is None:
            self._writing = self._engine.connect()
        connection = self._writing
        try:
            with connection.begin():
                if mode is not self._mode:
                    mode.set(connection)
                    self._mode = mode
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                _run(work, connection)
        except BaseException:
            self._writing = self._mode = None
            connection.close()
            raise

    async def close(self) -> None:
        await asyncio.to_thread(self._reader.shutdown)
        if self._writing is not None:
            self._writing.close()
        await asyncio.to_thread(self._engine.dispose)
        await asyncio.to_thread(self._readers.dispose)


def _sqlite_engine(url: URL, pool_class: type[pool.Pool], page_size: int) -> Engine:
    connect = {"check_same_thread": False, "timeout": BUSY_SECONDS}
    engine = create_engine(url, poolclass=pool_class, connect_args=connect, hide_parameters=True)
    event.listen(engine, "connect", functools.partial(_pragmas, page_size=page_size))
    return engine


def _run(work: Work[R], connection: Connection) -> R:
    try:
        return work(connection)
    except StopIteration as error:  # a future cannot hold it, and its awaiter would never wake
        raise RuntimeError("StopIteration out of a transaction") from error


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


def _pragmas(connection: Any, _record: object, *, page_size: int) -> None:
    cursor = connection.cursor()
    for pragma in (f"page_size={page_size}", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
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
    """PostgreSQL syncs each write. If it did not, it would forget those of the last half second when its server is killed, and
    the daemon, which lives on and has acknowledged them, would never know.
    """

    def __init__(self, url: URL, translate: Callable[[Exception], Exception]) -> None:
        self._engine = postgres_engine(url, pool_size=4, pool_pre_ping=True)
        self.commits = LoopCommit(self._write, translate)

    async def prepare(self) -> None:
        """Connects. Raises what the driver raises."""
        async with self._engine.connect():
            pass

    async def migrate(self, work: Work[None]) -> None:
        """Runs `work` in a synced transaction."""
        await self._write(work, synced=True)

    async def read(self, work: Work[R]) -> R:
        """Runs `work` in a transaction of its own."""
        async with self._engine.begin() as connection:
            return await connection.run_sync(functools.partial(_run, work))

    async def _write(self, work: Work[Any], synced: bool) -> None:  # noqa: ARG002 - all are
        for _ in range(_ATTEMPTS - 1):
            try:
                return await self._write_once(work)
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) not in _CONFLICTS:
                    raise
                log.info("transaction repeated: it met another process's", reason=type(error.orig).__name__)
        return await self._write_once(work)

    async def _write_once(self, work: Work[Any]) -> None:
        async with self._engine.begin() as connection:
            await connection.run_sync(functools.partial(_run, work))

    async def close(self) -> None:
        await self._engine.dispose()


class Database:
    """A database with its writer. Call `start` before use and `close` after it; `close` finishes the queued writes."""

    def __init__(self, url: str | URL, setting: str = "db", *, page_size: int = 4_096) -> None:
        """`setting`: the one that has the address, for errors. `page_size`: bytes of a page of an SQLite file that is new.

        Raises BadMessage for an address that is not understood.
        """
        self.url, self._setting = parse_database_url(url, setting) if isinstance(url, str) else url, setting
        sqlite = self.url.drivername.startswith("sqlite")
        self._backend: _Backend = (
            _Sqlite(self.url, self._translate, page_size) if sqlite else _Postgres(self.url, self._translate)
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
        while not _MIGRATING.acquire(blocking=False):  # noqa: ASYNC110 - other loops may hold it, and no event crosses loops
            await asyncio.sleep(0.01)
        try:
            await self._backend.migrate(lambda c: migrate(c, migrations))
        except (SQLAlchemyError, OSError, MigrationFailed) as error:
            raise explain_failed_start(error, self.url, self._setting) from error
        finally:
            _MIGRATING.release()
        self._file_identity = await asyncio.to_thread(_file_identity, self.url)
        self._backend.commits.start()

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
        """Waits for the writer and an empty transaction; returns the seconds that it took. Raises Unavailable."""
        begin = time.monotonic()
        if await asyncio.to_thread(_file_identity, self.url) != self._file_identity:
            raise Unavailable(Code.DATABASE_UNAVAILABLE, f"{self._setting}: the file {self.url.database} was deleted or replaced")
        await self.write(lambda connection: connection.exec_driver_sql("SELECT 1"), synced=False)
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
