from __future__ import annotations

import random

from tallystick.audit.verdicts import Verdict
from tallystick.client.audits.planted import MIN_SWAPPED, bad_question, judge_bad, make_bad
from tallystick.protocol.token_scores import ScoreRequest
from tests.client.audits.parties import HONEST, REQUEST
from tests.client.audits.toy_model import ToyModel, prompt_text


def questions(seed: int, length: int = 64) -> tuple[ScoreRequest, random.Random]:
    """A question about a good answer."""
    draws = random.Random(seed)
    prompt = prompt_text(ScoreRequest.of(REQUEST, (0,), (0,)))
    tokens = HONEST.answer(prompt, length, 0.7, draws)
    return ScoreRequest.of(REQUEST, tokens, tuple(range(length + 1))), draws


def test_honest_referees_pass_and_others_hardly_ever() -> None:
    """Whatever the answer, and wherever its tokens were swapped."""
    caught = 0
    for seed in range(40):
        request, draws = questions(seed)
        assert not isinstance(request.completion, str)
        bad = make_bad(request.completion, request.positions, draws.randbytes)
        assert bad is not None
        asked = bad_question(request, bad)
        assert not isinstance(asked.completion, str)
        assert sorted(asked.completion) == sorted(request.completion)
        assert judge_bad(bad, HONEST.score(asked)) is Verdict.PASS
        assert judge_bad(bad, HONEST.score(request)) is Verdict.SUSPECT
        caught += judge_bad(bad, ToyModel(7).score(asked)) is Verdict.SUSPECT
    assert caught >= 36


def test_an_answer_of_one_token_cannot_be_made_bad() -> None:
    """Nor one that is too short."""
    draws = random.Random(1)
    assert make_bad([5] * 64, range(65), draws.randbytes) is None
    assert make_bad(range(MIN_SWAPPED), range(MIN_SWAPPED + 1), draws.randbytes) is None


def test_missing_rows_decide_nothing() -> None:
    """A referee that answers nothing is not caught by this."""
    request, draws = questions(1)
    assert not isinstance(request.completion, str)
    bad = make_bad(request.completion, request.positions, draws.randbytes)
    assert bad is not None
    few = ScoreRequest.of(REQUEST, bad.tokens, (0, 1, 2))
    assert judge_bad(bad, HONEST.score(few)) is Verdict.INCONCLUSIVE
