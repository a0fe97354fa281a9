"""Sessions in the database: one a nonce, however many replicas are asked at once, bounded, and over in time."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coordinator.storage import session_store
from coordinator.storage.session_store import SqlSessionStore
from coordinator.storage.store import MIGRATIONS
from tallystick.protocol.errors import Refusal, TallyError, Unavailable
from tallystick.protocol.types import Address
from tallystick.runtime.storage import Database
from tallystick.web.sessions import MAX_OF_ACCOUNT, NONCE_SECONDS, Session, session_digest
from tests.postgres import POSTGRES, empty_database

ALICE, BOB = Address("0x" + "01" * 20), Address("0x" + "02" * 20)
NOW = 1_700_000_000.25


@pytest.fixture(params=["sqlite", "postgres"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SqlSessionStore]:
    """An empty database."""
    if request.param == "postgres" and not POSTGRES:
        if os.environ.get("TALLYSTICK_REQUIRE_SERVICES"):
            pytest.fail("needs PostgreSQL, which scripts/test starts")
        pytest.skip("needs PostgreSQL, which scripts/test starts")
    database = Database(f"sqlite:///{tmp_path}/sessions.db" if request.param == "sqlite" else await empty_database())
    await database.start(MIGRATIONS)
    yield SqlSessionStore(database)
    await database.close()


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


async def test_bounds(store: SqlSessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A further session of an account ends its oldest; the whole number is bounded; what is over makes room."""
    await store.open(session(-1, BOB, NOW - 100))
    for number in range(MAX_OF_ACCOUNT + 1):
        await store.open(session(number, at=NOW + number))
    assert await store.find(session(0, at=NOW).digest) is None
    assert await store.find(session(1).digest) is not None
    assert await store.find(session(-1).digest) is not None
    monkeypatch.setattr(session_store, "MAX_SESSION_ROWS", MAX_OF_ACCOUNT + 2)
    with pytest.raises(Unavailable, match="sessions are open"):
        await store.open(session(99, Address("0x" + "03" * 20), NOW + 100))
    await store.open(session(99, Address("0x" + "03" * 20), NOW + 4_000))
    assert await store.find(session(1).digest) is None
