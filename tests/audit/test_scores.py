from __future__ import annotations

from tallystick.audit.scores import scored_answer
from tallystick.protocol.token_scores import ScoreResponse, ScoreRow


def test_a_referees_rows_are_taken_by_their_position() -> None:
    """Unknown positions and the answer's end are left out, and so is a token below the best ones."""
    rows = (ScoreRow.of(0, 5, {5: -9.0, 1: -0.5, 2: -1.5}, 2), None, ScoreRow.of(3, None, {2: -0.1}, 2))
    answer = scored_answer(ScoreResponse("m", 4, (5, 6, 7), rows))
    assert answer.keys() == {0}
    assert answer[0].token == 5
    assert answer[0].logprobs == {1: -0.5, 2: -1.5}
    assert answer[0].lowest == -1.5
