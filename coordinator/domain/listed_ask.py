"""What the ask book lists: connected nodes, their slot groups and asks, with the integer keys of each order of the index. Pure.

A key is the price first, or a speed in steps of about a fifth and then the price. The last 32 bits come from the provider's
address, so the order is total and the same in each process.
"""

from __future__ import annotations

from functools import lru_cache
from math import log2
from typing import NamedTuple, Union

from tallystick.protocol.eip712 import Verified
from tallystick.protocol.link import Capacity
from tallystick.protocol.log_facts import INTEGRITY_STEPS
from tallystick.protocol.messages import Ask
from tallystick.protocol.types import Address

RELIABLE, PROVEN, OTHER = range(3)
"""The classes of reliability, best first. ranking.py assigns them by score."""
CLASSES = (RELIABLE, PROVEN, OTHER)
FULL_QUALITY = 128_000
"""The quality of a provider that never fails and whose integrity is beyond doubt: half of it is its score, half its integrity. By
it the index bounds what an unseen provider costs beside price and time.
"""
ADDRESS_BITS = 32
_STEPS_PER_DOUBLING = 4
"""Speeds are compared in steps of the fourth root of two, because every report of a node differs a little."""
SLOWEST = 84
"""The step of an unknown speed. It counts as a minute to the first token, or as a second per token."""
_SPEED_SHIFT = 128
_MAX_CHANGES = 32
_NUMBERS = tuple(range(1 << 13))
"""One object of each number, so that nodes with the same time to the first token share it, which saves memory."""


PERFECT = (INTEGRITY_STEPS, 0)
"""The integrity and the audits of an ask in a market where nothing is audited."""


class Speed(NamedTuple):
    """How fast a provider answers. 0: unknown."""

    first_token_ms: int = 0
    tokens_per_second: int = 0


FREE_SLOT, QUEUE_PLACE, NO_PLACE = range(3)
"""The states of a slot group, best first: a slot is free; only a place in the engine's queue is; the node takes no job."""
SlotKey = tuple[Address, int | None]
"""A slot group by its provider and number. None stands for the groups of a provider that is away."""


_Asks = Union["ListedAsk", tuple["ListedAsk", ...]]
"""One ask, or none or several in a tuple. Most nodes have one, and with 100,000 of them a tuple for each counts."""


_NO_PAST: tuple[tuple[SlotGroup, ...], tuple[ListedAsk, ...]] = ((), ())


def _packed(asks: tuple[ListedAsk, ...]) -> _Asks:
    return asks[0] if len(asks) == 1 else asks


def _unpacked(asks: _Asks) -> tuple[ListedAsk, ...]:
    return asks if isinstance(asks, tuple) else (asks,)


class ConnectedNode:
    """A connected node and its slot groups.

    `stake`: base units, as last read; 0 until a demand asks for a stake. `quality`: what its provider's score and integrity do
    not exceed, of FULL_QUALITY. Only the ask book changes members other than the stake.
    """

    __slots__ = ("_asks", "_past", "provider", "quality", "reliability", "stake")

    def __init__(self, provider: Address, *, reliability: int = OTHER) -> None:
        self.provider, self.reliability, self.quality, self.stake = provider, reliability, FULL_QUALITY, 0
        self._asks: _Asks = ()
        self._past = _NO_PAST

    @property
    def retired(self) -> tuple[SlotGroup, ...]:
        """Former slot groups that still have jobs."""
        return self._past[0]

    @retired.setter
    def retired(self, groups: tuple[SlotGroup, ...]) -> None:
        self._set_past(groups, self.former)

    @property
    def former(self) -> tuple[ListedAsk, ...]:
        """Asks that were replaced lately, which orders may still name."""
        return self._past[1]

    @former.setter
    def former(self, asks: tuple[ListedAsk, ...]) -> None:
        self._set_past(self.retired, asks)

    def _set_past(self, groups: tuple[SlotGroup, ...], asks: tuple[ListedAsk, ...]) -> None:
        self._past = (groups, asks) if groups or asks else _NO_PAST

    @property
    def several(self) -> bool:
        """Whether the node has more than one ask."""
        return isinstance(self._asks, tuple) and len(self._asks) > 1

    @property
    def asks(self) -> tuple[ListedAsk, ...]:
        """Its listed asks."""
        return _unpacked(self._asks)

    @asks.setter
    def asks(self, asks: tuple[ListedAsk, ...]) -> None:
        self._asks = _packed(asks)

    @property
    def groups(self) -> tuple[SlotGroup, ...]:
        """The slot groups that the node's asks name."""
        return tuple(dict.fromkeys(listed_ask.slot_group for listed_ask in self.asks))

    @property
    def leads(self) -> tuple[ListedAsk, ...]:
        """The leads of its slot groups."""
        return tuple(lead for group in self.groups for lead in group.leads)

    @property
    def free(self) -> int:
        """Free slots of all groups."""
        return sum(group.free for group in self.groups)

    @property
    def assigned(self) -> int:
        """Jobs that the node was given and that have not ended."""
        return sum(group.assigned for group in (*self.groups, *self.retired))


class SlotGroup:
    """Slots that some asks of a node share, because one engine serves them: their last reported capacity, and their jobs.

    The asks of a slot group are free or busy together, whatever the node's other engines do. Only the ask book changes it.

    `slots`: jobs that the engine runs at once. `assigned`: jobs that the group was given and that have not ended. `state`: the
    lists in which the group's asks are. `known_since`: the number of the first decision at which it is known whether a slot was
    free. `changes`: the numbers of the decisions before which that last changed, oldest first; at most _MAX_CHANGES.
    """

    __slots__ = (
        "_key", "_leads", "_queue", "_reported_free", "assigned", "changes", "first_token_ms", "known_since", "node", "number",
        "slots", "state", "tokens_per_second",
    )  # fmt: skip

    def __init__(self, node: ConnectedNode, number: int, capacity: Capacity, known_since: int = 0) -> None:
        self.node, self.number, self.known_since = node, number, known_since
        self.assigned, self.state, self.changes = 0, NO_PLACE, tuple[int, ...]()
        self._leads: _Asks = ()
        self._key: SlotKey | None = None
        """Held once for all jobs that wait for the group."""
        self.capacity = capacity

    @property
    def capacity(self) -> Capacity:
        """The last reported capacity. Its parts are kept without it, which saves memory."""
        return Capacity(self._reported_free, self.slots, self.tokens_per_second, self.first_token_ms, self._queue)

    @capacity.setter
    def capacity(self, capacity: Capacity) -> None:
        self._reported_free, self.slots, self._queue = capacity.free, capacity.slots, capacity.queue
        self.tokens_per_second, milliseconds = capacity.tokens_per_second, capacity.first_token_ms
        self.first_token_ms = _NUMBERS[milliseconds] if milliseconds < len(_NUMBERS) else milliseconds

    @property
    def leads(self) -> tuple[ListedAsk, ...]:
        """The cheapest of its asks in each group of the index, which stands for its others there: a provider has one place among
        equals. A slot group that no ask of a connected node names has none.
        """
        return _unpacked(self._leads)

    @leads.setter
    def leads(self, leads: tuple[ListedAsk, ...]) -> None:
        self._leads = _packed(leads)

    @property
    def provider(self) -> Address:
        """The provider of the node."""
        return self.node.provider

    @property
    def key(self) -> SlotKey:
        """Identifies the group, also after its node connected again."""
        if self._key is None:
            self._key = self.node.provider, self.number
        return self._key

    @property
    def places(self) -> int:
        """Jobs that the group takes now, as far as this coordinator knows: into free slots and the engine's queue."""
        left = self.slots + self._queue - self.assigned
        places = min(left, self._reported_free)
        return max(0, places)

    @property
    def free(self) -> int:
        """Free slots. The places of the engine's queue are used last."""
        return max(0, self.places - self._queue)

    @property
    def taken(self) -> int:
        """Jobs in slots or in the engine's queue, those of others included."""
        size = self.slots + self._queue
        if not self.assigned and self._reported_free >= size:
            return 0
        return min(max(size - self._reported_free, self.assigned), size)

    @property
    def load(self) -> float:
        """Jobs per slot: 1 if all slots are taken, more if jobs wait in the engine's queue."""
        return self.taken / self.slots if self.slots else 1.0

    @property
    def current_state(self) -> int:
        """The state that follows from the capacity and the jobs."""
        places = self.places
        return FREE_SLOT if places > self._queue else QUEUE_PLACE if places else NO_PLACE

    def set_state(self, state: int, decision: int) -> None:
        """Sets `state`. `decision`: the number of the next decision."""
        if (state == FREE_SLOT) != (self.state == FREE_SLOT) and decision > self.known_since:
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


class ListedAsk:
    """One ask in the book, with the slots that it sells, and its key in the order by price.

    `measured`: the speed that the coordinator measured for its provider and model; None if it measured too little.
    `siblings`: the provider's other asks in the same group and slot group, cheapest first, if this one leads them. `integrity`:
    that of what it sells, in INTEGRITY_STEPS, 0 if its provider is excluded; `audits`: those behind it.
    """

    __slots__ = (
        "audits", "by_price", "digest", "integrity", "measured", "message", "provider", "siblings", "signature", "slot_group",
    )  # fmt: skip

    def __init__(
        self, ask: Verified[Ask], slot_group: SlotGroup, measured: Speed | None = None, standing: tuple[int, int] = PERFECT
    ) -> None:
        message = ask.message
        self.provider, self.message = message.provider, message
        self.signature, self.digest = ask.signature, ask.digest
        self.slot_group, self.measured = slot_group, measured
        self.siblings: tuple[ListedAsk, ...] = ()
        self.integrity, self.audits = standing
        self.by_price = 3 * message.input_price + message.output_price << ADDRESS_BITS | int(message.provider[2:10], 16)

    @property
    def ask(self) -> Verified[Ask]:
        """The ask as its provider signed it. Its parts are kept without it, which saves memory."""
        return Verified(self.message, self.signature, self.digest)

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
        return Speed(self.first_token_ms, self.tokens_per_second)

    @property
    def first_token_ms(self) -> int:
        """The time to the first token, as in `speed`."""
        measured = self.measured
        return (measured.first_token_ms if measured else 0) or self.slot_group.first_token_ms

    @property
    def tokens_per_second(self) -> int:
        """The throughput, as in `speed`."""
        measured = self.measured
        return (measured.tokens_per_second if measured else 0) or self.slot_group.tokens_per_second

    @property
    def by_latency(self) -> int:
        """Sort key: the step of the time to the first token, then the price."""
        return latency_step(self.first_token_ms) << _SPEED_SHIFT | self.by_price

    @property
    def by_throughput(self) -> int:
        """Sort key: the step of the throughput, then the price."""
        return throughput_step(self.tokens_per_second) << _SPEED_SHIFT | self.by_price


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
