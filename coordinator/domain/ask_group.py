"""A group of asks that meet the same requirements and have about the same mix of input and output price. Pure.

The asks with a free slot are listed apart for each class of reliability, in each order of a shortlist. Asks without one are in
lists of their own, those whose engine would queue a job apart from those that take none. A list knows a bound below which no
request costs with the asks that follow, so a search stops early.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from operator import attrgetter

from sortedcontainers import SortedKeyList

from coordinator.domain.listed_ask import ADDRESS_BITS, CLASSES, FREE_SLOT, SLOWEST, ListedAsk, latency_step, throughput_step
from coordinator.domain.scoring import RequestShape, Scorer
from tallystick.protocol.messages import Ask
from tallystick.protocol.types import Address

NEAR_TIE = 100
"""Costs within one part in this many of the lowest count as equal: the draw decides where a shortlist begins among them."""
_SHARES = 4_096
"""Steps of the output's share of a standard price, by which a list bounds the price of a request."""
_SCALE = 3 * _SHARES
_MIXES = 32
"""Price mixes that are apart, so that one order by price is nearly the order by any request's price."""
_MANY_EXCLUDED, _LONG_LIST, _MAX_BEGINS = 16, 512, 4
"""A list of so many asks remembers for so many sets of excluded providers where the others begin, if so many are excluded."""
_CHUNK = 32
"""Asks that a list passes over at a time, if their providers are excluded."""
_GOLDEN = 0x9E3779B1 / 2**32

ORDERS: dict[str, Callable[[ListedAsk], int]] = {
    "price": attrgetter("by_price"),
    "latency": attrgetter("by_latency"),
    "throughput": attrgetter("by_throughput"),
}
"""The key of each order of a list."""
Offer = tuple[int, float, ListedAsk]
"""A bound on the price and time of this ask and those after it, in MICRO base units; a place among equal bounds; the ask."""


def output_share(ask: Ask) -> int:
    """Returns the output's share of the price of three input tokens and one output token, in steps of one part in 4,096."""
    price = 3 * ask.input_price + ask.output_price
    return _SHARES * ask.output_price // price if price else 0


def price_mix(ask: Ask) -> int:
    """Returns the class of an ask's mix of input and output price."""
    return output_share(ask) * _MIXES // _SHARES


class FreeAsks:
    """The free asks of one class of reliability in one group."""

    __slots__ = ("_begins", "_orders", "_scores", "_shares")

    def __init__(self, orders: Iterable[str]) -> None:
        self._begins: dict[Collection[Address], int] = {}
        """A key by price for sets of excluded providers: all asks below it are of these providers."""
        self._orders: dict[str, SortedKeyList[ListedAsk, int]] = {order: SortedKeyList(key=ORDERS[order]) for order in orders}
        self._scores: Counter[int] = Counter()
        self._shares: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._orders["price"])

    def add(self, listed_ask: ListedAsk) -> None:
        """Lists an ask in each order."""
        for ranked in self._orders.values():
            ranked.add(listed_ask)
        for exclude, begin in self._begins.items():
            if listed_ask.by_price < begin and listed_ask.provider not in exclude:
                self._begins[exclude] = listed_ask.by_price
        self._scores[listed_ask.node.quality] += 1
        self._shares[output_share(listed_ask.message)] += 1

    def remove(self, listed_ask: ListedAsk) -> None:
        """Undoes `add`."""
        for ranked in self._orders.values():
            ranked.remove(listed_ask)
        for counts, key in (
            (self._scores, listed_ask.node.quality),
            (self._shares, output_share(listed_ask.message)),
        ):
            counts[key] -= 1
            if not counts[key]:
                del counts[key]

    def keep_order(self, order: str) -> None:
        """Keeps one more order."""
        self._orders[order] = SortedKeyList(self._orders["price"], key=ORDERS[order])

    @property
    def best_quality(self) -> int:
        """The highest bound of the quality in the list."""
        return max(self._scores)

    def price_rate(self, shape: RequestShape) -> int:
        """Returns what a request costs at least for each base unit of an ask's standard price, in _SCALE parts of MICRO."""
        low, high = min(self._shares), min(max(self._shares) + 1, _SHARES)
        inputs, outputs = shape.input_tokens, 3 * shape.output_tokens
        return min((_SHARES - low) * inputs + low * outputs, (_SHARES - high) * inputs + high * outputs)

    def lowest(self, rate: int) -> int:
        """Returns the bound of the whole list on the price."""
        cheapest: ListedAsk = self._orders["price"][0]
        return cheapest.price * rate // _SCALE

    def _begin(self, exclude: Collection[Address]) -> int:
        """Returns the place in the order by price before which all asks are of excluded providers.

        A client excludes the same providers in each of its requests. So the place is remembered for the last sets of many.
        """
        ranked = self._orders["price"]
        if len(exclude) < _MANY_EXCLUDED or len(ranked) < _LONG_LIST:
            return 0
        key = self._begins.get(exclude)
        if key is None:
            if len(self._begins) >= _MAX_BEGINS:
                del self._begins[next(iter(self._begins))]
            others = (listed_ask.by_price for listed_ask in ranked if listed_ask.provider not in exclude)
            key = self._begins[exclude] = next(others, ranked[-1].by_price + 1)
        return int(ranked.bisect_key_left(key))

    def by_price(self, rate: int, tie: tuple[int, int], draw: float, exclude: Collection[Address] = ()) -> Iterator[Offer]:
        """Yields the asks, cheapest first, without those of the providers in `exclude`.

        `tie`: the lowest bound of all lists, and the one to which it counts as equal. Those asks are spread evenly among those of
        other lists, from one on that `draw` decides.
        """
        ranked = self._orders["price"]
        lowest, highest = tie
        start = self._begin(exclude)
        end = ranked.bisect_key_left((highest * _SCALE // rate if rate else ranked[-1].price) + 1 << ADDRESS_BITS)
        end = max(start, end)
        size = end - start or 1
        begin = start + int(draw * (end - start))
        place, step = (draw + size * _GOLDEN) % 1 / size, 1 / size
        for first, last in ((begin, end), (start, begin)):
            for number, listed_ask in enumerate(ranked.islice(first, last) if first < last else ()):
                if listed_ask.provider not in exclude:
                    yield lowest, place + number * step, listed_ask
            place += (last - first) * step
        following = ranked.islice(end)
        while chunk := list(islice(following, _CHUNK)):
            for listed_ask in [entry for entry in chunk if entry.provider not in exclude] if exclude else chunk:
                yield (listed_ask.by_price >> ADDRESS_BITS) * rate // _SCALE, 0.0, listed_ask

    def by_speed(self, order: str, rate: int, scorer: Scorer) -> Iterator[Offer]:
        """Yields the asks, the fastest first, the cheapest of the equally fast first."""
        least, latency, known, here, later = self.lowest(rate), order == "latency", -1, 0, 0
        weigh = scorer.first_token if latency else scorer.speed
        for listed_ask in self._orders[order]:
            step = latency_step(listed_ask.first_token_ms) if latency else throughput_step(listed_ask.tokens_per_second)
            if step != known:
                known, here, later = step, weigh(step), weigh(min(step + 1, SLOWEST)) + least
            bound = here + listed_ask.price * rate // _SCALE
            yield bound if step == SLOWEST else min(bound, later), 0.0, listed_ask


class AskGroup:
    """The asks of one model that meet the same requirements, at about one mix of prices. `example`: one that is or was in it.

    The orders by speed are kept from the first demand for them on.
    """

    __slots__ = ("_free", "_orders", "_others", "counts", "example", "place", "size")

    def __init__(self, example: Ask, orders: Iterable[str]) -> None:
        self.example, self.size, self.place = example, 0, 0
        self.counts = [0] * len(CLASSES)
        """The number of asks in each class of reliability."""
        self._orders = list(orders)
        self._free: dict[int, FreeAsks] = {}
        self._others: dict[tuple[int, int], SortedKeyList[ListedAsk, int]] = {}
        """The asks without a free slot, by state and class of reliability, cheapest first."""

    def add(self, listed_ask: ListedAsk) -> None:
        """Lists an ask by the state of its slot group: in each order if a slot is free."""
        self.counts[listed_ask.node.reliability] += 1
        self._list(listed_ask, listed_ask.slot_group.state)

    def remove(self, listed_ask: ListedAsk) -> None:
        """Undoes `add`. The ask's keys, and its state and reliability, must be those that it was added with."""
        self.counts[listed_ask.node.reliability] -= 1
        self._unlist(listed_ask, listed_ask.slot_group.state)

    def move(self, listed_ask: ListedAsk, *, former: int, state: int) -> None:
        """Moves an ask whose slot group changed its state."""
        self._unlist(listed_ask, former)
        self._list(listed_ask, state)

    def _list(self, listed_ask: ListedAsk, state: int) -> None:
        if state == FREE_SLOT:
            self._add_free(listed_ask)
            return
        place = state, listed_ask.node.reliability
        if place not in self._others:
            self._others[place] = SortedKeyList(key=ORDERS["price"])
        self._others[place].add(listed_ask)

    def _unlist(self, listed_ask: ListedAsk, state: int) -> None:
        if state == FREE_SLOT:
            self._remove_free(listed_ask)
            return
        place = state, listed_ask.node.reliability
        self._others[place].remove(listed_ask)
        if not self._others[place]:
            del self._others[place]

    def _add_free(self, listed_ask: ListedAsk) -> None:
        reliability = listed_ask.node.reliability
        if reliability not in self._free:
            self._free[reliability] = FreeAsks(self._orders)
        self._free[reliability].add(listed_ask)

    def _remove_free(self, listed_ask: ListedAsk) -> None:
        reliability = listed_ask.node.reliability
        self._free[reliability].remove(listed_ask)
        if not self._free[reliability]:
            del self._free[reliability]

    def keep_order(self, order: str) -> None:
        """Keeps the free asks in one more order."""
        self._orders.append(order)
        for free_asks in self._free.values():
            free_asks.keep_order(order)

    def other_asks(self, state: int, reliability: int) -> Iterator[ListedAsk]:
        """Returns the asks of one class without a free slot and in this state, the cheapest first."""
        for lead in self._others.get((state, reliability), ()):
            yield lead
            yield from lead.siblings

    def free_asks(self, reliability: int) -> FreeAsks | None:
        """Returns the free asks of one class, or None if there are none."""
        return self._free.get(reliability)
