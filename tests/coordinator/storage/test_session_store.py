"""Sessions in the database: one a nonce, however many replicas are asked at once, bounded, and over in time."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from coordinator.storage.session_store import SqlSessionStore, delete_over
from coordinator.storage.store import MIGRATIONS
from tallystick.protocol.errors import Refusal, TallyError, Unavailable
from tallystick.protocol.types import Address
from tallystick.runtime.storage import Database
from tallystick.web.sessions import MAX_OF_ACCOUNT, NONCE_SECONDS, Session, session_digest
from tests.postgres import POSTGRES, empty_database

ALICE, BOB = Address("0x" + "01" * 20), Address("0x" + "02" * 20)
NOW = 1_700_000_000.25


@pytest.fixture(params=["sqlite", "postgres"])
async def empty(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    """An empty database."""
    if request.param == "postgres" and not POSTGRES:
        if os.environ.get("TALLYSTICK_REQUIRE_SERVICES"):
            pytest.fail("needs PostgreSQL, which scripts/test starts")
        pytest.skip("needs PostgreSQL, which scripts/test starts")
    database = Database(f"sqlite:///{tmp_path}/sessions.db" if request.param == "sqlite" else await empty_database())
    await database.start(MIGRATIONS)
    yield database
    await database.close()


@pytest.fixture
def store(empty: Database) -> SqlSessionStore:
    """A store in an empty database."""
    return SqlSessionStore(empty)


def session(number: int, account: Address = ALICE, at: float = NOW) -> Session:
    """A session that lasts an hour."""
    return Session(session_digest(str(number)), f"nonce{number}", account, "https://market.example", at, at + 3_600)


async def test_what_is_stored(store: SqlSessionStore) -> None:
    """A session is found as it was opened, until it is closed."""
    await store.open(session(1))
    assert await store.find(session(1).digest) == session(1)
    assert await store.find(session(2).digest) is None
    await store.close(session(1).digest)
    assert await store.find(session(1).digest) is None


async def test_one_session_a_nonce(store: SqlSessionStore) -> None:
    """Of many that come at once with one nonce, one is opened; also after it was closed, none is."""

    async def opened(number: int) -> bool:
        again = Session(session_digest(f"value {number}"), "one nonce", ALICE, "https://market.example", NOW, NOW + 60)
        try:
            await store.open(again)
        except TallyError:
            return False
        return True

    assert sum(await asyncio.gather(*map(opened, range(8)))) == 1
    for number in range(8):
        await store.close(session_digest(f"value {number}"))
    with pytest.raises(Refusal, match="used before"):
        await store.open(Session(session_digest("x"), "one nonce", ALICE, "o", NOW + NONCE_SECONDS, NOW + 9_000))
    assert await opened(9) is False


async def test_bounds(store: SqlSessionStore) -> None:
    """A further session of an account ends its oldest, and none of another account."""
    await store.open(session(-1, BOB, NOW - 100))
    for number in range(MAX_OF_ACCOUNT + 1):
        await store.open(session(number, at=NOW + number))
    assert await store.find(session(0, at=NOW).digest) is None
    assert await store.find(session(1).digest) is not None
    assert await store.find(session(-1).digest) is not None
    await store.open(session(99, Address("0x" + "03" * 20), NOW + 4_000))
    assert await store.find(session(1).digest) is None, "over, so deleted"


def account(number: int) -> Address:
    """An account of its own for each number."""
    return Address(f"0x{number + 16:040x}")


async def test_a_full_store(empty: Database) -> None:
    """Whoever fills the store keeps nobody out for long: the oldest sessions end, but no nonce of a live message."""
    store = SqlSessionStore(empty, max_rows=5)
    for number in range(5):
        await store.open(session(number, account(number), NOW + number))
    for _ in range(2):
        with pytest.raises(Unavailable, match="5 sessions were opened in the last"):
            await store.open(session(5, account(5), NOW + NONCE_SECONDS))
    await store.open(session(5, account(5), NOW + NONCE_SECONDS + 1))
    assert [(await store.find(session(number).digest)) is not None for number in range(6)] == [False, *[True] * 5]
    later = NOW + NONCE_SECONDS * 3
    for number in range(6, 30):
        await store.open(session(number, account(number), later + number * (NONCE_SECONDS + 1)))
    assert len([number for number in range(30) if await store.find(session(number).digest) is not None]) <= 5
    assert await store.find(session(29).digest) is not None


async def test_another_process_fills_it(empty: Database) -> None:
    """Rows of other replicas count too, once a process has opened as many as it had room for."""
    mine, other = SqlSessionStore(empty, max_rows=6), SqlSessionStore(empty, max_rows=6)
    await mine.open(session(0, account(0)))
    for number in range(1, 6):
        await other.open(session(number, account(number)))
    with pytest.raises(Unavailable):
        await other.open(session(6, account(6)))
    for number in range(7, 12):
        await mine.open(session(number, account(number)))
    with pytest.raises(Unavailable):
        await mine.open(session(12, account(12)))


async def test_what_is_scanned(tmp_path: Path) -> None:
    """An open store does not read all its rows to find those that are over: an index leads there."""
    database = Database(f"sqlite:///{tmp_path}/sessions.db")
    await database.start(MIGRATIONS)
    statement = str(delete_over(NOW).compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True}))
    plan = await database.read(lambda connection: connection.execute(sa.text(f"EXPLAIN QUERY PLAN {statement}")).all())
    await database.close()
    assert "wallet_sessions_by_end" in str(plan), plan
