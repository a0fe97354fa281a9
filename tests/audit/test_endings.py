from __future__ import annotations

import math

import pytest

from tallystick.audit.endings import MIN_REPLAY_TOKENS, cut_evidence, replay_evidence


def test_an_end_that_was_likely_is_evidence_against_a_cut() -> None:
    """An end that was likely is evidence against a cut."""
    assert cut_evidence(math.log(0.9), 100) == -math.log(2)


def test_an_end_that_nobody_would_draw_is_evidence_of_a_cut() -> None:
    """An end that nobody would draw is evidence of a cut."""
    assert cut_evidence(math.log(1e-12), 100) > math.log(1_000)
    assert cut_evidence(math.log(1e-12), 100) == pytest.approx(-math.log(2) - 0.5 * math.log(1.01e-10))


def test_expected_evidence_of_honest_answers_is_at_most_one() -> None:
    """Over answers that end at each position with the same small probability, however small it is."""
    for hazard in (0.5, 1e-2, 1e-4, 1e-9):
        length = 200
        expected, alive = 0.0, 1.0
        for tokens in range(length):
            expected += alive * hazard * math.exp(cut_evidence(math.log(hazard), tokens))
            alive *= 1 - hazard
        assert expected <= 1


@pytest.mark.parametrize(("logprob", "tokens"), [(0.1, 5), (float("nan"), 5), (-1.0, -1)])
def test_cut_evidence_checks_its_numbers(logprob: float, tokens: int) -> None:
    """Cut evidence checks its numbers."""
    with pytest.raises(ValueError, match="expected"):
        cut_evidence(logprob, tokens)


def test_a_replayed_answer_is_as_unlikely_as_its_tokens() -> None:
    """A replayed answer is as unlikely as its tokens."""
    tokens = list(range(50))
    assert replay_evidence(tokens, [1.5] * 50, tokens) == pytest.approx(75)
    assert replay_evidence(tokens, [1.5] * 50, [*tokens[:20], 999]) == pytest.approx(30)


def test_short_starts_and_certain_tokens_are_no_replay() -> None:
    """Short starts and certain tokens are no replay."""
    tokens = list(range(50))
    assert replay_evidence(tokens, [1.5] * 50, tokens[: MIN_REPLAY_TOKENS - 1]) == 0
    assert replay_evidence(tokens, [1.5] * 50, tokens[:MIN_REPLAY_TOKENS]) > 0
    assert replay_evidence(tokens, [0.0] * 50, tokens) == 0
    assert replay_evidence(tokens, [1.5] * 50, [999, *tokens]) == 0


def test_each_token_needs_its_surprisal() -> None:
    """Each token needs its surprisal."""
    with pytest.raises(ValueError, match="expected 2"):
        replay_evidence([1, 2], [0.5], [1, 2])
