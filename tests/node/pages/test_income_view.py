"""Rows and chart of a node's income."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.pages.income_view import read_query, rows_of
from node.storage.earnings import EarningsLine
from tallystick.protocol.types import Address, Amount

ANN, BOB = Address("0x" + "0a" * 20), Address("0x" + "0b" * 20)
LINES = [
    EarningsLine("2026-01-02", "m", ANN, 2, 10, 20, Amount(300)),
    EarningsLine("2026-01-02", "n", BOB, 1, 1, 2, Amount(500)),
    EarningsLine("2026-01-01", "m", BOB, 4, 5, 6, Amount(400)),
]


@pytest.mark.parametrize(
    ("by", "rows"),
    [
        ("day", [("2026-01-02", 3, 800), ("2026-01-01", 4, 400)]),
        ("model", [("m", 6, 700), ("n", 1, 500)]),
        ("payer", [(BOB, 5, 900), (ANN, 2, 300)]),
    ],
)
def test_rows(by: str, rows: list[tuple[str, int, int]]) -> None:
    """Days newest first, models and payers by revenue; nothing is lost in a sum."""
    assert [(row.name, row.jobs, row.revenue) for row in rows_of(LINES, by)] == rows
    assert sum(row.output_tokens for row in rows_of(LINES, by)) == 28


@given(st.dictionaries(st.sampled_from(["days", "by"]), st.text()))
def test_any_address_is_a_query(parameters: dict[str, str]) -> None:
    """What is no choice is the default."""
    query = read_query(parameters)
    assert (query.days in {1, 7, 30, 365}, query.by in {"day", "model", "payer"}) == (True, True)
