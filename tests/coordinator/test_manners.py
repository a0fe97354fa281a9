from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.manners import Budget


def test_a_burst_and_then_a_pace() -> None:
    """So much at once, then so much a second, and no more saved up than the burst."""
    budget = Budget(rate=2, burst=3)
    assert [budget.spend("ann", 0) for _ in range(5)] == [True, True, True, False, False]
    assert budget.wait("ann", 0) == 0.5
    assert budget.spend("ann", 0.5)
    assert not budget.spend("ann", 0.5)
    assert [budget.spend("ann", 100) for _ in range(4)] == [True, True, True, False]


def test_parties_do_not_share() -> None:
    """One that spent everything takes nothing from another."""
    budget = Budget(rate=1, burst=1)
    assert budget.spend("ann", 0)
    assert not budget.spend("ann", 0)
    assert budget.wait("bob", 0) == 0
    assert budget.spend("bob", 0)


def test_memory_is_bounded() -> None:
    """However many strangers come, only the last are remembered."""
    budget = Budget(rate=1, burst=1)
    for number in range(20_000):
        budget.spend(str(number), 0)
    assert len(budget._left) == 10_000
    assert not budget.spend("19999", 0)


@given(st.lists(st.floats(0, 5), max_size=60), st.floats(0.1, 10), st.integers(1, 10))
def test_never_more_than_the_pace_allows(gaps: list[float], rate: float, burst: int) -> None:
    """Over any time, what was let through is at most the burst and the rate times that time."""
    budget, now, through = Budget(rate, burst), 0.0, 0
    for gap in gaps:
        now += gap
        through += budget.spend("ann", now)
        assert through <= burst + rate * now + 1e-6
