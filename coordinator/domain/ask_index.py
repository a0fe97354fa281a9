"""The index of one model's asks: those with a free slot, by what they offer, in each order of a shortlist. Pure.

Asks that meet the same requirements form a group. A demand accepts or rejects a whole group at once, so an ask of another region
costs nothing. A group lists its asks in three orders, apart for each class of reliability. Asks without a free slot are in
lists of their own, those whose engine would queue a job apart from those that take none. So the work of a shortlist does not
grow with the number of asks that are busy or do not fit, and strangers hide no proven provider.
A list is ordered by integer keys: the price first, or a speed in steps of about a fifth and then the price. The last 32 bits come
from the provider's address, so the order is total and the same in each process.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from heapq import merge
from itertools import chain, islice
from operator import attrgetter

from sortedcontainers import SortedKeyList, SortedList

from coordinator.domain.slot_groups import ADDRESS_BITS, CLASSES, FREE_SLOT, PROVEN, RELIABLE, ListedAsk
from tallystick.protocol.criteria import SORTS, Demand
from tallystick.protocol.messages import Ask

MAX_GROUPS = 256
"""Groups of one model that one shortlist considers. Those with reliable providers come first."""
_MAX_SCANNED_GROUPS = 1_024
"""Groups of one model that one shortlist looks at, and as many with proven providers: a stranger can create any number."""
NEAR_TIE = 100
"""Prices within one part in this many of the lowest count as equal: the draw decides where a shortlist begins among them."""
_MIN_SPREAD = 16
"""Near ties that are listed as they stand, because a shortlist looks at all of them anyway."""
_MAX_SELECTIONS = 64
"""Selections of groups that a model's index remembers, by requirements and route."""


_KEYS: dict[str, Callable[[ListedAsk], int]] = {sort: attrgetter(f"by_{sort}") for sort in SORTS}


class AskGroup:
    """The asks of one model that meet the same requirements. `example`: one of them, or one that was.

    The orders by speed are kept from the first demand for them on.
    """

    __slots__ = ("_lists", "_others", "_sorts", "counts", "example", "size")

    def __init__(self, example: Ask, sorts: Iterable[str]) -> None:
        self.example, self.size = example, 0
        self.counts = [0] * len(CLASSES)
        """The number of asks in each class of reliability."""
        self._others: dict[tuple[int, int], SortedKeyList[ListedAsk, int]] = {}
        """The asks without a free slot, by state and class of reliability, cheapest first."""
        self._sorts = list(sorts)
        self._lists: dict[tuple[str, int], SortedKeyList[ListedAsk, int]] = {}

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
            self._others[place] = SortedKeyList(key=_KEYS["price"])
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
        for sort in self._sorts:
            place = sort, listed_ask.node.reliability
            if place not in self._lists:
                self._lists[place] = SortedKeyList(key=_KEYS[sort])
            self._lists[place].add(listed_ask)

    def _remove_free(self, listed_ask: ListedAsk) -> None:
        for sort in self._sorts:
            place = sort, listed_ask.node.reliability
            self._lists[place].remove(listed_ask)
            if not self._lists[place]:
                del self._lists[place]

    def keep_order(self, sort: str) -> None:
        """Keeps the free asks in one more order."""
        self._sorts.append(sort)
        for reliability in CLASSES:
            listed_asks = self._lists.get(("price", reliability))
            if listed_asks is not None:
                self._lists[sort, reliability] = SortedKeyList(listed_asks, key=_KEYS[sort])

    def other_asks(self, state: int, reliability: int) -> Iterable[ListedAsk]:
        """Returns the asks of one class without a free slot and in this state, the cheapest first."""
        listed_asks: Iterable[ListedAsk] = self._others.get((state, reliability), ())
        return listed_asks

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
        end = ranked.bisect_key_left(last + 1 << ADDRESS_BITS)
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

    __slots__ = ("_contexts", "_groups", "_reputable", "_selected", "_sorts")

    def __init__(self) -> None:
        self._sorts = ["price"]
        self._groups: dict[_GroupKey, AskGroup] = {}
        self._contexts: SortedList[int] = SortedList()
        """The contexts of the groups, shortest first."""
        self._reputable: dict[int, dict[AskGroup, None]] = {RELIABLE: {}, PROVEN: {}}
        """The groups with asks of these classes."""
        self._selected: OrderedDict[Hashable, list[AskGroup]] = OrderedDict()

    def enter(self, listed_ask: ListedAsk) -> None:
        """Counts an ask in its group, which it creates if necessary, and lists the ask there."""
        ask = listed_ask.ask.message
        key = _group_key(ask)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = AskGroup(ask, self._sorts)
            self._contexts.add(ask.context_tokens)
            self._selected.clear()
        group.size += 1
        self._add(group, listed_ask)

    def leave(self, listed_ask: ListedAsk) -> None:
        """Undoes `enter`."""
        key = _group_key(listed_ask.ask.message)
        group = self._groups[key]
        group.size -= 1
        self._remove(group, listed_ask)
        if not group.size:
            del self._groups[key]
            self._contexts.remove(group.example.context_tokens)
            self._selected.clear()

    def unlist(self, listed_ask: ListedAsk) -> None:
        """Removes an ask from the lists, before a change on which its places depend. `relist` must follow."""
        self._remove(self.group_of(listed_ask), listed_ask)

    def relist(self, listed_ask: ListedAsk) -> None:
        """Lists an ask again after `unlist`."""
        self._add(self.group_of(listed_ask), listed_ask)

    def _add(self, group: AskGroup, listed_ask: ListedAsk) -> None:
        group.add(listed_ask)
        if listed_ask.node.reliability in self._reputable:
            self._reputable[listed_ask.node.reliability][group] = None

    def _remove(self, group: AskGroup, listed_ask: ListedAsk) -> None:
        group.remove(listed_ask)
        reliability = listed_ask.node.reliability
        if reliability in self._reputable and not group.counts[reliability]:
            del self._reputable[reliability][group]

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

    def other_asks(self, demand: Demand, state: int, reliability: int) -> Iterator[ListedAsk]:
        """Yields the asks of one class of reliability without a free slot, in this state, whose spec meets the demand.

        The cheapest comes first.
        """
        lists = [group.other_asks(state, reliability) for group in self._select(demand)]
        return merge(*lists, key=_KEYS["price"])

    def _select(self, demand: Demand) -> list[AskGroup]:
        """Returns the groups that meet a demand; of very many, those with reliable providers."""
        key = self._selection_key(demand)
        fitting = self._selected.get(key)
        if fitting is None:
            fitting = self._selected[key] = _fitting(demand, self._groups.values())
            if len(self._selected) > _MAX_SELECTIONS:
                self._selected.popitem(last=False)
        if len(self._groups) <= MAX_GROUPS:
            return fitting
        reputable = _fitting(demand, dict.fromkeys(chain.from_iterable(self._reputable.values())))
        return list(islice(dict.fromkeys(chain(reputable, fitting)), MAX_GROUPS))

    def _selection_key(self, demand: Demand) -> Hashable:
        """Returns a key that is equal for demands which the same groups meet.

        Every request has another length, so lengths count only by the contexts that they exceed.
        """
        require, contexts = demand.require, self._contexts
        lengths = contexts.bisect_left(require.context_tokens), contexts.bisect_left(demand.input_tokens)
        names = require.region, require.tier, require.precision, require.engine, require.features
        return demand.route, demand.needs.features, names, lengths


def _fitting(demand: Demand, groups: Iterable[AskGroup]) -> list[AskGroup]:
    """Returns the first groups that meet a demand, at most MAX_GROUPS."""
    scanned = islice(groups, _MAX_SCANNED_GROUPS)
    return list(islice((group for group in scanned if demand.spec_objection(group.example) is None), MAX_GROUPS))
