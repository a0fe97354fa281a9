"""Connected nodes, the slot groups of each, and its listed asks with their sort keys. Pure.

Slots belong to the engines of a node. Asks of one node that share an engine's slots form a slot group: they are free or busy
together, whatever the node's other engines do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from math import log2

from tallystick.protocol.eip712 import Verified
from tallystick.protocol.link import Capacity
from tallystick.protocol.messages import Ask
from tallystick.protocol.types import Address

RELIABLE, PROVEN, OTHER = range(3)
"""The classes of reliability, best first. ranking.py assigns them by score."""
CLASSES = (RELIABLE, PROVEN, OTHER)
_STEPS_PER_DOUBLING = 4
"""Speeds are compared in steps of the fourth root of two, because every report of a node differs a little."""
_SLOWEST = 255
"""The step of an unknown speed."""
_MAX_CHANGES = 32
_SPEED_SHIFT = 128
ADDRESS_BITS = 32
FREE_SLOT, QUEUE_PLACE, NO_PLACE = range(3)
"""The states of a slot group, best first: a slot is free; only a place in the engine's queue is; the node takes no job."""
SlotKey = tuple[Address, int | None]
"""A slot group by its provider and number. None stands for the groups of a provider that is away."""


@dataclass(slots=True, eq=False)
class ConnectedNode:
    """A connected node and its slot groups.

    `stake`: base units, as last read; 0 until a demand asks for a stake. Only the ask book changes the other members.
    """

    provider: Address
    stake: int = 0
    reliability: int = OTHER
    groups: tuple[SlotGroup, ...] = ()
    """The slot groups that the node's asks name."""
    retired: tuple[SlotGroup, ...] = ()
    """Former slot groups that still have jobs."""
    former: tuple[ListedAsk, ...] = ()
    """Asks that were replaced lately, which orders may still name."""

    @property
    def asks(self) -> tuple[ListedAsk, ...]:
        """The node's asks, by slot group."""
        if len(self.groups) == 1:
            return self.groups[0].asks
        return tuple(chain.from_iterable(group.asks for group in self.groups))

    @property
    def free(self) -> int:
        """Free slots of all groups."""
        return sum(group.free for group in self.groups)

    @property
    def assigned(self) -> int:
        """Jobs that the node was given and that have not ended."""
        return sum(group.assigned for group in (*self.groups, *self.retired))


@dataclass(slots=True, eq=False)
class SlotGroup:
    """Slots that some asks of a node share: their last reported capacity, and the jobs that were given to them.

    Only the ask book changes it.
    """

    node: ConnectedNode
    number: int
    capacity: Capacity
    assigned: int = 0
    """Jobs that the group was given and that have not ended."""
    state: int = NO_PLACE
    """The lists in which the group's asks are."""
    known_since: int = 0
    """The number of the first decision at which it is known whether a slot was free."""
    changes: tuple[int, ...] = ()
    """The numbers of the decisions before which that last changed, oldest first; at most _MAX_CHANGES."""
    asks: tuple[ListedAsk, ...] = ()

    @property
    def provider(self) -> Address:
        """The provider of the node."""
        return self.node.provider

    @property
    def key(self) -> SlotKey:
        """Identifies the group, also after its node connected again."""
        return self.node.provider, self.number

    @property
    def places(self) -> int:
        """Jobs that the group takes now, as far as this coordinator knows: into free slots and the engine's queue."""
        capacity = self.capacity
        return max(0, min(capacity.free, capacity.slots + capacity.queue - self.assigned))

    @property
    def free(self) -> int:
        """Free slots. The places of the engine's queue are used last."""
        return max(0, self.places - self.capacity.queue)

    @property
    def load(self) -> float:
        """Jobs per slot: 1 if all slots are taken, more if jobs wait in the engine's queue."""
        capacity = self.capacity
        return (capacity.slots + capacity.queue - self.places) / capacity.slots if capacity.slots else 1.0

    @property
    def current_state(self) -> int:
        """The state that follows from the capacity and the jobs."""
        places = self.places
        return FREE_SLOT if places > self.capacity.queue else QUEUE_PLACE if places else NO_PLACE

    def set_state(self, state: int, decision: int) -> None:
        """Sets `state`. `decision`: the number of the next decision."""
        if (state == FREE_SLOT) != (self.state == FREE_SLOT):
            self.changes = (*self.changes, decision)
            if len(self.changes) > _MAX_CHANGES:
                self.known_since, self.changes = self.changes[0], self.changes[1:]
        self.state = state

    def was_free(self, decision: int) -> bool | None:
        """Returns whether a slot was free at the decision of this number; None if that is not known any more."""
        if decision < self.known_since:
            return None
        later = sum(change > decision for change in self.changes)
        return (self.state == FREE_SLOT) ^ bool(later % 2)


@dataclass(slots=True, eq=False)
class ListedAsk:
    """One ask in the book, with the slots that it sells, and its key in the order by price."""

    ask: Verified[Ask]
    slot_group: SlotGroup
    provider: Address = field(init=False)
    by_price: int = field(init=False)

    def __post_init__(self) -> None:
        message = self.ask.message
        self.provider = message.provider
        self.by_price = 3 * message.input_price + message.output_price << ADDRESS_BITS | int(self.provider[2:10], 16)

    @property
    def node(self) -> ConnectedNode:
        """The node that offers it."""
        return self.slot_group.node

    @property
    def price(self) -> int:
        """The price of three input tokens and one output token, in base units per 1,000,000 of each."""
        return self.by_price >> ADDRESS_BITS

    @property
    def price_key(self) -> tuple[int, str]:
        """Sort key: the price; the address breaks a tie, so the order is total."""
        return self.price, self.provider

    @property
    def by_latency(self) -> int:
        """Sort key: the step of the time to the first token, then the price."""
        return speed_steps(self.slot_group.capacity)[0] << _SPEED_SHIFT | self.by_price

    @property
    def by_throughput(self) -> int:
        """Sort key: the step of the throughput, then the price."""
        return speed_steps(self.slot_group.capacity)[1] << _SPEED_SHIFT | self.by_price


def speed_steps(capacity: Capacity) -> tuple[int, int]:
    """Returns the steps of a slot group's time to the first token and of its throughput; a lower step is faster."""
    latency = throughput = _SLOWEST
    if capacity.first_token_ms:
        latency = min(int(log2(capacity.first_token_ms) * _STEPS_PER_DOUBLING), _SLOWEST - 1)
    if capacity.tokens_per_second:
        throughput = max(_SLOWEST - 1 - int(log2(capacity.tokens_per_second) * _STEPS_PER_DOUBLING), 0)
    return latency, throughput
