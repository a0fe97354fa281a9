from __future__ import annotations

import random

import pytest

from tallystick.audit.divergence import FLOOR, MIN_POSITIONS, TOP, measure_divergence
from tallystick.audit.scores import Row
from tests.audit.models import ToyModel

MODEL = ToyModel(1)
TOKENS = MODEL.write(random.Random(7), 64)


def test_equal_numbers_have_no_distance() -> None:
    """Equal numbers have no distance."""
    measured = measure_divergence(MODEL.score(TOKENS, TOP), MODEL.score(TOKENS))
    assert measured.mean == 0
    assert measured.positions == 63
    assert measured.conclusive


def test_distance_is_the_mean_of_relative_differences_scaled() -> None:
    """A row of five is at most TOP / 2 away, and so is one with fewer tokens: leaving some out brings nobody nearer."""
    ours, theirs = Row(1, {1: -1.0, 2: -2.0}), Row(1, {1: -3.0, 2: -2.0, 3: -4.0})
    assert measure_divergence({0: ours}, {0: theirs}).mean == pytest.approx((2 / (4 + FLOOR)) / 2 * TOP / 2)


def test_a_token_that_the_referee_lacks_is_at_most_as_probable_as_its_last() -> None:
    """A token that the referee lacks is at most as probable as its last."""
    ours, theirs = Row(1, {1: -1.0, 9: -2.0}), Row(1, {1: -1.0, 3: -6.0})
    assert measure_divergence({0: ours}, {0: theirs}).mean == pytest.approx((4 / (8 + FLOOR)) / 2 * TOP / 2)
    unlikely = Row(1, {1: -1.0, 9: -8.0})  # it may be as unlikely for the referee
    assert measure_divergence({0: unlikely}, {0: theirs}).mean == 0


def test_the_rounding_of_evidence_is_no_difference() -> None:
    """A sure token is rounded to 0, which is nothing of its own logarithm and all of its ratio."""
    ours, theirs = Row(1, {1: 0.0, 2: -8.0}), Row(1, {1: -0.0004, 2: -8.0004})
    assert measure_divergence({0: ours}, {0: theirs}).mean < 0.003 * TOP / 2


@pytest.mark.parametrize(("noise", "least"), [(0.05, 0.01), (0.3, 0.05)])
def test_coarser_weights_are_seen(noise: float, least: float) -> None:
    """Coarser weights are seen."""
    other = ToyModel(1, noise)
    tokens = other.write(random.Random(3), 64)
    assert measure_divergence(other.score(tokens, TOP), MODEL.score(tokens)).mean > least


def test_only_the_best_five_are_compared() -> None:
    """Only the best five are compared."""
    ours = Row(1, {token: -float(token) for token in range(1, 8)})
    theirs = Row(1, {**ours.logprobs, 6: -60.0, 7: -70.0})
    assert measure_divergence({0: ours}, {0: theirs}).mean == 0


def test_misaligned_and_missing_rows_are_nobodys_guilt() -> None:
    """Misaligned and missing rows are nobodys guilt."""
    ours = {0: Row(1, {1: -1.0}), 1: Row(2, {2: -1.0}), 2: Row(3, {}), 3: Row(4, {4: 0.0})}
    theirs = {0: Row(9, {9: -5.0}), 2: Row(3, {3: -5.0}), 3: Row(4, {})}
    measured = measure_divergence(ours, theirs)
    assert (measured.mean, measured.positions, measured.conclusive) == (0, 0, False)


def test_few_positions_are_inconclusive() -> None:
    """Few positions are inconclusive."""
    few = dict(list(MODEL.score(TOKENS).items())[: MIN_POSITIONS - 1])
    assert not measure_divergence(few, MODEL.score(TOKENS)).conclusive
    assert measure_divergence(dict(list(MODEL.score(TOKENS).items())[:MIN_POSITIONS]), MODEL.score(TOKENS)).conclusive


@pytest.mark.parametrize("value", [0.1, float("nan"), float("inf")])
def test_rows_are_checked(value: float) -> None:
    """Rows are checked."""
    with pytest.raises(ValueError, match="log-probabilities"):
        Row(1, {1: value})


def tempered(model: ToyModel, tokens: list[int], temperature: float) -> dict[int, Row]:
    """Evidence of an engine that reports probabilities at the temperature of the request, as SGLang does."""
    rows = {}
    for position in range(1, len(tokens)):
        values = model.logprobs(tokens[position - 1], temperature)
        best = sorted(range(len(values)), key=lambda token: -values[token])[:TOP]
        rows[position] = Row(tokens[position], {token: round(values[token], 3) for token in best})
    return rows


@pytest.mark.parametrize("temperature", [0.3, 0.7, 0.99, 1.4])
def test_engines_may_report_at_the_temperature_of_the_request(temperature: float) -> None:
    """Such an honest engine is no more suspect than another; at a temperature that nobody asked for it would be."""
    evidence, referee = tempered(MODEL, TOKENS, temperature), MODEL.score(TOKENS)
    assert measure_divergence(evidence, referee, (temperature,)).mean < 0.003
    if temperature != 0.99:
        assert measure_divergence(evidence, referee).mean > 0.01


@pytest.mark.parametrize("temperature", [0.0, 0.3, 0.7, 1.4])
def test_no_scale_hides_other_weights(temperature: float) -> None:
    """Numbers of coarser weights are far from the right ones at every temperature; greedy decoding has none of its own."""
    other = ToyModel(1, 0.2)
    tokens = other.write(random.Random(3), 64)
    plain = measure_divergence(other.score(tokens, TOP), MODEL.score(tokens))
    either = measure_divergence(other.score(tokens, TOP), MODEL.score(tokens), (temperature,))
    assert 0.03 < either.mean <= plain.mean
    scaled = tempered(other, tokens, temperature or 1.0)
    assert measure_divergence(scaled, MODEL.score(tokens), (temperature,)).mean > 0.03
