from __future__ import annotations

import random

import pytest

from tallystick.audit.greedy_margin import MAX_MARGIN, MIN_POSITIONS, measure_margin
from tallystick.audit.scores import Row
from tests.audit.models import ToyModel

MODEL = ToyModel(1)


def test_the_best_tokens_have_no_margin() -> None:
    """The best tokens have no margin."""
    measured = measure_margin(MODEL.score(MODEL.write(random.Random(1), 40, temperature=0)))
    assert measured.mean == 0
    assert measured.conclusive


def test_another_writer_is_seen() -> None:
    """Another writer is seen."""
    measured = measure_margin(MODEL.score(ToyModel(2).write(random.Random(1), 40, temperature=0)))
    assert measured.mean > 1


def test_a_near_tie_counts_by_its_difference() -> None:
    """A near tie counts by its difference."""
    assert measure_margin({0: Row(2, {1: -0.70, 2: -0.72})}).mean == pytest.approx(0.02)


def test_a_token_that_is_not_listed_counts_as_the_last_one_and_no_margin_exceeds_the_maximum() -> None:
    """A token that is not listed counts as the last one and no margin exceeds the maximum."""
    assert measure_margin({0: Row(9, {1: -0.5, 2: -2.0})}).mean == pytest.approx(1.5)
    assert measure_margin({0: Row(2, {1: -0.1, 2: -30.0})}).mean == MAX_MARGIN


def test_few_or_empty_rows_are_inconclusive() -> None:
    """Few or empty rows are inconclusive."""
    rows = MODEL.score(MODEL.write(random.Random(1), MIN_POSITIONS + 1, temperature=0))
    assert measure_margin(rows).conclusive
    rows[1] = Row(rows[1].token, {})
    assert not measure_margin(rows).conclusive
    assert measure_margin({}).mean == 0
