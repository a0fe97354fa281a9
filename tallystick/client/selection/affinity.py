"""Provider affinity: a conversation stays with the provider that has its beginning in its KV cache, unless that costs more.

Which provider answered a prefix is remembered by the prefix's tag, and the longest known prefix of a request decides. Tags are
keyed with a key that is derived from the wallet's key, so that all processes of a wallet, now and later, find the same provider.
Neither the key nor a tag leaves this machine; docs/explanation/decisions/affinity-at-the-client.md says why.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tallystick.client.openai.requests import ApiRequest
from tallystick.client.selection.prefix_table import PrefixTable
from tallystick.client.selection.prefix_tags import PrefixTag, derive_tags
from tallystick.protocol.criteria import Demand
from tallystick.protocol.eip712 import Signer, Verified
from tallystick.protocol.messages import Ask, Receipt
from tallystick.protocol.ranking_hints import MAX_HINTS, RankingHints
from tallystick.protocol.types import Address
from tallystick.protocol.wire import dumps

KEPT = 10
_PURPOSE = b"tallystick affinity 1"


FindAsks = Callable[[Address], Awaitable[Sequence[Verified[Ask]]]]
"""Returns the usable asks of a provider for the same demand, best first; none if it offers nothing now."""


@dataclass(frozen=True, slots=True)
class Preference:
    """A provider that holds a prefix of a request. `cached_percent`: the share of the request that it will bill as cached, if it
    bills as it did last. `shared`: the prefix is the system prompt of many conversations.
    """

    provider: Address
    cached_percent: int
    shared: bool


class Affinity:
    """The providers that hold prefixes of a wallet's requests."""

    def __init__(self, key: bytes, table: PrefixTable) -> None:
        self._key, self._table = key, table

    @classmethod
    def open(cls, wallet: Signer, path: Path, now: Callable[[], int]) -> Self:
        """Opens the table of a wallet at `path`. `now`: Unix time in seconds."""
        key = HKDF(SHA256(), 32, salt=None, info=_PURPOSE).derive(wallet.secret)
        return cls(key, PrefixTable.open(path, now))

    def close(self) -> None:
        """Closes the table."""
        self._table.close()

    def tags(self, request: ApiRequest, name: str | None) -> tuple[PrefixTag, ...]:
        """See `prefix_tags.derive_tags`."""
        return derive_tags(self._key, request, name)

    async def arrange(
        self, tags: Sequence[PrefixTag], asks: Sequence[Verified[Ask]], find: FindAsks
    ) -> tuple[Sequence[Verified[Ask]], Preference | None]:
        """Moves the ask of a provider that holds the longest known prefix to the front, unless it costs clearly more than the
        first one.

        A provider that holds an earlier turn is looked up by `find` if it is not among `asks`, as it seldom is among many at the
        same price. Returns the asks, and the provider that keeps the conversation if there is one.
        """
        preferences = self._preferences(tags)
        listed = {ask.message.provider for ask in asks}
        if not preferences or preferences[0].shared or not listed.isdisjoint(holder.provider for holder in preferences):
            return put_first(preferences, asks)
        provider = preferences[0].provider
        missing = await find(provider)
        if not missing:
            self.forget(tags, provider)
            return asks, None
        arranged, holder = put_first(preferences, [*asks, *missing])
        return (arranged, holder) if holder else (asks, None)

    def _preferences(self, tags: Sequence[PrefixTag]) -> list[Preference]:
        """The providers that hold the longest known prefix, the one that was used last first."""
        for prefix in tags:
            holders = self._table.holders(prefix.tag)
            if holders:
                percents = (min(holder.cached_percent, prefix.percent) for holder in holders)
                pairs = zip(holders, percents, strict=True)
                return [Preference(holder.provider, percent, prefix.shared) for holder, percent in pairs]
        return []

    def begin(self, tags: Sequence[PrefixTag], provider: Address) -> None:
        """Records that a provider began to answer, and so has read the request."""
        self._record(tags, provider, None)

    def end(self, tags: Sequence[PrefixTag], receipt: Receipt) -> None:
        """Records the share of the input that an honest receipt bills as cached."""
        percent = 100 * receipt.cached_input_tokens // max(receipt.input_tokens, 1)
        self._record(tags, receipt.provider, min(percent, 100))

    def _record(self, tags: Sequence[PrefixTag], provider: Address, percent: int | None) -> None:
        """Records the prefixes down to one that this provider held before; the shorter ones are recorded then."""
        for prefix in tags:
            if self._table.record(prefix.tag, provider, percent):
                break

    def forget(self, tags: Sequence[PrefixTag], provider: Address) -> None:
        """Forgets that a provider holds any prefix of a request."""
        for prefix in tags:
            self._table.forget(prefix.tag, provider)


def put_first(
    preferences: Sequence[Preference], asks: Sequence[Verified[Ask]]
) -> tuple[Sequence[Verified[Ask]], Preference | None]:
    """Moves the first ask of a preferred provider to the front. Returns the asks, and the provider that keeps the conversation.

    The order stays if that ask, with its share of the input cached, costs more than the first ask without a cache, by more than
    one part in KEPT. The coordinator applies the same margin to the price, time and load that it knows of.
    """
    by_provider = {preference.provider: preference for preference in preferences}
    for ask in asks:
        held = by_provider.get(ask.message.provider)
        if held is not None and (KEPT - 1) * _price(ask.message, held.cached_percent) <= KEPT * _price(asks[0].message, 0):
            return [ask, *(other for other in asks if other is not ask)], held
    return asks, None


def ranking_hints(demand: Demand, holder: Preference | None) -> RankingHints:
    """What the coordinator gets to know to rank the candidates of a request.

    Requirements that are too long for hints are left out: the coordinator then guesses them from the orders.
    """
    likely, provider, cached = demand.likely_tokens, None, 0
    if holder is not None:
        provider, cached = holder.provider, likely * holder.cached_percent // 100
    hints = RankingHints(likely, demand.sort, demand.weights, provider, cached, demand.require, demand.needs.features)
    return hints if _fits(hints) else replace(hints, require=None, needs=())


@lru_cache(512)
def _fits(hints: RankingHints) -> bool:
    return len(dumps(hints.to_json())) <= MAX_HINTS


def _price(ask: Ask, cached_percent: int) -> int:
    """A hundred times the price of a request with three input tokens, `cached_percent` of them cached, for each output token."""
    return 3 * (ask.cached_input_price * cached_percent + ask.input_price * (100 - cached_percent)) + 100 * ask.output_price
