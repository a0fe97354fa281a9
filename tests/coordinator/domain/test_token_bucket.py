from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.domain.token_bucket import TokenBucket


def test_a_burst_and_then_a_pace() -> None:
    """So much at once, then so much a second, and no more saved up than the burst."""
    bucket = TokenBucket(rate=2, burst=3)
    assert [bucket.try_spend("ann", 0) for _ in range(5)] == [True, True, True, False, False]
    assert bucket.delay("ann", 0) == 0.5
    assert bucket.try_spend("ann", 0.5)
    assert not bucket.try_spend("ann", 0.5)
    assert [bucket.try_spend("ann", 100) for _ in range(4)] == [True, True, True, False]


def test_parties_do_not_share() -> None:
    """One that spent everything takes nothing from another."""
    bucket = TokenBucket(rate=1, burst=1)
    assert bucket.try_spend("ann", 0)
    assert not bucket.try_spend("ann", 0)
    assert bucket.delay("bob", 0) == 0
    assert bucket.try_spend("bob", 0)


def test_memory_is_bounded() -> None:
    """However many strangers come, only the last are remembered."""
    bucket = TokenBucket(rate=1, burst=1)
    for number in range(20_000):
        bucket.try_spend(str(number), 0)
    assert len(bucket._levels) == 10_000
    assert not bucket.try_spend("19999", 0)


@given(st.lists(st.floats(0, 5), max_size=60), st.floats(0.1, 10), st.integers(1, 10))
def test_never_more_than_the_pace_allows(gaps: list[float], rate: float, burst: int) -> None:
    """Over any time, what was let through is at most the burst and the rate times that time."""
    bucket, now, through = TokenBucket(rate, burst), 0.0, 0
    for gap in gaps:
        now += gap
        through += bucket.try_spend("ann", now)
        assert through <= burst + rate * now + 1e-6


def test_a_debt_is_paid_off() -> None:
    """What was taken beyond the budget is waited for, whoever of many takes it at once."""
    bucket = TokenBucket(rate=2, burst=3)
    assert bucket.overdraw("ann", 0, 3) == 0
    assert bucket.overdraw("ann", 0, 4) == 2
    assert bucket.overdraw("ann", 0, 4) == 4
    assert bucket.overdraw("ann", 4, 0) == 0
