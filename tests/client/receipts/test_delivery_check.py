"""The limits on what a receipt may charge for what arrived, each at equality."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tallystick.client.receipts.delivery_check import (
    IN_FLIGHT_TOKENS,
    MAX_UNDELIVERED_QUARTERS,
    OUTPUT_ALLOWANCE,
    QUARTERS_CUT_SHORT,
    QUARTERS_DELIVERED,
    QUARTERS_UNDELIVERED,
    Delivery,
    StreamEnd,
    UndeliveredCharge,
    undelivered_quarters,
)
from tallystick.client.receipts.price_check import check_against_order
from tallystick.protocol.errors import BadReceipt, Fault
from tallystick.protocol.messages import Outcome
from tallystick.protocol.pricing import TEMPLATE_ALLOWANCE, Usage
from tallystick.protocol.types import ZERO_HASH, Hash
from tallystick.protocol.wire import INITIAL_CREDIT
from tests.client.parties import bill, place

OTHER = Hash(b"\6" * 32)
SEEN = Delivery(200, 50, ZERO_HASH, finished=True)


def _reads(outcome: Outcome) -> Delivery:
    return replace(SEEN, finished=False, commitment=OTHER, cancelled=outcome is Outcome.CLIENT_CANCELLED)


@pytest.mark.parametrize(
    ("commitment", "stream", "limit"),
    [
        (OTHER, StreamEnd.ENDED, 50 + OUTPUT_ALLOWANCE),
        (OTHER, StreamEnd.ABANDONED, 50 + OUTPUT_ALLOWANCE + IN_FLIGHT_TOKENS),
        (ZERO_HASH, StreamEnd.ENDED, 50 + OUTPUT_ALLOWANCE),
    ],
)
def test_the_refusal_names_the_limit(commitment: Hash, stream: StreamEnd, limit: int) -> None:
    """The message says how many tokens the bytes that arrived can hold."""
    seen = replace(_reads(Outcome.CLIENT_CANCELLED), commitment=commitment, stream=stream)
    receipt = bill(place(output=8_000, body=50_000), Usage(1, 0, limit + 1), Outcome.CLIENT_CANCELLED)
    with pytest.raises(BadReceipt, match=rf"outputTokens: expected at most {limit}\b"):
        check_against_order(place(output=8_000, body=50_000), receipt, seen)


def test_every_limit_at_equality() -> None:
    """A receipt at each limit passes, and one token above it fails; a contradiction with the provider's own signatures is
    its lie.
    """
    placed = place(output=8_000, body=50_000)
    most_in, most_out = 200 + TEMPLATE_ALLOWANCE, 50 + OUTPUT_ALLOWANCE
    cancelled = _reads(Outcome.CLIENT_CANCELLED)
    left = replace(cancelled, stream=StreamEnd.ABANDONED)
    kept = replace(cancelled, stream=StreamEnd.RESUMABLE)
    for seen, usage, error in (
        (cancelled, Usage(most_in, 0, most_out), None),
        (cancelled, Usage(1, 0, most_out + 1), UndeliveredCharge),
        (left, Usage(1, 0, most_out + IN_FLIGHT_TOKENS), None),
        (left, Usage(1, 0, most_out + IN_FLIGHT_TOKENS + 1), UndeliveredCharge),
        (kept, Usage(1, 0, 8_000), None),
        (kept, Usage(most_in + 1, 0, 0), BadReceipt),
        (replace(cancelled, commitment=ZERO_HASH), Usage(1, 0, most_out), None),
        (replace(cancelled, commitment=ZERO_HASH), Usage(1, 0, most_out + 1), BadReceipt),
        (replace(cancelled, bounded=False), Usage(1, 0, 8_000), None),
        (replace(cancelled, bounded=False, response_bytes=0), Usage(1, 0, OUTPUT_ALLOWANCE), None),
        (replace(cancelled, bounded=False, response_bytes=0), Usage(1, 0, OUTPUT_ALLOWANCE + 1), UndeliveredCharge),
        (replace(cancelled, cancelled=False), Usage(1, 0, 0), UndeliveredCharge),
    ):
        receipt = bill(placed, usage, Outcome.CLIENT_CANCELLED)
        if error is None:
            check_against_order(placed, receipt, seen)
            continue
        with pytest.raises(error) as caught:
            check_against_order(placed, receipt, seen)
        assert type(caught.value) is error


@pytest.mark.parametrize("outcome", [Outcome.COMPLETED, Outcome.LENGTH])
def test_a_stream_that_was_read_needs_its_last_chunk(outcome: Outcome) -> None:
    """A finished answer, cancelled or not, needs its last chunk; a receipt that charges nothing does not."""
    placed = place()
    for cancelled in (False, True):
        seen = replace(SEEN, finished=False, commitment=OTHER, cancelled=cancelled)
        with pytest.raises(UndeliveredCharge):
            check_against_order(placed, bill(placed, outcome=outcome), seen)
        check_against_order(placed, bill(placed, Usage(0, 0, 0), outcome), seen)
        with pytest.raises(BadReceipt, match="last chunk") as caught:
            check_against_order(placed, bill(placed, outcome=outcome), replace(seen, commitment=ZERO_HASH))
        assert caught.value.fault is Fault.PROVIDER


def test_undelivered_quarters_of_an_answer() -> None:
    """A whole answer reduces the count, a cut one counts a quarter, a larger undelivered part counts in full, and a free one
    nothing.
    """
    placed = place(output=500)
    cut = replace(SEEN, finished=False)
    most = 50 + OUTPUT_ALLOWANCE
    assert undelivered_quarters(bill(placed), SEEN) == -1
    assert undelivered_quarters(bill(placed), None) == 0
    assert undelivered_quarters(bill(placed, Usage(1, 0, most)), cut) == QUARTERS_CUT_SHORT
    assert undelivered_quarters(bill(placed, Usage(1, 0, most + 1)), cut) == QUARTERS_UNDELIVERED
    assert undelivered_quarters(bill(placed, Usage(0, 0, 0)), cut) == 0
    assert undelivered_quarters(bill(placed, outcome=Outcome.TIMED_OUT), cut) == 0
    assert MAX_UNDELIVERED_QUARTERS == 3 * QUARTERS_UNDELIVERED


def test_a_credit_window_may_have_been_in_flight() -> None:
    """A lost stream may be charged 16 tokens per chunk of one credit window beyond what arrived."""
    assert IN_FLIGHT_TOKENS == INITIAL_CREDIT * 16


def test_free_receipts_need_no_delivery() -> None:
    """A broken answer's receipt at no cost need not match what arrived, counts as no delivery, and its usage has no effect."""
    placed = place(output=8_000)
    free = bill(placed, Usage(9_000, 0, 8_000), Outcome.TIMED_OUT, result_commitment=OTHER)
    check_against_order(placed, free, SEEN)
    assert undelivered_quarters(free, SEEN) == 0


def test_answers_without_bounds_need_a_proper_end() -> None:
    """If bytes do not limit the tokens, an empty answer that ended properly is still whole."""
    placed = place(output=8_000)
    drawn = Delivery(200, 0, ZERO_HASH, finished=True, bounded=False)
    check_against_order(placed, bill(placed, Usage(1, 0, 8_000)), drawn)
    assert undelivered_quarters(bill(placed, Usage(1, 0, 8_000)), drawn) == QUARTERS_DELIVERED
