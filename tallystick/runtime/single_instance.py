"""The sole user of a database: a lock that a process holds for as long as it lives, so that a second one of its kind refuses to
start. It ends with the process, however that ends.

SQLite: a lock on a file beside the database (flock). PostgreSQL: a session's advisory lock, on a connection of its own; if that
connection is lost, so is the lock, and `lost` returns. Between that loss and its discovery lie at most CHECK_SECONDS and
ANSWER_SECONDS.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from types import ModuleType
from typing import Protocol

from sqlalchemy import make_url, pool, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.runtime.storage import sqlite_file

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # a system without such locks
    fcntl = None

CHECK_SECONDS = 5.0
ANSWER_SECONDS = 5.0
TAKEOVER_SECONDS = 3.0
"""How long PostgreSQL may take to notice that a former process is gone."""
ADVISORY_LOCK = 0x7A12


class InstanceLock(Protocol):
    """A lock on a database."""

    async def acquire(self) -> None:
        """Takes the lock. Raises Unavailable where another process holds it."""

    async def lost(self) -> None:
        """Returns when the lock was lost; until then it waits."""

    async def release(self) -> None:
        """Lets go of the lock. It is not an error if it was never taken."""


def instance_lock(url: str, who: str) -> InstanceLock:
    """The lock of the database at `url`; `who` names in errors what may run only once, such as "coordinator"."""
    if not url.startswith("sqlite"):
        return _AdvisoryLock(url, who)
    path = sqlite_file(url)
    return _NoLock() if path is None or fcntl is None else _FileLock(path, who)


class _NoLock:
    """A database in memory has no other users."""

    async def acquire(self) -> None:
        """See InstanceLock."""

    async def lost(self) -> None:
        """See InstanceLock."""
        await asyncio.Event().wait()

    async def release(self) -> None:
        """See InstanceLock."""


class _FileLock(_NoLock):
    """The file stays when the lock is let go: to remove it would let two processes lock two files of one name."""

    def __init__(self, path: Path, who: str) -> None:
        self._path, self._who = path, who
        self._descriptor: int | None = None

    async def acquire(self) -> None:
        """See InstanceLock."""
        path = self._path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside = path.with_name(path.name + ".lock")
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _lock(descriptor)
        except OSError as error:
            holder = os.read(descriptor, 32).decode(errors="replace").strip()
            os.close(descriptor)
            named = f"process {holder}" if holder.isdecimal() else "another process"
            remedy = f"stop that one first, or give this one a database of its own (`fuser -v {beside}` shows who holds the lock)"
            raise Unavailable(
                Code.ALREADY_RUNNING,
                f"{named} runs a {self._who} on the database {path}; two on one would end each other's jobs: {remedy}",
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
    def __init__(self, url: str, who: str) -> None:
        self._engine = create_async_engine(url, poolclass=pool.NullPool, isolation_level="AUTOCOMMIT", hide_parameters=True)
        self._url, self._who = make_url(url), who
        self._connection: AsyncConnection | None = None

    async def acquire(self) -> None:
        """See InstanceLock."""
        try:
            async with asyncio.timeout(TAKEOVER_SECONDS + ANSWER_SECONDS):
                self._connection = await self._engine.connect()
                await self._try(asyncio.get_running_loop().time() + TAKEOVER_SECONDS)
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            await self.release()
            raise Unavailable(Code.DATABASE_UNAVAILABLE, f"database: {error or 'no answer'}") from error

    async def _try(self, until: float) -> None:
        while not await self._ask(f"SELECT pg_try_advisory_lock({ADVISORY_LOCK})"):
            if asyncio.get_running_loop().time() > until:
                await self.release()
                where = f"{self._url.database} on {self._url.host}"
                raise Unavailable(
                    Code.ALREADY_RUNNING,
                    f"another process runs a {self._who} on the database {where}; two on one would end each other's jobs: stop"
                    " that one first, or give this one a database of its own (pg_locks shows who holds the advisory lock)",
                    fault=Fault.CLIENT,
                )
            await asyncio.sleep(0.1)

    async def _ask(self, query: str) -> object:
        if self._connection is None:
            raise ConnectionError("the lock's connection is closed")
        return await self._connection.scalar(text(query))

    async def lost(self) -> None:
        """See InstanceLock."""
        with contextlib.suppress(SQLAlchemyError, OSError, TimeoutError):
            while True:
                await asyncio.sleep(CHECK_SECONDS)
                async with asyncio.timeout(ANSWER_SECONDS):
                    await self._ask("SELECT 1")

    async def release(self) -> None:
        """See InstanceLock."""
        connection, self._connection = self._connection, None
        with contextlib.suppress(SQLAlchemyError, OSError, TimeoutError):
            if connection is not None:
                async with asyncio.timeout(ANSWER_SECONDS):
                    await connection.close()
        await self._engine.dispose()
