"""A lock that allows one instance of a daemon per database. It ends with the process, also if that crashes.

For SQLite it is a lock (flock) on a file beside the database. For PostgreSQL it is a session's advisory lock on a separate
connection. If that connection is lost, the lock is lost, and `lost` returns within CHECK_SECONDS and ANSWER_SECONDS.

Replicas of a daemon take the shared form of PostgreSQL's lock: any number of them hold it, and no lone instance beside them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from sqlalchemy import URL, pool, text
from sqlalchemy.exc import SQLAlchemyError

from tallystick.protocol.errors import BadMessage, Code, Fault, Unavailable
from tallystick.runtime.database_errors import explain_failed_start
from tallystick.runtime.database_url import parse_database_url
from tallystick.runtime.postgres_backend import postgres_engine
from tallystick.runtime.sqlite_backend import sqlite_file

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # a system without flock
    fcntl = None

CHECK_SECONDS = 5.0
ANSWER_SECONDS = 5.0
TAKEOVER_SECONDS = 3.0
"""The time for which PostgreSQL may still hold the lock of a process that ended."""
ADVISORY_LOCK = 0x7A12


class InstanceLock(Protocol):
    """A lock on a database."""

    async def acquire(self) -> None:
        """Takes the lock. Raises Unavailable (already_running) if another process holds it, or (database_unavailable)."""

    async def lost(self) -> None:
        """Waits until the lock is lost."""

    async def release(self) -> None:
        """Releases the lock. Does nothing if it was never taken."""


def instance_lock(url: str | URL, daemon: str, setting: str = "db", *, shared: bool = False) -> InstanceLock:
    """The lock of the database at `url`. `daemon` is the kind of daemon in errors, such as "coordinator".

    `setting`: the one that has the address, for errors. `shared`: the form for replicas, which excludes lone instances only.
    Raises BadMessage for an address that is not understood, or for replicas on a database that is not PostgreSQL.
    """
    url = parse_database_url(url, setting) if isinstance(url, str) else url
    if not url.drivername.startswith("sqlite"):
        return _AdvisoryLock(url, daemon, setting, shared=shared)
    if shared:
        expected = "a PostgreSQL database (postgresql+asyncpg://USER@HOST/NAME)"
        raise BadMessage(f"{setting}: expected {expected} for replicas of a {daemon}, got SQLite")
    path = sqlite_file(url)
    return _NoLock() if path is None or fcntl is None else _FileLock(path, daemon, url, setting)


class _NoLock:
    """The lock of a database in memory, which no other process can use."""

    async def acquire(self) -> None:
        """See InstanceLock."""

    async def lost(self) -> None:
        """See InstanceLock."""
        await asyncio.Event().wait()

    async def release(self) -> None:
        """See InstanceLock."""


class _FileLock(_NoLock):
    """A lock on a file, which is never removed: otherwise two processes could lock two files of one name."""

    def __init__(self, path: Path, daemon: str, url: URL, setting: str) -> None:
        self._path, self._daemon, self._url, self._setting = path, daemon, url, setting
        self._descriptor: int | None = None

    async def acquire(self) -> None:
        """See InstanceLock."""
        path = self._path.resolve()
        lock_file = path.with_name(path.name + ".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise explain_failed_start(error, self._url, self._setting) from error
        try:
            _lock(descriptor)
        except OSError as error:
            holder = os.read(descriptor, 32).decode(errors="replace").strip()
            os.close(descriptor)
            named = f"process {holder}" if holder.isdecimal() else "another process"
            remedy = f"stop it first, or give this one another database (`fuser -v {lock_file}` shows the process)"
            raise Unavailable(
                Code.ALREADY_RUNNING,
                f"{named} runs a {self._daemon} on the database {path}; two would end each other's jobs: {remedy}",
                fault=Fault.CLIENT,
            ) from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        self._descriptor = descriptor

    async def release(self) -> None:
        """See InstanceLock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _lock(descriptor: int) -> None:
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


class _AdvisoryLock:
    def __init__(self, url: URL, daemon: str, setting: str, *, shared: bool) -> None:
        self._engine = postgres_engine(url, poolclass=pool.NullPool, isolation_level="AUTOCOMMIT")
        self._url, self._daemon, self._setting, self._shared = url, daemon, setting, shared
        self._connection: AsyncConnection | None = None

    async def acquire(self) -> None:
        """See InstanceLock."""
        try:
            async with asyncio.timeout(TAKEOVER_SECONDS + ANSWER_SECONDS):
                self._connection = await self._engine.connect()
                await self._acquire_by(asyncio.get_running_loop().time() + TAKEOVER_SECONDS)
        except Unavailable:
            raise
        except Exception as error:  # drivers raise errors of many kinds if they cannot connect
            await self.release()
            raise explain_failed_start(error, self._url, self._setting) from error

    async def _acquire_by(self, deadline: float) -> None:
        form = "_shared" if self._shared else ""
        while not await self._query(f"SELECT pg_try_advisory_lock{form}({ADVISORY_LOCK})"):
            if asyncio.get_running_loop().time() > deadline:
                await self.release()
                raise Unavailable(Code.ALREADY_RUNNING, self._refusal(), fault=Fault.CLIENT)
            await asyncio.sleep(0.1)

    def _refusal(self) -> str:
        where = f"{self._url.database} on {self._url.host}"
        show = "pg_locks shows the session with the advisory lock"
        if self._shared:
            return (
                f"a {self._daemon} without `bus` runs on the database {where}, which it needs for itself: start it with `bus` as"
                f" well, or stop it first ({show})"
            )
        return (
            f"another process runs a {self._daemon} on the database {where}; two would end each other's jobs: stop it first, give"
            f" this one another database, or run all with `bus`, as replicas ({show})"
        )

    async def _query(self, query: str) -> object:
        if self._connection is None:
            raise ConnectionError("the lock's connection is closed")
        return await self._connection.scalar(text(query))

    async def lost(self) -> None:
        """See InstanceLock."""
        with contextlib.suppress(SQLAlchemyError, OSError, TimeoutError):
            while True:
                await asyncio.sleep(CHECK_SECONDS)
                async with asyncio.timeout(ANSWER_SECONDS):
                    await self._query("SELECT 1")

    async def release(self) -> None:
        """See InstanceLock."""
        connection, self._connection = self._connection, None
        with contextlib.suppress(SQLAlchemyError, OSError, TimeoutError):
            if connection is not None:
                async with asyncio.timeout(ANSWER_SECONDS):
                    await connection.close()
        await self._engine.dispose()
