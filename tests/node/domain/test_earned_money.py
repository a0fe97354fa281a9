from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.domain.earned_money import EarnedMoney, TabMoney, locate_money
from node.domain.tabs import Funds
from tallystick.protocol.types import Amount
from tests.node.harness import PAYER

UNITS = st.integers(0, 100)


def tab_money(cumulative: int, ceiling: int, settled: int = 0, funds: int = 0, *, known: bool = True) -> TabMoney:
    """Returns a tab whose payer has `funds` base units free."""
    chain = Funds(Amount(settled), Amount(0), Amount(funds), known=known)
    return TabMoney(PAYER.address, Amount(cumulative), Amount(ceiling), 1, chain)


@pytest.mark.parametrize(
    ("tab", "expected"),
    [
        (tab_money(50, 100, funds=100), (0, 50, 0, 0, 0, 0, 0)),
        (tab_money(50, 100, funds=9), (9, 0, 41, 0, 0, 0, 0)),
        (tab_money(50, 100, funds=10), (0, 10, 40, 0, 0, 0, 0)),
        (tab_money(50, 30, funds=100), (0, 30, 0, 20, 0, 0, 0)),
        (tab_money(50, 0, funds=100), (0, 0, 0, 50, 0, 0, 0)),
        (tab_money(50, 0, settled=20, funds=100), (0, 0, 0, 30, 3, 12, 5)),
        (tab_money(50, 100, settled=50), (0, 0, 0, 0, 3, 12, 35)),
        (tab_money(50, 100, settled=60), (0, 0, 0, 0, 3, 12, 45)),
        (tab_money(50, 100, settled=2), (0, 0, 48, 0, 2, 0, 0)),
        (tab_money(50, 100, known=False), (0, 50, 0, 0, 0, 0, 0)),
    ],
    ids=[
        "claimable",
        "too little",
        "enough",
        "above the ceiling",
        "expired",
        "rest lost",
        "settled",
        "state lost",
        "fee",
        "offline",
    ],
)
def test_places_of_one_tab(tab: TabMoney, expected: tuple[int, ...]) -> None:
    """Each unit has the place that its order, its payer's money and the chain give it; fees come before credit."""
    money = locate_money([tab], least=10, fees=3, credit=12)
    assert tuple(getattr(money, column.name) for column in fields(EarnedMoney)) == expected


@given(st.lists(st.tuples(UNITS, UNITS, UNITS, UNITS, st.booleans()), max_size=5), UNITS, UNITS, st.integers(1, 50))
def test_every_unit_is_in_one_place(states: list[tuple[int, int, int, int, bool]], fees: int, credit: int, least: int) -> None:
    """Whatever the state, no column is negative, and the columns add up to all receipts, or to more that the chain settled."""
    tabs = [tab_money(*state[:4], known=state[4]) for state in states]
    money = locate_money(tabs, least=least, fees=fees, credit=credit)
    columns = [getattr(money, column.name) for column in fields(EarnedMoney)]
    assert min(columns) >= 0
    assert sum(columns) == money.earned == sum(max(tab.cumulative, tab.funds.settled) for tab in tabs)
    assert money.credited <= credit
    assert money.coordinator_fees <= fees
