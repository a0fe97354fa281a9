from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.domain.usage_meter import NOTHING, Throughput, UsageMeter, estimate, make_receipt
from tallystick.protocol.messages import Outcome
from tallystick.protocol.pricing import TEMPLATE_ALLOWANCE, Usage, usage_of
from tallystick.protocol.sealing import Transcript
from tallystick.protocol.tab import ProviderTab, check_receipt
from tallystick.protocol.types import ZERO_HASH, Amount, Hash
from tallystick.protocol.usage_reports import ReportedUsage
from tests.builders import check_continuity
from tests.node.harness import NOW, Client, make_asks

PLACED = Client().order(make_asks().current[0])


def meter(body: int = 1_000) -> UsageMeter:
    """Returns the meter of a response to a request of `body` bytes."""
    return UsageMeter(PLACED.key, PLACED.order.digest, PLACED.terms, body)


def test_the_reported_usage_is_billed() -> None:
    """A plausible usage reported by the engine is billed unchanged; the last report counts."""
    counted = meter()
    counted.add_output(5_000, 300)
    counted.set_reported(ReportedUsage(1, 0, 1))
    counted.set_reported(ReportedUsage(200, 50, 80))
    counted.set_reported(None)
    assert counted.usage() == Usage(200, 50, 80)
    assert not counted.was_clamped


def test_the_engines_own_count_of_output() -> None:
    """It is known as it was reported, however little of it can be billed, and not known without a report."""
    counted = meter()
    assert counted.reported_output is None
    counted.set_reported(ReportedUsage(1, 0, None))
    assert counted.reported_output is None
    counted.set_reported(ReportedUsage(1, 0, 10**9))
    assert counted.reported_output == 10**9


def test_a_receipt_commits_to_the_evidence_that_it_is_given() -> None:
    """To none by default."""
    tab = ProviderTab(0, Amount(0))
    made = {"usage": NOTHING, "outcome": Outcome.COMPLETED, "commitment": ZERO_HASH, "finished_at": NOW}
    assert make_receipt(PLACED.order, PLACED.terms, tab, **made).evidence_root == ZERO_HASH  # type: ignore[arg-type]
    root = Hash(b"r" * 32)
    assert make_receipt(PLACED.order, PLACED.terms, tab, **made, evidence_root=root).evidence_root == root  # type: ignore[arg-type]


def test_without_a_report_bytes_are_counted() -> None:
    """Tokens are estimated as one for four bytes, rounded up, of the request and of the generated text."""
    counted = meter(body=1_001)
    counted.add_output(5_000, 90)
    assert counted.usage() == Usage(251, 0, 23)
    assert (estimate(0), estimate(1), estimate(4), estimate(5)) == (0, 1, 1, 2)


def test_counts_that_are_missing_are_estimated() -> None:
    """A missing count is estimated alone; zeros with text are no count, and zeros of an echoed prompt alone are one."""
    counted = meter(body=1_000)
    counted.add_output(5_000, 90)
    counted.set_reported(ReportedUsage(200, 50, None))
    assert counted.usage() == Usage(200, 50, 23)
    assert not counted.was_clamped
    counted.set_reported(ReportedUsage(None, 0, 80))
    assert counted.usage() == Usage(200, 50, 80), "what was reported before stays"
    for text, usage in ((90, Usage(250, 0, 23)), (0, Usage(0, 0, 0))):
        counted = meter(body=1_000)
        counted.add_output(5_000, text)
        counted.set_reported(ReportedUsage(0, 0, 0))
        assert counted.usage() == usage
    counted = meter(body=1_000)
    counted.add_output(5_000, 90)
    counted.set_reported(ReportedUsage(4, 0, 0))
    assert counted.usage() == Usage(4, 0, 0)


def test_the_context_bounds_what_bytes_do_not() -> None:
    """An image by its URL may have more tokens than its request has bytes, but never more than the context."""
    for reported, billed in ((1_400, 1_400), (10**6, 8_192)):
        counted = UsageMeter(PLACED.key, PLACED.order.digest, PLACED.terms, 100, context_tokens=8_192)
        counted.add_output(5_000, 90)
        counted.set_reported(ReportedUsage(reported, 0, 4))
        assert counted.usage() == Usage(billed, 0, 4)


def test_nothing_delivered_is_nothing_billed() -> None:
    """A response without any delivered output costs nothing, whatever the engine reported."""
    counted = meter()
    counted.set_reported(ReportedUsage(100, 0, 100))
    assert counted.usage() == NOTHING
    assert not counted.was_clamped


def test_a_cancelled_input_is_billed_once_the_engine_had_it() -> None:
    """Without output, a cancelled job counts the reported or estimated input, clamped and not cached, once the engine has the
    request.
    """
    counted = meter(body=1_001)
    assert counted.usage(cancelled=True) == NOTHING
    counted.mark_request_sent()
    assert (counted.usage(), counted.usage(cancelled=True)) == (NOTHING, Usage(251, 0, 0))
    counted.set_reported(ReportedUsage(200, 150, 80))
    assert counted.usage(cancelled=True) == Usage(200, 0, 0)
    counted.set_reported(ReportedUsage(10**9, 10**9, 10**9))
    assert counted.usage(cancelled=True) == Usage(1_001 + TEMPLATE_ALLOWANCE, 0, 0)


def test_work_done_includes_undelivered_output() -> None:
    """The work done counts produced but undelivered output; if nothing was produced, the input alone."""
    counted = meter(body=1_000)
    assert counted.work_done(0, 0) == NOTHING
    counted.mark_request_sent()
    assert counted.work_done(0, 0) == Usage(250, 0, 0)
    assert counted.work_done(40, 20) == Usage(250, 0, 5)
    counted.add_output(10, 8)
    assert counted.work_done(40, 20) == Usage(250, 0, 7)
    counted.set_reported(ReportedUsage(30, 10, 45))
    assert counted.work_done(40, 20) == Usage(30, 10, 45)


def test_impossible_usage_is_clamped() -> None:
    """Input is clamped to the request's bytes and the template allowance, output to the order and to the delivered bytes."""
    counted = meter(body=10)
    counted.add_output(7, 3)
    counted.set_reported(ReportedUsage(10**9, 10**9, 10**9))
    assert counted.usage() == Usage(10 + TEMPLATE_ALLOWANCE, 10 + TEMPLATE_ALLOWANCE, 7)
    assert counted.was_clamped


@pytest.mark.parametrize(
    ("reported", "clamped"),
    [
        (ReportedUsage(5, 0, 7), False),
        (ReportedUsage(5, 0, 8), True),
        (ReportedUsage(10 + TEMPLATE_ALLOWANCE + 1, 0, 7), True),
        (ReportedUsage(10 + TEMPLATE_ALLOWANCE, 0, 7), False),
    ],
)
def test_one_impossible_count_is_enough_to_be_clamped(reported: ReportedUsage, *, clamped: bool) -> None:
    """Input and output are judged apart, each at its limit."""
    counted = meter(body=10)
    counted.add_output(7, 3)
    counted.set_reported(reported)
    assert counted.was_clamped is clamped


counts = st.integers(-(10**6), 10**12)


@given(
    body=st.integers(0, 10_000),
    size=st.integers(0, 10_000),
    text=st.integers(0, 10_000),
    reported=st.none() | st.builds(ReportedUsage, counts, counts, counts),
    outcome=st.sampled_from(Outcome),
    seq=st.integers(0, 10**6),
    total=st.integers(0, 10**12),
)
def test_every_receipt_passes_the_payers_checks(
    *, body: int, size: int, text: int, reported: ReportedUsage | None, outcome: Outcome, seq: int, total: int
) -> None:
    """Whatever an engine reports, the receipt is within its bounds, has the cost of its prices, and continues its tab."""
    counted = meter(body)
    counted.add_output(size, min(text, size))
    counted.set_reported(reported)
    tab = ProviderTab(seq, Amount(total))
    receipt = make_receipt(
        PLACED.order,
        PLACED.terms,
        tab,
        usage=counted.usage(),
        outcome=outcome,
        commitment=counted.commitment,
        finished_at=NOW,
    )
    check_receipt(PLACED.order, PLACED.terms, receipt)
    usage = usage_of(receipt)
    assert usage.input <= body + TEMPLATE_ALLOWANCE
    assert usage.output <= min(size, PLACED.terms.max_output_tokens)
    booked = tab.record(receipt.cost, Amount(0))
    assert (receipt.seq, receipt.cumulative_cost) == (booked.seq, booked.cumulative)
    following = make_receipt(
        PLACED.order, PLACED.terms, booked, usage=NOTHING, outcome=outcome, commitment=counted.commitment, finished_at=NOW
    )
    check_continuity(receipt, following)


def test_the_commitment_matches_the_transcript() -> None:
    """Chunks are chained as a client chains them."""
    counted, transcript = meter(), Transcript(PLACED.key.commitment_key, PLACED.order.digest)
    for chunk in (b"head", b"body", b""):
        counted.add_chunk(chunk)
        transcript.add(chunk)
    assert counted.commitment == transcript.commitment


def test_throughput_follows_the_last_jobs() -> None:
    """Speed and time to first output start with the first job and move towards later ones."""
    pace = Throughput()
    assert (pace.tokens_per_second, pace.first_token_ms) == (0, 0)
    pace.add(first=0.5, total=1.5, tokens=101)
    assert (pace.tokens_per_second, pace.first_token_ms) == (100, 500)
    pace.add(first=1.5, total=2.5, tokens=201)
    assert (pace.tokens_per_second, pace.first_token_ms) == (120, 700), "a fifth of the way"
    for tokens, total in ((1, 2.0), (1_000, 0.7), (1_000, 0.6)):
        pace.add(first=0.7, total=total, tokens=tokens)
        assert pace.tokens_per_second == 120, "no time between tokens, no rate"
    pace.add(first=0.5, total=1.5, tokens=2)
    assert pace.tokens_per_second == 96


def test_whole_responses_count_with_their_whole_time() -> None:
    """A response in one piece says nothing about the time to the first token, and its tokens took all of its time."""
    pace = Throughput()
    pace.add_whole(seconds=2.0, tokens=200)
    assert (pace.tokens_per_second, pace.first_token_ms) == (100, 0)
    pace.add_whole(seconds=1.0, tokens=200)
    assert pace.tokens_per_second == 120
    for seconds, tokens in ((0.0, 100), (1.0, 1)):
        pace.add_whole(seconds=seconds, tokens=tokens)
        assert pace.tokens_per_second == 120
    pace.add_whole(seconds=1.0, tokens=2)
    assert pace.tokens_per_second == 96


def test_throughput_fits_its_fields() -> None:
    """Both numbers stay within 32 bits, however fast or slow the engine is."""
    pace = Throughput()
    pace.add(first=1e9, total=1e9 + 1, tokens=1 << 60)
    assert (pace.tokens_per_second, pace.first_token_ms) == (0xFFFF_FFFF, 0xFFFF_FFFF)
