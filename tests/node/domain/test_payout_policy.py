from __future__ import annotations

import pytest

from node.domain.payout_policy import PayoutPolicy
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import Amount

COIN = 10**18
POLICY = PayoutPolicy(min_amount=Amount(1_000), coin_price=Amount(2_000_000), max_gas_percent=5)


@pytest.mark.parametrize(
    ("credit", "cost", "reason"),
    [
        (999, 0, "0.000999 of 0.001 dollars are credited"),
        (1_000, 0, ""),
        (1_000, 50, ""),
        (1_000, 51, "gas would cost 0.000051 dollars, more than 5 % of 0.001"),
        (1_019, 51, "gas would cost 0.000051 dollars, more than 5 % of 0.001019"),
        (1_020, 51, ""),
    ],
)
def test_what_keeps_a_payout_back(credit: int, cost: int, reason: str) -> None:
    """A payout needs the credit that the provider set, and gas must not cost more than its share of it."""
    assert POLICY.objection(credit, cost * COIN // 2_000_000) == reason


def test_gas_is_rounded_up() -> None:
    """The part of a base unit counts as a whole one; without a price of coins, gas costs nothing."""
    assert [POLICY.gas_cost(wei) for wei in (0, 1, COIN // 2_000_000, COIN // 2_000_000 + 1)] == [0, 1, 1, 2]
    assert PayoutPolicy(min_amount=Amount(1)).gas_cost(COIN) == 0
    assert PayoutPolicy().objection(10**9, 0) == "not automatic"


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"min_amount": Amount(0)}, "min_amount"),
        ({"max_gas_percent": 0}, "max_gas_percent"),
        ({"max_gas_percent": 101}, "max_gas_percent"),
        ({"check_interval": 0.0}, "check_interval"),
    ],
)
def test_impossible_settings_are_refused(setting: dict[str, object], name: str) -> None:
    """The error names the setting."""
    with pytest.raises(BadMessage, match=f"payout.{name}"):
        PayoutPolicy(**setting)  # type: ignore[arg-type]  # of each type


@pytest.mark.parametrize("percent", [1, 100])
def test_possible_limits_are_accepted(percent: int) -> None:
    """From one percent to the whole payout."""
    assert PayoutPolicy(max_gas_percent=percent, min_amount=Amount(1)).max_gas_percent == percent
