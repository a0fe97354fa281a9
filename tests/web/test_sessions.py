"""Sessions in memory: bounded for all and for one account, and nonces that are used once."""

from __future__ import annotations

import pytest

from tallystick.protocol.errors import Refusal, Unavailable
from tallystick.protocol.types import Address
from tallystick.web import sessions
from tallystick.web.sessions import (
    MAX_OF_ACCOUNT,
    NONCE_SECONDS,
    MemorySessions,
    Session,
    cookie_name,
    read_cookie,
    session_digest,
)

ALICE, BOB = Address("0x" + "01" * 20), Address("0x" + "02" * 20)


def session(number: int, account: Address = ALICE, at: float = 0.0) -> Session:
    """A session that lasts ten minutes."""
    return Session(session_digest(str(number)), f"nonce{number}", account, "http://localhost", at, at + 600)


async def test_the_oldest_of_an_account_ends() -> None:
    """A further session of an account ends its oldest one, and none of another account."""
    store = MemorySessions()
    await store.open(session(-1, BOB))
    for number in range(MAX_OF_ACCOUNT + 1):
        await store.open(session(number))
    assert await store.find(session(0).digest) is None
    assert await store.find(session(1).digest) == session(1)
    assert await store.find(session(-1).digest) == session(-1, BOB)


async def test_a_nonce_is_used_once() -> None:
    """Also once its session was closed, put out or over; it is forgotten when no message with it can be used."""
    store = MemorySessions()
    await store.open(session(1))
    await store.close(session(1).digest)
    with pytest.raises(Refusal, match="used before"):
        await store.open(session(1, at=NONCE_SECONDS))
    await store.open(session(1, at=NONCE_SECONDS + 1))


async def test_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server keeps so many sessions and no more: the oldest end, but no nonce is forgotten that could be used again."""
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 2)
    store = MemorySessions()
    await store.open(session(1, ALICE))
    await store.open(session(2, BOB))
    with pytest.raises(Unavailable, match="2 sessions were opened"):
        await store.open(session(3, Address("0x" + "03" * 20)))
    assert await store.find(session(1).digest) is not None
    await store.open(session(4, Address("0x" + "03" * 20), at=NONCE_SECONDS + 1))
    assert [await store.find(session(number).digest) is None for number in (1, 2, 4)] == [True, False, False]


@pytest.mark.parametrize(
    ("origin", "name"),
    [
        ("http://localhost:8420", "tally_wallet_8420"),
        ("http://[::1]:8421", "tally_wallet_8421"),
        ("http://localhost", "tally_wallet"),
        ("https://market.example", "__Host-tally_wallet"),
        ("https://market.example:444", "__Host-tally_wallet_444"),
    ],
)
def test_cookie_name(origin: str, name: str) -> None:
    """Daemons on ports of one host have cookies of their own."""
    assert cookie_name(origin) == name


@pytest.mark.parametrize(
    ("headers", "value"),
    [
        (["a=1; name=x"], "x"),
        (["a=1", "name=x"], "x"),
        (["name=x; name=y"], None),
        (["name=x", "name=x"], None),
        (["other=x"], None),
        ([], None),
        (["name=" + "x" * 5_000], None),
        (['name="x y"'], "x y"),
    ],
)
def test_read_cookie(headers: list[str], value: str | None) -> None:
    """A cookie counts if it is there once, in a header that is not too long."""
    assert read_cookie(headers, "name") == value
