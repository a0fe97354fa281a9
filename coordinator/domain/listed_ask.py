"""What the ask book lists: connected nodes, their slot groups and asks, with the integer keys of each order of the index. Pure.

A key is the price first, or a speed in steps of about a fifth and then the price. The last 32 bits come from the provider's
address, so the order is total and the same in each process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import log2
from typing import NamedTuple

from tallystick.protocol.eip712 import Verified
from tallystick.protocol.link import Capacity
from tallystick.protocol.messages import Ask
from tallystick.protocol.types import Address

RELIABLE, PROVEN, OTHER = range(3)
"""The classes of reliability, best first. ranking.py assigns them by score."""
CLASSES = (RELIABLE, PROVEN, OTHER)
SCORE_STEPS = 64
"""Steps of a provider's score, by which the index bounds how reliable an unseen provider can be."""
ADDRESS_BITS = 32
_STEPS_PER_DOUBLING = 4
"""Speeds are compared in steps of the fourth root of two, because every report of a node differs a little."""
SLOWEST = 84
"""The step of an unknown speed. It counts as a minute to the first token, or as a second per token."""
_SPEED_SHIFT = 128
_MAX_CHANGES = 32


class Speed(NamedTuple):
    """How fast a provider answers. 0: unknown."""

    first_token_ms: int = 0
    tokens_per_second: int = 0


UNKNOWN_SPEED = Speed()


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
    score_step: int = SCORE_STEPS
    """A step that its provider's score does not exceed."""
    groups: tuple[SlotGroup, ...] = ()
    """The slot groups that the node's asks name."""
    retired: tuple[SlotGroup, ...] = ()
    """Former slot groups that still have jobs."""
    asks: tuple[ListedAsk, ...] = ()
    leads: tuple[ListedAsk, ...] = ()
    """Its cheapest ask in each group and slot group, which stands for its others there: a provider has one place among equals."""
    former: tuple[ListedAsk, ...] = ()
    """Asks that were replaced lately, which orders may still name."""

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
    """Slots that some asks of a node share, because one engine serves them: their last reported capacity, and their jobs.

    The asks of a slot group are free or busy together, whatever the node's other engines do. Only the ask book changes it.
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
    leads: tuple[ListedAsk, ...] = ()
    """Those of the node's leads that sell these slots."""
    key: SlotKey = field(init=False, repr=False)
    """Identifies the group, also after its node connected again. One object, which all jobs that wait for the group share."""

    def __post_init__(self) -> None:
        self.key = self.node.provider, self.number

    @property
    def provider(self) -> Address:
        """The provider of the node."""
        return self.node.provider

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
    def taken(self) -> int:
        """Jobs in slots or in the engine's queue, those of others included."""
        return self.capacity.slots + self.capacity.queue - self.places

    @property
    def load(self) -> float:
        """Jobs per slot: 1 if all slots are taken, more if jobs wait in the engine's queue."""
        return self.taken / self.capacity.slots if self.capacity.slots else 1.0

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
    """One ask in the book, with the slots that it sells, and its key in the order by price.

    `measured`: the speed that the coordinator measured for its provider and model; None if it measured too little.
    """

    ask: Verified[Ask]
    slot_group: SlotGroup
    measured: Speed | None = None
    siblings: tuple[ListedAsk, ...] = ()
    """The provider's other asks in the same group and slot group, cheapest first, if this one stands for them in the lists."""
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
    def speed(self) -> Speed:
        """The measured speed, and until enough was measured, what the node says of itself."""
        capacity, measured = self.slot_group.capacity, self.measured or UNKNOWN_SPEED
        first_token_ms = measured.first_token_ms or capacity.first_token_ms
        return Speed(first_token_ms, measured.tokens_per_second or capacity.tokens_per_second)

    @property
    def by_latency(self) -> int:
        """Sort key: the step of the time to the first token, then the price."""
        return latency_step(self.speed.first_token_ms) << _SPEED_SHIFT | self.by_price

    @property
    def by_throughput(self) -> int:
        """Sort key: the step of the throughput, then the price."""
        return throughput_step(self.speed.tokens_per_second) << _SPEED_SHIFT | self.by_price


@lru_cache(maxsize=1 << 16)
def latency_step(first_token_ms: int) -> int:
    """Returns the step of a time to the first token; a lower step is faster."""
    return min(int(log2(first_token_ms) * _STEPS_PER_DOUBLING), SLOWEST - 1) if first_token_ms else SLOWEST


@lru_cache(maxsize=1 << 16)
def throughput_step(tokens_per_second: int) -> int:
    """Returns the step of a throughput; a lower step is faster."""
    return max(SLOWEST - 1 - int(log2(tokens_per_second) * _STEPS_PER_DOUBLING), 0) if tokens_per_second else SLOWEST


def _doublings(steps: int, scale: int, limit: int) -> int:
    return min(round(scale * 2 ** (steps / _STEPS_PER_DOUBLING)), limit)


LATENCY_MS = tuple(_doublings(step, 1, 60_000) for step in range(SLOWEST + 1))
"""Milliseconds that each step of a time to the first token counts as."""
TOKEN_US = tuple(_doublings(step + 1 - SLOWEST, 1_000_000, 1_000_000) for step in range(SLOWEST + 1))
"""Microseconds per token that each step of a throughput counts as."""


def speed_steps(speed: Speed | Capacity) -> tuple[int, int]:
    """Returns the steps of a time to the first token and of a throughput."""
    return latency_step(speed.first_token_ms), throughput_step(speed.tokens_per_second)
