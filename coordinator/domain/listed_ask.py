"""What the ask book lists: connected nodes and their asks, with the integer keys of each order of the index. Pure.

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
    score_step: int = SCORE_STEPS
    """A step that its provider's score does not exceed."""
    listed: bool = False
    """Whether the node's asks are in the lists of their groups."""
    known_since: int = 0
    """The number of the first decision at which it is known whether the node was listed."""
    changes: tuple[int, ...] = ()
    """The numbers of the decisions before which `listed` last changed, oldest first; at most _MAX_CHANGES."""
    asks: tuple[ListedAsk, ...] = ()
    leads: tuple[ListedAsk, ...] = ()
    """Its cheapest ask in each group, which stands for its others there: a provider has one place among equals."""
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
    """One ask in the book, with the node that offers it, and its key in the order by price.

    `measured`: the speed that the coordinator measured for its provider and model; None if it measured too little.
    """

    ask: Verified[Ask]
    node: ConnectedNode
    measured: Speed | None = None
    siblings: tuple[ListedAsk, ...] = ()
    """The provider's other asks in the same group, cheapest first, if this one stands for them in the lists."""
    provider: Address = field(init=False)
    by_price: int = field(init=False)

    def __post_init__(self) -> None:
        message = self.ask.message
        self.provider = message.provider
        self.by_price = 3 * message.input_price + message.output_price << ADDRESS_BITS | int(self.provider[2:10], 16)

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
        capacity, measured = self.node.capacity, self.measured or UNKNOWN_SPEED
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
