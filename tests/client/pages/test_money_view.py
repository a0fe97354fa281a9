"""The division of a wallet's money: nothing is counted twice, nothing is left out, whatever chain and ledger say."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tallystick.client.ledger.accounts import Account
from tallystick.client.pages.money_view import TabMoney, as_dollars, places_of
from tallystick.protocol.types import Address, Amount

ANN, BOB = (Address("0x" + digit * 40) for digit in "ab")
AMOUNTS = st.integers(0, 1 << 60)


def _tab(provider: Address, reserved: int, settled: int, billed: int, in_flight: int) -> TabMoney:
    return TabMoney(provider, reserved, settled, Account(provider, Amount(billed), Amount(in_flight), 0, ""))


def test_an_example() -> None:
    """10 dollars were deposited, 3 of them reserved for Ann; she billed 2 and collected 1.5; her jobs may cost 4 at most."""
    places = places_of(7_000_000, 1_000_000, [_tab(ANN, 3_000_000, 1_500_000, 2_000_000, 4_000_000)])
    (tab,) = places.tabs
    assert (tab.owed, tab.in_flight, tab.unused, tab.beyond) == (500_000, 2_500_000, 0, 1_500_000)
    assert (places.total, places.available, places.pledged, places.thawing) == (10_000_000, 4_500_000, 1_500_000, 1_000_000)
    assert (places.uncovered, places.settled) == (0, 1_500_000)


def test_more_is_due_than_there_is() -> None:
    """What a purse does not cover is named apart, and is no part of the sum."""
    places = places_of(100, 100, [_tab(ANN, 50, 0, 70, 0), _tab(BOB, 10, 5, 5, 3)])
    assert (places.total, places.available, places.pledged, places.thawing, places.uncovered) == (160, 0, 0, 100, 20)
    assert [tab.provider for tab in places.tabs] == [ANN, BOB]


@given(AMOUNTS, AMOUNTS, st.lists(st.tuples(AMOUNTS, AMOUNTS, AMOUNTS, AMOUNTS), max_size=5))
def test_the_sum_is_the_chains(free: int, thawing: int, tabs: list[tuple[int, int, int, int]]) -> None:
    """Every row is at least 0, and all rows together are the purse and the reservations on chain."""
    places = places_of(free, thawing, [_tab(Address(f"0x{number:040x}"), *tab) for number, tab in enumerate(tabs)])
    amounts = [int(amount) for _, amount, _ in as_dollars(places)]
    assert min(amounts) >= 0
    assert sum(amounts) == places.total == free + sum(reserved for reserved, *_ in tabs)
    for tab in places.tabs:
        assert tab.reserved == tab.owed + tab.in_flight + tab.unused
        assert min(tab.owed, tab.in_flight, tab.unused, tab.beyond) >= 0
    due = sum(max(0, billed - settled) + in_flight for _, settled, billed, in_flight in tabs)
    assert due == places.pledged + places.uncovered + sum(tab.owed + tab.in_flight for tab in places.tabs)
