"""Verdicts: of one audit, and of a provider over its audits.

One audit is at most SUSPECT, and one referee never convicts. A provider is CONFIRMED if so many of its audited jobs are suspect,
by at least two referees, that an honest provider gets there with a probability of at most MAX_FALSE. So a provider that cheats on
a part of its jobs is found too, only later.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass

FALSE_SUSPECT = 1e-3
"""The share of audits of honest providers that may be suspect. Thresholds are calibrated to it."""
MAX_FALSE = 2e-6
"""The probability that an honest provider is confirmed at a given audit. Many audits of many providers follow each other."""
MIN_SUSPECT_JOBS, MIN_REFEREES = 2, 2
WINDOW = 500
"""The latest audits that count."""


class Verdict(enum.StrEnum):
    """What is known of an audit, or of a provider."""

    PASS = "pass"  # noqa: S105 - not a password
    INCONCLUSIVE = "inconclusive"
    SUSPECT = "suspect"
    CONFIRMED = "confirmed"


@dataclass(frozen=True, slots=True)
class Finding:
    """One test of one audit. `statistic` above `threshold` is suspect; a test that could not decide is not `conclusive`."""

    test: str
    statistic: float
    threshold: float
    conclusive: bool = True

    @property
    def verdict(self) -> Verdict:
        """At most SUSPECT. A statistic that is not a number decides nothing."""
        if not self.conclusive or math.isnan(self.statistic):
            return Verdict.INCONCLUSIVE
        return Verdict.SUSPECT if self.statistic > self.threshold else Verdict.PASS


@dataclass(frozen=True, slots=True)
class Audit:
    """One audited job, as one referee saw it."""

    job: bytes
    referee: bytes
    verdict: Verdict


def judge(findings: Iterable[Finding]) -> Verdict:
    """The verdict of one audit: SUSPECT if any test is, PASS if none is and one could decide."""
    verdicts = {finding.verdict for finding in findings}
    if Verdict.SUSPECT in verdicts:
        return Verdict.SUSPECT
    return Verdict.PASS if Verdict.PASS in verdicts else Verdict.INCONCLUSIVE


def judge_provider(audits: Iterable[Audit], *, false_suspect: float = FALSE_SUSPECT) -> Verdict:
    """The verdict on a provider by its audits, oldest first. Several audits of a job count once, as suspect only if all are.

    A referee whose own audits disagree with others' on the same job therefore convicts nobody. Raises ValueError.
    """
    if not 0 < false_suspect < 1:
        raise ValueError(f"false_suspect: expected a probability between 0 and 1, got {false_suspect}")
    by_job: dict[bytes, list[Audit]] = {}
    for audit in audits:
        if audit.verdict is not Verdict.INCONCLUSIVE:
            by_job.setdefault(audit.job, []).append(audit)
    jobs = list(by_job.values())[-WINDOW:]
    suspects = [job for job in jobs if all(audit.verdict is not Verdict.PASS for audit in job)]
    if not jobs:
        return Verdict.INCONCLUSIVE
    if not suspects:
        return Verdict.PASS
    referees = {audit.referee for job in suspects for audit in job}
    enough = len(suspects) >= MIN_SUSPECT_JOBS and len(referees) >= MIN_REFEREES
    if enough and _tail(len(suspects), len(jobs), false_suspect) <= MAX_FALSE:
        return Verdict.CONFIRMED
    return Verdict.SUSPECT


def _tail(least: int, count: int, share: float) -> float:
    """The probability of at least `least` hits among `count` draws that hit with the probability `share`."""
    return math.fsum(math.comb(count, hits) * share**hits * (1 - share) ** (count - hits) for hits in range(least, count + 1))
