"""The rows and the chart of the spending page."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tallystick.client.ledger.spending import SpendingRow
from tallystick.client.pages.spending_view import amounts_of, lines_of, read_query
from tallystick.protocol.types import Amount


def _row(group: Any, cost: int) -> SpendingRow:
    values: dict[str, Any] = dict.fromkeys(SpendingRow.__dataclass_fields__, 0)
    return SpendingRow(**values | {"group": (group,), "requests": 2, "failed": 1, "cost": Amount(cost), "latency_ms": None})


@given(st.dictionaries(st.sampled_from(["days", "by"]), st.text()))
def test_any_address_is_a_query(parameters: dict[str, str]) -> None:
    """What is no choice is the default."""
    query = read_query(parameters)
    assert (query.days in {1, 7, 30, 365}, query.by in {"day", "label", "model", "provider"}) == (True, True)


def test_rows() -> None:
    """The dearest first, with its share; days by date; a group without a name is a dash."""
    lines = lines_of([_row("a", 10), _row("", 30)], "label")
    assert [(line.name, line.share) for line in lines] == [("\N{EN DASH}", 75), ("a", 25)]
    days = lines_of([_row(0, 10), _row(1, 30)], "day")
    assert [line.name for line in days] == ["1970-01-02", "1970-01-01"]
    assert lines_of([_row("a", 0)], "model")[0].share == 0


def test_amounts() -> None:
    """By date, as the chart takes them."""
    assert amounts_of([_row(0, 10), _row(100, 5)]) == {"1970-01-01": 10, "1970-04-11": 5}
