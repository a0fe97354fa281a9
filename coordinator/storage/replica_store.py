"""The table of replicas in PostgreSQL, over a connection of its own: a beat never waits behind the writes of jobs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy import pool
from sqlalchemy.exc import SQLAlchemyError

from coordinator.storage.schema import replicas
from coordinator.storage.upserts import inserting
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.replicas import Replica
from tallystick.runtime.database_errors import describe_error
from tallystick.runtime.database_url import parse_database_url
from tallystick.runtime.postgres_backend import postgres_engine

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

ANSWER_SECONDS = 2.0
"""How long the database may take for a beat; another replica counts this one as gone after 3 s."""
FORGET_SECONDS = 3_600
"""Age of the last beat after which the row of a replica that was killed is deleted."""
_NOW = sa.func.extract("epoch", sa.func.clock_timestamp())


class SqlReplicaStore:
    """Implements ReplicaStore."""

    def __init__(self, url: str) -> None:
        self._url = parse_database_url(url, "db")
        self._engine = postgres_engine(self._url, poolclass=pool.NullPool, isolation_level="AUTOCOMMIT")
        self._connection: AsyncConnection | None = None
        self._busy = asyncio.Lock()

    async def beat(self, own: tuple[Replica, bool], gone_seconds: float) -> list[tuple[Replica, bool]]:
        """See ReplicaStore."""
        replica, ready = own
        row = {"url": replica.url, "beat_at": _NOW, "ready": ready}
        insert = inserting("postgresql", replicas).values(id=replica.id, **row)
        beat = insert.on_conflict_do_update(index_elements=("id",), set_=row)
        columns, age = replicas.c, _NOW - replicas.c.beat_at
        live = sa.select(columns.id, columns.url, columns.ready).where(age <= gone_seconds).order_by(columns.beat_at)
        async with self._connected() as connection:
            await connection.execute(beat)
            await connection.execute(sa.delete(replicas).where(age > FORGET_SECONDS))
            return [(Replica(number, url), ready) for number, url, ready in await connection.execute(live)]

    async def remove(self, replica: str) -> None:
        """See ReplicaStore."""
        async with self._connected() as connection:
            await connection.execute(sa.delete(replicas).where(replicas.c.id == replica))

    async def close(self) -> None:
        """Closes the connection."""
        await self._disconnect()
        await self._engine.dispose()

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[AsyncConnection]:
        """A connection for one caller at a time. After any error the next caller gets a new one."""
        async with self._busy:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    if self._connection is None:
                        self._connection = await self._engine.connect()
                        await self._connection.exec_driver_sql("SET synchronous_commit = off")
                    yield self._connection
            except Exception as error:  # drivers raise errors of many kinds
                await self._disconnect()
                why = "no answer in time" if isinstance(error, TimeoutError) else describe_error(error, self._url)
                raise Unavailable(Code.DATABASE_UNAVAILABLE, f"the table of replicas cannot be reached: {why}") from error
            except BaseException:
                await self._disconnect()
                raise

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        with contextlib.suppress(SQLAlchemyError, OSError, TimeoutError):
            if connection is not None:
                async with asyncio.timeout(ANSWER_SECONDS):
                    await connection.close()
