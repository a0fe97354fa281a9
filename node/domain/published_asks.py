"""What this node sells, and the signed asks that say so. Pure: time is an argument.

An ask that was replaced stays good until it expires, since orders on it are under way; one whose engine went down does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tallystick.protocol.eip712 import Verified
from tallystick.protocol.link import MAX_ASK_BYTES, MAX_ASKS, MAX_NODE_ASK_BYTES
from tallystick.protocol.messages import Ask, Spec
from tallystick.protocol.pricing import Prices
from tallystick.protocol.types import Address, Hash
from tallystick.protocol.wire import dumps

Sign = Callable[[Ask], Verified[Ask]]


@dataclass(frozen=True, slots=True)
class Offer:
    """One model for sale. `upstream` is its name at the engine called `engine`; prices are base units per 1,000,000 tokens.

    `limit_field` is how that engine calls the output limit in chat requests, `usage_option` whether it knows
    `stream_options.include_usage`.
    """

    model: str
    engine: str
    upstream: str
    prices: Prices
    context_tokens: int
    max_output_tokens: int
    spec: Spec
    output_limit_field: str = "max_tokens"
    supports_stream_usage: bool = True


@dataclass(frozen=True, slots=True)
class Seller:
    """What all asks of a node have in common. `validity` is in seconds."""

    provider: Address
    sealing_suite: str
    sealing_key: bytes
    validity: int = 3_600


@dataclass(frozen=True, slots=True)
class PublishedAsk:
    """A signed ask and the offer that it makes public. `size`: bytes of its JSON."""

    ask: Verified[Ask]
    offer: Offer
    size: int


class PublishedAsks:
    """The asks of this node: those that stand, and replaced ones that orders may still name."""

    def __init__(self, seller: Seller, sign: Sign) -> None:
        self._seller, self._sign = seller, sign
        self._known: dict[Hash, PublishedAsk] = {}
        self._current: tuple[PublishedAsk, ...] = ()
        self._seq = 0
        self._left_out: tuple[PublishedAsk, ...] = ()

    @property
    def current(self) -> tuple[Verified[Ask], ...]:
        """The standing asks, as the coordinator should list them."""
        return tuple(standing.ask for standing in self._current)

    @property
    def offers(self) -> tuple[Offer, ...]:
        """What is for sale now."""
        return tuple(standing.offer for standing in self._current)

    def publish(self, offers: Iterable[Offer], now: int) -> bool:
        """Makes these the offers: signs an ask for each that is new, changed or past half of its validity. True if any was. Those
        beyond what a coordinator takes of one node are left out.
        """
        held = {standing.offer: standing for standing in (*self._current, *self._left_out)}
        wanted = tuple(offers)
        fresh = tuple(
            held[offer] if offer in held and not self._needs_renewal(held[offer], now) else self._sign_ask(offer, now)
            for offer in wanted
        )
        fresh, self._left_out = _fitting(fresh)
        changed = fresh != self._current
        self._current = fresh
        engines = {offer.engine for offer in wanted}
        self._known = {
            digest: standing
            for digest, standing in self._known.items()
            if standing.ask.message.valid_until > now and standing.offer.engine in engines
        }
        self._known |= {standing.ask.digest: standing for standing in fresh}
        return changed

    def find(self, digest: Hash, now: int) -> PublishedAsk | None:
        """The ask with this digest, if an order may be placed on it now."""
        standing = self._known.get(digest)
        return standing if standing is not None and standing.ask.message.valid_until > now else None

    def _needs_renewal(self, standing: PublishedAsk, now: int) -> bool:
        return standing.ask.message.valid_until - now <= self._seller.validity // 2

    def _sign_ask(self, offer: Offer, now: int) -> PublishedAsk:
        # The clock leads the sequence, so that it grows over restarts without being stored.
        self._seq = max(self._seq + 1, now)
        seller = self._seller
        ask = Ask(
            provider=seller.provider,
            model=offer.model,
            input_price=offer.prices.input,
            cached_input_price=offer.prices.cached_input,
            output_price=offer.prices.output,
            context_tokens=offer.context_tokens,
            max_output_tokens=offer.max_output_tokens,
            sealing_suite=seller.sealing_suite,
            sealing_key=seller.sealing_key,
            valid_from=now,
            valid_until=now + seller.validity,
            seq=self._seq,
            spec=offer.spec,
        )
        signed = self._sign(ask)
        return PublishedAsk(signed, offer, len(dumps(signed.to_json())))


def _fitting(asks: tuple[PublishedAsk, ...]) -> tuple[tuple[PublishedAsk, ...], tuple[PublishedAsk, ...]]:
    """The asks that a coordinator takes of one node, the first ones first, and the others."""
    taken: list[PublishedAsk] = []
    left: list[PublishedAsk] = []
    room = MAX_NODE_ASK_BYTES - len(b"[]")
    for one in asks:
        if one.size > MAX_ASK_BYTES or one.size + len(b",") > room or len(taken) >= MAX_ASKS:
            left.append(one)
        else:
            taken.append(one)
            room -= one.size + len(b",")
    return tuple(taken), tuple(left)
