"""Asks for some payers alone: whom a rule admits, and how an ask says it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.criteria import Demand, Facts, Reason, audience
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.link import MAX_FEATURE_CHARACTERS, MAX_FEATURES, Capacity, Listing
from tallystick.protocol.messages import Spec
from tallystick.protocol.payer_rules import MAX_RULE_WALLETS, STRANGER, Payer, PayerRule, is_for, payer_rule, rule_features
from tallystick.protocol.types import Amount
from tests.coordinator.harness import MODEL, START, make_ask, person
from tests.protocol.strategies import addresses

ANN, PAYER, OTHER = (person(name).address for name in ("ann", "payer", "other"))
KNOWN = PayerRule(frozenset({OTHER}), Amount(10_000_000))
SIGNED = make_ask(person("ann"), spec=Spec(features=("tools", *KNOWN.to_features())))
ASK = SIGNED.message


@given(st.frozensets(addresses, max_size=MAX_RULE_WALLETS), st.none() | st.integers(1, 1 << 96).map(Amount))
def test_features_say_the_rule(wallets: frozenset[str], settled: Amount | None) -> None:
    """The features of a rule are read as the same rule, in any case and order, and fit into an ask beside others."""
    rule = PayerRule(wallets, settled)  # type: ignore[arg-type]  # the strategy's addresses are typed as text
    features = rule.to_features()
    wanted = rule if wallets or settled is not None else None
    assert payer_rule(("tools", *features)) == payer_rule(tuple(name.upper() for name in reversed(features))) == wanted
    assert len(features) <= MAX_FEATURES // 2 + 1
    assert all(len(feature) <= MAX_FEATURE_CHARACTERS for feature in features)


def test_whom_an_ask_is_for() -> None:
    """A listed wallet, or one that settled the very amount with this provider; what others got of it does not count."""
    for payer, admitted in (
        (Payer(OTHER, {}), True),
        (Payer(PAYER, {}), False),
        (Payer(PAYER, {ANN: Amount(10_000_000)}), True),
        (Payer(PAYER, {ANN: Amount(9_999_999), OTHER: Amount(1 << 90)}), False),
        (STRANGER, False),
    ):
        assert is_for(ASK, payer) is admitted
        assert is_for(make_ask(person("ann")).message, payer)
        reason = None if admitted else Reason.PAYER
        assert Demand(MODEL, payer=payer).objection(ASK, Facts(START)) is reason
        assert Demand(MODEL, payer=payer).offer_objection(ASK, Facts(START)) is reason
    assert Demand(MODEL).objection(ASK, Facts(START)) is None


@pytest.mark.parametrize("feature", [f"for_settled:{text}" for text in ("", "-1", "1.5", "٣", "9" * 31)])
def test_a_rule_that_cannot_be_read_is_for_nobody(feature: str) -> None:
    """A newer provider's rule never becomes everybody's price."""
    rule = payer_rule((feature,))
    assert rule is not None
    assert not rule.admits(PAYER, Amount(1 << 200))
    assert rule.words == "nobody"


def test_a_refusal_says_what_is_missing() -> None:
    """It names whom the price is for, and what is left to settle."""
    KNOWN.check(PAYER, Amount(10_000_000))
    with pytest.raises(Refusal, match=r"settled 10 dollars with this provider, and 1 listed wallet; 2\.5 dollars") as caught:
        KNOWN.check(PAYER, Amount(7_500_000))
    assert caught.value.code is Code.TIER_LIMIT
    with pytest.raises(Refusal, match="this price is for 2 listed wallets"):
        PayerRule(frozenset({ANN, OTHER})).check(PAYER, Amount(1))


def test_whom_a_price_is_for_in_words() -> None:
    """Batch jobs and payers are named; a price for everybody is not."""
    assert audience(make_ask(person("ann")).message) == ""
    assert audience(ASK) == KNOWN.words
    both = replace(ASK, spec=Spec(features=("batch_only", "for_settled:1")))
    assert audience(both) == "batch jobs of payers that settled 0.000001 dollars with this provider"
    assert rule_features(both.spec.features) == ["for_settled:1"]


def test_a_listing_for_everybody() -> None:
    """A coordinator that does not know such rules gets the other asks, and the capacity of their slot groups alone."""
    plain = make_ask(person("ann"), seq=9)
    listing = Listing((SIGNED, plain), (0, 1), {0: Capacity(1, 1), 1: Capacity(2, 2)})
    assert listing.for_everybody() == Listing((plain,), (1,), {1: Capacity(2, 2)})
    assert Listing.from_json(listing.for_everybody().to_json()).groups == (1,)
