"""Access tiers: which tier a wallet has, what lifts it, and what a config may not say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.tiers import MAX_MODELS, MAX_TIERS, MAX_WALLETS, Tier, Tiers
from tallystick.protocol.types import Address, Amount

DOLLAR = 1_000_000
VIP, SYBIL = Address("0x" + "01" * 20), Address("0x" + "02" * 20)
NEW = Tier(name="new", models=("small",), jobs_in_flight=2)
KNOWN = Tier(name="known", settled_at_least=Amount(10 * DOLLAR), models=("small", "large"))
PARTNER = Tier(name="partner", wallets=(VIP,), settled_at_least=Amount(100 * DOLLAR))
TIERS = Tiers((NEW, KNOWN, PARTNER))


@pytest.mark.parametrize(
    ("wallet", "settled", "tier"),
    [
        (SYBIL, 0, NEW),
        (SYBIL, 10 * DOLLAR - 1, NEW),
        (SYBIL, 10 * DOLLAR, KNOWN),
        (SYBIL, 100 * DOLLAR - 1, KNOWN),
        (SYBIL, 100 * DOLLAR, PARTNER),
        (VIP, 0, PARTNER),
    ],
)
def test_the_last_tier_that_is_met(wallet: Address, settled: int, tier: Tier) -> None:
    """A wallet nobody knows has the lowest tier; its own name or what it settled lifts it, at the very amount."""
    assert TIERS.of(wallet, Amount(settled)) is tier


@given(st.integers(0, 1 << 96), st.integers(0, 1 << 96))
def test_settling_never_lowers(less: int, more: int) -> None:
    """Who has settled more has the same tier or a higher one."""
    less, more = sorted((less, more))
    places = [TIERS.tiers.index(tier) for amount in (less, more) if (tier := TIERS.of(SYBIL, Amount(amount)))]
    assert places == sorted(places)


def test_without_tiers() -> None:
    """Then nobody has one, and nothing that was settled needs to be known."""
    assert (Tiers(()).of(VIP, Amount(0)), bool(Tiers(())), Tiers(()).count_settled) == (None, False, False)
    assert (bool(TIERS), TIERS.count_settled, Tiers((NEW,)).count_settled) == (True, True, False)


def test_models() -> None:
    """A tier sells the models that it lists, by their whole names, or all."""
    TIERS.check_model(NEW, Amount(0), "small")
    TIERS.check_model(PARTNER, Amount(0), "anything")
    for model in ("large", "smal", "small/x", "SMALL"):
        with pytest.raises(Refusal) as refused:
            TIERS.check_model(NEW, Amount(0), model)
        assert refused.value.code is Code.TIER_LIMIT


def test_what_lifts() -> None:
    """The next tier that would help is named, with the dollars that are missing; or the operator; or nothing."""
    assert TIERS.lifts(NEW, Amount(DOLLAR)) == "tier 'known' needs 10 dollars settled on chain, 9 more than now"
    assert TIERS.lifts(NEW, Amount(DOLLAR), "huge") == "tier 'partner' needs 100 dollars settled on chain, 99 more than now"
    assert TIERS.lifts(PARTNER, Amount(0)) == "no tier lifts this limit"
    listed = Tiers((NEW, Tier(name="friends", wallets=(VIP,))))
    assert listed.lifts(NEW, Amount(0)) == "tier 'friends' is for wallets that its operator lists; ask the operator"
    assert listed.lifts(NEW, Amount(0), "small").startswith("tier 'friends'")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"name": ""}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"settled_at_least": Amount(0)}, "settled_at_least"),
        ({"models": ("",)}, "models"),
        ({"models": ("x" * 257,)}, "models"),
        ({"models": ("x",) * (MAX_MODELS + 1)}, "models"),
        ({"wallets": (VIP,) * (MAX_WALLETS + 1)}, "wallets"),
        ({"jobs_in_flight": -1}, "jobs_in_flight"),
        ({"jobs_per_minute": 0}, "jobs_per_minute"),
    ],
)
def test_a_tier_that_is_none(values: dict[str, Any], named: str) -> None:
    """The setting is named."""
    with pytest.raises(BadMessage, match=named):
        Tier(**({"name": "x"} | values))


def test_edges_of_a_tier() -> None:
    """The longest name, no job at all, and one job a minute are allowed."""
    assert Tier(name="x" * 64, jobs_in_flight=0, jobs_per_minute=1, models=("x" * 256,), settled_at_least=Amount(1))


@pytest.mark.parametrize(
    ("tiers", "named"),
    [
        ((PARTNER,), "first tier"),
        ((KNOWN, NEW), "first tier"),
        ((NEW, Tier(name="open")), "hides the tiers before it"),
        ((NEW, NEW), "same name twice"),
        ((NEW, PARTNER, KNOWN), "expected more than 100"),
        ((NEW, KNOWN, Tier(name="same", settled_at_least=Amount(10 * DOLLAR))), "expected more than 10"),
        (tuple(Tier(name=str(number)) for number in range(MAX_TIERS + 1)), f"at most {MAX_TIERS}"),
    ],
)
def test_lists_that_are_none(tiers: tuple[Tier, ...], named: str) -> None:
    """A list that leaves a wallet without a tier, or has one that nobody gets, is refused."""
    with pytest.raises(BadMessage, match=named):
        Tiers(tiers)
