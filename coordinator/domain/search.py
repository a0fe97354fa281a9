"""The search for the asks that meet one demand, in the order of an index that ends the search early. Pure."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from operator import attrgetter

from coordinator.domain.ask_book import AskBook
from coordinator.domain.ask_index import FreeOffers
from coordinator.domain.listed_ask import CLASSES, FULL_QUALITY, NO_PLACE, OTHER, ListedAsk, SlotGroup
from coordinator.domain.match_errors import no_match_error
from coordinator.domain.ranking import BAD
from coordinator.domain.scoring import Score, Scorer
from tallystick.protocol.criteria import MAX_ADDRESSES, Demand, Facts, Reason
from tallystick.protocol.errors import TallyError
from tallystick.protocol.log_facts import INTEGRITY_STEPS
from tallystick.protocol.payer_rules import is_for
from tallystick.protocol.types import Address

_LEAST = 4
"""Fitting providers that a shortlist considers, at least, and that it takes from the last class, which has the newcomers."""
_MAX_JUDGED = 512
"""Suitable asks that one shortlist judges by price, validity and provider. Those of excluded providers do not count."""
_MAX_SCANNED = 5_000
"""Asks that one shortlist looks at in one class, those of excluded providers and further ones of a provider that fits too."""
_MAX_SCORED = 48
"""Fitting providers of one class that a shortlist scores, beyond those that it takes at least: as many as may still be better."""
_TOLERANCE = 128
"""The search ends when what follows is at most one part in this many better than what it has: less than a near tie."""
_LAST = 1 << 128
"""Added to the total of a provider that mostly fails."""
_MAX_EXPLAINED = 256
"""Asks, cheapest first, whose reasons are counted if no ask meets the demand."""


def perfect_score(_provider: Address) -> float:
    """Returns the score of a provider that never fails."""
    return 1.0


def integrity_percent(listed_ask: ListedAsk) -> float:
    """Returns the integrity of what an ask sells, in percent."""
    return 100 * listed_ask.integrity / INTEGRITY_STEPS


def rejection(
    listed_ask: ListedAsk,
    demand: Demand,
    now: int,
    score: Score = perfect_score,
    *,
    queues: bool = False,
    waits: bool = False,
) -> Reason | None:
    """Returns the first reason why this ask does not meet the demand, or None if it does. `now`: Unix seconds.

    `queues`: the job may wait in the engine's queue. `waits`: it may wait for a slot.
    """
    group, ask = listed_ask.slot_group, listed_ask.message
    reputation = 100 * score(listed_ask.provider) if demand.min_reputation else None
    places = None if waits else group.places if queues else group.free
    facts = Facts(now, group.node.stake, places, reputation, integrity_percent(listed_ask))
    return demand.objection(ask, facts)


@dataclass(slots=True)
class Search:
    """The search for the asks that meet one demand. It adds the asks that it judged and rejected to `rejected`."""

    book: AskBook
    demand: Demand
    now: int
    score: Score
    scorer: Scorer
    chance: float
    rejected: list[tuple[Reason, ListedAsk]]
    is_open: Callable[[SlotGroup], bool] | None = None
    """Whether a free slot is for newcomers. None: all are."""
    held: list[ListedAsk] = field(default_factory=list)
    """Asks with a free slot that is not, as of a job that was granted it; not judged yet."""

    def best(self) -> list[ListedAsk]:
        """Returns fitting asks that declare all that the request needs; if there are none, other fitting asks."""
        strict = self.demand.strict
        if strict is not None:
            declared = replace(self, demand=strict, rejected=[]).fitting_asks()
            if declared:
                return declared
        return self.fitting_asks()

    def fitting_asks(self) -> list[ListedAsk]:
        """Returns fitting asks, of the pinned providers or of all that have a free slot."""
        return self._among_pinned() if self.demand.pin else self._among_free()

    def best_of(self, state: int) -> list[ListedAsk]:
        """Returns asks in a state other than FREE_SLOT that would fit if a slot were free, one per provider.

        Those that are `held` count as in state NO_PLACE. If there are any, returns those that declare all that the request needs.
        """
        book, demand = self.book, self.demand
        index = book.index_of(demand.model)
        if index is None:
            return []
        classes: list[Iterator[ListedAsk]]
        for wanted in (demand,) if demand.strict is None else (demand.strict, demand):
            if demand.pin:
                pinned = (entry for entry in book.of_providers(demand.model, demand.pin) if entry.slot_group.state == state)
                classes = [iter(sorted(pinned, key=attrgetter("price_key")))]
            else:
                classes = [index.other_asks(wanted, state, reliability, self.chance) for reliability in CLASSES]
            if state == NO_PLACE:
                classes.append(iter(self.held))
            fitting = [listed_ask for listed_asks in classes for listed_ask in self._fitting_when_free(listed_asks, wanted)]
            if fitting:
                return list({listed_ask.provider: listed_ask for listed_ask in fitting}.values())
        return []

    def _fitting_when_free(self, listed_asks: Iterator[ListedAsk], demand: Demand) -> list[ListedAsk]:
        """Returns the first ask of each provider that would fit if it had a free slot, of at most _MAX_EXPLAINED that are judged.

        A provider that fits hides no other, however many asks it has.
        """
        fitting: dict[Address, ListedAsk] = {}
        payer = demand.payer
        others = (
            entry
            for entry in islice(listed_asks, _MAX_SCANNED)
            if entry.provider not in fitting and (payer is None or is_for(entry.message, payer))
        )
        for listed_ask in islice(others, _MAX_EXPLAINED):
            if self._fits_when_free(listed_ask, demand):
                fitting[listed_ask.provider] = listed_ask
        return list(fitting.values())

    def _fits_when_free(self, listed_ask: ListedAsk, demand: Demand) -> bool:
        slots = listed_ask.slot_group.slots
        return slots > 0 and rejection(listed_ask, demand, self.now, self.score, waits=True) is None

    def _among_pinned(self) -> list[ListedAsk]:
        """Returns the fitting asks of pinned providers, which are found wherever they stand in the order."""
        pinned = self.book.of_providers(self.demand.model, self.demand.pin)
        return self._fitting(iter(sorted(pinned, key=attrgetter("price_key"))), MAX_ADDRESSES)

    def _among_free(self) -> list[ListedAsk]:
        """Returns the best free asks that fit, one per provider: at least a few of each class of reliability, and all others that
        may be among the best.
        """
        index, pool = self.book.index_of(self.demand.model), _Pool(self)
        if index is None:
            return []
        for reliability in CLASSES:
            offers = index.free_asks(self.demand, reliability, self.scorer, self.chance)
            if offers is not None:
                more = _LEAST if reliability == OTHER else 0
                wanted = max(self.demand.limit + self.demand.concurrent, _LEAST, len(pool.fitting) + more)
                self._take(offers, wanted, pool)
        pool.limit(FULL_QUALITY)
        return list(pool.fitting.values())

    def _take(self, offers: FreeOffers, wanted: int, pool: _Pool) -> None:
        """Adds fitting asks of one class to the pool: until it has as many as wanted, and no ask that follows may win."""
        demand, fitting, left = self.demand, pool.fitting, _MAX_JUDGED
        exclude, most, best_quality = demand.exclude, len(fitting) + _MAX_SCORED, offers.best_quality
        payer = demand.payer
        simple = None if demand.min_stake or demand.min_reputation or demand.min_integrity else Facts(self.now)
        add, objection, is_open = pool.unscored.append, demand.offer_objection, self.is_open
        for bound, _, lead in islice(offers, _MAX_SCANNED):
            provider = lead.provider
            if provider in fitting or provider in exclude or (payer is not None and not is_for(lead.message, payer)):
                continue
            if len(fitting) >= wanted and (bound >= pool.limit(best_quality) or len(fitting) >= most):
                return
            if not left:
                return
            left -= 1
            if is_open is not None and not is_open(lead.slot_group):
                self.held.append(lead)
                continue
            if lead.slot_group.node.several:
                listed_ask = self._best_of(lead)
                if listed_ask is None:
                    continue
                lead = listed_ask  # noqa: PLW2901  # the provider's best ask stands for it
            else:
                reason = objection(lead.message, simple or self._facts(lead))
                if reason is not None:
                    self.rejected.append((reason, lead))
                    continue
            fitting[provider] = lead
            add(lead)

    def _facts(self, listed_ask: ListedAsk) -> Facts:
        """Returns what is known of a free ask's provider."""
        rating = 100 * self.score(listed_ask.provider)
        return Facts(self.now, listed_ask.node.stake, None, rating, integrity_percent(listed_ask))

    def _best_of(self, lead: ListedAsk) -> ListedAsk | None:
        """Returns the best fitting ask of a provider with several; None unless this one, or a sibling of it, is the best."""
        fitting: list[tuple[int, int, ListedAsk]] = []
        for number, listed_ask in enumerate(lead.node.asks):
            if listed_ask.message.model == self.demand.model:
                reason = rejection(listed_ask, self.demand, self.now, self.score)
                if reason is None:
                    fitting.append((self.scorer.price(listed_ask), number, listed_ask))
                elif listed_ask is lead:
                    self.rejected.append((reason, lead))
        best = min(fitting)[2] if fitting else None
        return best if best is lead or best in lead.siblings else None

    def _fitting(self, listed_asks: Iterator[ListedAsk], wanted: int) -> list[ListedAsk]:
        """Returns the best fitting ask of each provider, of at most `wanted` providers."""
        fitting: dict[Address, ListedAsk] = {}
        for listed_ask in islice(listed_asks, _MAX_SCANNED):
            provider = listed_ask.provider
            if len(fitting) == wanted and provider not in fitting:
                continue
            reason = rejection(listed_ask, self.demand, self.now, self.score)
            if reason is not None:
                self.rejected.append((reason, listed_ask))
            elif self.is_open is not None and not self.is_open(listed_ask.slot_group):
                self.held.append(listed_ask)
            elif provider not in fitting or self.scorer.price(listed_ask) < self.scorer.price(fitting[provider]):
                fitting[provider] = listed_ask
        return list(fitting.values())

    def no_match(self) -> TallyError:
        """Returns the error for a demand that nobody meets, from the reasons against the cheapest asks, busy ones too."""
        of_model = self.book.of_model(self.demand.model)
        if self.demand.pin:
            pinned = sum(1 for _ in self.book.of_providers(self.demand.model, self.demand.pin))
            return no_match_error(self.demand, self.rejected, not_requested=len(of_model) - pinned, book=self.book)
        self.rejected.clear()
        for listed_ask in of_model[:_MAX_EXPLAINED]:
            reason = rejection(listed_ask, self.demand, self.now, self.score)
            if reason is not None:
                self.rejected.append((reason, listed_ask))
        return no_match_error(self.demand, self.rejected, book=self.book)


@dataclass(slots=True)
class _Pool:
    """The fitting asks that a search found, one per provider. The first class that has any sets the scorer's reference."""

    search: Search
    fitting: dict[Address, ListedAsk] = field(default_factory=dict)
    _totals: list[int] = field(default_factory=list)
    unscored: list[ListedAsk] = field(default_factory=list)
    """The last ones, in their order. Who adds an ask to `fitting` adds it here too."""
    _referred: bool = False

    def limit(self, best_quality: int) -> int:
        """Returns the price and time from which no further ask can be among the best, if its score has at most this step."""
        search = self.search
        if not self._referred:
            search.scorer.refer(self.unscored)
            self._referred = True
        judge = search.scorer.judge
        for listed_ask in self.unscored:
            _, score, total = judge(listed_ask)
            insort(self._totals, total + _LAST if score < BAD or not listed_ask.integrity else total)
        self.unscored.clear()
        if len(self._totals) < search.demand.limit:
            return _LAST
        worst = self._totals[search.demand.limit - 1]
        return worst - worst // _TOLERANCE - search.scorer.least_loss(best_quality)
