from __future__ import annotations

import math

import pytest

from tallystick.audit.scores import end_logprob, scored_answer
from tallystick.protocol.token_scores import ScoreResponse, ScoreRow


def test_a_referees_rows_are_taken_by_their_position() -> None:
    """Unknown positions and the answer's end are left out, and so is a token below the best ones."""
    rows = (ScoreRow.of(0, 5, {5: -9.0, 1: -0.5, 2: -1.5}, 2), None, ScoreRow.of(3, None, {2: -0.1}, 2))
    answer = scored_answer(ScoreResponse("m", 4, (5, 6, 7), rows))
    assert answer.keys() == {0}
    assert answer[0].token == 5
    assert answer[0].logprobs == {1: -0.5, 2: -1.5}
    assert answer[0].lowest == -1.5


def scored(tokens: tuple[int, ...], position: int, *top: tuple[int, float], ends: tuple[int, ...] = (2, 3)) -> ScoreResponse:
    """A referee's answer with one row."""
    row = ScoreRow(position, tokens[position] if position < len(tokens) else None, None, top)
    return ScoreResponse("m", 4, tokens, (None, row), ends)


def test_how_probable_an_end_is() -> None:
    """It is read after the last token, or at the last token if that ends the turn; all tokens that end one count."""
    assert end_logprob(scored((5, 6), 2, (2, -1.0), (9, -2.0))) == -1.0
    assert end_logprob(scored((5, 6, 3), 2, (2, -2.0), (3, -2.0))) == pytest.approx(-2.0 + math.log(2))
    assert end_logprob(scored((5, 6), 2, (8, -1.0), (9, -4.0))) == -4.0, "it is at most as probable as the last one listed"


def test_an_end_that_nobody_scored_says_nothing() -> None:
    """Neither another row nor an engine that does not name its ends is evidence."""
    assert end_logprob(scored((5, 6), 1, (2, -1.0))) is None
    assert end_logprob(scored((5, 6), 2, (2, -1.0), ends=())) is None
    assert end_logprob(scored((5, 6), 2)) is None
