"""The index of one model's asks: those with a free slot, by what they offer, in each order of a shortlist. Pure.

Asks that meet the same requirements form a group. A demand accepts or rejects a whole group at once, so an ask of another region
costs nothing. Groups are apart by price mix too. A request with much input and little output costs least with other asks than one
with much output. Within a group, one order by price serves both, and each list bounds the price of what follows. So the work of a
shortlist does not grow with the number of asks that are busy, do not fit or cannot win, and strangers hide no proven provider.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable, Iterator
from heapq import merge
from itertools import chain, islice

from sortedcontainers import SortedList

from coordinator.domain.ask_group import NEAR_TIE, ORDERS, AskGroup, FreeAsks, Offer, price_mix
from coordinator.domain.listed_ask import PROVEN, RELIABLE, ListedAsk
from coordinator.domain.scoring import Scorer
from tallystick.protocol.criteria import Demand
from tallystick.protocol.messages import Ask
from tallystick.protocol.payer_rules import payer_rule
from tallystick.protocol.precisions import precision_class
from tallystick.protocol.types import Address

MAX_GROUPS = 256
"""Groups of one model that one shortlist considers. Those with reliable providers come first."""
_MAX_SCANNED_GROUPS = 1_024
"""Groups of one model that one shortlist looks at, and as many with proven providers: a stranger can create any number."""
_MAX_SELECTIONS = 64
"""Selections of groups that a model's index remembers, by requirements and route."""


GroupKey = tuple[str, str, str, str, frozenset[str], int, int]


def group_key(ask: Ask) -> GroupKey:
    """Returns a key that is equal for asks of one group."""
    spec = ask.spec
    features = frozenset(feature if feature.startswith("/") else feature.lower() for feature in spec.features)
    names = spec.region.lower(), spec.tier.lower(), precision_class(spec.precision), spec.engine.lower()
    return *names, features, ask.context_tokens, price_mix(ask)


class FreeOffers:
    """The free asks of one class that a request may get, of all groups. `best_quality`: the highest bound of their quality."""

    __slots__ = ("_draw", "_exclude", "_lists", "_orders", "_scorer", "best_quality")

    def __init__(
        self, lists: list[FreeAsks], orders: list[str], scorer: Scorer, draw: float, exclude: Collection[Address] = ()
    ) -> None:
        self.best_quality = max([free_asks.best_quality for free_asks in lists])
        self._lists, self._orders, self._scorer, self._draw = lists, orders, scorer, draw
        self._exclude = exclude

    def __iter__(self) -> Iterator[Offer]:
        """Yields the asks, each with a bound: the asks after it have no lower price and time, except those yielded before.

        With several orders, each ask comes up once in each of them, in turns.
        """
        rates = [free_asks.price_rate(self._scorer.shape) for free_asks in self._lists]
        streams = [self._stream(order, rates) for order in self._orders]
        return streams[0] if len(streams) == 1 else _in_turns(streams)

    def _stream(self, order: str, rates: list[int]) -> Iterator[Offer]:
        pairs = list(zip(self._lists, rates, strict=True))
        if order == "price":
            lowest = min([free_asks.lowest(rate) for free_asks, rate in pairs])
            tie = lowest, lowest + lowest // NEAR_TIE
            streams = [free_asks.by_price(rate, tie, self._draw, self._exclude) for free_asks, rate in pairs]
        else:
            streams = [free_asks.by_speed(order, rate, self._scorer) for free_asks, rate in pairs]
        return streams[0] if len(streams) == 1 else merge(*streams, key=_bound)


def _in_turns(streams: list[Iterator[Offer]]) -> Iterator[Offer]:
    bounds = [0] * len(streams)
    while True:
        for number, stream in enumerate(streams):
            offer = next(stream, None)
            if offer is None:
                return
            bounds[number] = offer[0]
            yield max(bounds), offer[1], offer[2]


def _bound(offer: Offer) -> tuple[int, float]:
    return offer[0], offer[1]


class ModelIndex:
    """The groups of one model."""

    __slots__ = ("_contexts", "_groups", "_in_order", "_orders", "_reputable", "_selected", "payer_groups")

    def __init__(self) -> None:
        self.payer_groups = 0
        """The groups of asks that are for some payers alone."""
        self._orders = ["price"]
        self._groups: dict[GroupKey, AskGroup] = {}
        self._in_order: list[AskGroup] = []
        """The groups, each at its `place`."""
        self._contexts: SortedList[int] = SortedList()
        """The contexts of the groups, shortest first."""
        self._reputable: dict[int, dict[AskGroup, None]] = {RELIABLE: {}, PROVEN: {}}
        """The groups with asks of these classes."""
        self._selected: OrderedDict[Hashable, list[AskGroup]] = OrderedDict()

    def enter(self, listed_ask: ListedAsk) -> None:
        """Counts an ask in its group, which it creates if necessary, and lists the ask there."""
        ask = listed_ask.message
        key = group_key(ask)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = AskGroup(ask, self._orders)
            group.place = len(self._in_order)
            self._in_order.append(group)
            self._contexts.add(ask.context_tokens)
            self.payer_groups += payer_rule(ask.spec.features) is not None
            self._selected.clear()
        group.size += 1
        self._add(group, listed_ask)

    def leave(self, listed_ask: ListedAsk) -> None:
        """Undoes `enter`."""
        key = group_key(listed_ask.message)
        group = self._groups[key]
        group.size -= 1
        self._remove(group, listed_ask)
        if not group.size:
            del self._groups[key]
            last = self._in_order.pop()
            if last is not group:
                self._in_order[group.place], last.place = last, group.place
            self._contexts.remove(group.example.context_tokens)
            self.payer_groups -= payer_rule(group.example.spec.features) is not None
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
        return self._groups[group_key(listed_ask.message)]

    def free_asks(self, demand: Demand, reliability: int, scorer: Scorer, draw: float) -> FreeOffers | None:
        """Returns the free asks of one class whose spec meets the demand, for one request; None if there are none.

        `draw`, from 0 to 1, decides where to begin among asks whose prices nearly tie with the lowest.
        """
        lists = [free for group in self._select(demand, draw) if (free := group.free_asks(reliability)) is not None]
        if not lists:
            return None
        weights = scorer.shape.weights
        orders = ["price"] if demand.sort == "price" else []
        for order, weight in (("latency", weights.first_token), ("throughput", weights.speed)):
            if weight:
                self._keep_order(order)
                orders.append(order)
        return FreeOffers(lists, orders, scorer, draw, demand.exclude)

    def _keep_order(self, order: str) -> None:
        if order not in self._orders:
            self._orders.append(order)
            for group in self._groups.values():
                group.keep_order(order)

    def other_asks(self, demand: Demand, state: int, reliability: int, draw: float) -> Iterator[ListedAsk]:
        """Yields the asks of one class of reliability without a free slot, in this state, whose spec meets the demand.

        The cheapest comes first.
        """
        lists = [group.other_asks(state, reliability) for group in self._select(demand, draw)]
        return merge(*lists, key=ORDERS["price"])

    def _select(self, demand: Demand, draw: float) -> list[AskGroup]:
        """Returns the groups that meet a demand: of very many, those with reliable providers and a part that `draw` chooses."""
        if len(self._groups) <= MAX_GROUPS:
            return self._fitting(demand, 0)
        parts = -(-len(self._groups) // _MAX_SCANNED_GROUPS)
        reputable = _fitting(demand, dict.fromkeys(chain.from_iterable(self._reputable.values())))
        others = self._fitting(demand, int(draw * parts) * _MAX_SCANNED_GROUPS)
        begin = int(draw * parts % 1 * len(others))
        return list(islice(dict.fromkeys(chain(reputable, others[begin:], others[:begin])), MAX_GROUPS))

    def _fitting(self, demand: Demand, begin: int) -> list[AskGroup]:
        """Returns the groups from a place on that meet a demand; of those, at most _MAX_SCANNED_GROUPS are looked at."""
        key = begin, self._selection_key(demand)
        fitting = self._selected.get(key)
        if fitting is None:
            fitting = self._selected[key] = _fitting(demand, self._in_order[begin : begin + _MAX_SCANNED_GROUPS])
            if len(self._selected) > _MAX_SELECTIONS:
                self._selected.popitem(last=False)
        return fitting

    def _selection_key(self, demand: Demand) -> Hashable:
        """Returns a key that is equal for demands which the same groups meet.

        Every request has another length, so lengths count only by the contexts that they exceed.
        """
        require, contexts = demand.require, self._contexts
        lengths = contexts.bisect_left(require.context_tokens), contexts.bisect_left(demand.input_tokens)
        names = require.region, require.tier, require.precision, require.engine, require.features
        return demand.route, demand.needs.features, names, lengths, demand.batch


def _fitting(demand: Demand, groups: Iterable[AskGroup]) -> list[AskGroup]:
    """Returns those of the first _MAX_SCANNED_GROUPS groups that meet a demand."""
    return [group for group in islice(groups, _MAX_SCANNED_GROUPS) if demand.spec_objection(group.example) is None]
