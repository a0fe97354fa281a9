"""Durable storage with group commit: many writers, one transaction, one sync.

`Database.write(fn)` runs `fn(connection)` and returns once its effects are synced to disk. Writes that arrive while a
transaction is being synced wait for the next one and share it: a synced transaction costs milliseconds, a row in it
microseconds. If one of a group fails, the group is rolled back and each runs alone, so that only the bad one fails.

`fn` is synchronous SQLAlchemy code in both cases: SQLite runs it in one writer thread, PostgreSQL through asyncpg with
`run_sync`. It must have no effects but the connection's, since it may run twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import structlog
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, create_engine, event, make_url, pool
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import create_async_engine

from tallystick.protocol.errors import Code, Unavailable

R = TypeVar("R")
Work = Callable[[Connection], R]
GROUP = 256
QUEUE = 4_096
log = structlog.get_logger()


class _Backend(Protocol):
    """Runs work in one transaction."""

    async def run(self, work: Work[R], *, write: bool) -> R: ...
    async def close(self) -> None: ...


class _Sqlite:
    """One thread that writes, another that reads; write-ahead log, fully synced."""

    def __init__(self, url: str) -> None:
        path = make_url(url).database
        if path and path != ":memory:":
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._engine = create_engine(url, poolclass=pool.SingletonThreadPool)
        event.listen(self._engine, "connect", _pragmas)
        self._writer = ThreadPoolExecutor(1, "sqlite-writer")
        in_memory = not path or path == ":memory:"
        self._reader = self._writer if in_memory else ThreadPoolExecutor(1, "sqlite-reader")

    async def run(self, work: Work[R], *, write: bool) -> R:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._writer if write else self._reader, self._transact, work)

    def _transact(self, work: Work[R]) -> R:
        with self._engine.begin() as connection:
            return work(connection)

    async def close(self) -> None:
        await asyncio.to_thread(self._writer.shutdown)
        await asyncio.to_thread(self._reader.shutdown)
        self._engine.dispose()


def _pragmas(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


class _Postgres:
    def __init__(self, url: str) -> None:
        self._engine = create_async_engine(url, pool_size=4, pool_pre_ping=True)

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

    async def start(self, migrations: Path) -> None:
        """Migrates to the head of `migrations`/versions and starts the writer. Raises Unavailable without a database."""
        try:
            await self._backend.run(lambda c: _migrate(c, migrations), write=True)
        except (OperationalError, OSError) as error:
            raise Unavailable(Code.COORDINATOR_UNAVAILABLE, f"database: {error}") from error
        self._task = asyncio.create_task(self._commit_groups(), name="group-commit")

    async def write(self, work: Work[R]) -> R:
        """Runs `work` and returns its result once it is durable. Raises what `work` raised, with nothing written."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        await self._queue.put((work, future))
        return await future

    def note(self, work: Work[Any]) -> None:
        """Queues `work` and returns: it is durable before any later write is. Raises Unavailable if the queue is full."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        future.add_done_callback(_log_lost)
        try:
            self._queue.put_nowait((work, future))
        except asyncio.QueueFull:
            future.cancel()
            raise Unavailable(Code.COORDINATOR_UNAVAILABLE, "the database is too far behind") from None

    async def read(self, work: Work[R]) -> R:
        """Runs `work`, which only reads."""
        return await self._backend.run(work, write=False)

    async def close(self) -> None:
        """Writes what is queued, then lets go of the database."""
        if self._task is not None:
            await self._queue.put(None)
            await self._task
            self._task = None
        await self._backend.close()

    async def _commit_groups(self) -> None:
        while (first := await self._queue.get()) is not None:
            group, closing = [first], False
            while len(group) < GROUP and not self._queue.empty():
                entry = self._queue.get_nowait()
                if entry is None:
                    closing = True
                    break
                group.append(entry)
            await self._commit(group)
            if closing:
                return

    async def _commit(self, group: list[tuple[Work[Any], asyncio.Future[Any]]]) -> None:
        try:
            results = await self._backend.run(lambda c: [work(c) for work, _ in group], write=True)
        except Exception as error:  # noqa: BLE001 - whatever one writer raised is that writer's, found by running it alone
            if len(group) > 1:
                for entry in group:
                    await self._commit([entry])
                return
            _settle(group[0][1], error=_translate(error))
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


def _translate(error: Exception) -> Exception:
    if isinstance(error, OperationalError) or (isinstance(error, DBAPIError) and error.connection_invalidated):
        log.error("database write failed", error=str(error))
        return Unavailable(Code.COORDINATOR_UNAVAILABLE, f"the database did not take the write: {error.orig}")
    return error


def _migrate(connection: Connection, migrations: Path) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "alembic"))
    config.set_main_option("version_locations", str(migrations / "versions"))
    config.set_main_option("path_separator", "newline")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
