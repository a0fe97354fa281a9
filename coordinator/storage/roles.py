"""Roles that one replica of a coordinator has at a time, such as the one that settles claims.

A role is an advisory lock of PostgreSQL, and all locks of a replica are held by one connection that serves nothing else. The
server frees them when the connection ends, also if the process was killed or stopped: it closes a connection that is idle, or
whose machine does not answer, after SILENT_SECONDS. A replica asks for the roles that it has not once in LOOK_SECONDS.

The same connection holds a lock on the replica's id, by which others see that it lives although it is on no list, since it stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import structlog
from sqlalchemy import URL, Connection, pool, text

from tallystick.runtime.database_errors import describe_error
from tallystick.runtime.database_url import parse_database_url
from tallystick.runtime.postgres_backend import KEEPALIVE, postgres_engine

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

log = structlog.get_logger()
LOOK_SECONDS = 1.0
ANSWER_SECONDS = 2.0
"""How long the server may take for an answer, before a replica counts its roles as lost."""
SILENT_SECONDS = 4
_LOCK_CLASS, LIFE_CLASS = 0x7A15, 0x7A18
"""The first numbers of the locks on roles, and of those on the ids of replicas."""
_SETTINGS = KEEPALIVE | {"idle_session_timeout": f"{SILENT_SECONDS}s"}  # since PostgreSQL 14
Work = Callable[[], Coroutine[Any, Any, None]]


class Roles(Protocol):
    """The roles of this process."""

    async def run(self, works: Mapping[str, Work]) -> None:
        """Runs the work of each role while this process has it, until cancelled. Raises the error of a work."""

    def held(self) -> frozenset[str]:
        """Returns the roles that this process has now."""
        ...


class AllRoles:
    """The roles of a lone coordinator, which has them all."""

    def __init__(self) -> None:
        self._works: dict[str, asyncio.Task[None]] = {}

    async def run(self, works: Mapping[str, Work]) -> None:
        """See Roles."""
        try:
            self._works = {role: asyncio.create_task(work(), name=role) for role, work in works.items()}
            await asyncio.gather(*self._works.values())
        finally:
            ended, self._works = self._works, {}
            await _cancel(ended.values())

    def held(self) -> frozenset[str]:
        """See Roles."""
        return frozenset(self._works)


class ReplicaRoles:
    """The roles of a replica; see the module's docstring. `sleep` waits for some seconds."""

    def __init__(self, url: str | URL, replica: str, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """`replica`: the id of this process. Raises BadMessage for an address that is not understood."""
        self._url = parse_database_url(url, "db") if isinstance(url, str) else url
        self._engine = postgres_engine(self._url, _SETTINGS, poolclass=pool.NullPool, isolation_level="AUTOCOMMIT")
        self._connection: AsyncConnection | None = None
        self._works: dict[str, asyncio.Task[None]] = {}
        self._replica, self._sleep = replica, sleep

    def held(self) -> frozenset[str]:
        """See Roles."""
        return frozenset(self._works)

    async def run(self, works: Mapping[str, Work]) -> None:
        """See Roles."""
        try:
            while True:
                try:
                    async with asyncio.timeout(ANSWER_SECONDS):
                        await self._look(works)
                except Exception as error:  # noqa: BLE001 - drivers raise errors of many kinds if they cannot connect
                    await self._lose(error)
                await self._wait()
        finally:
            await self._lose(None)
            await self._engine.dispose()

    async def _look(self, works: Mapping[str, Work]) -> None:
        """Asks for the roles that this process has not. The questions show that the connection is alive."""
        if self._connection is None:
            self._connection = await self._engine.connect()
            await self._connection.execute(_TRY, {"class": LIFE_CLASS, "key": lock_key(self._replica)})
        await self._connection.scalar(text("SELECT 1"))
        for role, work in works.items():
            if role not in self._works and await self._connection.scalar(_TRY, {"class": _LOCK_CLASS, "key": lock_key(role)}):
                self._works[role] = asyncio.create_task(work(), name=role)
                log.info("role taken", role=role)

    async def _wait(self) -> None:
        """Waits until the next look. Raises the error of a work that failed meanwhile."""
        sleeping = asyncio.ensure_future(self._sleep(LOOK_SECONDS))
        running = [task for task in self._works.values() if not task.done()]
        try:
            await asyncio.wait({sleeping, *running}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeping.cancel()
        for task in self._works.values():
            if task.done():
                task.result()

    async def _lose(self, error: Exception | None) -> None:
        """Ends all work, then the connection, so that nobody else begins before."""
        connection, self._connection = self._connection, None
        ended, self._works = self._works, {}
        await _cancel(ended.values())
        if error is not None:
            why = "no answer in time" if isinstance(error, TimeoutError) else describe_error(error, self._url)
            log.warning("roles lost: the database does not answer", roles=sorted(ended), error=why)
        if connection is not None:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(ANSWER_SECONDS):
                    await (connection.close() if error is None else connection.invalidate())


_TRY = text("SELECT pg_try_advisory_lock(:class, :key)")


def lock_key(name: str) -> int:
    """The second number of the lock on a role or a replica: the first 31 bits of the SHA-256 of its name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) >> 1


_HELD = (
    "SELECT objid::bigint FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 2 AND classid = $1::bigint::oid"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


def living(connection: Connection, replicas: Iterable[str]) -> set[str]:
    """Returns those of these replicas whose lock is held: their processes live."""
    keys = set(connection.exec_driver_sql(_HELD, (LIFE_CLASS,)).scalars())
    return {replica for replica in replicas if lock_key(replica) in keys}


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancels tasks and waits for their ends. Their errors are logged: nobody else would see them."""
    listed = list(tasks)
    for task in listed:
        task.cancel()
    for result in await asyncio.gather(*listed, return_exceptions=True):
        if isinstance(result, Exception):
            log.error("the work of a role failed", error=f"{type(result).__name__}: {result}")
