"""What a receipt may charge for what arrived: every limit at equality, and what is remembered of it. Pure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tallystick.client.receipts.checks import (
    CUT_SHORT,
    IN_FLIGHT_TOKENS,
    MAX_UNDELIVERED,
    MAX_UNRELEASED,
    NOT_DELIVERED,
    OUTPUT_ALLOWANCE,
    WHOLE,
    Delivered,
    Stream,
    Tab,
    Undelivered,
    check_answer,
    quarters_of,
    why_unreleased,
)
from tallystick.protocol.errors import BadReceipt, Fault
from tallystick.protocol.messages import Outcome
from tallystick.protocol.pricing import TEMPLATE_ALLOWANCE, Usage
from tallystick.protocol.tab import MAX_SEQ
from tallystick.protocol.types import ZERO_HASH, Hash
from tallystick.protocol.wire import INITIAL_CREDIT
from tests.client.parties import bill, place

OTHER = Hash(b"\6" * 32)
SEEN = Delivered(200, 50, ZERO_HASH, finished=True)


def _reads(outcome: Outcome) -> Delivered:
    return replace(SEEN, finished=False, commitment=OTHER, cancelled=outcome is Outcome.CLIENT_CANCELLED)


def test_every_limit_at_equality() -> None:
    """At each bound a receipt passes, one token above it does not; what the provider signed for itself is its own lie."""
    placed = place(output=8_000, body=50_000)
    most_in, most_out = 200 + TEMPLATE_ALLOWANCE, 50 + OUTPUT_ALLOWANCE
    cancelled = _reads(Outcome.CLIENT_CANCELLED)
    left = replace(cancelled, stream=Stream.LEFT)
    kept = replace(cancelled, stream=Stream.KEPT)
    for seen, usage, error in (
        (cancelled, Usage(most_in, 0, most_out), None),
        (cancelled, Usage(1, 0, most_out + 1), Undelivered),
        (left, Usage(1, 0, most_out + IN_FLIGHT_TOKENS), None),
        (left, Usage(1, 0, most_out + IN_FLIGHT_TOKENS + 1), Undelivered),
        (kept, Usage(1, 0, 8_000), None),
        (kept, Usage(most_in + 1, 0, 0), BadReceipt),
        (replace(cancelled, commitment=ZERO_HASH), Usage(1, 0, most_out), None),
        (replace(cancelled, commitment=ZERO_HASH), Usage(1, 0, most_out + 1), BadReceipt),
        (replace(cancelled, bounded=False), Usage(1, 0, 8_000), None),
        (replace(cancelled, bounded=False, response_bytes=0), Usage(1, 0, OUTPUT_ALLOWANCE), None),
        (replace(cancelled, bounded=False, response_bytes=0), Usage(1, 0, OUTPUT_ALLOWANCE + 1), Undelivered),
        (replace(cancelled, cancelled=False), Usage(1, 0, 0), Undelivered),
    ):
        receipt = bill(placed, usage, Outcome.CLIENT_CANCELLED)
        if error is None:
            check_answer(placed, receipt, seen)
            continue
        with pytest.raises(error) as caught:
            check_answer(placed, receipt, seen)
        assert type(caught.value) is error


@pytest.mark.parametrize("outcome", [Outcome.COMPLETED, Outcome.LENGTH])
def test_a_stream_that_was_read_needs_its_last_chunk(outcome: Outcome) -> None:
    """Cancelled or not, a finished answer comes with its last chunk; a receipt that charges nothing needs none."""
    placed = place()
    for cancelled in (False, True):
        seen = replace(SEEN, finished=False, commitment=OTHER, cancelled=cancelled)
        with pytest.raises(Undelivered):
            check_answer(placed, bill(placed, outcome=outcome), seen)
        check_answer(placed, bill(placed, Usage(0, 0, 0), outcome), seen)
        with pytest.raises(BadReceipt, match="last chunk") as caught:
            check_answer(placed, bill(placed, outcome=outcome), replace(seen, commitment=ZERO_HASH))
        assert caught.value.fault is Fault.PROVIDER


def test_what_an_answer_adds_to_the_count() -> None:
    """Whole answers pay back, cut ones count a quarter, more than what arrived counts in full, what cost nothing does not."""
    placed = place(output=500)
    cut = replace(SEEN, finished=False)
    most = 50 + OUTPUT_ALLOWANCE
    assert quarters_of(bill(placed), SEEN) == -1
    assert quarters_of(bill(placed), None) == 0
    assert quarters_of(bill(placed, Usage(1, 0, most)), cut) == CUT_SHORT
    assert quarters_of(bill(placed, Usage(1, 0, most + 1)), cut) == NOT_DELIVERED
    assert quarters_of(bill(placed, Usage(0, 0, 0)), cut) == 0
    assert quarters_of(bill(placed, outcome=Outcome.TIMED_OUT), cut) == 0
    assert MAX_UNDELIVERED == 3 * NOT_DELIVERED


def test_a_credit_window_may_have_been_in_flight() -> None:
    """What a lost stream may be charged beyond what arrived is 16 tokens for each chunk of one credit window."""
    assert IN_FLIGHT_TOKENS == INITIAL_CREDIT * 16


def test_the_longest_tab_is_honest() -> None:
    """The highest seq that fits is accepted."""
    placed = place()
    check_answer(placed, bill(placed, seq=MAX_SEQ), SEEN)


def test_what_charges_nothing_is_held_against_nothing() -> None:
    """A broken answer's receipt at no cost need not match what arrived, counts as no delivery, and its usage binds nobody."""
    placed = place(output=8_000)
    free = bill(placed, Usage(9_000, 0, 8_000), Outcome.TIMED_OUT, result_commitment=OTHER)
    check_answer(placed, free, SEEN)
    assert quarters_of(free, SEEN) == 0


def test_answers_without_bounds_need_a_sign_of_life() -> None:
    """Where bytes do not bound the tokens, an empty answer that ended whole is no less whole."""
    placed = place(output=8_000)
    drawn = Delivered(200, 0, ZERO_HASH, finished=True, bounded=False)
    check_answer(placed, bill(placed, Usage(1, 0, 8_000)), drawn)
    assert quarters_of(bill(placed, Usage(1, 0, 8_000)), drawn) == WHOLE


def test_who_is_barred() -> None:
    """A frozen provider, for the reason of the freeze, and one that owes the stated number of receipts; nobody else."""
    assert Tab(frozen="it lied").barred == "it lied"
    assert Tab(unreleased=MAX_UNRELEASED - 1).barred == ""
    assert Tab(unreleased=MAX_UNRELEASED).barred == why_unreleased(MAX_UNRELEASED)
    assert why_unreleased(MAX_UNRELEASED).startswith(f"{MAX_UNRELEASED} orders of ended jobs")
