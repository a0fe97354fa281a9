from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tallystick.runtime.token_bucket import TokenBucket


def test_a_burst_and_then_the_rate() -> None:
    """A burst, then the rate; idle time saves up no more than the burst."""
    bucket = TokenBucket(rate=2, burst=3)
    assert [bucket.try_spend("ann", 0) for _ in range(5)] == [True, True, True, False, False]
    assert bucket.delay("ann", 0) == 0.5
    assert bucket.try_spend("ann", 0.5)
    assert not bucket.try_spend("ann", 0.5)
    assert [bucket.try_spend("ann", 100) for _ in range(4)] == [True, True, True, False]


def test_keys_do_not_share() -> None:
    """A key that spent everything takes nothing from another key."""
    bucket = TokenBucket(rate=1, burst=1)
    assert bucket.try_spend("ann", 0)
    assert not bucket.try_spend("ann", 0)
    assert bucket.delay("bob", 0) == 0
    assert bucket.try_spend("bob", 0)


def test_memory_is_bounded() -> None:
    """Only the keys that were used last are remembered."""
    bucket = TokenBucket(rate=1, burst=1, max_keys=1_000)
    for number in range(2_000):
        bucket.try_spend(str(number), 0)
    assert len(bucket._levels) == 1_000
    assert not bucket.try_spend("1999", 0)
    assert bucket.try_spend("999", 0)


@given(st.lists(st.floats(0, 5), max_size=60), st.floats(0.1, 10), st.integers(1, 10))
def test_never_more_than_the_rate_allows(gaps: list[float], rate: float, burst: int) -> None:
    """Over any time, at most the burst plus the rate times that time is spent."""
    bucket, now, through = TokenBucket(rate, burst), 0.0, 0
    for gap in gaps:
        now += gap
        through += bucket.try_spend("ann", now)
        assert through <= burst + rate * now + 1e-6


def test_a_debt_is_refilled() -> None:
    """A debt delays the key until it is refilled."""
    bucket = TokenBucket(rate=2, burst=3)
    assert bucket.overdraw("ann", 0, 3) == 0
    assert bucket.overdraw("ann", 0, 4) == 2
    assert bucket.overdraw("ann", 0, 4) == 4
    assert bucket.overdraw("ann", 4, 0) == 0


def test_refunds() -> None:
    """What was taken for nothing can be taken again, but nothing beyond the burst."""
    bucket = TokenBucket(rate=1, burst=2)
    bucket.refund("ann", 0)
    assert [bucket.try_spend("ann", 0) for _ in range(3)] == [True, True, False]
    bucket.refund("ann", 0)
    assert [bucket.try_spend("ann", 0) for _ in range(2)] == [True, False]
    bucket.refund("ann", 5)
    assert bucket.delay("bob", 5) == 0
    assert [bucket.try_spend("ann", 5) for _ in range(3)] == [True, True, False]


def test_a_clock_that_is_set_back() -> None:
    """A clock that is set back takes no tokens, and refills none."""
    bucket = TokenBucket(rate=1, burst=2)
    assert bucket.try_spend("ann", 1_000)
    assert [bucket.try_spend("ann", 10) for _ in range(2)] == [True, False]
    assert bucket.try_spend("ann", 11)
