"""What the income page shows of a node's receipts. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from tallystick.protocol.types import Address, Amount

PERIODS = {"1": "today", "7": "7 days", "30": "30 days", "365": "a year"}
GROUPINGS = ("day", "model", "payer")
CHART_WIDTH, CHART_HEIGHT = 600, 120


class Earned(Protocol):
    """Receipts of one UTC day, model and payer. `revenue` is base units."""

    @property
    def day(self) -> str:
        """The day, as YYYY-MM-DD."""
        ...

    @property
    def model(self) -> str:
        """The model."""
        ...

    @property
    def payer(self) -> Address:
        """The payer."""
        ...

    @property
    def jobs(self) -> int:
        """The number of receipts."""
        ...

    @property
    def input_tokens(self) -> int:
        """Their input tokens."""
        ...

    @property
    def output_tokens(self) -> int:
        """Their output tokens."""
        ...

    @property
    def revenue(self) -> Amount:
        """Their cost."""
        ...


@dataclass(frozen=True, slots=True)
class IncomeQuery:
    """The days back, including today, and what the rows stand for."""

    days: int = 7
    by: str = "model"


def read_query(parameters: Mapping[str, str]) -> IncomeQuery:
    """Reads the parameters of the page's address; what is not one of the choices is the default."""
    days, by = parameters.get("days", ""), parameters.get("by", "")
    return IncomeQuery(int(days) if days in PERIODS else 7, by if by in GROUPINGS else "model")


@dataclass(slots=True)
class Row:
    """The sums of one group; `revenue` is base units."""

    name: str
    jobs: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    revenue: int = 0


def rows_of(lines: Iterable[Earned], by: str) -> list[Row]:
    """Returns a row for each day, newest first, or for each model or payer, by revenue."""
    rows: dict[str, Row] = {}
    for line in lines:
        name = str(getattr(line, by))
        row = rows.setdefault(name, Row(name))
        row.jobs += line.jobs
        row.input_tokens += line.input_tokens
        row.output_tokens += line.output_tokens
        row.revenue += int(line.revenue)
    if by == "day":
        return sorted(rows.values(), key=lambda row: row.name, reverse=True)
    return sorted(rows.values(), key=lambda row: (-row.revenue, row.name))


@dataclass(frozen=True, slots=True)
class Bar:
    """One day of the chart: its place and size in SVG units, and what it stands for, in base units."""

    x: float
    y: float
    width: float
    height: float
    day: str
    revenue: int


def bars_of(lines: Sequence[Earned], days: int, now: float) -> list[Bar]:
    """Returns a bar for each of the last `days` days; none without income. `now`: Unix seconds."""
    by_day = {row.name: row.revenue for row in rows_of(lines, "day")}
    top = max(by_day.values(), default=0)
    if not top:
        return []
    today, step = datetime.fromtimestamp(now, UTC).date(), CHART_WIDTH / days
    names = [f"{today - timedelta(days=days - 1 - place):%F}" for place in range(days)]
    return [
        Bar(round(place * step, 1), round(CHART_HEIGHT - height, 1), round(0.8 * step, 1), round(height, 1), name, revenue)
        for place, name in enumerate(names)
        for revenue in [by_day.get(name, 0)]
        for height in [CHART_HEIGHT * revenue / top]
    ]
