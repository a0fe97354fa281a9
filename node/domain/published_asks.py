"""The asks of this node: what it sells, and the signed asks that publish it. Time is an argument.

A replaced ask stays valid until it expires, since orders may already name it. An ask whose engine went down does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from node.domain.logprob_request import EvidenceSupport
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.features import BATCH_ONLY, absent
from tallystick.protocol.link import MAX_ASK_BYTES, MAX_ASKS, MAX_FEATURE_CHARACTERS, MAX_FEATURES, MAX_NODE_ASK_BYTES
from tallystick.protocol.messages import Ask, Spec
from tallystick.protocol.payer_rules import PayerRule, payer_rule
from tallystick.protocol.pricing import Prices
from tallystick.protocol.routes import ALWAYS, SCORES
from tallystick.protocol.types import Address, Hash
from tallystick.protocol.wire import dumps

SignAsk = Callable[[Ask], Verified[Ask]]


@dataclass(frozen=True, slots=True)
class Offer:
    """One model for sale. `upstream` is the model's name at the engine `engine`; prices are base units per 1,000,000 tokens.

    `output_limit_field`: name of the output limit in chat requests to that engine; `supports_stream_usage`: whether the engine
    supports `stream_options.include_usage`. `evidence`: how it gives log-probabilities; None if answers have no evidence.
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
    evidence: EvidenceSupport | None = None


def split_scoring(offer: Offer, prices: Prices) -> tuple[Offer, ...]:
    """An offer whose scoring has prices of its own: all else, and scoring alone. One offer if it sells no scoring."""
    features = offer.spec.features
    if SCORES not in features:
        return (offer,)
    others = replace(offer.spec, features=tuple(feature for feature in features if feature != SCORES))
    alone = replace(offer.spec, features=(SCORES, *map(absent, ALWAYS)))
    return replace(offer, spec=others), replace(offer, spec=alone, prices=prices)


def for_batch(offer: Offer, prices: Prices) -> Offer:
    """The same offer at other prices, for batch jobs alone."""
    return replace(offer, spec=replace(offer.spec, features=(*offer.spec.features, BATCH_ONLY)), prices=prices)


def for_payers(offer: Offer, prices: Prices, rule: PayerRule) -> Offer:
    """The same offer at other prices, for some payers alone."""
    return replace(offer, spec=replace(offer.spec, features=(*offer.spec.features, *rule.to_features())), prices=prices)


@dataclass(frozen=True, slots=True)
class Seller:
    """The members that all asks of a node share. `validity` is in seconds."""

    provider: Address
    sealing_suite: str
    sealing_key: bytes
    validity: int = 3_600


@dataclass(frozen=True, slots=True)
class PublishedAsk:
    """A signed ask and the offer that it publishes. `size`: bytes of its JSON."""

    ask: Verified[Ask]
    offer: Offer
    size: int


class PublishedAsks:
    """The asks of this node: the current ones, and replaced ones that orders may still name."""

    def __init__(self, seller: Seller, sign: SignAsk) -> None:
        self._seller, self._sign = seller, sign
        self._known: dict[Hash, PublishedAsk] = {}
        self._current: tuple[PublishedAsk, ...] = ()
        self._seq = 0
        self._left_out: tuple[PublishedAsk, ...] = ()

    @property
    def provider(self) -> Address:
        """The account that sells."""
        return self._seller.provider

    @property
    def current(self) -> tuple[Verified[Ask], ...]:
        """The current asks, as the coordinator should list them."""
        return tuple(published.ask for published in self._current)

    @property
    def listed(self) -> tuple[tuple[Verified[Ask], Offer], ...]:
        """The current asks, each with its offer."""
        return tuple((published.ask, published.offer) for published in self._current)

    @property
    def offers(self) -> tuple[Offer, ...]:
        """The offers of the current asks."""
        return tuple(published.offer for published in self._current)

    def publish(self, offers: Iterable[Offer], now: int) -> bool:
        """Replaces the offers and returns whether the current asks changed.

        Signs an ask for each offer that is new, changed, or past half of its validity. Offers beyond a coordinator's limits are
        left out.
        """
        held = {published.offer: published for published in (*self._current, *self._left_out)}
        wanted = tuple(offers)
        current = tuple(
            held[offer] if offer in held and not self._needs_renewal(held[offer], now) else self._sign_ask(offer, now)
            for offer in wanted
        )
        current, self._left_out = _fitting(current)
        changed = current != self._current
        self._current = current
        engines = {offer.engine for offer in wanted}
        self._known = {
            digest: published
            for digest, published in self._known.items()
            if published.ask.message.valid_until > now and published.offer.engine in engines
        }
        self._known |= {published.ask.digest: published for published in current}
        return changed

    def find(self, digest: Hash, now: int) -> PublishedAsk | None:
        """Returns the ask with this digest if an order may name it at `now` (Unix seconds), else None."""
        published = self._known.get(digest)
        return published if published is not None and published.ask.message.valid_until > now else None

    def _needs_renewal(self, published: PublishedAsk, now: int) -> bool:
        return published.ask.message.valid_until - now <= self._seller.validity // 2

    def _sign_ask(self, offer: Offer, now: int) -> PublishedAsk:
        # The sequence number follows the clock, so it grows across restarts without being stored.
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
    """Splits the asks into those within a coordinator's limits and the others, each in order. Those for everybody come first
    where not all have room.
    """
    fitting: set[Hash] = set()
    room = MAX_NODE_ASK_BYTES - len(b"[]")
    for ask in sorted(asks, key=lambda ask: payer_rule(ask.offer.spec.features) is not None):
        if _is_readable(ask) and ask.size + len(b",") <= room and len(fitting) < MAX_ASKS:
            fitting.add(ask.ask.digest)
            room -= ask.size + len(b",")
    listed = tuple(ask for ask in asks if ask.ask.digest in fitting)
    return listed, tuple(ask for ask in asks if ask.ask.digest not in fitting)


def _is_readable(ask: PublishedAsk) -> bool:
    """Whether a coordinator reads the ask. For one that it does not, it would refuse the whole node."""
    features = ask.offer.spec.features
    short = all(len(feature) <= MAX_FEATURE_CHARACTERS for feature in features)
    return short and len(features) <= MAX_FEATURES and ask.size <= MAX_ASK_BYTES
