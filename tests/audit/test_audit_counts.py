from __future__ import annotations

import math

import pytest

from tallystick.audit.audit_counts import LATEST, MIN_UNVERIFIABLE, NAMED_SHARE, AuditCounts


@pytest.mark.parametrize(
    ("counts", "named"),
    [
        (AuditCounts(), False),
        (AuditCounts(unverifiable=2), False),
        (AuditCounts(unverifiable=3), True),
        (AuditCounts(passed=12, unverifiable=3), False),
        (AuditCounts(passed=11, unverifiable=3), True),
        (AuditCounts(suspect=12, unverifiable=3), False),
        (AuditCounts(inconclusive=90, unverifiable=3), True),
        (AuditCounts(inconclusive=90), False),
        (AuditCounts(passed=80, unverifiable=20), False),
        (AuditCounts(passed=79, unverifiable=21), True),
    ],
)
def test_a_provider_is_named_from_three_and_a_fifth(counts: AuditCounts, named: bool) -> None:
    """What the referees could not decide is nobody's doing, and does not count."""
    assert counts.is_named is named


def test_an_honest_provider_is_hardly_ever_named() -> None:
    """One whose node loses the evidence of one answer in a hundred: at any time in its latest audits, below 1 in 1,000."""

    def at_least(least: int, count: int, share: float) -> float:
        return math.fsum(math.comb(count, hits) * share**hits * (1 - share) ** (count - hits) for hits in range(least, count + 1))

    for count in range(1, LATEST + 1):
        least = max(MIN_UNVERIFIABLE, math.floor(NAMED_SHARE * count) + 1)
        assert at_least(least, count, 0.01) < 1e-3


def test_counts_in_words() -> None:
    """As commands show them."""
    counts = AuditCounts(1, 2, 3, 4)
    assert str(counts) == "1 passed, 2 suspect, 3 inconclusive, 4 unverifiable"
    assert counts.total == 10
