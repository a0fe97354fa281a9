"""Matching: the shortlist for a demand, the ranking of a job's candidates, and the reason why a provider is left out.

Both use the predicates of `Demand`. Pure: the ask book, a demand and the time go in; a ranking or the reasons come out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import attrgetter, itemgetter

from coordinator.domain.ask_book import AskBook, ListedAsk
from coordinator.domain.ranking import (
    IsNewcomer,
    Score,
    limited,
    sort_by_cost,
    sort_reliable_first,
    spread_near_ties,
    with_exploration,
)
from coordinator.domain.slot_groups import (
    CLASSES,
    FREE_SLOT,
    NO_PLACE,
    OTHER,
    PROVEN,
    QUEUE_PLACE,
    RELIABLE,
    SlotGroup,
)
from tallystick.protocol.criteria import MAX_ADDRESSES, Demand, Facts, Reason, context_refusal
from tallystick.protocol.errors import Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.features import MEANINGS
from tallystick.protocol.messages import Ask
from tallystick.protocol.requirements import Requirements
from tallystick.protocol.routes import serves
from tallystick.protocol.types import Address, format_amount
from tallystick.protocol.wire import Candidate

_POOL = {RELIABLE: 8, PROVEN: 4, OTHER: 4}
"""Fitting providers that a shortlist takes from each class of reliability, at least. What one class lacks, the next one fills."""
_MAX_JUDGED = 512
"""Suitable asks that one shortlist judges by price, validity and provider. Excluded providers do not count."""
_MAX_SCANNED = 5_000
"""Asks that one shortlist looks at in one class, those of excluded providers and further ones of a provider that fits too."""
_MAX_EXPLAINED = 256
"""Asks, cheapest first, whose reasons are counted if no ask meets the demand."""

_SORT_KEYS: dict[str, Callable[[ListedAsk], float]] = {
    "price": lambda listed_ask: listed_ask.price_key[0],
    "latency": lambda listed_ask: listed_ask.slot_group.capacity.first_token_ms or float("inf"),
    "throughput": lambda listed_ask: -listed_ask.slot_group.capacity.tokens_per_second,
}
"""Sort keys of a shortlist. Unknown speeds come last; the cheaper ask breaks a tie."""


def _perfect_score(_provider: Address) -> float:
    return 1.0


def _no_backlog(_group: SlotGroup) -> float:
    return 0.0


def _no_newcomer(_provider: Address) -> bool:
    return False


def rejection(
    listed_ask: ListedAsk, demand: Demand, now: int, score: Score = _perfect_score, *, suitable: bool = False
) -> Reason | None:
    """Returns the first reason why this ask does not meet the demand, or None if it does. `now`: Unix seconds.

    `suitable`: the ask's spec is known to meet the demand.
    """
    ask, reputation = listed_ask.ask.message, 100 * score(listed_ask.provider) if demand.min_reputation else None
    facts = Facts(now, listed_ask.node.stake, listed_ask.slot_group.places, reputation)
    return demand.offer_objection(ask, facts) if suitable else demand.objection(ask, facts)


def shortlist(
    book: AskBook,
    demand: Demand,
    now: int,
    rejected: list[tuple[Reason, ListedAsk]] | None = None,
    score: Score = _perfect_score,
    *,
    newcomer: IsNewcomer = _no_newcomer,
    chance: float = 1.0,
    backlog: Callable[[SlotGroup], float] = _no_backlog,
) -> list[ListedAsk]:
    """Returns the best asks for a demand, best first: at most `demand.limit`, one per provider.

    Asks with a free slot come alone if there are any, else those whose engines would queue the job. If all that fit are busy,
    returns the most reliable ones with the least `backlog`: a job can wait for them.
    `rejected` is filled with the asks that were judged and do not meet the demand, each with its reason. `chance`: a uniform draw
    from 0 to 1, see ranking.py. Raises Refusal or Unavailable that say why no ask meets the demand.
    """
    search = _Search(book, demand, now, score, [] if rejected is None else rejected)
    pool = search.best(chance) or search.best_of(QUEUE_PLACE)
    if not pool:
        waited_for = search.best_of(NO_PLACE)
        busy = sorted(waited_for, key=lambda entry: (entry.node.reliability, backlog(entry.slot_group), entry.price_key))
        if not busy:
            raise search.no_match()
        return busy[: demand.limit]
    ranked = sort_by_demand(pool, demand, score)
    if demand.sort == "price":
        ranked = spread_near_ties(ranked, _itself, score, chance)
    return limited(with_exploration(ranked, _itself, newcomer, chance), demand.limit, newcomer)


@dataclass(frozen=True, slots=True)
class _Search:
    """The search for the asks that meet one demand. It adds the asks that it judged and rejected to `rejected`."""

    book: AskBook
    demand: Demand
    now: int
    score: Score
    rejected: list[tuple[Reason, ListedAsk]]

    def best(self, chance: float) -> list[ListedAsk]:
        """Returns fitting asks that declare all that the request needs; if there are none, other fitting asks."""
        strict = self.demand.strict
        if strict is not None:
            declared = replace(self, demand=strict, rejected=[]).fitting_asks(chance)
            if declared:
                return declared
        return self.fitting_asks(chance)

    def fitting_asks(self, chance: float) -> list[ListedAsk]:
        """Returns fitting asks, of the pinned providers or of all that have a free slot."""
        return self._among_pinned() if self.demand.pin else self._among_free(chance)

    def best_of(self, state: int) -> list[ListedAsk]:
        """Returns asks in a state other than FREE_SLOT that would fit if a slot were free, one per provider.

        If there are any, returns those that declare all that the request needs.
        """
        book, demand = self.book, self.demand
        index = book.index_of(demand.model)
        if index is None:
            return []
        for wanted in (demand,) if demand.strict is None else (demand.strict, demand):
            if demand.pin:
                pinned = (entry for entry in book.of_providers(demand.model, demand.pin) if entry.slot_group.state == state)
                classes = [iter(sorted(pinned, key=attrgetter("price_key")))]
            else:
                classes = [index.other_asks(wanted, state, reliability) for reliability in CLASSES]
            fitting = [listed_ask for listed_asks in classes for listed_ask in self._fitting_when_free(listed_asks, wanted)]
            if fitting:
                return fitting
        return []

    def _fitting_when_free(self, listed_asks: Iterator[ListedAsk], demand: Demand) -> list[ListedAsk]:
        """Returns the first ask of each provider that would fit if it had a free slot, of at most _MAX_EXPLAINED that are judged.

        A provider that fits hides no other, however many asks it has.
        """
        fitting: dict[Address, ListedAsk] = {}
        others = (entry for entry in islice(listed_asks, _MAX_SCANNED) if entry.provider not in fitting)
        for listed_ask in islice(others, _MAX_EXPLAINED):
            if self._fits_when_free(listed_ask, demand):
                fitting[listed_ask.provider] = listed_ask
        return list(fitting.values())

    def _fits_when_free(self, listed_ask: ListedAsk, demand: Demand) -> bool:
        node = listed_ask.node
        reputation = 100 * self.score(node.provider) if demand.min_reputation else None
        return (
            listed_ask.slot_group.capacity.slots > 0
            and demand.objection(listed_ask.ask.message, Facts(self.now, node.stake, None, reputation)) is None
        )

    def _among_pinned(self) -> list[ListedAsk]:
        """Returns the fitting asks of pinned providers, which are found wherever they stand in the order.

        Those with a free slot come alone if there are any.
        """
        pinned = sorted(self.book.of_providers(self.demand.model, self.demand.pin), key=_by_state)
        fitting = self._fitting(iter(pinned), MAX_ADDRESSES, suitable=False)
        return [listed_ask for listed_ask in fitting if listed_ask.slot_group.state == fitting[0].slot_group.state]

    def _among_free(self, chance: float) -> list[ListedAsk]:
        """Returns the best free asks that fit, one per provider, of each class of reliability."""
        index, pool, wanted = self.book.index_of(self.demand.model), list[ListedAsk](), 0
        if index is None:
            return pool
        for reliability in CLASSES:
            wanted += _POOL[reliability]
            free_asks = index.free_asks(self.demand, reliability, chance)
            pool += self._fitting(free_asks, wanted - len(pool), suitable=True)
        return pool

    def _fitting(self, listed_asks: Iterator[ListedAsk], wanted: int, *, suitable: bool) -> list[ListedAsk]:
        """Returns the first fitting ask of each provider, at most `wanted`. `suitable`: the specs are known to fit."""
        fitting: dict[Address, ListedAsk] = {}
        demand, left = self.demand, _MAX_JUDGED
        skipped = demand.exclude if suitable else frozenset()
        simple = Facts(self.now) if suitable and not (demand.min_stake or demand.min_reputation) else None
        for listed_ask in islice(listed_asks, _MAX_SCANNED):
            provider = listed_ask.provider
            if provider in skipped or provider in fitting:
                continue
            if simple is None:
                reason = rejection(listed_ask, demand, self.now, self.score, suitable=suitable)
            else:
                reason = demand.offer_objection(listed_ask.ask.message, simple)
            if reason is None:
                fitting[provider] = listed_ask
                if len(fitting) == wanted:
                    break
            else:
                self.rejected.append((reason, listed_ask))
            left -= 1
            if not left:
                break
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


def explain(listed_asks: Sequence[ListedAsk], demand: Demand, now: int, score: Score) -> list[tuple[ListedAsk, Reason | None]]:
    """Returns each of these asks with the reason for which the demand's shortlist would not have it; None if it would."""
    reasons = [rejection(listed_ask, demand, now, score) for listed_ask in listed_asks]
    strict = demand.strict
    declares = [strict is None or rejection(listed_ask, strict, now, score) is None for listed_ask in listed_asks]
    if any(declares):
        reasons = [
            Reason.UNDECLARED if reason is None and not declared else reason
            for reason, declared in zip(reasons, declares, strict=True)
        ]
    explained = list(zip(listed_asks, reasons, strict=True))
    if any(reason is None and listed_ask.slot_group.state == FREE_SLOT for listed_ask, reason in explained):
        return [
            (listed_ask, Reason.BUSY if reason is None and listed_ask.slot_group.state != FREE_SLOT else reason)
            for listed_ask, reason in explained
        ]
    return explained


def sort_by_demand(listed_asks: Sequence[ListedAsk], demand: Demand, score: Score) -> list[ListedAsk]:
    """Returns the asks in the order that the demand asks for."""
    if demand.sort == "price":
        return sort_by_cost(listed_asks, _itself, score)
    return sort_reliable_first(listed_asks, _SORT_KEYS[demand.sort], score)


def _itself(listed_ask: ListedAsk) -> ListedAsk:
    return listed_ask


def _by_state(listed_ask: ListedAsk) -> tuple[int, tuple[int, str]]:
    """Sort key: asks with a free slot first, then those whose engines would queue the job; the cheaper ones first."""
    return listed_ask.slot_group.state, listed_ask.price_key


_PRICE = frozenset({Reason.INPUT_PRICE, Reason.OUTPUT_PRICE})
_CHOICE = frozenset({Reason.NOT_PINNED, Reason.EXCLUDED})
_UNABLE = frozenset({Reason.ROUTE, Reason.UNSUPPORTED, Reason.TOO_LONG})
_MAX_NAMED = 5
"""Models that an error names."""


def no_match_error(
    demand: Demand, rejected: Sequence[tuple[Reason, ListedAsk]], *, not_requested: int = 0, book: AskBook | None = None
) -> TallyError:
    """Returns the error that tells a client why nobody can take its job, and what would change that.

    `rejected`: the asks that were judged, each with its reason; `not_requested`: the number of asks of providers not pinned;
    `book`: where other models are found that could take it.
    """
    reasons = Counter(reason for reason, _ in rejected)
    if not_requested:
        reasons[Reason.NOT_PINNED] += not_requested
    if not reasons:
        return Refusal(Code.UNKNOWN_MODEL, f"no provider offers the model {demand.model!r}")
    counts = "; ".join(f"{count} x {reason.value}" for reason, count in reasons.most_common())
    if Reason.BUSY in reasons:
        return Unavailable(Code.NODE_BUSY, f"providers of {demand.model!r} are busy: {counts}", fault=Fault.PROVIDER)
    asks = [listed_ask.ask.message for reason, listed_ask in rejected if reason in _PRICE]
    if asks and set(reasons) <= _PRICE | _CHOICE:
        among = "every provider asked for" if set(reasons) & _CHOICE else "every provider"
        lowest_input = format_amount(min(ask.input_price for ask in asks))
        lowest_output = format_amount(min(ask.output_price for ask in asks))
        text = f"{among} of {demand.model!r} is above the price cap; the lowest prices in dollars per million tokens are "
        return Refusal(Code.PRICE_ABOVE_CAP, f"{text}{lowest_input} for input and {lowest_output} for output")
    longest = max((entry.ask.message.context_tokens for reason, entry in rejected if reason is Reason.TOO_LONG), default=0)
    if longest and set(reasons) <= _UNABLE | _CHOICE:
        return context_refusal(demand.model, longest, demand.input_tokens)
    if set(reasons) <= _UNABLE | _CHOICE and set(reasons) & _UNABLE:
        return _unable_error(demand, book, served=Reason.UNSUPPORTED in reasons)
    return Refusal(Code.NO_PROVIDER, f"no provider of {demand.model!r} fits: {counts}")


def _unable_error(demand: Demand, book: AskBook | None, *, served: bool) -> Refusal:
    """The error of a request that no provider of its model can answer. It names models whose providers can."""
    if served:
        needs = ", ".join(
            f"{feature} ({MEANINGS[feature]})" if feature in MEANINGS else feature for feature in demand.needs.features
        )
        code, lacking = Code.UNSUPPORTED, f"supports what the request needs: {needs}"
    else:
        code, lacking = Code.UNKNOWN_ROUTE, f"serves {demand.route}"
    others = [] if book is None else _able_models(demand, book)
    advice = f"models on offer that do: {', '.join(others)}" if others else "no other model on offer is known to do so"
    return Refusal(code, f"no provider of {demand.model!r} {lacking}; {advice}")


def _able_models(demand: Demand, book: AskBook) -> list[str]:
    """The first models, by name, of which an ask serves the demanded route and declares the features that the request needs."""
    wanted = Requirements(features=demand.needs.features or demand.essential)
    able: list[str] = []
    scanned = 0
    for model, listed_asks in book.models():
        scanned += len(listed_asks)
        if any(_is_able(listed_ask.ask.message, demand, wanted) for listed_ask in listed_asks):
            able.append(model)
        if len(able) >= _MAX_NAMED or scanned >= _MAX_SCANNED:
            break
    return able


def _is_able(ask: Ask, demand: Demand, wanted: Requirements) -> bool:
    served = demand.route is None or serves(ask.spec.features, demand.route)
    return served and wanted.first_unmet(ask) is None


def rank_candidates(
    candidates: Sequence[Candidate],
    book: AskBook,
    *,
    tried: Collection[Address],
    score: Score,
    now: int,
    ranked: bool = False,
    newcomer: IsNewcomer = _no_newcomer,
    chance: float = 1.0,
) -> tuple[list[tuple[ListedAsk, Candidate]], dict[Address, str]]:
    """Returns the candidates of a job that can take it now, best first, and the reason against each of the others.

    Candidates with a free slot come before those whose engines would queue the job.
    `tried`: providers that failed this job. `ranked`: the candidates are in the client's own order, which is kept. `chance`: a
    uniform draw from 0 to 1, see ranking.py. Raises Refusal (order_terms).
    """
    fitting: list[tuple[ListedAsk, Candidate]] = []
    rejected: dict[Address, str] = {}
    for candidate in candidates:
        order, terms = candidate.order.message, candidate.terms
        listed_ask = book.find(terms.ask)
        reason: Reason | None = Reason.ASK_GONE
        if listed_ask is not None:
            check_terms(candidate, listed_ask)
            reason = rejection(listed_ask, Demand(model=terms.model), now)
        if order.deadline <= now:
            reason = Reason.ORDER_EXPIRED
        if order.provider in tried:
            reason = Reason.FAILED
        if listed_ask is not None and reason is None:
            fitting.append((listed_ask, candidate))
        elif reason is not None:
            rejected[order.provider] = reason.value
    if not ranked:
        ranking = spread_near_ties(sort_by_cost(fitting, itemgetter(0), score), itemgetter(0), score, chance)
        fitting = with_exploration(ranking, itemgetter(0), newcomer, chance)
    fitting.sort(key=lambda entry: entry[0].slot_group.state)  # stable: the ranking decides among those with a free slot
    return fitting, rejected


def check_terms(candidate: Candidate, listed_ask: ListedAsk) -> None:
    """Checks an order's terms against the ask that they name. Raises Refusal (order_terms)."""
    terms, ask = candidate.terms, listed_ask.ask.message
    if ask.provider != candidate.order.message.provider or ask.model != terms.model:
        raise Refusal(Code.ORDER_TERMS, "terms.ask: the ask of another provider or model")
    offered = (ask.input_price, ask.cached_input_price, ask.output_price)
    prices = (terms.input_price, terms.cached_input_price, terms.output_price)
    if offered != prices:
        text = f"terms: expected the ask's prices {offered}, got {prices} (input, cached input, output; base units)"
        raise Refusal(Code.ORDER_TERMS, text)
    if terms.max_output_tokens > ask.max_output_tokens:
        text = f"terms.maxOutputTokens: expected at most the ask's {ask.max_output_tokens}, got {terms.max_output_tokens}"
        raise Refusal(Code.ORDER_TERMS, text)
