"""What `tally node collect` says about the credit that it brought."""

from __future__ import annotations

import pytest

from node.domain.payout_policy import PayoutPolicy
from tallystick.cli.node.collect import credit_advice
from tallystick.protocol.types import Amount


@pytest.mark.parametrize(
    ("payout", "wallet", "advice"),
    [
        (PayoutPolicy(), "node", "next: tally cash-out --wallet node"),
        (PayoutPolicy(), "my keys/node.json", "next: tally cash-out --wallet 'my keys/node.json'"),
        (PayoutPolicy(min_amount=Amount(1)), "node", "the node pays it out by itself"),
    ],
)
def test_credit_advice(payout: PayoutPolicy, wallet: str, advice: str) -> None:
    """The command names the wallet that was collected for: without it, cash-out pays another account's credit."""
    assert credit_advice(payout, wallet) == advice
