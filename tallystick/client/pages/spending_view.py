"""What the pages of a wallet show of its spending. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tallystick.client.ledger.spending import DAY_SECONDS, GROUPS, SpendingRow
from tallystick.protocol.types import Amount
from tallystick.web.day_chart import DEFAULT_DAYS, read_days

GROUPINGS = {name: name for name in GROUPS}
_UNNAMED = "–"  # noqa: RUF001 - an en dash, which a reader sees


@dataclass(frozen=True, slots=True)
class SpendingQuery:
    """What the page of spending shows: the days back, including today, and the group of each row."""

    days: int = DEFAULT_DAYS
    by: str = "model"


def read_query(parameters: Mapping[str, str]) -> SpendingQuery:
    """Reads the parameters of the page's address; what is not one of the choices is the default."""
    by = parameters.get("by", "")
    return SpendingQuery(read_days(parameters.get("days", "")), by if by in GROUPINGS else "model")


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


def amounts_of(rows: Sequence[SpendingRow]) -> dict[str, int]:
    """Returns the cost of each day, by its date. `rows` are by day."""
    return {_name(row.group[0], "day"): int(row.cost) for row in rows}
