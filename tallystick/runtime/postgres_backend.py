"""The PostgreSQL side of storage.py: an engine over asyncpg, whose transactions run in the event loop."""

from __future__ import annotations

import functools
import ssl
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import structlog
from sqlalchemy import URL, Connection, event
from sqlalchemy.exc import DBAPIError, EmulatedDBAPIException, InvalidatePoolError

from tallystick.runtime.database_url import postgres_dsn, trusts_system_roots
from tallystick.runtime.group_commit import LoopCommit, R, Work, run_work

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import ConnectionPoolEntry

SILENT_SECONDS = 3
"""How long a connection may wait for a machine that is gone."""
IDLE_SECONDS = 5
"""How long a transaction may wait for a process that hangs: others may wait for its locks."""
KEEPALIVE = {
    "tcp_keepalives_idle": "1",
    "tcp_keepalives_interval": "1",
    "tcp_keepalives_count": f"{SILENT_SECONDS}",
}
"""Settings of PostgreSQL with which it notices that a machine is gone."""
_SETTINGS = KEEPALIVE | {"idle_in_transaction_session_timeout": f"{IDLE_SECONDS}s"}
_PATIENT = "SET LOCAL idle_in_transaction_session_timeout = 0"
_SET = "SELECT set_config(name, $2, false) FROM pg_settings WHERE name = $1"
MAX_CONNECTIONS = 4
"""Of one database of a process to the server; whoever needs one more waits. The operator's manual counts them."""
_ATTEMPTS = 5
"""Of a transaction that PostgreSQL undid because of another process's."""
_PING_AFTER = 1.0
"""Seconds for which nobody used a connection to PostgreSQL, after which the server is asked whether it is still there."""
_CONFLICTS = frozenset({"40001", "40P01"})
"""SQLSTATEs of a serialization failure and a deadlock."""
log = structlog.get_logger()


def postgres_engine(url: URL, settings: Mapping[str, str] = MappingProxyType({}), **options: Any) -> AsyncEngine:
    """An engine for PostgreSQL. asyncpg reads the address itself, because it knows libpq's parameters, such as sslmode.

    `settings`: of each connection; those that the server does not know are left out.
    """
    from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415 - slow to import, and SQLite's users do not need it

    dsn, seconds = postgres_dsn(url)
    tls = {"ssl": ssl.create_default_context()} if trusts_system_roots(url) else {}

    async def connect() -> Any:
        import asyncpg  # noqa: PLC0415 - slow to import, and SQLite's users do not need it

        connection = await asyncpg.connect(dsn, timeout=seconds, **tls)
        try:
            for name, value in settings.items():  # not with the connection: poolers refuse what they do not know
                await connection.fetchval(_SET, name, value, timeout=seconds)
        except BaseException:
            connection.terminate()
            raise
        return connection

    return create_async_engine("postgresql+asyncpg://", async_creator=connect, hide_parameters=True, **options)


def _check_at_checkout(engine: AsyncEngine) -> None:
    """Replaces connections of the pool that have ended. A question to the server, which costs a write as much as a statement, is
    asked only of those that nobody has used for a while: asyncpg learns from the socket that a server has gone.
    """

    def returned(_connection: Any, record: ConnectionPoolEntry) -> None:
        record.info["returned"] = time.monotonic()

    def taken(connection: Any, record: ConnectionPoolEntry, _proxy: Any) -> None:
        if connection.driver_connection.is_closed():
            raise InvalidatePoolError
        now = time.monotonic()
        if now - record.info.get("returned", now) > _PING_AFTER:
            try:
                connection.ping()
            except (EmulatedDBAPIException, OSError) as error:
                raise InvalidatePoolError from error

    event.listen(engine.sync_engine, "checkin", returned)
    event.listen(engine.sync_engine, "checkout", taken)


class PostgresBackend:
    """PostgreSQL syncs each write. If it did not, it would forget those of the last half second when its server is killed, and
    the daemon, which lives on and has acknowledged them, would never know.
    """

    def __init__(self, url: URL, translate: Callable[[Exception], Exception]) -> None:
        self._engine = postgres_engine(url, _SETTINGS, pool_size=MAX_CONNECTIONS, max_overflow=0)
        _check_at_checkout(self._engine)
        self.commits = LoopCommit(self._write, translate)

    async def prepare(self) -> None:
        """Connects. Raises what the driver raises."""
        async with self._engine.connect():
            pass

    async def migrate(self, work: Work[None]) -> None:
        """Runs `work` in a synced transaction, which may take its time between statements."""

        def patiently(connection: Connection) -> None:
            connection.exec_driver_sql(_PATIENT)
            work(connection)

        await self._write(patiently, synced=True)

    async def read(self, work: Work[R]) -> R:
        """Runs `work` in a transaction of its own."""
        async with self._engine.begin() as connection:
            return await connection.run_sync(functools.partial(run_work, work))

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
            await connection.run_sync(functools.partial(run_work, work))

    async def close(self) -> None:
        """Closes the connections."""
        await self._engine.dispose()
