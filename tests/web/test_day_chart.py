"""The chart of amounts by day, as spending and income show it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.web.day_chart import CHART_HEIGHT, CHART_WIDTH, PERIODS, bars_of, read_days

NOON = 1_767_355_200.0
"""2026-01-02 12:00 UTC."""


@pytest.mark.parametrize("days", [int(days) for days in PERIODS])
def test_bars(days: int) -> None:
    """One a day up to today, all within the chart; the highest is as high as it; none without an amount."""
    bars = bars_of({"2026-01-02": 800, "2026-01-01": 400}, days, NOON)
    assert len(bars) == days
    assert (bars[-1].day, bars[-1].amount, bars[-1].height) == ("2026-01-02", 800, CHART_HEIGHT)
    assert all(0 <= bar.x <= bar.x + bar.width <= CHART_WIDTH for bar in bars)
    assert all(0 <= bar.y <= bar.y + bar.height <= CHART_HEIGHT + 0.1 for bar in bars)
    assert not bars_of({}, days, NOON)
    assert not bars_of({"2026-01-02": 0}, days, NOON)


@given(st.text())
def test_any_period(text: str) -> None:
    """What is no choice is the default."""
    assert str(read_days(text)) in PERIODS
