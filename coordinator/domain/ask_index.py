"""The index of one model's asks: those with a free slot, by what they offer, in each order of a shortlist. Pure.

Asks that meet the same requirements form a group. A demand accepts or rejects a whole group at once, so an ask of another region
costs nothing. A group lists its asks in three orders, apart for each class of reliability. Asks without a free slot are in a
list of their own. So the work of a shortlist does not grow with the number of asks that are busy or do not fit, and strangers
hide no proven provider.

A list is ordered by integer keys: the price first, or a speed in steps of about a fifth and then the price. The last 32 bits come
from the provider's address, so the order is total and the same in each process.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from heapq import merge
from itertools import chain
from math import log2
from operator import attrgetter

from sortedcontainers import SortedKeyList

from tallystick.protocol.criteria import SORTS, Demand
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.link import Capacity
from tallystick.protocol.messages import Ask
from tallystick.protocol.types import Address

RELIABLE, PROVEN, OTHER = range(3)
"""The classes of reliability, best first. ranking.py assigns them by score."""
CLASSES = (RELIABLE, PROVEN, OTHER)
MAX_GROUPS = 256
"""Groups of one model that one shortlist considers. Those with reliable providers come first."""
NEAR_TIE = 100
"""Prices within one part in this many of the lowest count as equal: the draw decides where a shortlist begins among them."""
_MIN_SPREAD = 16
"""Near ties that are listed as they stand, because a shortlist looks at all of them anyway."""
_STEPS_PER_DOUBLING = 4
"""Speeds are compared in steps of the fourth root of two, because every report of a node differs a little."""
_SLOWEST = 255
"""The step of an unknown speed."""
_MAX_CHANGES = 32
_SPEED_SHIFT = 128
_ADDRESS_BITS = 32
_MAX_SELECTIONS = 64
"""Selections of groups that a model's index remembers, by requirements and route."""


@dataclass(slots=True, eq=False)
class ConnectedNode:
    """A connected node: its last reported capacity, and the jobs that it was given and still has.

    `stake`: base units, as last read; 0 until a demand asks for a stake. Only the ask book changes the other members.
    """

    provider: Address
    capacity: Capacity
    assigned: int = 0
    """Jobs that the node was given and that have not ended."""
    stake: int = 0
    reliability: int = OTHER
    listed: bool = False
    """Whether the node's asks are in the lists of their groups."""
    known_since: int = 0
    """The number of the first decision at which it is known whether the node was listed."""
    changes: tuple[int, ...] = ()
    """The numbers of the decisions before which `listed` last changed, oldest first; at most _MAX_CHANGES."""
    asks: tuple[ListedAsk, ...] = ()
    former: tuple[ListedAsk, ...] = ()
    """Asks that were replaced lately, which orders may still name."""

    def set_listed(self, listed: bool, decision: int) -> None:
        """Sets `listed`. `decision`: the number of the next decision."""
        if listed == self.listed:
            return
        self.listed, self.changes = listed, (*self.changes, decision)
        if len(self.changes) > _MAX_CHANGES:
            self.known_since, self.changes = self.changes[0], self.changes[1:]

    def was_listed(self, decision: int) -> bool | None:
        """Returns whether the node was listed at the decision of this number; None if that is not known any more."""
        if decision < self.known_since:
            return None
        later = sum(change > decision for change in self.changes)
        return self.listed ^ bool(later % 2)

    @property
    def free(self) -> int:
        """Free slots, as far as this coordinator knows."""
        return max(0, min(self.capacity.free, self.capacity.slots - self.assigned))

    @property
    def load(self) -> float:
        """The share of slots that are taken, from 0 to 1."""
        return 1.0 - self.free / self.capacity.slots if self.capacity.slots else 1.0


@dataclass(slots=True, eq=False)
class ListedAsk:
    """One ask in the book, with the node that offers it, and its key in the order by price."""

    ask: Verified[Ask]
    node: ConnectedNode
    provider: Address = field(init=False)
    by_price: int = field(init=False)

    def __post_init__(self) -> None:
        message = self.ask.message
        self.provider = message.provider
        self.by_price = 3 * message.input_price + message.output_price << _ADDRESS_BITS | int(self.provider[2:10], 16)

    @property
    def price(self) -> int:
        """The price of three input tokens and one output token, in base units per 1,000,000 of each."""
        return self.by_price >> _ADDRESS_BITS

    @property
    def price_key(self) -> tuple[int, str]:
        """Sort key: the price; the address breaks a tie, so the order is total."""
        return self.price, self.provider

    @property
    def by_latency(self) -> int:
        """Sort key: the step of the node's time to the first token, then the price."""
        return speed_steps(self.node.capacity)[0] << _SPEED_SHIFT | self.by_price

    @property
    def by_throughput(self) -> int:
        """Sort key: the step of the node's throughput, then the price."""
        return speed_steps(self.node.capacity)[1] << _SPEED_SHIFT | self.by_price


def speed_steps(capacity: Capacity) -> tuple[int, int]:
    """Returns the steps of a node's time to the first token and of its throughput; a lower step is faster."""
    latency = throughput = _SLOWEST
    if capacity.first_token_ms:
        latency = min(int(log2(capacity.first_token_ms) * _STEPS_PER_DOUBLING), _SLOWEST - 1)
    if capacity.tokens_per_second:
        throughput = max(_SLOWEST - 1 - int(log2(capacity.tokens_per_second) * _STEPS_PER_DOUBLING), 0)
    return latency, throughput


_KEYS: dict[str, Callable[[ListedAsk], int]] = {sort: attrgetter(f"by_{sort}") for sort in SORTS}


class AskGroup:
    """The asks of one model that meet the same requirements. `example`: one of them, or one that was.

    The orders by speed are kept from the first demand for them on.
    """

    __slots__ = ("_lists", "_sorts", "busy", "example", "size")

    def __init__(self, example: Ask, sorts: Iterable[str]) -> None:
        self.example, self.size = example, 0
        self.busy: SortedKeyList[ListedAsk, int] = SortedKeyList(key=_KEYS["price"])
        """The asks without a free slot, cheapest first."""
        self._sorts = list(sorts)
        self._lists: dict[tuple[str, int], SortedKeyList[ListedAsk, int]] = {}

    def add(self, listed_ask: ListedAsk) -> None:
        """Lists a free ask in each order."""
        for sort in self._sorts:
            place = sort, listed_ask.node.reliability
            if place not in self._lists:
                self._lists[place] = SortedKeyList(key=_KEYS[sort])
            self._lists[place].add(listed_ask)

    def remove(self, listed_ask: ListedAsk) -> None:
        """Removes an ask from the lists. Its keys and reliability must be those that it was listed with."""
        for sort in self._sorts:
            place = sort, listed_ask.node.reliability
            self._lists[place].remove(listed_ask)
            if not self._lists[place]:
                del self._lists[place]

    def set_free(self, listed_ask: ListedAsk, *, free: bool) -> None:
        """Moves an ask whose node got its first free slot, or has none left."""
        if free:
            self.busy.remove(listed_ask)
            self.add(listed_ask)
        else:
            self.remove(listed_ask)
            self.busy.add(listed_ask)

    def keep_order(self, sort: str) -> None:
        """Keeps the free asks in one more order."""
        self._sorts.append(sort)
        for reliability in CLASSES:
            listed_asks = self._lists.get(("price", reliability))
            if listed_asks is not None:
                self._lists[sort, reliability] = SortedKeyList(listed_asks, key=_KEYS[sort])

    def best_reliability(self) -> int:
        """Returns the best class of reliability with a free slot, or a value after all classes."""
        return next((reliability for reliability in CLASSES if ("price", reliability) in self._lists), len(CLASSES))

    def free_asks(self, sort: str, reliability: int, draw: float) -> Iterator[ListedAsk] | None:
        """Returns the free asks of one class, the best by `sort` first, or None if there are none. `draw`: from 0 to 1."""
        ranked = self._lists.get((sort, reliability))
        if ranked is None:
            return None
        in_order: Iterator[ListedAsk] = iter(ranked)
        if sort != "price" or len(ranked) <= _MIN_SPREAD:
            return in_order
        lowest = ranked[0].price
        last = lowest + lowest // NEAR_TIE
        if ranked[_MIN_SPREAD].price > last:
            return in_order
        end = ranked.bisect_key_left(last + 1 << _ADDRESS_BITS)
        begin = int(draw * end)
        spread: Iterator[ListedAsk] = chain(ranked.islice(begin, end), ranked.islice(0, begin), ranked.islice(end))
        return spread


_GroupKey = tuple[str, str, str, str, frozenset[str], int]


def _group_key(ask: Ask) -> _GroupKey:
    spec = ask.spec
    features = frozenset(feature if feature.startswith("/") else feature.lower() for feature in spec.features)
    return spec.region.lower(), spec.tier.lower(), spec.precision.lower(), spec.engine.lower(), features, ask.context_tokens


class ModelIndex:
    """The groups of one model."""

    __slots__ = ("_contexts", "_groups", "_selected", "_sorts")

    def __init__(self) -> None:
        self._sorts = ["price"]
        self._groups: dict[_GroupKey, AskGroup] = {}
        self._contexts: list[int] = []
        """The contexts of the groups, shortest first."""
        self._selected: OrderedDict[Hashable, list[AskGroup]] = OrderedDict()

    def enter(self, listed_ask: ListedAsk) -> None:
        """Counts an ask in its group, which it creates if necessary, and lists the ask there if its node is listed."""
        ask = listed_ask.ask.message
        key = _group_key(ask)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = AskGroup(ask, self._sorts)
            self._groups_changed()
        group.size += 1
        if listed_ask.node.listed:
            group.add(listed_ask)
        else:
            group.busy.add(listed_ask)

    def leave(self, listed_ask: ListedAsk) -> None:
        """Undoes `enter`."""
        key = _group_key(listed_ask.ask.message)
        group = self._groups[key]
        group.size -= 1
        if listed_ask.node.listed:
            group.remove(listed_ask)
        else:
            group.busy.remove(listed_ask)
        if not group.size:
            del self._groups[key]
            self._groups_changed()

    def _groups_changed(self) -> None:
        self._selected.clear()
        self._contexts = []

    def group_of(self, listed_ask: ListedAsk) -> AskGroup:
        """Returns the group of an ask that was entered."""
        return self._groups[_group_key(listed_ask.ask.message)]

    def free_asks(self, demand: Demand, reliability: int, draw: float) -> Iterator[ListedAsk]:
        """Yields the free asks whose spec meets the demand, the best by its sort order first, of one class of reliability.

        `draw`, from 0 to 1, decides where to begin among asks whose prices nearly tie with the lowest.
        """
        if demand.sort not in self._sorts:
            self._sorts.append(demand.sort)
            for group in self._groups.values():
                group.keep_order(demand.sort)
        groups = (group.free_asks(demand.sort, reliability, draw) for group in self._select(demand))
        lists = [listed_asks for listed_asks in groups if listed_asks is not None]
        return lists[0] if len(lists) == 1 else merge(*lists, key=_KEYS[demand.sort])

    def busy_asks(self, demand: Demand) -> Iterator[ListedAsk]:
        """Yields the asks without a free slot whose spec meets the demand, the cheapest first."""
        lists = [group.busy for group in self._select(demand) if group.busy]
        return merge(*lists, key=_KEYS["price"])

    def _select(self, demand: Demand) -> list[AskGroup]:
        """Returns the groups that meet a demand; of very many, those with reliable providers."""
        key = self._selection_key(demand)
        fitting = self._selected.get(key)
        if fitting is None:
            fitting = [group for group in self._groups.values() if demand.spec_objection(group.example) is None]
            self._selected[key] = fitting
            if len(self._selected) > _MAX_SELECTIONS:
                self._selected.popitem(last=False)
        if len(fitting) <= MAX_GROUPS:
            return fitting
        return sorted(fitting, key=AskGroup.best_reliability)[:MAX_GROUPS]

    def _selection_key(self, demand: Demand) -> Hashable:
        """Returns a key that is equal for demands which the same groups meet.

        Every request has another length, so lengths count only by the contexts that they exceed.
        """
        if not self._contexts:
            self._contexts = sorted({group.example.context_tokens for group in self._groups.values()})
        require = demand.require
        lengths = bisect_left(self._contexts, require.context_tokens), bisect_left(self._contexts, demand.input_tokens)
        names = require.region, require.tier, require.precision, require.engine, require.features
        return demand.route, demand.needs.features, names, lengths
