from __future__ import annotations

import pytest

from tallystick.audit.thresholds import MARGIN, MIN_SAMPLES, Thresholds, calibrate
from tallystick.protocol.errors import BadMessage


def test_a_threshold_keeps_its_margin_above_honest_audits() -> None:
    """A threshold keeps its margin above honest audits."""
    honest = [n / 1_000 for n in range(1_000)]
    assert calibrate(honest) == pytest.approx(MARGIN * 0.998)
    assert calibrate([*honest, float("nan")]) == calibrate(honest)


def test_one_outlier_of_few_audits_is_not_ignored() -> None:
    """One outlier of few audits is not ignored."""
    assert calibrate([0.001] * (MIN_SAMPLES - 1) + [0.02]) == pytest.approx(0.03)


def test_few_audits_calibrate_nothing() -> None:
    """Few audits calibrate nothing."""
    with pytest.raises(ValueError, match="expected at least 100 honest audits, got 99"):
        calibrate([0.1] * 99)


def test_thresholds_are_data() -> None:
    """Thresholds are data."""
    assert Thresholds.of({"divergence": 0.02}) == Thresholds(divergence=0.02)
    assert Thresholds.of({}) == Thresholds()


@pytest.mark.parametrize(
    ("document", "named"),
    [([], "thresholds: expected an object"), ({"divergense": 1}, "thresholds.divergense"), ({"margin": "1"}, "thresholds.margin")]
    + [({"margin": value}, "thresholds.margin") for value in (0, -1, True, float("inf"), float("nan"), None)],
)
def test_bad_thresholds_are_named(document: object, named: str) -> None:
    """Bad thresholds are named."""
    with pytest.raises(BadMessage, match=named):
        Thresholds.of(document)
