"""Integrity: how sure one may be that a provider's answers are what it sells, from the audits behind it.

A Beta distribution with forgetting: an audit counts half after HALF_LIFE further ones. The prior is low, so a newcomer, or a
cheater under a new key, starts low and earns its place. Matching uses the lower quantile: few audits say little.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from tallystick.audit.verdicts import Verdict

PRIOR = (1.0, 3.0)
"""Passes and failures that a provider without audits is taken to have."""
HALF_LIFE = 500
"""Audits after which an audit counts half."""
LOWER = 0.05
"""The quantile that matching uses."""
WEIGHTS = {Verdict.PASS: (1.0, 0.0), Verdict.SUSPECT: (0.0, 1.0), Verdict.CONFIRMED: (0.0, 50.0)}
"""What a verdict adds to passes and failures. INCONCLUSIVE adds nothing. CONFIRMED takes earlier passes away, too."""
TEXT_ONLY = 0.25
"""What a pass counts of an answer without evidence: its text alone does not show a quantization. Evidence of a part of the answer
counts in proportion.
"""
BASE_RATE, MORE_RATE = 0.02, 0.28
"""Share of the jobs of a trusted provider that are audited, and what is added for one that is not trusted at all."""
_TERMS = 24
"""Pairs of terms of the continued fraction; more for large parameters."""
NEWCOMER_JOBS = 50
"""Jobs of a provider that are audited at the full rate."""


@dataclass(frozen=True, slots=True)
class Integrity:
    """What the audits of a provider say. `audits`: those that decided something."""

    passes: float = 0.0
    failures: float = 0.0
    audits: int = 0

    def after(self, verdict: Verdict, *, weight: float = 1.0) -> Integrity:
        """With one more verdict. `weight`, from 0 to 1: what its reporter counts. INCONCLUSIVE changes nothing.

        Raises ValueError.
        """
        if not 0 <= weight <= 1:
            raise ValueError(f"weight: expected a number from 0 to 1, got {weight}")
        if verdict not in WEIGHTS or weight == 0:
            return self
        passes, failures = WEIGHTS[verdict]
        keep = 0.5 ** (weight / HALF_LIFE)
        kept_passes = self.passes * keep * (1 - weight if verdict is Verdict.CONFIRMED else 1)
        return Integrity(kept_passes + weight * passes, self.failures * keep + weight * failures, self.audits + 1)

    @property
    def mean(self) -> float:
        """The expected share of good answers, between 0 and 1."""
        good, bad = self.passes + PRIOR[0], self.failures + PRIOR[1]
        return good / (good + bad)

    @property
    def lower(self) -> float:
        """The share of good answers that is exceeded with probability 1 - LOWER."""
        return beta_quantile(LOWER, self.passes + PRIOR[0], self.failures + PRIOR[1])


def weight_of(verdict: Verdict, coverage: float) -> float:
    """What an audit's verdict counts, from TEXT_ONLY to 1. `coverage`: the share of the answer, from 0 to 1, that has evidence.

    Raises ValueError.
    """
    if not 0 <= coverage <= 1:
        raise ValueError(f"coverage: expected a number from 0 to 1, got {coverage}")
    return TEXT_ONLY + (1 - TEXT_ONLY) * coverage if verdict is Verdict.PASS else 1.0


def audit_rate(integrity: Integrity, jobs: int) -> float:
    """The share of a provider's jobs to audit. `jobs`: those that this client had from it."""
    if jobs < NEWCOMER_JOBS:
        return BASE_RATE + MORE_RATE
    return BASE_RATE + MORE_RATE * (1 - integrity.lower)


@functools.lru_cache(4_096)
def beta_quantile(probability: float, alpha: float, beta: float) -> float:
    """The quantile of a Beta distribution, by bisection. Raises ValueError for parameters that are not positive."""
    if not (0 <= probability <= 1 and alpha > 0 and beta > 0):
        raise ValueError("expected a probability and positive parameters")
    low, high = 0.0, 1.0
    while high - low > 1e-7:
        middle = (low + high) / 2
        if beta_cdf(middle, alpha, beta) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def beta_cdf(value: float, alpha: float, beta: float) -> float:
    """The regularized incomplete beta function, by its continued fraction (DLMF 8.17.22)."""
    if value <= 0 or value >= 1:
        return float(value >= 1)
    if value > (alpha + 1) / (alpha + beta + 2):  # the fraction converges fast on this side only
        return 1 - beta_cdf(1 - value, beta, alpha)
    terms, fraction = _TERMS + 4 * int(math.sqrt(alpha + beta)), 1.0
    for m in range(terms, -1, -1):
        odd = -(alpha + m) * (alpha + beta + m) * value / ((alpha + 2 * m) * (alpha + 2 * m + 1))
        even = m * (beta - m) * value / ((alpha + 2 * m - 1) * (alpha + 2 * m)) if m else 0.0
        fraction = 1 + odd / fraction
        if m:
            fraction = 1 + even / fraction
    front = alpha * math.log(value) + beta * math.log1p(-value) - _log_beta(alpha, beta)
    return math.exp(front) / alpha / fraction


def _log_beta(alpha: float, beta: float) -> float:
    return math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)
