from __future__ import annotations

import pytest

from tallystick.audit.token_counts import MIN_TOKENS, PooledCounts
from tallystick.audit.verdicts import Verdict


@pytest.mark.parametrize(
    ("billed", "verdict"),
    [
        (1.0, "pass"),
        (0.9, "pass"),
        (1.01, "pass"),
        (1.0101, "suspect"),
        (1.02, "suspect"),
        (1.0201, "confirmed"),
        (1.05, "confirmed"),
    ],
)
def test_surplus_of_many_tokens_is_judged(billed: float, verdict: str) -> None:
    """Surplus of many tokens is judged."""
    assert PooledCounts(round(billed * 100_000), 100_000).verdict is Verdict(verdict)


def test_few_tokens_are_inconclusive() -> None:
    """Few tokens are inconclusive."""
    counts = PooledCounts()
    for _ in range(MIN_TOKENS // 100 - 1):
        counts = counts.add(150, 100)
    assert counts.verdict is Verdict.INCONCLUSIVE
    assert counts.add(150, 100).verdict is Verdict.CONFIRMED
    assert PooledCounts().surplus == 0


def test_negative_counts_are_refused() -> None:
    """Negative counts are refused."""
    with pytest.raises(ValueError, match="tokens"):
        PooledCounts().add(-1, 1)
