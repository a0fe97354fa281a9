"""What the opinions of an audit's referees mean together: whether another one is asked, and what the provider did. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from tallystick.audit.verdicts import Audit, Finding, Referees, Verdict, needs_opinion
from tallystick.client.audits.findings import DIVERGENCE
from tallystick.client.audits.planning import is_own
from tallystick.client.audits.records import KnownAudit, Opinion
from tallystick.client.audits.subject import Subject

MAX_ASKED: Final = 12
"""Referees that one job is shown to at most."""
MAX_SILENT: Final = 3
"""Referees of one job that may have nothing to say."""
MIN_INCOMPARABLE: Final = 2
"""Referees that must fail to compare an answer with its evidence before that is the provider's doing."""


def votes_of(audit: KnownAudit, opinions: Sequence[Opinion]) -> list[Audit]:
    """The opinions as votes on the audit's job."""
    return [Audit(audit.job.encode(), opinion.referee.encode(), opinion.verdict) for opinion in opinions]


def wants_more(opinions: Sequence[Opinion], audit: KnownAudit, rules: Referees) -> bool:
    """Whether another referee should see an answer because too few said something, or agree."""
    if len(opinions) >= MAX_ASKED:
        return False
    if all(opinion.verdict is Verdict.INCONCLUSIVE for opinion in opinions):
        return len(opinions) < MAX_SILENT
    return needs_opinion(votes_of(audit, opinions), rules)


def can_compare(opinions: Sequence[Opinion]) -> bool:
    """Whether a referee's numbers could be compared with those that the provider committed to."""
    return any(finding.test == DIVERGENCE and finding.conclusive for opinion in opinions for finding in opinion.findings)


def is_unscorable(subject: Subject, opinions: Sequence[Opinion]) -> bool:
    """Whether an answer consists of rows alone that several referees could not score."""
    silent = not any(opinion.findings for opinion in opinions)
    return not subject.text and silent and len(opinions) >= MIN_INCOMPARABLE


def are_several(opinions: Sequence[Opinion]) -> bool:
    """Whether what referees could not do is the provider's doing: a single one may be at fault, or want to harm a rival."""
    return len(opinions) >= MIN_INCOMPARABLE or any(is_own(opinion.referee) for opinion in opinions)


def wants_comparison(subject: Subject, opinions: Sequence[Opinion]) -> bool:
    """Whether another referee should see an answer that passed, whose evidence nobody could compare so far."""
    passed = any(opinion.verdict is Verdict.PASS for opinion in opinions)
    accused = any(opinion.verdict is Verdict.SUSPECT for opinion in opinions)
    comparable = subject.kept.has_root and not subject.withheld
    return comparable and passed and not accused and not can_compare(opinions) and not are_several(opinions)


def describe(opinions: Sequence[Opinion], verdict: Verdict) -> str:
    """What the referees found, in words."""
    deciding = [finding for opinion in opinions for finding in opinion.findings if finding.verdict is verdict]
    worst: Mapping[str, Finding] = {finding.test: finding for finding in sorted(deciding, key=lambda item: item.statistic)}
    tests = ", ".join(f"{test} {finding.statistic:.4g} of {finding.threshold:.4g}" for test, finding in worst.items())
    said = f"{sum(opinion.verdict is verdict for opinion in opinions)} of {len(opinions)} referees"
    return f"{said}: {tests}" if tests else said
