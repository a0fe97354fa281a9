"""In which order providers are considered: what a job is expected to cost with each, its failing included. Pure.

Cost = the ask's price + (1 - score) x loss. The loss is what a job that fails costs its client, whose time it takes: as much as
FAILED_JOBS jobs at the price of the best-known provider that fits (ties: the cheapest), and FLOOR more. So it does not follow
from a provider's own price: an ask at price 0 gains nothing by failing. Next to a provider that hardly fails, one that fails more
than half of its jobs comes later at any price, and so does one that nothing is known of: it has its share of exploration. Who is
known to be worse than nothing known (a score below BAD) comes after all others. Being dear does not help: of two providers, one
comes first at any price only where its score is better by a half or more.

Exploration: of EXPLORED of the shortlists and matches that a well-known provider would win, one newcomer is put first, drawn
evenly among the newcomers that fit and ask no more than the provider that it displaces. So strangers, however many keys they
make, get that share at most, and nobody pays more for it. And the last place of a full shortlist is a newcomer's, so that
orders on newcomers exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from coordinator.domain.ask_book import ListedAsk
from tallystick.protocol.types import Address

FAILED_JOBS = 2
FLOOR = 100_000
"""In units of `Standing.price_key`: three million tokens in and a million out cost ten cents of a six-decimal dollar."""
BAD = 0.2
"""Two failures and nothing else bring a score below it."""
EXPLORED = 0.05
PROVEN = 0.5
"""The score from which a provider is looked for behind any number of cheaper strangers."""

T = TypeVar("T")
Score = Callable[[Address], float]
"""What a provider is known for, from 0 to 1."""
IsNewcomer = Callable[[Address], bool]


def sort_by_cost(listed: Sequence[T], standing_of: Callable[[T], ListedAsk], score: Score) -> list[T]:
    """These, the least expected cost first; ties by price, then by address."""
    if not listed:
        return []
    scores = {id(one): score(standing_of(one).node.provider) for one in listed}
    best = min(listed, key=lambda one: (-scores[id(one)], standing_of(one).price_key))
    loss = FAILED_JOBS * standing_of(best).price_key[0] + FLOOR

    def cost(one: T) -> tuple[bool, float, tuple[int, str]]:
        price_key, score = standing_of(one).price_key, scores[id(one)]
        return score < BAD, price_key[0] + (1 - score) * loss, price_key

    return sorted(listed, key=cost)


def sort_reliable_first(listed: Sequence[ListedAsk], sort: Callable[[ListedAsk], float], score: Score) -> list[ListedAsk]:
    """These as `sort` has them. Those with less than half of the best score come last: a node itself says how fast it is."""
    most = max((score(listed_ask.node.provider) for listed_ask in listed), default=0.0)
    return sorted(listed, key=lambda one: (2 * score(one.node.provider) < most, sort(one), one.price_key))


def with_exploration(
    listed: list[T],
    standing_of: Callable[[T], ListedAsk],
    newcomer: IsNewcomer,
    chance: float,
) -> list[T]:
    """The list with a newcomer first, if `chance` (from 0 to 1, drawn evenly) says so and one may be."""
    if not listed or chance >= EXPLORED or newcomer(standing_of(listed[0]).node.provider):
        return listed
    most = standing_of(listed[0]).price_key[0]
    fresh = [one for one in listed if newcomer(standing_of(one).node.provider) and standing_of(one).price_key[0] <= most]
    if not fresh:
        return listed
    chosen = fresh[int(chance / EXPLORED * len(fresh))]
    return [chosen, *(one for one in listed if one is not chosen)]


def limited(listed: list[ListedAsk], limit: int, newcomer: IsNewcomer) -> list[ListedAsk]:
    """The first `limit` of the list; the last place is a newcomer's, if there is none before and one that follows."""
    kept = listed[:limit]
    if limit > 1 and not any(newcomer(listed_ask.node.provider) for listed_ask in kept):
        fresh = next((listed_ask for listed_ask in listed[limit:] if newcomer(listed_ask.node.provider)), None)
        if fresh is not None:
            kept[-1] = fresh
    return kept
