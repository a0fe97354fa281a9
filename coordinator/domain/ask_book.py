"""The ask book: all asks of connected nodes, by model with the cheapest first, and the load that each node reports. Pure."""

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
    """A connected node: its last reported capacity, and the jobs that it was given and still has."""

    provider: Address
    capacity: Capacity
    assigned: int = 0
    """Jobs that the node was given and that have not ended."""
    stake: int = 0
    """Base units that the provider has staked, as last read; 0 until a demand asks for a stake."""

    @property
    def free(self) -> int:
        """Free slots, as far as this coordinator knows."""
        return max(0, min(self.capacity.free, self.capacity.slots - self.assigned))


@dataclass(frozen=True, slots=True)
class ListedAsk:
    """One ask in the book, with the node that offers it."""

    ask: Verified[Ask]
    node: ConnectedNode

    @property
    def price_key(self) -> tuple[int, str]:
        """Sort key: the price of three input tokens and one output token; the address breaks a tie, so the order is total."""
        message = self.ask.message
        return 3 * message.input_price + message.output_price, message.provider


@dataclass(slots=True)
class AskBook:
    """All listed asks: by model, cheapest first, by digest, and by provider."""

    _by_model: dict[str, list[ListedAsk]] = field(default_factory=dict)
    _by_digest: dict[Hash, ListedAsk] = field(default_factory=dict)
    _nodes: dict[Address, ConnectedNode] = field(default_factory=dict)
    _by_provider: dict[Address, tuple[ListedAsk, ...]] = field(default_factory=dict)

    def replace(self, provider: Address, asks: Iterable[Verified[Ask]], capacity: Capacity | None = None) -> None:
        """Replaces all asks of a provider. `capacity`: None keeps the one reported before."""
        node = self._nodes.get(provider)
        if node is None:
            node = self._nodes[provider] = ConnectedNode(provider, capacity or Capacity(0, 0))
        elif capacity is not None:
            node.capacity = capacity
        self._remove_asks(provider)
        listed_asks = tuple(ListedAsk(ask, node) for ask in asks)
        self._by_provider[provider] = listed_asks
        for listed_ask in listed_asks:
            self._by_digest[listed_ask.ask.digest] = listed_ask
            of_model = self._by_model.setdefault(listed_ask.ask.message.model, [])
            insort(of_model, listed_ask, key=lambda entry: entry.price_key)

    def drop(self, provider: Address) -> None:
        """Removes a provider that disconnected."""
        self._remove_asks(provider)
        self._nodes.pop(provider, None)

    def _remove_asks(self, provider: Address) -> None:
        for listed_ask in self._by_provider.pop(provider, ()):
            self._by_digest.pop(listed_ask.ask.digest, None)
            model = listed_ask.ask.message.model
            of_model = self._by_model[model]
            index = bisect_left(of_model, listed_ask.price_key, key=lambda entry: entry.price_key)
            while of_model[index] is not listed_ask:
                index += 1
            del of_model[index]
            if not of_model:
                del self._by_model[model]

    def node(self, provider: Address) -> ConnectedNode | None:
        """Returns the node of a provider, or None if it is not connected."""
        return self._nodes.get(provider)

    def of_provider(self, provider: Address) -> tuple[ListedAsk, ...]:
        """Returns the asks of a provider."""
        return self._by_provider.get(provider, ())

    def of_model(self, model: str) -> list[ListedAsk]:
        """Returns the asks for a model, cheapest first. The caller must not change the list."""
        return self._by_model.get(model, [])

    def of_providers(self, model: str, providers: Iterable[Address]) -> Iterator[ListedAsk]:
        """Returns the asks of these providers for a model, unsorted."""
        listed_asks = (listed_ask for provider in providers for listed_ask in self._by_provider.get(provider, ()))
        return (listed_ask for listed_ask in listed_asks if listed_ask.ask.message.model == model)

    def find(self, digest: Hash) -> ListedAsk | None:
        """Returns the listed ask with this digest, or None."""
        return self._by_digest.get(digest)

    def models(self) -> Iterator[tuple[str, list[ListedAsk]]]:
        """Returns every model with its asks, by name."""
        return iter(sorted(self._by_model.items()))

    @property
    def size(self) -> int:
        """The number of listed asks."""
        return len(self._by_digest)
