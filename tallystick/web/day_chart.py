"""A bar chart of amounts by day, which pages draw as SVG with the template days.html. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

PERIODS = {"1": "today", "7": "7 days", "30": "30 days", "365": "a year"}
"""The numbers of days that pages offer, and their names."""
DEFAULT_DAYS = 7
CHART_WIDTH, CHART_HEIGHT = 600, 120


@dataclass(frozen=True, slots=True)
class Bar:
    """One day: its place and size in SVG units, and what it stands for, in base units."""

    x: float
    y: float
    width: float
    height: float
    day: str
    amount: int


def read_days(text: str) -> int:
    """Reads the days of a page's address; what is not one of PERIODS is the default."""
    return int(text) if text in PERIODS else DEFAULT_DAYS


def bars_of(amounts: Mapping[str, int], days: int, now: float) -> list[Bar]:
    """Returns a bar for each of the last `days` days (UTC); none if all amounts are 0.

    `amounts`: base units by day, as YYYY-MM-DD. `now`: Unix seconds.
    """
    top = max(amounts.values(), default=0)
    if not top:
        return []
    today, step = datetime.fromtimestamp(now, UTC).date(), CHART_WIDTH / days
    names = [f"{today - timedelta(days=days - 1 - place):%F}" for place in range(days)]
    return [
        Bar(round(place * step, 1), round(CHART_HEIGHT - height, 1), round(0.8 * step, 1), round(height, 1), name, amount)
        for place, name in enumerate(names)
        for amount in [amounts.get(name, 0)]
        for height in [min(CHART_HEIGHT, CHART_HEIGHT * amount / top)]
    ]
