"""Where every unit of a wallet's money in the escrow is: the chain's amounts, divided by what the ledger knows of them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tallystick.client.ledger.accounts import Account
from tallystick.protocol.types import Address, Amount


@dataclass(frozen=True, slots=True)
class TabMoney:
    """One tab on chain, in base units: reserved for the provider, and paid to it so far. `account` is the ledger's side."""

    provider: Address
    reserved: int
    settled: int
    account: Account

    @property
    def owed(self) -> int:
        """Billed by receipts and not settled."""
        return max(0, self.account.billed - self.settled)


@dataclass(frozen=True, slots=True)
class TabPlaces:
    """How a tab's reservation is used, in base units. `reserved` is the sum of `owed`, `in_flight` and `unused`.

    `beyond`: what is owed or in flight beyond the reservation; the free part of the purse pays it.
    """

    provider: Address
    reserved: int
    owed: int
    in_flight: int
    unused: int
    beyond: int
    settled: int


@dataclass(frozen=True, slots=True)
class Places:
    """Every place of the money, in base units.

    `total` is what the chain holds for this wallet: `available` + `pledged` + `thawing` + the tabs' `reserved`. `pledged` is free
    on chain, but owed to providers or held by running jobs beyond their reservations; `uncovered` is what not even that covers.
    """

    total: int
    available: int
    pledged: int
    thawing: int
    uncovered: int
    settled: int
    tabs: tuple[TabPlaces, ...]


def places_of(free: int, thawing: int, tabs: Sequence[TabMoney]) -> Places:
    """Divides a purse. `free` is the chain's, which includes `thawing`."""
    rows = tuple(sorted(map(_divide, tabs), key=lambda row: (-row.reserved - row.beyond, -row.settled, row.provider)))
    beyond, open_money = sum(row.beyond for row in rows), max(0, free - thawing)
    pledged = min(beyond, open_money)
    return Places(
        total=free + sum(row.reserved for row in rows),
        available=open_money - pledged,
        pledged=pledged,
        thawing=free - open_money,
        uncovered=beyond - pledged,
        settled=sum(row.settled for row in rows),
        tabs=rows,
    )


def _divide(tab: TabMoney) -> TabPlaces:
    owed = min(tab.owed, tab.reserved)
    in_flight = min(int(tab.account.in_flight), tab.reserved - owed)
    beyond = tab.owed - owed + int(tab.account.in_flight) - in_flight
    return TabPlaces(tab.provider, tab.reserved, owed, in_flight, tab.reserved - owed - in_flight, beyond, tab.settled)


def as_dollars(places: Places) -> list[tuple[str, Amount, str]]:
    """The rows of the page's first table, which add up to the total: a name, an amount, and what it is."""
    tabs = places.tabs
    return [
        ("free", Amount(places.available), "buys jobs; to take it out: tally thaw AMOUNT, wait, tally withdraw"),
        ("free, but pledged", Amount(places.pledged), "owed or held by running jobs beyond reservations: it pays for them"),
        ("thawing", Amount(places.thawing), "leaves the purse: tally withdraw, once the wait is over"),
        ("running jobs", Amount(sum(tab.in_flight for tab in tabs)), "reserved; at most this becomes due when they end"),
        ("owed", Amount(sum(tab.owed for tab in tabs)), "reserved; signed by receipts, and not yet collected by the providers"),
        ("reserved, unused", Amount(sum(tab.unused for tab in tabs)), "secures further jobs; back by: tally release PROVIDER"),
    ]
