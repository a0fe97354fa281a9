from __future__ import annotations

import math

import pytest

from tallystick.audit.integrity import NEWCOMER_JOBS, Integrity, audit_rate, beta_cdf, beta_quantile, weight_of
from tallystick.audit.verdicts import Verdict


@pytest.mark.parametrize(
    ("value", "alpha", "beta", "expected"),
    [
        (0.3, 1, 1, 0.3),
        (0.3, 2, 1, 0.09),
        (0.2, 1, 3, 0.488),
        (0.5, 5, 5, 0.5),
        (1, 2, 2, 1),
        (0, 2, 2, 0),
    ],
)
def test_beta_distribution(value: float, alpha: float, beta: float, expected: float) -> None:
    """Against closed forms; for whole parameters the distribution is a tail of the binomial one."""
    assert beta_cdf(value, alpha, beta) == pytest.approx(expected, abs=1e-9)
    assert beta_cdf(value, alpha, beta) == pytest.approx(binomial_tail(int(alpha), int(alpha + beta) - 1, value), abs=1e-9)


def binomial_tail(least: int, count: int, share: float) -> float:
    """The probability of at least `least` hits in `count` draws."""
    return math.fsum(math.comb(count, hits) * share**hits * (1 - share) ** (count - hits) for hits in range(least, count + 1))


@pytest.mark.parametrize("parameters", [(1, 3), (0.5, 0.5), (51, 3), (700, 3), (1, 80), (720, 720)])
def test_quantile_inverts_the_distribution(parameters: tuple[float, float]) -> None:
    """Quantile inverts the distribution."""
    for probability in (0.05, 0.5, 0.95):
        assert beta_cdf(beta_quantile(probability, *parameters), *parameters) == pytest.approx(probability, abs=1e-5)


def after(*verdicts: Verdict, start: Integrity | None = None) -> Integrity:
    """Integrity after these verdicts."""
    integrity = start or Integrity()
    for verdict in verdicts:
        integrity = integrity.after(verdict)
    return integrity


def test_a_newcomer_starts_low_and_earns_its_place() -> None:
    """A newcomer starts low and earns its place."""
    assert Integrity().lower < 0.02
    assert after(*[Verdict.PASS] * 10).lower < after(*[Verdict.PASS] * 50).lower
    assert 0.85 < after(*[Verdict.PASS] * 50).lower < 0.95


def test_a_confirmed_cheater_falls_below_a_newcomers_mean() -> None:
    """A confirmed cheater falls below a newcomers mean."""
    assert after(*[Verdict.PASS] * 300, Verdict.CONFIRMED).lower < 0.85
    assert after(*[Verdict.PASS] * 20, Verdict.CONFIRMED).mean < Integrity().mean + 0.05


def test_suspicion_lowers_and_is_forgotten() -> None:
    """Suspicion lowers and is forgotten."""
    trusted = after(*[Verdict.PASS] * 500)
    doubted = trusted.after(Verdict.SUSPECT)
    assert doubted.lower < trusted.lower
    assert after(*[Verdict.PASS] * 500, start=doubted).lower == pytest.approx(
        after(*[Verdict.PASS] * 500, start=trusted).lower, abs=0.002
    )
    assert trusted.after(Verdict.INCONCLUSIVE) == trusted
    assert trusted.audits == 500


def test_reports_count_by_their_weight() -> None:
    """Reports count by their weight."""
    trusted = after(*[Verdict.PASS] * 100)
    assert trusted.after(Verdict.SUSPECT, weight=0) == trusted
    assert trusted.after(Verdict.SUSPECT).lower < trusted.after(Verdict.SUSPECT, weight=0.2).lower < trusted.lower
    with pytest.raises(ValueError, match="weight"):
        trusted.after(Verdict.PASS, weight=1.5)


def test_audit_rate_falls_with_integrity() -> None:
    """Audit rate falls with integrity."""
    assert audit_rate(after(*[Verdict.PASS] * 500), NEWCOMER_JOBS - 1) == pytest.approx(0.3)
    assert audit_rate(after(*[Verdict.PASS] * 500), NEWCOMER_JOBS) < 0.03
    assert audit_rate(Integrity(), 10_000) > 0.29


@pytest.mark.parametrize("arguments", [(2, 1, 1), (0.5, 0, 1), (0.5, 1, -1)])
def test_quantile_checks_its_numbers(arguments: tuple[float, float, float]) -> None:
    """Quantile checks its numbers."""
    with pytest.raises(ValueError, match="expected"):
        beta_quantile(*arguments)


@pytest.mark.parametrize(("coverage", "weight"), [(0.0, 0.25), (0.5, 0.625), (1.0, 1.0)])
def test_a_pass_counts_by_its_evidence(coverage: float, weight: float) -> None:
    """From a quarter, for a text alone, to a whole one. What accuses counts in full."""
    assert weight_of(Verdict.PASS, coverage) == weight
    assert weight_of(Verdict.SUSPECT, coverage) == weight_of(Verdict.CONFIRMED, coverage) == 1


@pytest.mark.parametrize("coverage", [-0.01, 1.01, float("nan")])
def test_coverage_is_a_share(coverage: float) -> None:
    """Nothing else."""
    with pytest.raises(ValueError, match="coverage"):
        weight_of(Verdict.PASS, coverage)
