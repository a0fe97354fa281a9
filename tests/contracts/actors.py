"""The participants of the invariants' market, and the strategies for their actions."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

from hypothesis import strategies as st

from tallystick.protocol.eip712 import Domain, Signer
from tallystick.protocol.types import ZERO_ADDRESS, Address, Amount
from tests.chain.harness import RULES as WAITS
from tests.chain.harness import person
from tests.contracts.market_harness import U96, Market
from tests.contracts.model import Book

OWNERS, KEYS = [person(n) for n in ("ann", "bob")], [person(n) for n in ("key 1", "key 2", "key 3", "key 4")]
PROVIDERS, COORDINATORS = [person(n) for n in ("p1", "p2", "p3")], [person(n) for n in ("c1", "c2")]
THIEF = person("thief")
PEOPLE = [*OWNERS, *KEYS, *PROVIDERS, *COORDINATORS, THIEF]
RULES = replace(WAITS, penalty=Amount(20))
WEALTH = 1_000

keys, providers, coordinators, anyone = map(st.sampled_from, (KEYS, PROVIDERS, COORDINATORS, PEOPLE))
places = st.integers(0, 11)
addresses = st.sampled_from([*(p.address for p in PEOPLE), ZERO_ADDRESS])
amounts = st.integers(1, 90) | st.sampled_from([0, 1, 10, WEALTH, WEALTH + 1, U96, U96 + 1])
deltas = st.integers(1, 40) | st.sampled_from([0, -5, U96])
rates = st.sampled_from([5_000, 10_000, 100, 0])
rarely_wrong = st.sampled_from([False] * 5 + [True])
papers = st.tuples(st.integers(0, 2), st.sampled_from([9, 9, 0]))  # an authorization's salt and validity
poisons = st.sampled_from(
    [""] * 8 + ["forged", "altered", "foreign chain", "foreign contract", "another provider's", "late", "own"]
)
rows = st.fixed_dictionaries(
    {
        "key": keys,
        "ceiling": deltas,
        "cost": deltas,
        "target": st.sampled_from([0, 0, 15, 60, U96]),
        "rate": rates,
        "coordinator": coordinators,
        "poison": poisons,
        "again": st.integers(-12, 5),
    }
)
claims = st.fixed_dictionaries(
    {
        "provider": providers,
        "rows": st.lists(rows, max_size=4),
        "how": st.sampled_from(["signed"] * 8 + ["unsigned", "forged", "cut"]),
    }
)
evidence = st.fixed_dictionaries(
    {
        "other payer": rarely_wrong,
        "seq": st.integers(1, 4),
        "later": st.sampled_from([0, 0, 0, 1]),
        "totals": st.sampled_from([(1, 2)] * 4 + [(1, 1), (2, 1)]),
        "wrong": st.tuples(rarely_wrong, rarely_wrong),
        "place": st.sampled_from([0, 0, 0, 0, 1, 2]),
    }
)


def begin() -> tuple[Market, Book]:
    """Makes the market and the book of a new example."""
    market, book, mark = _made()
    market.chain.restore(mark)
    return market, copy.deepcopy(book)


@cache
def _made() -> tuple[Market, Book, tuple[bytes, int]]:
    """A market with money in it, from which every example starts."""
    market = Market(rules=RULES)
    book = Book(market.domain, market.token, RULES, market.chain.now)
    for holder in PEOPLE:
        market.fund(holder.address, WEALTH)
        book.coins[holder.address], book.allowance[holder.address] = WEALTH, U96
    setup: list[tuple[Any, ...]] = []
    for key, owner in zip(KEYS, [*OWNERS, OWNERS[0]], strict=False):
        setup += [("open", key.address, key.address, owner.address, b""), ("deposit", owner.address, key.address, 100)]
    setup += [("stake", provider.address, 40) for provider in PROVIDERS[:2]]
    setup += [("setFee", COORDINATORS[0].address, 2_500)]
    for function, sender, *arguments in setup:
        getattr(book, snake_case(function))(sender, *arguments)
        market.call(sender, function, *arguments)
    return market, book, market.chain.snapshot()


def coin_domain(market: Market) -> Domain:
    """The domain for signing permits and authorizations."""
    return Domain(chain_id=market.domain.chain_id, contract=market.token, name="Test USD", version="1")


def person_at(address: Address) -> Signer:
    """The person with this address."""
    return next((person for person in PEOPLE if person.address == address), THIEF)


def snake_case(name: str) -> str:
    """The contract's name of a call with this Python name."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name)
