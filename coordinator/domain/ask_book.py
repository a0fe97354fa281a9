"""The ask book: all asks of connected nodes, by model with the cheapest first, and the load that each node reports. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from operator import attrgetter
from sys import intern

from coordinator.domain.ask_group import AskGroup
from coordinator.domain.ask_index import GroupKey, ModelIndex, group_key
from coordinator.domain.listed_ask import SCORE_STEPS, ConnectedNode, ListedAsk, Speed, speed_steps
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.link import Capacity
from tallystick.protocol.messages import Ask, Spec
from tallystick.protocol.types import Address, Hash

__all__ = ["AskBook", "ConnectedNode", "ListedAsk"]
MAX_FORMER_ASKS = 16
"""Replaced asks of one node that orders may still name."""
_price_key = attrgetter("price_key")


@lru_cache(maxsize=4_096)
def _shared(spec: Spec) -> Spec:
    """Returns an equal spec that other asks have already, if one is remembered: many nodes sell the same product."""
    return spec


def _compact(ask: Verified[Ask], provider: Address) -> Verified[Ask]:
    """Returns the same ask with the values that others have too in common with them."""
    message = ask.message
    model, suite = intern(message.model), intern(message.sealing_suite)
    shared = replace(message, provider=provider, model=model, sealing_suite=suite, spec=_shared(message.spec))
    return Verified(shared, ask.signature, ask.digest)


def _ignore(_node: ConnectedNode) -> None:
    pass


def _unmeasured(_provider: Address, _model: str) -> Speed | None:
    return None


def _fold(listed_asks: tuple[ListedAsk, ...]) -> tuple[ListedAsk, ...]:
    """Returns the cheapest ask of each group, with the others of that group as its siblings."""
    if len(listed_asks) < 2:
        return listed_asks
    groups: dict[tuple[str, GroupKey], list[ListedAsk]] = {}
    for listed_ask in sorted(listed_asks, key=_price_key):
        ask = listed_ask.ask.message
        groups.setdefault((ask.model, group_key(ask)), []).append(listed_ask)
    for lead, *siblings in groups.values():
        lead.siblings = tuple(siblings)
    return tuple(members[0] for members in groups.values())


def _set_score(node: ConnectedNode, reliability: int, score_step: int) -> None:
    node.reliability, node.score_step = reliability, score_step


@dataclass(slots=True)
class AskBook:
    """All listed asks: by model, cheapest first, by digest, and by provider."""

    _by_model: dict[str, list[ListedAsk]] = field(default_factory=dict)
    _by_digest: dict[Hash, ListedAsk] = field(default_factory=dict)
    _nodes: dict[Address, ConnectedNode] = field(default_factory=dict)
    _indexes: dict[str, ModelIndex] = field(default_factory=dict)
    decisions: int = 0
    """The number of the next decision, which dates changes of a node's free slots."""
    on_free: Callable[[ConnectedNode], None] = _ignore
    """Called with each node that may have got a free slot."""
    measured: Callable[[Address, str], Speed | None] = _unmeasured
    """Returns the speed that was measured for a provider and a model; None if too little was."""

    def replace(
        self,
        provider: Address,
        asks: Iterable[Verified[Ask]],
        capacity: Capacity | None = None,
        reliability: int | None = None,
        score_step: int = SCORE_STEPS,
    ) -> None:
        """Replaces all asks of a provider. None for `capacity` or `reliability` keeps the former one.

        `score_step`: see ConnectedNode, if `reliability` is given.
        """
        node = self._nodes.get(provider)
        former = () if node is None else (*node.former, *node.asks)
        self._remove_asks(provider)
        if node is None:
            node = self._nodes[provider] = ConnectedNode(provider, Capacity(0, 0), known_since=self.decisions)
        if capacity is not None:
            node.capacity = capacity
        if reliability is not None:
            node.reliability, node.score_step = reliability, score_step
        node.set_listed(node.free > 0, self.decisions)
        node.asks = tuple(ListedAsk(_compact(ask, provider), node, self.measured(provider, ask.message.model)) for ask in asks)
        node.leads = _fold(node.asks)
        for listed_ask in node.asks:
            model = listed_ask.ask.message.model
            self._by_digest[listed_ask.ask.digest] = listed_ask
            insort(self._by_model.setdefault(model, []), listed_ask, key=_price_key)
        for listed_ask in node.leads:
            model = listed_ask.ask.message.model
            index = self._indexes.get(model)
            if index is None:
                index = self._indexes[model] = ModelIndex()
            index.enter(listed_ask)
        self._keep_former(node, former)
        if node.listed:
            self.on_free(node)

    def _keep_former(self, node: ConnectedNode, former: Iterable[ListedAsk]) -> None:
        """Keeps the last replaced asks of models that the node still sells: it accepts orders on them until they expire."""
        models = {listed_ask.ask.message.model for listed_ask in node.asks}
        replaced = [entry for entry in former if entry.ask.message.model in models and entry.ask.digest not in self._by_digest]
        node.former = tuple(replaced[-MAX_FORMER_ASKS:])
        for listed_ask in node.former:
            self._by_digest[listed_ask.ask.digest] = listed_ask

    def drop(self, provider: Address) -> None:
        """Removes a provider that disconnected."""
        self._remove_asks(provider)
        self._nodes.pop(provider, None)

    def _remove_asks(self, provider: Address) -> None:
        node = self._nodes.get(provider)
        if node is None:
            return
        for listed_ask in node.leads:
            self._indexes[listed_ask.ask.message.model].leave(listed_ask)
        for listed_ask in node.asks:
            self._by_digest.pop(listed_ask.ask.digest, None)
            model = listed_ask.ask.message.model
            of_model = self._by_model[model]
            index = bisect_left(of_model, listed_ask.price_key, key=_price_key)
            while of_model[index] is not listed_ask:
                index += 1
            del of_model[index]
            if not of_model:
                del self._by_model[model], self._indexes[model]
        for listed_ask in node.former:
            self._by_digest.pop(listed_ask.ask.digest, None)
        node.asks = node.leads = node.former = ()

    # What changes with every job

    def set_capacity(self, provider: Address, capacity: Capacity) -> None:
        """Records the capacity that a connected node reports."""
        node = self._nodes.get(provider)
        if node is None:
            return
        if not node.listed or speed_steps(capacity) == speed_steps(node.capacity):
            node.capacity = capacity
        else:
            self._relist(node, partial(setattr, node, "capacity", capacity))
        self._update(node)

    def set_reliability(self, provider: Address, reliability: int, score_step: int = SCORE_STEPS) -> None:
        """Records the class of reliability of a connected node's provider, and the step that its score does not exceed."""
        node = self._nodes.get(provider)
        if node is not None and (node.reliability, node.score_step) != (reliability, score_step):
            self._relist(node, partial(_set_score, node, reliability, score_step))

    def set_speed(self, provider: Address, model: str, speed: Speed) -> None:
        """Records the speed that was measured for a provider and a model."""
        node = self._nodes.get(provider)
        if node is None:
            return
        for listed_ask in node.asks:
            if listed_ask.ask.message.model != model:
                continue
            before = speed_steps(listed_ask.speed)
            former, listed_ask.measured = listed_ask.measured, speed
            if listed_ask in node.leads and speed_steps(listed_ask.speed) != before:
                index, listed_ask.measured = self._indexes[model], former
                index.unlist(listed_ask)
                listed_ask.measured = speed
                index.relist(listed_ask)

    def assign(self, node: ConnectedNode) -> None:
        """Counts a job that the node was given."""
        node.assigned += 1
        self._update(node)

    def release(self, node: ConnectedNode) -> None:
        """Counts the end of a job of the node, which may have disconnected since."""
        node.assigned -= 1
        self._update(node)

    def _update(self, node: ConnectedNode) -> None:
        """Lists the asks of a node that has a free slot again, and unlists those of one that has none left."""
        if self._nodes.get(node.provider) is not node:
            return
        free = node.free > 0
        if free != node.listed:
            node.set_listed(free, self.decisions)
            for group, listed_ask in self._groups_of(node):
                group.set_free(listed_ask, free=free)
        if free:
            self.on_free(node)

    def _relist(self, node: ConnectedNode, change: Callable[[], None]) -> None:
        """Makes a change on which the places of a node's asks depend."""
        for listed_ask in node.leads:
            self._indexes[listed_ask.ask.message.model].unlist(listed_ask)
        change()
        for listed_ask in node.leads:
            self._indexes[listed_ask.ask.message.model].relist(listed_ask)

    def _groups_of(self, node: ConnectedNode) -> Iterator[tuple[AskGroup, ListedAsk]]:
        """Yields the asks of a node, each with its group."""
        for listed_ask in node.leads:
            yield self._indexes[listed_ask.ask.message.model].group_of(listed_ask), listed_ask

    # Reading

    def node(self, provider: Address) -> ConnectedNode | None:
        """Returns the node of a provider, or None if it is not connected."""
        return self._nodes.get(provider)

    def of_provider(self, provider: Address) -> tuple[ListedAsk, ...]:
        """Returns the asks of a provider."""
        node = self._nodes.get(provider)
        return () if node is None else node.asks

    def of_model(self, model: str) -> list[ListedAsk]:
        """Returns the asks for a model, cheapest first. The caller must not change the list."""
        return self._by_model.get(model, [])

    def index_of(self, model: str) -> ModelIndex | None:
        """Returns the index of a model's free asks, or None for a model that nobody offers."""
        return self._indexes.get(model)

    def of_providers(self, model: str, providers: Iterable[Address]) -> Iterator[ListedAsk]:
        """Returns the asks of these providers for a model, unsorted."""
        listed_asks = (listed_ask for provider in providers for listed_ask in self.of_provider(provider))
        return (listed_ask for listed_ask in listed_asks if listed_ask.ask.message.model == model)

    def find(self, digest: Hash) -> ListedAsk | None:
        """Returns the ask with this digest, a listed one or one that was replaced lately, or None."""
        return self._by_digest.get(digest)

    def models(self) -> Iterator[tuple[str, list[ListedAsk]]]:
        """Returns every model with its asks, by name."""
        return iter(sorted(self._by_model.items()))

    @property
    def size(self) -> int:
        """The number of listed asks."""
        return sum(map(len, self._by_model.values()))
