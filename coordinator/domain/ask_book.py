"""The ask book: all asks of connected nodes, by model with the cheapest first, and the capacity that each node reports. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter

from coordinator.domain.ask_index import GroupKey, ModelIndex, group_key
from coordinator.domain.ask_interning import intern_ask, shared_value
from coordinator.domain.listed_ask import (
    FREE_SLOT,
    FULL_QUALITY,
    NO_PLACE,
    PERFECT,
    ConnectedNode,
    ListedAsk,
    SlotGroup,
    SlotKey,
    Speed,
    speed_steps,
)
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import BadMessage, Fault
from tallystick.protocol.link import Capacities, Capacity
from tallystick.protocol.messages import Ask
from tallystick.protocol.types import Address, Hash

__all__ = ["AskBook", "ConnectedNode", "ListedAsk"]
NO_CAPACITY = Capacity(0, 0)
MAX_FORMER_ASKS = 16
"""Replaced asks of one node that orders may still name."""
_price_key = attrgetter("price_key")


def _ignore(_group: SlotGroup) -> None:
    pass


def _size(capacity: Capacity) -> int:
    return capacity.slots + capacity.queue


def _by_group(capacity: Capacity | Capacities) -> Capacities:
    """Returns capacities by slot group. A single one is that of group 0."""
    return {0: capacity} if isinstance(capacity, Capacity) else capacity


def _unmeasured(_provider: Address, _model: str) -> Speed | None:
    return None


def _unaudited(_ask: Ask) -> tuple[int, int]:
    return PERFECT


def _fold(listed_asks: tuple[ListedAsk, ...]) -> tuple[ListedAsk, ...]:
    """Returns the cheapest ask of each group and slot group, with the others of these as its siblings."""
    if len(listed_asks) < 2:
        return listed_asks
    groups: dict[tuple[str, GroupKey, int], list[ListedAsk]] = {}
    for listed_ask in sorted(listed_asks, key=_price_key):
        ask = listed_ask.message
        groups.setdefault((ask.model, group_key(ask), listed_ask.slot_group.number), []).append(listed_ask)
    for lead, *siblings in groups.values():
        lead.siblings = tuple(siblings)
    return tuple(members[0] for members in groups.values())


def _set_leads(node: ConnectedNode) -> None:
    leads: dict[SlotGroup, list[ListedAsk]] = {}
    for lead in _fold(node.asks):
        leads.setdefault(lead.slot_group, []).append(lead)
    for group, of_group in leads.items():
        group.leads = node.asks if len(of_group) == len(node.asks) == 1 else tuple(of_group)


def _set_score(node: ConnectedNode, reliability: int, quality: int) -> None:
    node.reliability, node.quality = reliability, shared_value(quality)


@dataclass(slots=True)
class AskBook:
    """All listed asks: by model, cheapest first, by digest, and by provider."""

    _by_model: dict[str, list[ListedAsk]] = field(default_factory=dict)
    _by_digest: dict[Hash, ListedAsk] = field(default_factory=dict)
    _nodes: dict[Address, ConnectedNode] = field(default_factory=dict)
    _indexes: dict[str, ModelIndex] = field(default_factory=dict)
    free_slots: int = 0
    """The free slots of all engines, each counted once however many asks share them."""
    decisions: int = 0
    """The number of the next decision, which dates changes of the free slots."""
    on_free: Callable[[SlotGroup], None] = _ignore
    """Called with each slot group that may take a job."""
    max_jobs: int = 1 << 32
    """Jobs that one node may be given at a time, over all of its slot groups."""
    measured: Callable[[Address, str], Speed | None] = _unmeasured
    """Returns the speed that was measured for a provider and a model; None if too little was."""
    standing: Callable[[Ask], tuple[int, int]] = _unaudited
    """Returns the integrity of what an ask sells, in INTEGRITY_STEPS, and the number of audits behind it."""

    def replace(
        self,
        provider: Address,
        asks: Iterable[Verified[Ask]],
        capacity: Capacity | Capacities | None = None,
        reliability: int | None = None,
        quality: int = FULL_QUALITY,
        *,
        groups: Sequence[int] = (),
    ) -> None:
        """Replaces all asks of a provider. None for `capacity` or `reliability` keeps the former one.

        `quality`: see ConnectedNode, if `reliability` is given. `groups`: the number of each ask's slot group; without any,
        all asks share group 0.
        """
        node = self._nodes.get(provider)
        self.free_slots -= 0 if node is None else node.free
        former, slot_groups = ((), ()) if node is None else ((*node.former, *node.asks), (*node.retired, *node.groups))
        self._remove_asks(provider)
        if node is None:
            node = self._nodes[provider] = ConnectedNode(provider)
        if reliability is not None:
            _set_score(node, reliability, quality)
        listed = list(asks)
        numbers = list(groups) or [0] * len(listed)
        by_number, keys = self._set_groups(node, slot_groups, numbers, capacity), dict[bytes, bytes]()
        node.asks = tuple(
            ListedAsk(
                intern_ask(ask, provider, keys),
                by_number[number],
                self.measured(provider, ask.message.model),
                self.standing(ask.message),
            )
            for ask, number in zip(listed, numbers, strict=True)
        )
        _set_leads(node)
        for listed_ask in node.asks:
            model = listed_ask.message.model
            self._by_digest[listed_ask.digest] = listed_ask
            insort(self._by_model.setdefault(model, []), listed_ask, key=_price_key)
        for listed_ask in node.leads:
            model = listed_ask.message.model
            index = self._indexes.get(model)
            if index is None:
                index = self._indexes[model] = ModelIndex()
            index.enter(listed_ask)
        self._keep_former(node, former)
        self.free_slots += node.free
        for slot_group in node.groups:
            if slot_group.state != NO_PLACE:
                self.on_free(slot_group)

    def _set_groups(
        self,
        node: ConnectedNode,
        former: Iterable[SlotGroup],
        numbers: Iterable[int],
        capacity: Capacity | Capacities | None,
    ) -> dict[int, SlotGroup]:
        """Returns a node's slot groups with these numbers: of the former ones those that there are. Those with jobs retire."""
        known = {group.number: group for group in former}
        groups = {
            number: known.pop(number) if number in known else SlotGroup(node, number, NO_CAPACITY, known_since=self.decisions)
            for number in dict.fromkeys(numbers)
        }
        node.retired = tuple(group for group in known.values() if group.assigned)
        for group, group_capacity in self._limited(node, groups.values(), _by_group(capacity or {})):
            group.capacity = group_capacity
        for group in groups.values():
            group.set_state(group.current_state, self.decisions)
        return groups

    def _limited(
        self, node: ConnectedNode, groups: Collection[SlotGroup], reported: Capacities
    ) -> list[tuple[SlotGroup, Capacity]]:
        """Returns the slot groups with their reported capacities, of which no node gets more than `max_jobs` places in all.

        Groups that no ask names are left out.
        """
        left = self.max_jobs - sum(group.assigned for group in node.retired)
        left -= sum(_size(group.capacity) for group in groups if group.number not in reported)
        limited: list[tuple[SlotGroup, Capacity]] = []
        for group in groups:
            capacity = reported.get(group.number)
            if capacity is None:
                continue
            if _size(capacity) > left:
                slots = min(capacity.slots, max(left, 0))
                capacity = replace(capacity, slots=slots, queue=min(capacity.queue, max(left, 0) - slots))
            left -= _size(capacity)
            limited.append((group, capacity))
        return limited

    def _keep_former(self, node: ConnectedNode, former: Iterable[ListedAsk]) -> None:
        """Keeps the last replaced asks of models that the node still sells: it accepts orders on them until they expire."""
        sold = {(listed_ask.message.model, listed_ask.slot_group) for listed_ask in node.asks}
        replaced = [
            entry for entry in former if (entry.message.model, entry.slot_group) in sold and entry.digest not in self._by_digest
        ]
        node.former = tuple(replaced[-MAX_FORMER_ASKS:])
        for listed_ask in node.former:
            self._by_digest[listed_ask.digest] = listed_ask

    def drop(self, provider: Address) -> None:
        """Removes a provider that disconnected."""
        node = self._nodes.get(provider)
        self.free_slots -= 0 if node is None else node.free
        self._remove_asks(provider)
        self._nodes.pop(provider, None)

    def _remove_asks(self, provider: Address) -> None:
        node = self._nodes.get(provider)
        if node is None:
            return
        for listed_ask in node.leads:
            self._indexes[listed_ask.message.model].leave(listed_ask)
        for listed_ask in node.asks:
            self._by_digest.pop(listed_ask.digest, None)
            model = listed_ask.message.model
            of_model = self._by_model[model]
            index = bisect_left(of_model, listed_ask.price_key, key=_price_key)
            while of_model[index] is not listed_ask:
                index += 1
            del of_model[index]
            if not of_model:
                del self._by_model[model], self._indexes[model]
        for listed_ask in node.former:
            self._by_digest.pop(listed_ask.digest, None)
        for group in node.groups:
            group.leads = ()
        node.asks = node.former = ()

    # What changes with every job

    def set_capacity(self, provider: Address, capacity: Capacity | Capacities) -> None:
        """Records the capacity that a connected node reports of some of its slot groups; a single one is that of group 0.

        Raises BadMessage for a group that none of its asks names, and then records nothing.
        """
        node = self._nodes.get(provider)
        if node is None:
            return
        reported, groups = _by_group(capacity), node.groups
        unknown = reported.keys() - {group.number for group in groups}
        if unknown:
            text = f"expected slot groups that asks of the node name, got {min(unknown)}"
            raise BadMessage(f"capacity.group: {text}", fault=Fault.PROVIDER)
        for group, group_capacity in self._limited(node, groups, reported):
            self._set_capacity(group, group_capacity)

    def _set_capacity(self, group: SlotGroup, capacity: Capacity) -> None:
        free = group.free
        if group.state != FREE_SLOT or speed_steps(capacity) == speed_steps(group.capacity):
            group.capacity = capacity
        else:
            self._relist(group.leads, partial(setattr, group, "capacity", capacity))
        self._update(group, free)

    def set_reliability(self, provider: Address, reliability: int, quality: int = FULL_QUALITY) -> None:
        """Records the class of reliability of a connected node's provider, and the step that its score does not exceed."""
        node = self._nodes.get(provider)
        if node is not None and (node.reliability, node.quality) != (reliability, quality):
            self._relist(node.leads, partial(_set_score, node, reliability, quality))

    def refresh_standing(self, provider: Address) -> None:
        """Reads again what audits say of a connected provider's asks, those that were replaced lately included."""
        node = self._nodes.get(provider)
        if node is not None:
            for listed_ask in (*node.asks, *node.former):
                listed_ask.integrity, listed_ask.audits = self.standing(listed_ask.message)

    def set_speed(self, provider: Address, model: str, speed: Speed) -> None:
        """Records the speed that was measured for a provider and a model."""
        node = self._nodes.get(provider)
        if node is None:
            return
        for listed_ask in node.asks:
            if listed_ask.message.model != model:
                continue
            before = speed_steps(listed_ask.speed)
            former, listed_ask.measured = listed_ask.measured, speed
            if listed_ask in listed_ask.slot_group.leads and speed_steps(listed_ask.speed) != before:
                index, listed_ask.measured = self._indexes[model], former
                index.unlist(listed_ask)
                listed_ask.measured = speed
                index.relist(listed_ask)

    def assign(self, group: SlotGroup) -> None:
        """Counts a job that a slot group was given."""
        free = group.free
        group.assigned += 1
        self._update(group, free)

    def release(self, group: SlotGroup) -> None:
        """Counts the end of a job of a slot group, whose node may have disconnected since."""
        free = group.free
        group.assigned -= 1
        if not group.assigned and group in group.node.retired:
            group.node.retired = tuple(retired for retired in group.node.retired if retired is not group)
        self._update(group, free)

    def _update(self, group: SlotGroup, free: int) -> None:
        """Moves the asks of a slot group to the lists of its state. `free`: the slots that were free before the change."""
        if not group.leads:  # its node was dropped, or no ask names it any more
            return
        self.free_slots += group.free - free
        former, state = group.state, group.current_state
        if former != state:
            group.set_state(state, self.decisions)
            for lead in group.leads:
                self._indexes[lead.message.model].group_of(lead).move(lead, former=former, state=state)
        if state != NO_PLACE:
            self.on_free(group)

    def _relist(self, leads: Sequence[ListedAsk], change: Callable[[], None]) -> None:
        """Makes a change on which the places of these asks depend."""
        for lead in leads:
            self._indexes[lead.message.model].unlist(lead)
        change()
        for lead in leads:
            self._indexes[lead.message.model].relist(lead)

    # Reading

    def node(self, provider: Address) -> ConnectedNode | None:
        """Returns the node of a provider, or None if it is not connected."""
        return self._nodes.get(provider)

    def groups_of(self, key: SlotKey) -> tuple[SlotGroup, ...]:
        """Returns the slot group with this key, or all of a provider's for a key without a number; none if they are gone."""
        provider, number = key
        node = self._nodes.get(provider)
        if node is None:
            return ()
        return node.groups if number is None else tuple(group for group in node.groups if group.number == number)

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
        return (listed_ask for listed_ask in listed_asks if listed_ask.message.model == model)

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
