"""What the pages of a wallet show of its spending. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tallystick.client.ledger.spending import DAY_SECONDS, GROUPS, SpendingRow
from tallystick.protocol.types import Amount

PERIODS = {"1": "today", "7": "7 days", "30": "30 days", "365": "a year"}
GROUPINGS = {name: name for name in GROUPS}
CHART_WIDTH, CHART_HEIGHT = 600, 120
_UNNAMED = "–"  # noqa: RUF001 - an en dash, which a reader sees


@dataclass(frozen=True, slots=True)
class SpendingQuery:
    """What the page of spending shows: the days back, including today, and the group of each row."""

    days: int = 7
    by: str = "model"


def read_query(parameters: Mapping[str, str]) -> SpendingQuery:
    """Reads the parameters of the page's address; what is not one of the choices is the default."""
    days, by = parameters.get("days", ""), parameters.get("by", "")
    return SpendingQuery(int(days) if days in PERIODS else 7, by if by in GROUPINGS else "model")


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table. Costs are base units; `share` is of the total cost, in percent."""

    name: str
    requests: int
    failed: int
    input_tokens: int
    output_tokens: int
    cost: Amount
    share: int


def lines_of(rows: Sequence[SpendingRow], by: str) -> list[Line]:
    """Returns the rows of one group: days newest first, all others by their cost."""
    total = sum(int(row.cost) for row in rows)
    lines = [
        Line(
            _name(row.group[0], by),
            row.requests,
            row.failed,
            row.input_tokens,
            row.output_tokens,
            Amount(row.cost),
            100 * int(row.cost) // total if total else 0,
        )
        for row in rows
    ]
    if by == "day":
        return sorted(lines, key=lambda line: line.name, reverse=True)
    return sorted(lines, key=lambda line: (-int(line.cost), line.name))


def _name(value: Any, by: str) -> str:
    if by == "day":
        return f"{datetime.fromtimestamp(int(value) * DAY_SECONDS, UTC):%F}"
    return str(value) or _UNNAMED


@dataclass(frozen=True, slots=True)
class Bar:
    """One day of the chart: its place and size in SVG units, and what it stands for."""

    x: float
    y: float
    width: float
    height: float
    day: str
    cost: Amount


def bars_of(rows: Sequence[SpendingRow], days: int, today: int) -> list[Bar]:
    """Returns a bar for each of the last `days` days. `rows` are by day; `today`: the number of the day since 1970 (UTC)."""
    costs = {int(str(row.group[0])): int(row.cost) for row in rows}
    top = max(costs.values(), default=0)
    if not top:
        return []
    step = CHART_WIDTH / days
    bars = []
    for place, day in enumerate(range(today - days + 1, today + 1)):
        cost = costs.get(day, 0)
        height = round(CHART_HEIGHT * cost / top, 1)
        name = f"{datetime.fromtimestamp(day * DAY_SECONDS, UTC):%F}"
        bars.append(Bar(round(place * step, 1), CHART_HEIGHT - height, round(0.8 * step, 1), height, name, Amount(cost)))
    return bars
