"""Ranking: the order in which providers are considered, by what a job is expected to cost with each. Pure.

Expected cost = price of the ask + (1 - score) x loss. The loss is what a failed job costs its client: as much as FAILED_JOBS jobs
at the price of the fitting provider with the best score (the cheapest breaks a tie), plus FLOOR. The loss does not depend on
a provider's own price, so an ask at price 0 gains nothing by failing. Next to a provider that hardly fails, a provider that
fails more than half of its jobs comes later at any price. So does an unknown provider, which has its share of exploration
instead. A provider with a score below BAD, worse than an unknown one, comes after all others. A high price does not help:
of two providers, one comes first at any price only if its score is better by a half or more.

Exploration: in a share of EXPLORED of the shortlists and matches that a well-known provider would win, one newcomer is put
first. It is drawn evenly from the fitting newcomers that ask no more than the provider that it displaces. So strangers get
that share at most, however many keys they create, and nobody pays more for it. The last place of a full shortlist goes to a
newcomer, so that orders on newcomers exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from coordinator.domain.ask_index import NEAR_TIE
from coordinator.domain.slot_groups import OTHER, PROVEN, RELIABLE, ListedAsk
from tallystick.protocol.types import Address

FAILED_JOBS = 2
FLOOR = 100_000
"""In units of `ListedAsk.price_key`: three million input tokens and one million output tokens cost ten cents."""
BAD = 0.2
"""Two failures and nothing else bring a score below it."""
EXPLORED = 0.05
PROVEN_SCORE, RELIABLE_SCORE = 0.5, 0.9
"""The scores from which a provider is searched for behind any number of cheaper strangers, and of proven providers."""

_NEAR_SCORE = 0.02
"""Scores that differ by no more count as equal among near ties."""
_MAX_ADDRESS_PART = 0xFFFFFFFF
"""The bits of `ListedAsk.by_price` that come from the address."""
_SHUFFLE = 0x9E3779B1
"""An odd factor near 2^32 divided by the golden ratio: it scatters neighbouring addresses (Knuth, TAOCP 3, section 6.4)."""

T = TypeVar("T")
Score = Callable[[Address], float]
"""Returns a provider's score, from 0 to 1."""
IsNewcomer = Callable[[Address], bool]


def reliability(score: float) -> int:
    """Returns the class of reliability of a provider with this score."""
    if score >= RELIABLE_SCORE:
        return RELIABLE
    return PROVEN if score >= PROVEN_SCORE else OTHER


def spread_near_ties(entries: list[T], ask_of: Callable[[T], ListedAsk], score: Score, chance: float) -> list[T]:
    """Returns entries sorted by cost, with those that nearly tie with the first in an order that `chance` decides.

    Of the first two of them, the less loaded one comes first ("power of two choices": Mitzenmacher, IEEE TPDS 12(10), 2001). So
    providers at equal price share the jobs, and a client pays at most one part in NEAR_TIE more for it.
    """
    if len(entries) < 2:
        return entries
    first = ask_of(entries[0])
    highest, lowest_score = first.price + first.price // NEAR_TIE, score(first.provider) - _NEAR_SCORE
    salt, places = int(chance * _MAX_ADDRESS_PART), list[tuple[int, int]]()
    for place, entry in enumerate(entries):
        listed_ask = ask_of(entry)
        if listed_ask.price > highest or score(listed_ask.provider) < lowest_score:
            break
        places.append((((listed_ask.by_price & _MAX_ADDRESS_PART) ^ salt) * _SHUFFLE & _MAX_ADDRESS_PART, place))
    if len(places) < 2:
        return entries
    tied = [entries[place] for _, place in sorted(places)]
    if ask_of(tied[1]).slot_group.load < ask_of(tied[0]).slot_group.load:
        tied[0], tied[1] = tied[1], tied[0]
    return tied + entries[len(tied) :]


def sort_by_cost(entries: Sequence[T], ask_of: Callable[[T], ListedAsk], score: Score) -> list[T]:
    """Returns the entries with the least expected cost first; price, then address break a tie. `ask_of`: the ask of an entry."""
    if not entries:
        return []
    scores = {id(entry): score(ask_of(entry).node.provider) for entry in entries}
    best = min(entries, key=lambda entry: (-scores[id(entry)], ask_of(entry).price_key))
    loss = FAILED_JOBS * ask_of(best).price_key[0] + FLOOR

    def cost(entry: T) -> tuple[bool, float, tuple[int, str]]:
        price_key, score = ask_of(entry).price_key, scores[id(entry)]
        return score < BAD, price_key[0] + (1 - score) * loss, price_key

    return sorted(entries, key=cost)


def sort_reliable_first(
    listed_asks: Sequence[ListedAsk], sort_key: Callable[[ListedAsk], float], score: Score
) -> list[ListedAsk]:
    """Returns the asks sorted by `sort_key`, those with less than half of the best score last: nodes report their own speed."""
    best_score = max((score(listed_ask.node.provider) for listed_ask in listed_asks), default=0.0)

    def key(listed_ask: ListedAsk) -> tuple[bool, float, tuple[int, str]]:
        return 2 * score(listed_ask.node.provider) < best_score, sort_key(listed_ask), listed_ask.price_key

    return sorted(listed_asks, key=key)


def with_exploration(entries: list[T], ask_of: Callable[[T], ListedAsk], newcomer: IsNewcomer, chance: float) -> list[T]:
    """Returns the entries, with a newcomer first if the draw says so and one fits. `chance`: a uniform draw from 0 to 1."""
    if not entries or chance >= EXPLORED or newcomer(ask_of(entries[0]).node.provider):
        return entries
    price = ask_of(entries[0]).price_key[0]
    newcomers = [entry for entry in entries if newcomer(ask_of(entry).node.provider) and ask_of(entry).price_key[0] <= price]
    if not newcomers:
        return entries
    chosen = newcomers[int(chance / EXPLORED * len(newcomers))]
    return [chosen, *(entry for entry in entries if entry is not chosen)]


def limited(listed_asks: list[ListedAsk], limit: int, newcomer: IsNewcomer) -> list[ListedAsk]:
    """Returns the first `limit` asks. If no newcomer is among them and one follows, it takes the last place."""
    kept = listed_asks[:limit]
    if limit > 1 and not any(newcomer(listed_ask.node.provider) for listed_ask in kept):
        later = listed_asks[limit:]
        first_newcomer = next((listed_ask for listed_ask in later if newcomer(listed_ask.node.provider)), None)
        if first_newcomer is not None:
            kept[-1] = first_newcomer
    return kept
