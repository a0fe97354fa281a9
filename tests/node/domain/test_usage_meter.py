from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.domain.usage_meter import NOTHING, Throughput, UsageMeter, estimate, make_receipt
from tallystick.protocol.messages import Outcome
from tallystick.protocol.openai_wire import ReportedUsage
from tallystick.protocol.pricing import TEMPLATE_ALLOWANCE, Usage, usage_of
from tallystick.protocol.sealing import Transcript
from tallystick.protocol.tab import ProviderTab, check_continuity, check_receipt
from tallystick.protocol.types import Amount
from tests.node.harness import NOW, Client, ask_book

PLACED = Client().order(ask_book().current[0])


def meter(body: int = 1_000) -> UsageMeter:
    """The meter of a response to a request of so many bytes."""
    return UsageMeter(PLACED.key, PLACED.order.digest, PLACED.terms, body)


def test_the_engines_count_is_what_is_billed() -> None:
    """A plausible usage of the engine is taken as it is; the last word counts."""
    counted = meter()
    counted.add_output(5_000, 300)
    counted.set_reported(ReportedUsage(1, 0, 1))
    counted.set_reported(ReportedUsage(200, 50, 80))
    counted.set_reported(None)
    assert counted.usage() == Usage(200, 50, 80)
    assert not counted.was_clamped


def test_without_a_count_bytes_are_the_rule() -> None:
    """One token for four bytes, rounded up, of the request and of the generated text."""
    counted = meter(body=1_001)
    counted.add_output(5_000, 90)
    assert counted.usage() == Usage(251, 0, 23)
    assert (estimate(0), estimate(1), estimate(4), estimate(5)) == (0, 1, 1, 2)


def test_nothing_delivered_is_nothing_billed() -> None:
    """Whatever the engine counted, an answer of which nothing left counts nothing."""
    counted = meter()
    counted.set_reported(ReportedUsage(100, 0, 100))
    assert counted.usage() == NOTHING
    assert not counted.was_clamped


def test_a_cancelled_input_is_billed_once_the_engine_had_it() -> None:
    """Without output, a cancelled job counts the engine's input or the estimate, clamped, none of it as cached; else nothing."""
    counted = meter(body=1_001)
    assert counted.usage(cancelled=True) == NOTHING
    counted.mark_request_sent()
    assert (counted.usage(), counted.usage(cancelled=True)) == (NOTHING, Usage(251, 0, 0))
    counted.set_reported(ReportedUsage(200, 150, 80))
    assert counted.usage(cancelled=True) == Usage(200, 0, 0)
    counted.set_reported(ReportedUsage(10**9, 10**9, 10**9))
    assert counted.usage(cancelled=True) == Usage(1_001 + TEMPLATE_ALLOWANCE, 0, 0)


def test_work_that_was_held_back_has_its_worth() -> None:
    """What a job would have cost counts what was made and not delivered; where nothing was made, the input alone."""
    counted = meter(body=1_000)
    assert counted.work_done(0, 0) == NOTHING
    counted.mark_request_sent()
    assert counted.work_done(0, 0) == Usage(250, 0, 0)
    assert counted.work_done(40, 20) == Usage(250, 0, 5)
    counted.add_output(10, 8)
    assert counted.work_done(40, 20) == Usage(250, 0, 7)
    counted.set_reported(ReportedUsage(30, 10, 45))
    assert counted.work_done(40, 20) == Usage(30, 10, 45)


def test_a_count_that_can_not_be_true_is_clamped() -> None:
    """Input is clamped to the request's bytes and the template allowance, output to the order and to the bytes delivered."""
    counted = meter(body=10)
    counted.add_output(7, 3)
    counted.set_reported(ReportedUsage(10**9, 10**9, 10**9))
    assert counted.usage() == Usage(10 + TEMPLATE_ALLOWANCE, 10 + TEMPLATE_ALLOWANCE, 7)
    assert counted.was_clamped


counts = st.integers(-(10**6), 10**12)


@given(
    body=st.integers(0, 10_000),
    size=st.integers(0, 10_000),
    text=st.integers(0, 10_000),
    said=st.none() | st.builds(ReportedUsage, counts, counts, counts),
    outcome=st.sampled_from(Outcome),
    seq=st.integers(0, 10**6),
    total=st.integers(0, 10**12),
)
def test_every_receipt_passes_the_other_sides_checks(
    *, body: int, size: int, text: int, said: ReportedUsage | None, outcome: Outcome, seq: int, total: int
) -> None:
    """Whatever an engine reports, the receipt is within its bounds, costs what its prices give, and continues its tab."""
    counted = meter(body)
    counted.add_output(size, min(text, size))
    counted.set_reported(said)
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


def test_the_commitment_is_the_transcripts() -> None:
    """Chunks are chained as a client chains them."""
    counted, transcript = meter(), Transcript(PLACED.key.commitment_key, PLACED.order.digest)
    for chunk in (b"head", b"body", b""):
        counted.add_chunk(chunk)
        transcript.add(chunk)
    assert counted.commitment == transcript.commitment


def test_the_pace_follows_the_last_jobs() -> None:
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


def test_the_pace_fits_its_fields() -> None:
    """Whatever an engine makes of its time, both numbers are within 32 bits."""
    pace = Throughput()
    pace.add(first=1e9, total=1e9 + 1, tokens=1 << 60)
    assert (pace.tokens_per_second, pace.first_token_ms) == (0xFFFF_FFFF, 0xFFFF_FFFF)
