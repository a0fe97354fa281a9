from __future__ import annotations

import math

from tallystick.audit.scores import Row
from tallystick.audit.thresholds import Thresholds
from tallystick.audit.verdicts import Verdict
from tallystick.client.audits.findings import (
    CUT,
    DIVERGENCE,
    MARGIN,
    REPLAY,
    SURPRISAL,
    AuditedAnswer,
    RefereeNumbers,
    find,
)
from tallystick.client.audits.sampling_terms import SamplingTerms
from tallystick.protocol.token_evidence import EvidenceRow
from tests.client.audits.toy_model import ToyModel

MODEL, OTHER = ToyModel(1), ToyModel(2)
DRAWN = SamplingTerms(1.0, independent=True)


def answer_of(model: ToyModel, tokens: tuple[int, ...]) -> dict[int, Row]:
    """A referee's rows: the twenty best tokens of each position."""
    rows = {}
    for position, token in enumerate(tokens):
        best = sorted(model.logprobs("p", tokens[:position]).items(), key=lambda entry: -entry[1])[:20]
        rows[position] = Row(token, dict(best))
    return rows


def verdicts(audited: AuditedAnswer, numbers: RefereeNumbers) -> dict[str, Verdict]:
    """The verdict of each test that applies."""
    return {finding.test: finding.verdict for finding in find(audited, numbers, Thresholds())}


def test_an_unknown_class_is_compared_with_a_wide_threshold() -> None:
    """A quantization is no other product where the ask does not say which one is sold; another model still is."""
    tokens = tuple(range(32))
    coarser = ToyModel(1, noise=0.05)
    for rows, known, expected in (
        (coarser, True, Verdict.SUSPECT),
        (coarser, False, Verdict.PASS),
        (OTHER, False, Verdict.SUSPECT),
    ):
        audited = AuditedAnswer(rows.rows("p", tokens), tokens, SamplingTerms(None), class_known=known)
        assert verdicts(audited, RefereeNumbers(answer_of(MODEL, tokens))) == {DIVERGENCE: expected}


def test_too_few_positions_decide_nothing() -> None:
    """A referee that answers a few positions only convicts nobody."""
    tokens = tuple(range(32))
    audited = AuditedAnswer(OTHER.rows("p", tokens), tokens, DRAWN)
    few = {position: row for position, row in answer_of(MODEL, tokens).items() if position < 4}
    assert set(verdicts(audited, RefereeNumbers(few)).values()) == {Verdict.INCONCLUSIVE}


def test_rows_of_other_positions_are_left_out() -> None:
    """A referee may send more than it was asked for."""
    tokens = tuple(range(32))
    audited = AuditedAnswer(MODEL.rows("p", tokens), tokens, SamplingTerms(None))
    extra = answer_of(MODEL, tokens) | {-1: Row(0, {0: -9.0}), 99: Row(0, {0: -9.0})}
    assert verdicts(audited, RefereeNumbers(extra)) == {DIVERGENCE: Verdict.PASS}


def test_greedy_answers_are_judged_by_their_margin() -> None:
    """At temperature 0 nothing is drawn, so that no surprisal means anything."""
    greedy = tuple(range(3))
    for _ in range(29):
        scores = MODEL.logprobs("p", greedy)
        greedy += (max(scores, key=lambda token: scores[token]),)
    terms = SamplingTerms(0.0)
    honest = AuditedAnswer((), greedy, terms)
    numbers = answer_of(MODEL, greedy)
    numbers = {position: row for position, row in numbers.items() if position >= 3}
    assert verdicts(honest, RefereeNumbers(numbers)) == {MARGIN: Verdict.PASS}
    other = tuple(range(32))
    assert verdicts(AuditedAnswer((), other, terms), RefereeNumbers(answer_of(MODEL, other))) == {MARGIN: Verdict.SUSPECT}


def test_cut_answers() -> None:
    """An answer that claims to have ended where hardly any ends."""
    tokens = tuple(range(100))
    ended = AuditedAnswer((), tokens, DRAWN, ended=True)
    assert verdicts(ended, RefereeNumbers({}, -40.0))[CUT] is Verdict.SUSPECT
    assert verdicts(ended, RefereeNumbers({}, math.log(0.3)))[CUT] is Verdict.PASS
    assert CUT not in verdicts(ended, RefereeNumbers({}, None))
    assert CUT not in verdicts(AuditedAnswer((), tokens, DRAWN), RefereeNumbers({}, -40.0))


def test_replayed_answers() -> None:
    """The same text twice is no chance, unless the request asks for it by a seed."""
    tokens = tuple(range(40))
    numbers = RefereeNumbers(answer_of(MODEL, tokens))
    assert verdicts(AuditedAnswer((), tokens, DRAWN, earlier=[tokens]), numbers)[REPLAY] is Verdict.SUSPECT
    assert verdicts(AuditedAnswer((), tokens, DRAWN, earlier=[tokens[::-1]]), numbers)[REPLAY] is Verdict.PASS
    assert REPLAY not in verdicts(AuditedAnswer((), tokens, SamplingTerms(1.0), earlier=[tokens]), numbers)
    assert REPLAY not in verdicts(AuditedAnswer((), tokens, DRAWN), numbers)


def test_sampling_that_is_not_declared_is_not_judged() -> None:
    """Engines fill it in as they like."""
    tokens = tuple(range(64))
    numbers = RefereeNumbers(answer_of(MODEL, tokens))
    assert SURPRISAL not in verdicts(AuditedAnswer((), tokens, SamplingTerms(None)), numbers)
    assert verdicts(AuditedAnswer((), tokens, DRAWN), numbers)[SURPRISAL] is Verdict.SUSPECT


def test_evidence_without_rows_of_a_position_is_left_out() -> None:
    """Half a character has no row in some engines."""
    tokens = tuple(range(32))
    rows = tuple(row if number % 2 else EvidenceRow(row.token, ()) for number, row in enumerate(MODEL.rows("p", tokens)))
    audited = AuditedAnswer(rows, tokens, SamplingTerms(None))
    assert verdicts(audited, RefereeNumbers(answer_of(MODEL, tokens))) == {DIVERGENCE: Verdict.PASS}


def test_rows_of_one_or_two_tokens_are_not_compared() -> None:
    """Rounding alone would make an honest engine suspect that reports the best token only."""
    tokens = tuple(range(32))
    for kept, expected in ((1, Verdict.INCONCLUSIVE), (2, Verdict.INCONCLUSIVE), (3, Verdict.SUSPECT), (4, Verdict.SUSPECT)):
        rows = tuple(EvidenceRow(row.token, row.top[:kept]) for row in ToyModel(1, noise=0.05).rows("p", tokens))
        audited = AuditedAnswer(rows, tokens, SamplingTerms(None))
        assert verdicts(audited, RefereeNumbers(answer_of(MODEL, tokens))) == {DIVERGENCE: expected}


def test_a_text_that_is_split_otherwise_is_nobodys_guilt() -> None:
    """A text is its tokens no more if the model wrote a word in two pieces. All later rows are shifted, and repeat by chance."""
    repeating = (7, 7, 7, 3) * 16
    read = (9, 8, *repeating)
    audited = AuditedAnswer(MODEL.rows("p", (9, *repeating)), read, SamplingTerms(None))
    assert verdicts(audited, RefereeNumbers(answer_of(MODEL, read))) == {DIVERGENCE: Verdict.INCONCLUSIVE}
    once = (5, *repeating)  # one token read as another: the others are where they were
    audited = AuditedAnswer(OTHER.rows("p", (9, *repeating)), once, SamplingTerms(None))
    assert verdicts(audited, RefereeNumbers(answer_of(MODEL, once))) == {DIVERGENCE: Verdict.SUSPECT}
