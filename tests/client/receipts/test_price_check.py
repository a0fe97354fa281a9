"""Checks of receipts against their orders: parties, price, tokens and answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tallystick.client.receipts.delivery_check import (
    OUTPUT_ALLOWANCE,
    Delivery,
)
from tallystick.client.receipts.price_check import check_against_order
from tallystick.protocol.errors import BadReceipt, Fault
from tallystick.protocol.messages import Outcome
from tallystick.protocol.pricing import TEMPLATE_ALLOWANCE, Usage
from tallystick.protocol.tab import MAX_SEQ
from tallystick.protocol.types import ZERO_HASH, Amount, Hash
from tests.client.parties import COORDINATOR, bill, place

SEEN = Delivery(request_bytes=200, response_bytes=50, commitment=ZERO_HASH, finished=True)


def test_honest_receipts_pass() -> None:
    """Honest receipts of every outcome are accepted."""
    placed = place()
    for outcome in Outcome:
        check_against_order(placed, bill(placed, outcome=outcome), replace(SEEN, cancelled=outcome is Outcome.CLIENT_CANCELLED))
    check_against_order(placed, bill(placed), None)


@pytest.mark.parametrize(
    ("changes", "delivered", "text"),
    [
        ({"cost": Amount(4), "cumulative_cost": Amount(4)}, SEEN, "receipt.cost"),
        ({"cost": Amount(2)}, None, "receipt.cost"),
        ({"cumulative_cost": Amount(2)}, SEEN, "cumulativeCost"),
        ({"outcome": 77}, SEEN, "outcome"),
        ({"outcome": Outcome.PROVIDER_ERROR}, SEEN, "receipt.cost"),
        ({"cached_input_tokens": 11}, SEEN, "cached"),
        ({"output_tokens": 101}, SEEN, "outputTokens"),
        ({"seq": 0}, SEEN, "seq"),
        ({"seq": MAX_SEQ + 1}, SEEN, "seq"),
        ({"result_commitment": Hash(b"\1" * 32)}, SEEN, "resultCommitment"),
        ({}, replace(SEEN, finished=False), "last chunk"),
    ],
)
def test_dishonest_receipts(changes: dict[str, Any], delivered: Delivery | None, text: str) -> None:
    """Each contradiction between a receipt and its order or answer is named as the provider's fault."""
    placed = place()
    with pytest.raises(BadReceipt, match=text) as caught:
        check_against_order(placed, replace(bill(placed), **changes), delivered)
    assert caught.value.fault is Fault.PROVIDER


@pytest.mark.parametrize("changes", [{"payer": COORDINATOR}, {"provider": COORDINATOR}, {"order_hash": ZERO_HASH}])
def test_misdirected_receipts(changes: dict[str, Any]) -> None:
    """A receipt of other parties or another order is the coordinator's fault, not evidence against the provider."""
    placed = place()
    with pytest.raises(BadReceipt) as caught:
        check_against_order(placed, bill(placed, **changes), SEEN)
    assert caught.value.fault is Fault.COORDINATOR


def test_usage_bounds() -> None:
    """Tokens can't exceed bytes plus the stated allowances; requests with images are not bounded by bytes."""
    placed = place(output=8_000, body=50_000)
    most_in, most_out = 200 + TEMPLATE_ALLOWANCE, 50 + OUTPUT_ALLOWANCE
    check_against_order(placed, bill(placed, Usage(most_in, 0, most_out)), SEEN)
    for usage in (Usage(most_in + 1, 0, 0), Usage(0, 0, most_out + 1)):
        with pytest.raises(BadReceipt, match="bytes"):
            check_against_order(placed, bill(placed, usage), SEEN)
        check_against_order(placed, bill(placed, usage), replace(SEEN, bounded=False))


def test_cut_off_answers_are_not_held_against_the_provider() -> None:
    """If chunks are missing, the transcript cannot be compared, and the receipt is judged by its arithmetic."""
    placed = place()
    partial = replace(SEEN, commitment=Hash(b"\1" * 32), finished=False, cancelled=True)
    check_against_order(placed, bill(placed, outcome=Outcome.CLIENT_CANCELLED), partial)


def test_the_highest_seq_is_accepted() -> None:
    """A receipt with the highest possible seq is accepted."""
    placed = place()
    check_against_order(placed, bill(placed, seq=MAX_SEQ), SEEN)
