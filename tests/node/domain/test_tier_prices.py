"""Prices per access tier: the further offers of a model, and what a config may not say."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from node.domain.tier_prices import TierPrices
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.payer_rules import MAX_RULE_WALLETS, PayerRule, payer_rule
from tallystick.protocol.pricing import Prices
from tallystick.protocol.tiers import Tier, Tiers
from tallystick.protocol.types import Address, Amount
from tests.node.harness import OFFER, PAYER

WHEN = datetime(2026, 1, 5, tzinfo=UTC)
NEW = Tier(name="new")
KNOWN = Tier(name="known", settled_at_least=Amount(10), discount="10%")
FRIENDS = Tier(name="friends", wallets=(PAYER.address,))
PARTNERS = Tier(name="partners", settled_at_least=Amount(99), models=("model", "other"), discount="50%")


def test_an_offer_for_each_discount() -> None:
    """It is for the tier and those above it, rounded up; a tier without a discount, or without the model, has none of its own."""
    prices = TierPrices(Tiers((NEW, KNOWN, FRIENDS, PARTNERS)))
    first, second = prices.offers(OFFER, WHEN, 0.0)
    assert (first.prices, second.prices) == (Prices(90_000, 45_000, 360_000), Prices(50_000, 25_000, 200_000))
    assert payer_rule(first.spec.features) == PayerRule(frozenset({PAYER.address}), Amount(10))
    assert payer_rule(second.spec.features) == PayerRule(frozenset(), Amount(99))
    assert first.model == second.model == OFFER.model
    narrow = Tier(name="narrow", settled_at_least=Amount(10), models=("another",), discount="10%")
    for tiers in ((), (NEW,), (NEW, Tier(name="known", settled_at_least=Amount(10), discount="0%")), (NEW, narrow)):
        assert TierPrices(Tiers(tiers)).offers(OFFER, WHEN, 0.0) == ()


@pytest.mark.parametrize(
    ("tiers", "says"),
    [
        ((Tier(name="new", discount="10%"),), "tiers: new: discount: expected none"),
        ((NEW, Tier(name="known", settled_at_least=Amount(1), discount="half")), 'tiers: known: discount: expected "1%"'),
        (
            (NEW, Tier(name="many", wallets=tuple(Address(f"0x{n:040x}") for n in range(MAX_RULE_WALLETS + 1)), discount="1%")),
            "tiers: many: discount: .* at most 32, got 33",
        ),
    ],
)
def test_discounts_that_no_ask_can_say(tiers: tuple[Tier, ...], says: str) -> None:
    """The error names the tier."""
    with pytest.raises(BadMessage, match=says):
        TierPrices(Tiers(tiers))
