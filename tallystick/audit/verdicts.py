"""Verdicts: of one audit, and of a provider over its audits.

One audit is at most SUSPECT, and one referee never convicts. A suspect job is shown to further referees until OPINIONS agree.
Only jobs on which all of them agree convict, so referees that work together must meet by chance to accuse an honest provider. A
provider is CONFIRMED if so many of its jobs convict that an honest one gets there with a probability of at most MAX_FALSE. So a
provider that cheats on a part of its jobs is found too, only later.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass

FALSE_SUSPECT = 1e-3
"""The share of audits of honest providers that may be suspect. Thresholds are calibrated to it."""
MAX_FALSE = 5e-6
"""The probability that an honest provider is confirmed at a given audit. Many audits of many providers follow each other."""
OPINIONS = 3
"""Referees that must find a job suspect for it to count."""
CAPTURED = 0.1
"""The assumed share of referees that accuse whom they want."""
MIN_SUSPECT_JOBS = 2
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


@dataclass(frozen=True, slots=True)
class Referees:
    """How far referees are trusted. `opinions`, at least 2: those that a suspect job needs. `captured`: see CAPTURED.

    Raises ValueError.
    """

    opinions: int = OPINIONS
    captured: float = CAPTURED

    def __post_init__(self) -> None:
        if self.opinions < 2 or not 0 <= self.captured < 1:
            raise ValueError("referees: expected at least 2 opinions, and a share from 0 to below 1")

    @property
    def false_suspect(self) -> float:
        """The share of the jobs of an honest provider that count as suspect, by chance or by captured referees alone."""
        return FALSE_SUSPECT + self.captured**self.opinions


DEFAULT_REFEREES = Referees()


def needs_opinion(audits: Iterable[Audit], referees: Referees = DEFAULT_REFEREES) -> bool:
    """Whether another referee should see a job that has been audited so: it is suspect by too few, or they disagree."""
    passing, suspecting = _votes(audits)
    return bool(suspecting) and max(len(passing), len(suspecting)) < referees.opinions


def judge_job(audits: Iterable[Audit], referees: Referees = DEFAULT_REFEREES) -> Verdict:
    """The verdict on a job: that of all its referees, or of the first OPINIONS that agree where they do not."""
    passing, suspecting = _votes(audits)
    if not passing and not suspecting:
        return Verdict.INCONCLUSIVE
    if not passing or not suspecting:
        return Verdict.SUSPECT if suspecting else Verdict.PASS
    if max(len(passing), len(suspecting)) < referees.opinions:
        return Verdict.INCONCLUSIVE
    return Verdict.SUSPECT if len(suspecting) > len(passing) else Verdict.PASS


def judge_provider(audits: Iterable[Audit], referees: Referees = DEFAULT_REFEREES) -> Verdict:
    """The verdict on a provider by its audits, oldest first. Only jobs on which all referees agree convict."""
    by_job: dict[bytes, list[Audit]] = {}
    for audit in audits:
        by_job.setdefault(audit.job, []).append(audit)
    jobs = [job for job in by_job.values() if judge_job(job, referees) is not Verdict.INCONCLUSIVE][-WINDOW:]
    suspects = [_votes(job) for job in jobs if judge_job(job, referees) is not Verdict.PASS]
    if not jobs:
        return Verdict.INCONCLUSIVE
    if not suspects:
        return Verdict.PASS
    sure = sum(not passing and len(suspecting) >= referees.opinions for passing, suspecting in suspects)
    if sure >= MIN_SUSPECT_JOBS and _tail(sure, len(jobs), referees.false_suspect) <= MAX_FALSE:
        return Verdict.CONFIRMED
    return Verdict.SUSPECT


def _votes(audits: Iterable[Audit]) -> tuple[set[bytes], set[bytes]]:
    """The referees that pass a job, and those that find it suspect. One that said both counts for both."""
    passing, suspecting = set[bytes](), set[bytes]()
    for audit in audits:
        if audit.verdict is not Verdict.INCONCLUSIVE:
            (passing if audit.verdict is Verdict.PASS else suspecting).add(audit.referee)
    return passing, suspecting


def _tail(least: int, count: int, share: float) -> float:
    """The probability of at least `least` hits among `count` draws that hit with the probability `share`."""
    return math.fsum(math.comb(count, hits) * share**hits * (1 - share) ** (count - hits) for hits in range(least, count + 1))
