"""Stale asks: no order uses an ask that its provider has replaced, even within the ask's validity."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tallystick.client.config import ClientConfig
from tallystick.client.ledger import ask_freshness
from tallystick.client.ledger.ask_freshness import MAX_REMEMBERED, find_stale
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.schema import asks as table
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Domain, Signer, Verified
from tallystick.protocol.errors import Unavailable
from tallystick.protocol.messages import Ask, Spec
from tests.client.fake_coordinator import FakeMarket
from tests.client.parties import ALICE, BOB, DOMAIN, MODEL, PAYER, Provider, take

NOW = 1_700_000_000


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    """An empty ledger."""
    ledger = await Ledger.open(tmp_path / "state.db", PAYER.address)
    yield ledger
    await ledger.close()


def signed(provider: Provider = ALICE, domain: Domain = DOMAIN, **changes: Any) -> Verified[Ask]:
    """An ask of a provider."""
    return provider.signer.sign(replace(provider.ask.message, **changes), domain)


async def refused(ledger: Ledger, *asks: Verified[Ask], domain: Domain = DOMAIN, now: int = NOW) -> list[bool]:
    """Returns the stale asks among these, in this order."""
    reasons = await ledger.stale_asks(domain, asks, now)
    return [ask.digest in reasons for ask in asks]


def test_a_price_for_some_payers_makes_no_other_ask_stale() -> None:
    """A provider's ask for everybody may be dearer and older than its ask for some, which is a product of its own."""
    full = signed(seq=1)
    cheap = signed(seq=2, input_price=1, spec=replace(full.message.spec, features=("for_settled:5",)))
    other = signed(seq=3, input_price=2, spec=replace(full.message.spec, features=("for_settled:7",)))
    assert find_stale([full, cheap, other], {})[0] == {}
    older = signed(seq=1, input_price=9, spec=replace(full.message.spec, features=("FOR_SETTLED:5",)))
    assert list(find_stale([cheap, older], {})[0]) == [older.digest]


@pytest.mark.parametrize(
    "changes",
    [
        {"input_price": 100_001},
        {"cached_input_price": 50_001},
        {"output_price": 400_001},
        {"output_price": 400_001, "input_price": 1},
        {"sealing_key": b"\3" * 32},
        {"output_price": (1 << 64) - 1},
        {"input_price": 100_001, "spec": Spec(engine_version="0.1", revision="old")},
        {"input_price": 100_001, "context_tokens": 1, "valid_until": (1 << 64) - 1},
    ],
)
async def test_a_stale_ask_on_other_terms_is_never_ordered_on(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A stale ask with any lower price or an old sealing key is refused beside the newest ask, after it, and after a restart."""
    old, new = signed(**{"seq": 5} | changes), signed(seq=6)
    for shown in ((old, new), (new, old)):
        assert find_stale(shown, {})[0].keys() == {old.digest}
    for again in range(2):
        ledger = await Ledger.open(tmp_path / "state.db", PAYER.address)
        if not again:
            assert await refused(ledger, old) == [False], "nothing newer was seen yet"
            assert await refused(ledger, new) == [False]
        assert await refused(ledger, old) == [True]
        assert await refused(ledger, new) == [False]
        await ledger.close()


async def test_two_asks_with_one_seq_are_not_both_believed(ledger: Ledger) -> None:
    """Of two asks with one seq only the first is accepted, even if the second is cheaper; the next seq is accepted."""
    first, other = signed(seq=7), signed(seq=7, output_price=1)
    assert await refused(ledger, first, other) == [False, True]
    assert await refused(ledger, other) == [True]
    assert await refused(ledger, signed(seq=8, output_price=2), first) == [False, True]


async def test_asks_of_other_products_are_not_stale(ledger: Ledger) -> None:
    """Asks of other models, providers, deployments, precision classes, regions and tiers, for batch jobs alone, and of equal
    engines at one price, are not stale.
    """
    assert await refused(ledger, signed(seq=9)) == [False]
    dear: dict[str, Any] = {"seq": 1, "output_price": 900_000}
    specs = (Spec(precision="x"), Spec(kv_precision="x"), Spec(region="x"), Spec(tier="x"), Spec(features=("batch_only",)))
    others = (
        signed(model="other", **dear),
        signed(BOB, **dear),
        *(signed(spec=spec, **dear) for spec in specs),
        signed(seq=8),
        signed(seq=8, output_price=1),
    )
    assert await refused(ledger, *others) == [False] * len(others)
    elsewhere = Domain(1, DOMAIN.contract)
    assert await refused(ledger, signed(domain=elsewhere, **dear), domain=elsewhere) == [False]


async def test_made_up_providers_do_not_make_a_real_one_be_forgotten(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored asks are bounded; a flood of keys displaces only its own asks, not those of this wallet's providers."""
    monkeypatch.setattr(ask_freshness, "MAX_REMEMBERED", 8)
    await take(ledger, ALICE)
    assert await refused(ledger, signed(seq=9)) == [False]
    for number in range(20):
        stranger = Provider.make(f"stranger {number}")
        assert await refused(ledger, stranger.ask, now=NOW + number) == [False]
    count = await ledger._database.read(lambda c: len(c.execute(table.select()).all()))
    assert count == 8 < MAX_REMEMBERED
    assert await refused(ledger, signed(seq=1, output_price=900_000)) == [True]


async def test_a_seq_beyond_the_database_is_no_crash(ledger: Ledger) -> None:
    """An ask whose seq or price exceeds the database's 63 bits causes no crash."""
    top = (1 << 64) - 1
    assert await refused(ledger, signed(seq=top, input_price=top)) == [False]
    assert await refused(ledger, signed(seq=top - 1, output_price=top)) == [True]


async def test_a_coordinator_cannot_sell_a_replaced_price(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A stale ask is left out while other providers' newest asks are used; alone, it is no offer, also in the next process."""
    alice = fake.providers[0]
    new, old = signed(alice, seq=2), signed(alice, seq=1, output_price=4_000_000)
    fake.asks = lambda: [{"ask": new.to_json(), "free": 1}]
    async with Market(fake.url, wallet, config) as market:
        assert [ask.message.seq for ask in await market.shortlist(MODEL)] == [2]
        market._shortlists.forget()
        fake.asks = lambda: [{"ask": ask.to_json(), "free": 1} for ask in (old, fake.providers[1].ask)]
        assert [ask.message.provider for ask in await market.shortlist(MODEL)] == [fake.providers[1].address]
    async with Market(fake.url, wallet, config) as market:
        fake.asks = lambda: [{"ask": old.to_json(), "free": 1}]
        with pytest.raises(Unavailable, match="none of them usable"):
            await market.shortlist(MODEL)
        fake.asks = lambda: [{"ask": ask.to_json(), "free": 1} for ask in (old, new)]
        assert [ask.message.seq for ask in await market.shortlist(MODEL)] == [2], "the stale one does not hide the newest"
