from __future__ import annotations

import math
import random

import pytest

from tallystick.audit.sampling import EDGE_NOISE, NOISE, OTHER, Sampling, outcome_bounds
from tallystick.audit.scores import Row
from tallystick.audit.surprisal import LOOSE, TILTS, WEIGHTS, Surprisal, measure_surprisal
from tests.audit.models import VOCABULARY, ToyModel

MODEL, OTHER_MODEL = ToyModel(1), ToyModel(2)


def pooled(writer: ToyModel, temperature: float, declared: Sampling, answers: int, seed: int = 5) -> Surprisal:
    """The evidence of several answers of 40 tokens."""
    draws, total = random.Random(seed), Surprisal()
    for _ in range(answers):
        total += measure_surprisal(MODEL.score(writer.write(draws, 40, temperature)), declared)
    return total


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_honest_answers_give_no_evidence(temperature: float) -> None:
    """Of 300 honest answers none gets near the threshold that one in 1,000 may reach, and pooling them makes it less."""
    draws, declared, total = random.Random(11), Sampling(temperature), Surprisal()
    for _ in range(300):
        measured = measure_surprisal(MODEL.score(MODEL.write(draws, 40, temperature)), declared)
        assert measured.log_evidence < math.log(1_000)
        total += measured
    assert total.log_evidence < math.log(1_000)


def test_expected_wealth_of_an_honest_answer_is_at_most_one() -> None:
    """The property on which the error rate rests, for each row and tilt, whatever is declared."""
    for declared in (
        Sampling(),
        Sampling(0.5),
        Sampling(2.0),
        Sampling(1, top_k=5),
        Sampling(0.8, top_p=0.9),
        Sampling(1, min_p=0.1),
    ):
        for last in range(0, VOCABULARY, 7):
            expected = 0.0
            honest = distribution(last, declared)
            for token, probability in honest.items():
                wealth = measure_surprisal({0: MODEL.row(last, token)}, declared).log_evidence
                expected += probability * math.exp(wealth)
            assert expected <= 1 + 1e-9


def distribution(last: int, sampling: Sampling) -> dict[int, float]:
    """What an honest engine draws from, by its whole vocabulary."""
    values = MODEL.logprobs(last, sampling.temperature)
    ordered = sorted(((math.exp(value), token) for token, value in enumerate(values)), reverse=True)
    if sampling.top_k:
        ordered = ordered[: sampling.top_k]
    if sampling.min_p:
        ordered = [entry for entry in ordered if entry[0] >= sampling.min_p * ordered[0][0]]
    if sampling.top_p < 1:
        whole, reached, kept = sum(weight for weight, _ in ordered), 0.0, []
        for entry in ordered:
            kept.append(entry)
            reached += entry[0]
            if reached >= sampling.top_p * whole:
                break
        ordered = kept
    total = sum(weight for weight, _ in ordered)
    return {token: weight / total for weight, token in ordered}


@pytest.mark.parametrize(
    ("writer", "temperature", "answers"),
    [(OTHER_MODEL, 1.0, 1), (MODEL, 0.5, 12), (MODEL, 1.6, 12)],
    ids=["other model", "colder", "hotter"],
)
def test_cheaters_are_seen(writer: ToyModel, temperature: float, answers: int) -> None:
    """Cheaters are seen."""
    assert pooled(writer, temperature, Sampling(), answers).log_evidence > math.log(1_000)


def test_bounds_are_above_the_true_probabilities() -> None:
    """Bounds are above the true probabilities."""
    for temperature in (0.5, 1.0, 2.0):
        for listed in (1, 5, 20):
            bounds = outcome_bounds(MODEL.row(3, 0, listed), Sampling(temperature))
            true = [math.exp(value) for value in MODEL.logprobs(3, temperature)]
            assert all(true[token] <= bound for token, bound in bounds.items() if token != OTHER)
            assert sum(value for token, value in enumerate(true) if token not in bounds) <= bounds[OTHER]


def test_truncation_leaves_what_cannot_be_drawn_only_the_noise() -> None:
    """Truncation leaves what cannot be drawn only the noise."""
    row = Row(1, {1: math.log(0.6), 2: math.log(0.3), 3: math.log(0.06)})
    noise = EDGE_NOISE
    assert outcome_bounds(row, Sampling(top_k=2)) == pytest.approx({1: 2 / 3 + noise, 2: 1 / 3 + noise, 3: noise, OTHER: noise})
    assert outcome_bounds(row, Sampling(top_p=0.85))[3] == noise
    assert outcome_bounds(row, Sampling(min_p=0.2))[OTHER] == noise
    assert outcome_bounds(Row(1, {}), Sampling()) == {OTHER: 1 + NOISE}


def test_rows_without_numbers_are_left_out() -> None:
    """Rows without numbers are left out."""
    assert measure_surprisal({0: Row(1, {})}, Sampling()) == Surprisal()
    assert Surprisal().log_evidence == 0


def row_of(token: int, likely: float) -> Row:
    """A row of two tokens. The others have the rest."""
    return Row(token, {1: math.log(likely), 2: math.log(min(0.1, 1 - likely) / 2)})


def test_nobody_bets_where_a_row_says_too_little() -> None:
    """Whatever the token is: the choice must not depend on it. A low temperature makes rows loose that are tight at 1."""
    for token in (1, 2, 3):
        loose, tight = row_of(token, 0.3), row_of(token, 0.9)
        assert math.fsum(outcome_bounds(loose, Sampling(0.7)).values()) > LOOSE
        assert math.fsum(outcome_bounds(tight, Sampling(0.7)).values()) <= LOOSE
        assert measure_surprisal({0: loose}, Sampling(0.7)) == Surprisal()
        assert measure_surprisal({0: loose}, Sampling()).positions == 1
        bet = measure_surprisal({0: loose, 1: tight}, Sampling(0.7))
        assert bet == measure_surprisal({1: tight}, Sampling(0.7))
        assert bet.positions == 1
        assert all(bet.wealth)


def test_the_stake_is_one_and_is_divided_among_the_bets() -> None:
    """So the mixture of fair bets is a fair bet, and what one of them gains counts by its share."""
    assert len(WEIGHTS) == len(TILTS)
    assert math.fsum(WEIGHTS) == pytest.approx(1)
    assert min(WEIGHTS) > 0
    for index, weight in enumerate(WEIGHTS):
        alone = tuple(20.0 if other == index else -1e3 for other in range(len(TILTS)))
        assert Surprisal(alone, 1).log_evidence == pytest.approx(20 + math.log(weight))


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}, {"min_p": 2}], ids=str
)
def test_sampling_out_of_range_is_refused(wrong: dict[str, float]) -> None:
    """Sampling out of range is refused."""
    with pytest.raises(ValueError, match="expected"):
        Sampling(**wrong)  # type: ignore[arg-type]
