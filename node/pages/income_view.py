"""What the income page shows of a node's receipts. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from tallystick.protocol.types import Address, Amount
from tallystick.web.day_chart import DEFAULT_DAYS, read_days

GROUPINGS = ("day", "model", "payer")


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

    days: int = DEFAULT_DAYS
    by: str = "model"


def read_query(parameters: Mapping[str, str]) -> IncomeQuery:
    """Reads the parameters of the page's address; what is not one of the choices is the default."""
    by = parameters.get("by", "")
    return IncomeQuery(read_days(parameters.get("days", "")), by if by in GROUPINGS else "model")


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
