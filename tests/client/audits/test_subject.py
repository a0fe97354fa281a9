"""Answers whose evidence is not that of all their tokens: nobody is convicted by it, and nobody cleared."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from tallystick.audit.token_counts import PooledCounts
from tallystick.audit.verdicts import Verdict
from tallystick.client.audits.store import AuditStore
from tallystick.client.audits.subject import Subject
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.token_evidence import EvidenceRow
from tallystick.protocol.token_scores import ScoreRequest, ScoreResponse
from tests.client.audits.parties import ALICE, HONEST, REQUEST, Referees, build_bench, sold
from tests.client.audits.test_conduct import OTHER_MODEL, conduct
from tests.client.audits.toy_model import VOCABULARY, ToyModel, prompt_text
from tests.client.parties import MODEL

LENGTH = 64
SLIGHTLY_COARSER = ToyModel(1, noise=0.03)
Rows = tuple[EvidenceRow, ...]


def with_end(request: ScoreRequest) -> ScoreResponse:
    """An honest referee that knows the end token: it is likely after a whole answer, and hardly ever within one."""
    response = HONEST.score(request)
    end = len(response.tokens)
    return replace(response, end_logprob=-0.5 if end >= LENGTH else -12.0) if end in request.positions else response


def market_with_ends() -> Referees:
    """Three of these."""
    market = Referees()
    for number in range(3):
        market.add(f"referee{number}", with_end)
    return market


@pytest.mark.parametrize("gap", [12, 32, 62, 63])
async def test_rows_that_end_at_a_gap_convict_nobody(store: AuditStore, gap: int) -> None:
    """llama.cpp gives no row for half of a character, such as an emoji's. The rows before it are no cut answer, and its tokens
    not all that are billed.
    """
    bench = build_bench(store, market_with_ends())
    for _ in range(50):
        verdict = await conduct(bench, sold(ALICE, HONEST, keep=lambda rows: rows[:gap]))
        assert verdict is Verdict.PASS
    assert {conclusion.provider for conclusion, _ in bench.conclusions} == {Verdict.PASS}
    for counts in (await store.counts(ALICE.address, MODEL)).values():
        assert counts.billed == counts.counted


def test_a_referee_that_saw_a_part_says_nothing_of_the_whole() -> None:
    """A payer may show a referee the tokens that have rows alone: neither the end nor the count of the answer follows."""
    subject = Subject.of(sold(ALICE, HONEST, keep=lambda rows: rows[:32]))
    request = ScoreRequest.of(subject.request, subject.completion, range(33))
    assert subject.counts(request, with_end(request)) == PooledCounts()
    assert subject.pool(request, with_end(request)).cut == 0
    text = subject.question(LENGTH + 1, random.Random(1).randbytes)
    assert text.completion == subject.text
    assert subject.pool(text, with_end(text)).cut != 0
    assert subject.counts(text, with_end(text)).counted == subject.counts(text, with_end(text)).billed


@pytest.mark.parametrize(("text", "rows", "covered"), [("a", 63, True), ("é", 63, False), ("é", 64, True), ("a", 62, False)])
def test_a_character_of_several_tokens_may_be_what_lacks_a_row(text: str, rows: int, *, covered: bool) -> None:
    """Where a row is missing, it is that of the end only if no character can have several tokens. Else the text is shown."""
    subject = Subject.of(sold(ALICE, HONEST, keep=lambda kept: kept[:rows]))
    subject = replace(subject, text=text + subject.text)
    assert subject.is_covered is covered
    questions = [subject.question(80, random.Random(seed).randbytes) for seed in range(40)]
    assert any(not isinstance(question.completion, str) for question in questions) is covered


@pytest.mark.parametrize(("billed", "surplus"), [(LENGTH, 0), (LENGTH + 1, 0), (LENGTH + 2, 1), (LENGTH - 1, -1)])
def test_an_end_token_may_be_billed(billed: int, surplus: int) -> None:
    """It is in no text. In short answers it alone would be more than the share that convicts."""
    subject = Subject.of(sold(ALICE, HONEST, evidence=False, billed=billed))
    request = subject.question(80, random.Random(1).randbytes)
    counts = subject.counts(request, HONEST.score(request))
    assert counts.billed - counts.counted == surplus


@pytest.mark.parametrize(
    ("limit", "context", "finish", "claims_an_end"),
    [
        (200, 8_192, "length", True),
        (LENGTH + 9, 8_192, "length", True),
        (LENGTH + 8, 8_192, "length", False),
        (LENGTH, 8_192, "length", False),
        (LENGTH, 8_192, "stop", True),
        (None, 8_192, "length", True),
        (200, LENGTH + 9, "length", False),
        (200, 8_192, "content_filter", False),
        (200, 8_192, "abort", True),
        (True, 8_192, "length", True),
        (200, None, "length", False),
    ],
)
def test_a_limit_that_was_not_reached_is_no_excuse(
    limit: int | None, context: int | None, finish: str, *, claims_an_end: bool
) -> None:
    """Who cuts an answer and calls that the limit of its length is judged like one who calls it complete."""
    for member in ("max_tokens", "max_completion_tokens"):
        base = {name: value for name, value in REQUEST.items() if name not in ("max_tokens", "max_completion_tokens")}
        kept = sold(ALICE, HONEST, request=base if limit is None else base | {member: limit}, finish=finish)
        ask = ALICE.ask
        kept = replace(kept, ask=None if context is None else Signed(replace(ask.message, context_tokens=context), ask.signature))
        subject = Subject.of(kept)
        assert subject.ended is claims_an_end
        request = subject.question(LENGTH + 1, random.Random(1).randbytes)
        assert (subject.pool(request, with_end(request)).cut != 0) is claims_an_end


def tops(kept: int, every: int = 1) -> Callable[[Rows], Rows]:
    """Evidence with this many entries in every so-many-th row."""

    def trim(rows: Rows) -> Rows:
        return tuple(EvidenceRow(row.token, row.top[:kept]) if n % every == 0 else row for n, row in enumerate(rows))

    return trim


@pytest.mark.parametrize("kept", [0, 1, 2, 4])
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("cheap", [SLIGHTLY_COARSER, ToyModel(1, noise=0.3), OTHER_MODEL])
async def test_rows_without_their_best_tokens_clear_nobody(store: AuditStore, cheap: ToyModel, kept: int, every: int) -> None:
    """Whoever commits to rows and leaves their numbers out cannot be compared, and gains nothing."""
    bench = build_bench(store, market_with_ends())
    for _ in range(3):
        kept_job = sold(ALICE, cheap, keep=tops(kept, every))
        assert await conduct(bench, kept_job) is not Verdict.PASS
    assert (await store.integrity(ALICE.address, MODEL, kept_job.precision)).passes == 0


@pytest.mark.parametrize("rows", [1, 7])
async def test_a_few_rows_clear_nobody(store: AuditStore, rows: int) -> None:
    """They are too few to compare."""
    bench = build_bench(store, market_with_ends())
    assert await conduct(bench, sold(ALICE, SLIGHTLY_COARSER, keep=lambda all_rows: all_rows[:rows])) is Verdict.INCONCLUSIVE


async def test_a_short_row_now_and_then_is_honest(store: AuditStore) -> None:
    """Engines leave some entries out, such as those that have the same text."""
    assert await conduct(build_bench(store, market_with_ends()), sold(ALICE, HONEST, keep=tops(3, 5))) is Verdict.PASS


@pytest.mark.parametrize("first", [12, 24, 40])
@pytest.mark.parametrize("billed", [None, 200])
@pytest.mark.parametrize("finish", ["stop", "length"])
async def test_anything_after_the_rows_is_looked_at(store: AuditStore, first: int, billed: int | None, finish: str) -> None:
    """The true model writes the beginning and has rows for it, and somebody else the rest."""
    bench = build_bench(store, market_with_ends())
    prompt = prompt_text(ScoreRequest.of(REQUEST, (0,), (0,)))
    draw = random.Random(first)
    verdicts = []
    for _ in range(3):
        tail = tuple(draw.randrange(VOCABULARY) for _ in range(40))
        tokens = HONEST.answer(prompt, first, 0.7, draw) + tail
        kept = sold(ALICE, HONEST, tokens=tokens, billed=billed, finish=finish, keep=lambda rows: rows[:first])
        verdicts.append(await conduct(bench, kept))
    assert Verdict.SUSPECT in verdicts


@pytest.mark.parametrize(("short", "expected"), [(16, Verdict.PASS), (17, Verdict.INCONCLUSIVE), (64, Verdict.INCONCLUSIVE)])
async def test_many_short_rows_clear_nobody_even_with_right_numbers(store: AuditStore, short: int, expected: Verdict) -> None:
    """Who may choose which numbers to show chooses those that fit."""

    def trim(rows: Rows) -> Rows:
        return tuple(EvidenceRow(row.token, row.top[: 4 if n < short else 5]) for n, row in enumerate(rows))

    assert await conduct(build_bench(store, market_with_ends()), sold(ALICE, HONEST, keep=trim)) is expected


async def test_withheld_evidence_is_no_vote_and_hides_nothing_that_adds_up(store: AuditStore) -> None:
    """A pass would dilute suspect answers. A temperature that is a little off shows after many answers, also of such ones."""
    bench = build_bench(store, market_with_ends())
    await conduct(bench, sold(ALICE, HONEST, keep=tops(0)))
    conclusion, kept = bench.conclusions[-1]
    assert not await store.history(ALICE.address, kept.model, kept.precision)
    assert conclusion.verdict is Verdict.INCONCLUSIVE
    assert len(await store.pools(ALICE.address, kept.model, kept.precision)) == 1
