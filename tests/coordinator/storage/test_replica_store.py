"""The table of replicas in a real PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from coordinator.storage.replica_store import FORGET_SECONDS, SqlReplicaStore
from coordinator.storage.schema import replicas
from coordinator.storage.store import Store
from tallystick.protocol.errors import Unavailable
from tallystick.protocol.replicas import Replica
from tests.postgres import POSTGRES, empty_database

pytestmark = pytest.mark.skipif(not POSTGRES, reason="needs PostgreSQL, which scripts/test starts")
ANN, BOB = (Replica("ann", "http://ann"), True), (Replica("bob", "http://bob"), False)


@pytest.fixture
async def url() -> str:
    """A database with the coordinator's tables."""
    address = await empty_database()
    store = Store(address)
    await store.start()
    await store.close()
    return address


@asynccontextmanager
async def _open(url: str) -> AsyncIterator[SqlReplicaStore]:
    store = SqlReplicaStore(url)
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def _engine(url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    try:
        yield engine
    finally:
        await engine.dispose()


async def _age(url: str, seconds: float) -> None:
    async with _engine(url) as engine, engine.connect() as connection:
        await connection.execute(sa.update(replicas).values(beat_at=replicas.c.beat_at - seconds))


async def test_beats_by_the_databases_clock(url: str) -> None:
    """A beat inserts or renews a row; the latest beat comes last; a row that is too old is not returned."""
    async with _open(url) as ann, _open(url) as bob:
        assert await ann.beat(ANN, 1_000) == [ANN]
        assert await bob.beat(BOB, 1_000) == [ANN, BOB]
        assert await ann.beat(ANN, 1_000) == [BOB, ANN]
        await _age(url, 2_000)
        assert await ann.beat(ANN, 1_000) == [ANN]
        await ann.remove("bob")
        await ann.remove("ann")
        assert await bob.beat(BOB, 9_999) == [BOB]


async def test_rows_of_replicas_that_were_killed_are_deleted(url: str) -> None:
    """The table does not grow with every restart."""
    async with _open(url) as ann, _open(url) as bob, _engine(url) as engine:
        await ann.beat(ANN, 1)
        await _age(url, FORGET_SECONDS + 1)
        await bob.beat(BOB, 1)
        async with engine.connect() as connection:
            assert list((await connection.execute(sa.select(replicas.c.id))).scalars()) == ["bob"]


async def test_a_lost_connection_costs_one_beat(url: str) -> None:
    """The beat fails with Unavailable, whose text has no password, and the next one connects again."""
    async with _open(url) as ann, _engine(url) as engine:
        await ann.beat(ANN, 60)
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        async with engine.connect() as connection:
            await connection.execute(sa.text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"))
        with pytest.raises(Unavailable, match="table of replicas cannot be reached"):
            await ann.beat(ANN, 60)
        assert await ann.beat(ANN, 60) == [ANN]


async def test_a_database_that_is_not_there() -> None:
    """Each beat raises Unavailable; a cancelled one leaves the store usable."""
    async with _open("postgresql+asyncpg://nobody:s3cret@127.0.0.1:1/nothing") as store:
        for _ in range(2):
            with pytest.raises(Unavailable) as caught:
                await store.beat(ANN, 60)
            assert "s3cret" not in str(caught.value)


async def test_concurrent_calls_take_turns(url: str) -> None:
    """A beat and a removal at the same time both happen."""
    async with _open(url) as ann:
        await asyncio.gather(*(ann.beat(ANN, 60) for _ in range(5)), ann.remove("other"))
        assert await ann.beat(ANN, 60) == [ANN]


async def test_the_reason_of_the_server_is_told() -> None:
    """Of a server that refuses connections, or has no more of them, the operator reads that, and no password."""
    store = SqlReplicaStore("postgresql://tally:s3cret@127.0.0.1:9/market")
    with pytest.raises(Unavailable, match=r"Connect call failed|Connection refused") as caught:
        await store.beat(ANN, 60)
    assert "s3cret" not in str(caught.value)
    await store.close()
