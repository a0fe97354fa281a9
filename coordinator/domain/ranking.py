"""Ranking: the order in which providers are considered, by what a request is expected to cost with each. Pure.

The terms of that cost are in scoring.py. Next to a provider that hardly fails, a provider that fails more than half of its jobs
comes later at any price. So does an unknown provider, which has its share of exploration instead. A provider with a score below
BAD, worse than an unknown one, comes after all others, and so does one that this coordinator found cheating. A high price does
not help: of two providers, one comes first at any price only if its score is better by a half or more.

Near ties: providers whose price and time differ by no more than one part in NEAR_TIE come in an order that a draw decides, each
provider once. Of the first two of them, the less loaded one comes first.

Concurrent jobs: those of a client that look for a slot at the same moment begin at different free slots, of the first that
suffice for all.

Hysteresis: the provider that has the beginning of a conversation in its cache keeps the conversation while it has a free slot,
until another is cheaper by more than one part in KEPT. So a conversation does not change between two providers that are about
equally good.

Exploration: in a share of EXPLORED of the shortlists and matches that a well-known provider would win, one newcomer is put
first. It is drawn evenly from the fitting newcomers that ask no more than the provider that it displaces. So strangers get
that share at most, however many keys they create, and nobody pays more for it. The last place of a full shortlist goes to a
newcomer, so that orders on newcomers exist.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from math import ceil
from typing import Generic, NamedTuple, TypeVar

from coordinator.domain.ask_group import NEAR_TIE
from coordinator.domain.integrity_records import UNAUDITED
from coordinator.domain.listed_ask import ADDRESS_BITS, FULL_QUALITY, OTHER, PROVEN, RELIABLE, ListedAsk
from coordinator.domain.scoring import Scorer, ScoreTerms
from tallystick.protocol.log_facts import INTEGRITY_STEPS
from tallystick.protocol.types import Address

BAD = 0.2
"""Two failures and nothing else bring a score below it."""
EXPLORED = 0.05
KEPT = 10
PROVEN_SCORE, RELIABLE_SCORE = 0.5, 0.9
"""The scores from which a provider is searched for behind any number of cheaper strangers, and of proven providers."""

_NEAR_SCORE = 0.02
"""Scores that differ by no more count as equal among near ties."""
_SCORE_STEPS = 64
_MAX_ADDRESS_PART = (1 << ADDRESS_BITS) - 1
_CONCURRENT_DRAWS = 7_919
"""A draw times this, modulo 1, is a second draw that does not depend on whether the first is for exploration."""
_SHUFFLE = 0x9E3779B1
"""An odd factor near 2^32 divided by the golden ratio: it scatters neighbouring addresses (Knuth, TAOCP 3, section 6.4)."""

_tuple = tuple.__new__
"""Makes a named tuple in half the time that its own constructor takes."""
T = TypeVar("T")
IsNewcomer = Callable[[Address], bool]


def reliability(score: float) -> int:
    """Returns the class of reliability of a provider with this score."""
    if score >= RELIABLE_SCORE:
        return RELIABLE
    return PROVEN if score >= PROVEN_SCORE else OTHER


def quality_bound(score: float, integrity: int = INTEGRITY_STEPS) -> int:
    """Returns a number of few that a provider's quality does not exceed, of FULL_QUALITY. `integrity`: in INTEGRITY_STEPS.

    Half of it is the score. The rest is exact for strangers and those below, so that no search goes on among them in vain.
    """
    half, part = FULL_QUALITY // 2, FULL_QUALITY // (2 * _SCORE_STEPS)
    exact = integrity * half // INTEGRITY_STEPS
    rounded = exact if integrity <= UNAUDITED.integrity else min(-(-exact // (2 * part)) * 2 * part, half)
    return ceil(score * _SCORE_STEPS) * part + rounded


def is_bad(score: float, integrity: int) -> bool:
    """Whether a provider comes after all others: it mostly fails, or this coordinator found it cheating."""
    return score < BAD or not integrity


class Ranked(NamedTuple, Generic[T]):
    """An entry of a ranking: an ask, or an order on it, with the terms of its score and their `total`.

    `reputation`: its provider's score.
    """

    entry: T
    listed_ask: ListedAsk
    terms: ScoreTerms
    reputation: float
    total: int

    @property
    def bad(self) -> bool:
        """See `is_bad`."""
        return is_bad(self.reputation, self.listed_ask.integrity)


def rank(entries: Sequence[T], ask_of: Callable[[T], ListedAsk], scorer: Scorer) -> list[Ranked[T]]:
    """Returns the entries with the lowest expected cost first. `scorer` must have its reference."""
    judge = scorer.judge
    ranking: list[Ranked[T]] = [
        _tuple(Ranked, (entry, listed_ask, *judge(listed_ask))) for entry in entries for listed_ask in (ask_of(entry),)
    ]
    ranking.sort(key=_key)
    return ranking


def _key(ranked: Ranked[T]) -> tuple[bool, int, int]:
    """Sort key: those that mostly fail last, then the lowest total; price, then address break a tie."""
    listed_ask = ranked[1]
    return ranked[3] < BAD or not listed_ask.integrity, ranked[4], listed_ask.by_price  # as is_bad, without a call


def spread_near_ties(ranking: list[Ranked[T]], chance: float) -> list[Ranked[T]]:
    """Returns a ranking with those that nearly tie with the first in an order that `chance` decides.

    Of the first two of them, the less loaded one comes first ("power of two choices": Mitzenmacher, IEEE TPDS 12(10), 2001). So
    providers at equal price share the jobs, and a client pays at most one part in NEAR_TIE more for it.
    """
    if len(ranking) < 2:
        return ranking
    best, salt = ranking[0], int(chance * _MAX_ADDRESS_PART)
    tied, others = _near_ties(ranking, best)
    if len(tied) < 2:
        return ranking
    tied.sort(key=lambda ranked: ((ranked.listed_ask.by_price & _MAX_ADDRESS_PART) ^ salt) * _SHUFFLE & _MAX_ADDRESS_PART)
    if tied[1].listed_ask.slot_group.load < tied[0].listed_ask.slot_group.load:
        tied[0], tied[1] = tied[1], tied[0]
    return tied + others


def _near_ties(ranking: list[Ranked[T]], best: Ranked[T]) -> tuple[list[Ranked[T]], list[Ranked[T]]]:
    """Returns the entries that are about as cheap, fast and reliable as the best one, and the others."""
    price, _, first_token, speed, _, risk = best.terms
    highest, slowest = price + price // NEAR_TIE, first_token + speed + (first_token + speed) // NEAR_TIE
    least, bad, risk = best.reputation - _NEAR_SCORE, best.bad, risk + price // NEAR_TIE
    mixed = ranking[-1].bad != bad  # a ranking has the bad ones last
    tied: list[Ranked[T]] = []
    others: list[Ranked[T]] = []
    for ranked in ranking:
        terms, reputation = ranked.terms, ranked.reputation
        near = terms[0] <= highest and terms[2] + terms[3] <= slowest and reputation >= least and terms[5] <= risk
        near = near and (not mixed or ranked.bad == bad)
        (tied if near else others).append(ranked)
    return tied, others


def spread_concurrent(ranking: list[Ranked[T]], concurrent: int, chance: float) -> list[Ranked[T]]:
    """Returns a ranking of asks with a free slot that begins at a slot which `chance` decides, one of the first `concurrent` + 1.

    So jobs that choose at the same moment order on different providers, and together on the best of them. Those that follow
    come next, then those before. Providers that mostly fail stay last.
    """
    worst = ranking[0].bad
    sound = [ranked for ranked in ranking if ranked.bad == worst]
    ends = list(accumulate(ranked.listed_ask.slot_group.free for ranked in sound))
    drawn = int(chance * _CONCURRENT_DRAWS % 1 * min(concurrent + 1, ends[-1]))
    begin = bisect_right(ends, drawn) % len(sound)
    return [*sound[begin:], *sound[:begin], *(ranked for ranked in ranking if ranked.bad != worst)]


def keep_holder(ranking: list[Ranked[T]], holder: Address | None) -> list[Ranked[T]]:
    """Returns a ranking with the provider first that holds the conversation, unless another is better by more than the margin."""
    kept = None if holder is None else next((ranked for ranked in ranking if ranked.listed_ask.provider == holder), None)
    if kept is None:
        return ranking
    best = min(ranking, key=_key)
    common = min(kept.terms.integrity, best.terms.integrity)  # what both are unknown for decides nothing between them
    if kept.bad > best.bad or KEPT * (best.total - common) < (KEPT - 1) * (kept.total - common):
        return ranking
    return [kept, *(ranked for ranked in ranking if ranked is not kept)]


def with_exploration(ranking: list[Ranked[T]], newcomer: IsNewcomer, chance: float) -> list[Ranked[T]]:
    """Returns a ranking, with a newcomer first if the draw says so and one fits. `chance`: a uniform draw from 0 to 1."""
    if not ranking or chance >= EXPLORED or newcomer(ranking[0].listed_ask.provider):
        return ranking
    price = ranking[0].terms.price
    newcomers = [
        ranked
        for ranked in ranking
        if newcomer(ranked.listed_ask.provider) and ranked.terms.price <= price and ranked.listed_ask.integrity
    ]
    if not newcomers:
        return ranking
    chosen = newcomers[int(chance / EXPLORED * len(newcomers))]
    return [chosen, *(ranked for ranked in ranking if ranked is not chosen)]


def limited(ranking: list[Ranked[T]], limit: int, newcomer: IsNewcomer) -> list[Ranked[T]]:
    """Returns the first `limit` entries. If no newcomer is among them and one follows, it takes the last place."""
    kept = ranking[:limit]
    if limit > 1 and not any(newcomer(ranked.listed_ask.provider) for ranked in kept):
        first_newcomer = next((ranked for ranked in ranking[limit:] if newcomer(ranked.listed_ask.provider)), None)
        if first_newcomer is not None:
            kept[-1] = first_newcomer
    return kept
