"""The book of standing asks. Pure: it knows who offers what at which price and how busy they say they are, nothing else."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tallystick.protocol.eip712 import Verified
from tallystick.protocol.link import Capacity
from tallystick.protocol.messages import Ask
from tallystick.protocol.types import Address, Hash


@dataclass(slots=True)
class ConnectedNode:
    """A connected node: its capacity as last heard, and the jobs handed to it since then that it has not counted yet."""

    provider: Address
    capacity: Capacity
    assigned: int = 0
    stake: int = 0
    """What its provider has staked, in base units, as far as that was asked for."""

    @property
    def free(self) -> int:
        """Slots that are free now, as far as can be known here."""
        return max(0, min(self.capacity.free, self.capacity.slots - self.assigned))


@dataclass(frozen=True, slots=True)
class ListedAsk:
    """One ask in the book, with the node that stands behind it."""

    ask: Verified[Ask]
    node: ConnectedNode

    @property
    def price_key(self) -> tuple[int, str]:
        """Cheapest first, for a request that reads three tokens for each one it writes; ties by address, so order is total."""
        message = self.ask.message
        return 3 * message.input_price + message.output_price, message.provider


@dataclass(slots=True)
class AskBook:
    """All standing asks: by model, cheapest first, and by digest."""

    _by_model: dict[str, list[ListedAsk]] = field(default_factory=dict)
    _by_digest: dict[Hash, ListedAsk] = field(default_factory=dict)
    _nodes: dict[Address, ConnectedNode] = field(default_factory=dict)
    _of_node: dict[Address, tuple[ListedAsk, ...]] = field(default_factory=dict)

    def replace(self, provider: Address, asks: Iterable[Verified[Ask]], capacity: Capacity | None = None) -> None:
        """Makes these the provider's standing asks, instead of all that it had."""
        node = self._nodes.get(provider)
        if node is None:
            node = self._nodes[provider] = ConnectedNode(provider, capacity or Capacity(0, 0))
        elif capacity is not None:
            node.capacity = capacity
        self._remove_asks(provider)
        listed_asks = tuple(ListedAsk(ask, node) for ask in asks)
        self._of_node[provider] = listed_asks
        for listed_ask in listed_asks:
            self._by_digest[listed_ask.ask.digest] = listed_ask
            insort(self._by_model.setdefault(listed_ask.ask.message.model, []), listed_ask, key=lambda s: s.price_key)

    def drop(self, provider: Address) -> None:
        """Forgets a provider that went away."""
        self._remove_asks(provider)
        self._nodes.pop(provider, None)

    def _remove_asks(self, provider: Address) -> None:
        for listed_ask in self._of_node.pop(provider, ()):
            self._by_digest.pop(listed_ask.ask.digest, None)
            model = listed_ask.ask.message.model
            listed = self._by_model[model]
            index = bisect_left(listed, listed_ask.price_key, key=lambda s: s.price_key)
            while listed[index] is not listed_ask:
                index += 1
            del listed[index]
            if not listed:
                del self._by_model[model]

    def node(self, provider: Address) -> ConnectedNode | None:
        """The node of a provider, if it is connected."""
        return self._nodes.get(provider)

    def of_provider(self, provider: Address) -> tuple[ListedAsk, ...]:
        """A provider's asks."""
        return self._of_node.get(provider, ())

    def of_model(self, model: str) -> list[ListedAsk]:
        """Asks for a model, cheapest first. Do not change the list."""
        return self._by_model.get(model, [])

    def of_providers(self, model: str, providers: Iterable[Address]) -> Iterator[ListedAsk]:
        """Asks of these providers for a model, in no order."""
        return (s for provider in providers for s in self._of_node.get(provider, ()) if s.ask.message.model == model)

    def find(self, digest: Hash) -> ListedAsk | None:
        """The standing ask with this digest."""
        return self._by_digest.get(digest)

    def models(self) -> Iterator[tuple[str, list[ListedAsk]]]:
        """Every model with its asks."""
        return iter(sorted(self._by_model.items()))

    @property
    def size(self) -> int:
        """How many asks stand."""
        return len(self._by_digest)
