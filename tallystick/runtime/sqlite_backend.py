"""SQLite for `storage`: a writer's and a reader's thread on one file, which is created for its owner alone."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import structlog
from sqlalchemy import URL, Connection, Engine, create_engine, event, pool

from tallystick.runtime.database_errors import BUSY_SECONDS
from tallystick.runtime.group_commit import R, ThreadCommit, Work, Write, run_work

CHECKPOINT_PAGES = 1_000
"""Pages of SQLite's write-ahead log from which on a commit copies them into the database."""
log = structlog.get_logger()


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


class SqliteBackend:
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
            return run_work(work, connection)

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
                run_work(work, connection)
        except BaseException:
            self._writing = self._mode = None
            connection.close()
            raise

    async def close(self) -> None:
        """Ends the threads and closes both connections."""
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


def file_identity(url: URL) -> tuple[int, int] | None:
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
