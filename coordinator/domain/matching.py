"""Matching: the shortlist for a demand, the ranking of a job's candidates, and the reason why a provider is left out.

Both use the predicates of `Demand`. Pure: the ask book, a demand and the time go in; a ranking or the reasons come out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import TypeVar

from coordinator.domain.ask_book import AskBook
from coordinator.domain.listed_ask import CLASSES, NO_PLACE, QUEUE_PLACE, ListedAsk, SlotGroup
from coordinator.domain.ranking import (
    IsNewcomer,
    Ranked,
    keep_holder,
    limited,
    rank,
    spread_concurrent,
    spread_near_ties,
    with_exploration,
)
from coordinator.domain.scoring import ANY_REQUEST, RequestShape, Score, Scorer, ScoreTerms, shape_of
from coordinator.domain.search import Search, perfect_score, rejection
from tallystick.protocol.criteria import Demand, Reason, is_batch_only
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.messages import UNKNOWN, Spec
from tallystick.protocol.payer_rules import is_for
from tallystick.protocol.requirements import Requirements, compared_name
from tallystick.protocol.types import Address
from tallystick.protocol.wire import Candidate

T = TypeVar("T")
_UNDECLARED = frozenset(("", UNKNOWN))


def _no_backlog(_group: SlotGroup) -> float:
    return 0.0


def _no_newcomer(_provider: Address) -> bool:
    return False


def shape_of_demand(demand: Demand, mean_output: int | None = None) -> RequestShape:
    """Returns the shape of the request that a demand is for. `mean_output`: see `shape_of`."""
    return shape_of(demand.likely_tokens, demand.max_output, mean_output, sort=demand.sort, weights=demand.weights)


def shortlist(
    book: AskBook,
    demand: Demand,
    now: int,
    rejected: list[tuple[Reason, ListedAsk]] | None = None,
    score: Score = perfect_score,
    *,
    newcomer: IsNewcomer = _no_newcomer,
    chance: float = 1.0,
    backlog: Callable[[SlotGroup], float] = _no_backlog,
    is_open: Callable[[SlotGroup], bool] | None = None,
    mean_output: int | None = None,
    terms: dict[Address, ScoreTerms] | None = None,
) -> list[ListedAsk]:
    """Returns the best asks for a demand, best first: at most `demand.limit`, one per provider.

    Asks with a free slot come alone if there are any, else those whose engines would queue the job. If all that fit are busy,
    returns the most reliable ones with the least `backlog`: a job can wait for them. An ask whose free slot is not open, because
    another job was granted it or waits for it, counts as busy.
    `rejected` is filled with the asks that were judged and do not meet the demand, each with its reason; `terms` with the scores
    of the asks that were considered. `chance`: a uniform draw from 0 to 1, see ranking.py. `mean_output`: see `shape_of`. Raises
    Refusal or Unavailable that say why no ask meets the demand.
    """
    scorer = Scorer(shape_of_demand(demand, mean_output), score)
    search = Search(book, demand, now, score, scorer, chance, [] if rejected is None else rejected, is_open)
    free = search.best()
    pool = free or search.best_of(QUEUE_PLACE)
    waiting = [] if pool else search.best_of(NO_PLACE)
    if not pool and not waiting:
        raise search.no_match()
    if not free or demand.pin:
        scorer.refer(pool or waiting)
    ranking = rank(pool or waiting, _itself, scorer)
    if pool:
        ranking = with_exploration(spread_near_ties(ranking, chance), newcomer, chance)
        if free and demand.concurrent:
            ranking = spread_concurrent(ranking, demand.concurrent, chance)
        ranking = limited(ranking, demand.limit, newcomer)
    else:
        ranking.sort(key=lambda ranked: (ranked.listed_ask.node.reliability, backlog(ranked.listed_ask.slot_group)))
    if terms is not None:
        terms.update((ranked.listed_ask.provider, ranked.terms) for ranked in ranking)
    return [ranked.listed_ask for ranked in ranking[: demand.limit]]


def likely_requirements(specs: Iterable[Spec]) -> Requirements:
    """Returns what a client that ordered on asks with these specs may require: what they have in common.

    A name that one of them does not declare is not required, since an unknown one meets no requirement.
    """
    listed = list(specs)

    def names(member: str) -> tuple[str, ...]:
        values = {compared_name(member, getattr(spec, member)) for spec in listed}
        return () if values & _UNDECLARED else tuple(sorted(values))

    common = set(listed[0].features).intersection(*(spec.features for spec in listed)) if listed else set[str]()
    return Requirements(
        region=names("region"),
        tier=names("tier"),
        precision=names("precision"),
        engine=names("engine"),
        features=tuple(sorted(name for name in common if not name.startswith("-"))),
    )


def spare_asks(book: AskBook, demand: Demand, score: Score, chance: float) -> Iterator[ListedAsk]:
    """Yields the asks with a free slot whose spec meets a demand: the most reliable class first, in each the cheapest first."""
    index, scorer = book.index_of(demand.model), Scorer(shape_of_demand(demand), score)
    payer = None if index is None or not index.payer_groups else demand.payer
    for reliability in () if index is None else CLASSES:
        offers = None if index is None else index.free_asks(demand, reliability, scorer, chance)
        for _, _, lead in offers or ():
            if payer is None or is_for(lead.message, payer):
                yield lead
                yield from lead.siblings


def explain(
    listed_asks: Sequence[ListedAsk], demand: Demand, now: int, score: Score, mean_output: int | None = None
) -> list[tuple[Ranked[ListedAsk], Reason | None]]:
    """Returns each of these asks with the terms of its score, by the lowest total first, and the reason for which the demand's
    shortlist would not have it; None if it would.

    If none that fits has a free slot, a shortlist has those whose engines queue, and then those that a job can wait for.
    """
    reasons = {id(listed_ask): rejection(listed_ask, demand, now, score) for listed_ask in listed_asks}
    for waits in (False, True):
        if any(reason is None for reason in reasons.values()):
            break
        for listed_ask in listed_asks:
            if reasons[id(listed_ask)] is Reason.BUSY and listed_ask.slot_group.slots:
                reasons[id(listed_ask)] = rejection(listed_ask, demand, now, score, queues=True, waits=waits)
    strict, fitting = demand.strict, [entry for entry in listed_asks if reasons[id(entry)] is None]
    if strict is not None and any(strict.spec_objection(entry.message) is None for entry in fitting):
        for entry in fitting:
            if strict.spec_objection(entry.message) is not None:
                reasons[id(entry)] = Reason.UNDECLARED
    scorer = Scorer(shape_of_demand(demand, mean_output), score)
    scorer.refer([entry for entry in listed_asks if reasons[id(entry)] is None] or listed_asks)
    return [(ranked, reasons[id(ranked.entry)]) for ranked in rank(listed_asks, _itself, scorer)]


def _itself(listed_ask: ListedAsk) -> ListedAsk:
    return listed_ask


def rank_candidates(
    candidates: Sequence[Candidate],
    book: AskBook,
    *,
    tried: Collection[Address],
    score: Score,
    now: int,
    ranked: bool = False,
    shape: RequestShape = ANY_REQUEST,
    newcomer: IsNewcomer = _no_newcomer,
    chance: float = 1.0,
    batch: bool = False,
) -> tuple[list[Ranked[tuple[ListedAsk, Candidate]]], dict[Address, str]]:
    """Returns the candidates of a job that can take it now, best first, and the reason against each of the others.

    `tried`: providers that failed this job. `ranked`: the candidates are in the client's own order, which is kept. `shape`: what
    is known of the request. `chance`: a uniform draw from 0 to 1, see ranking.py. `batch`: the job's class. Raises Refusal
    (order_terms).
    """
    fitting: list[tuple[ListedAsk, Candidate]] = []
    rejected: dict[Address, str] = {}
    for candidate in candidates:
        order, terms = candidate.order.message, candidate.terms
        listed_ask = book.find(terms.ask)
        if listed_ask is not None:
            check_terms(candidate, listed_ask, batch=batch)
        reason = candidate_rejection(listed_ask, terms.model, order.deadline, now, tried=order.provider in tried)
        if listed_ask is not None and reason is None:
            fitting.append((listed_ask, candidate))
        elif reason is not None:
            rejected[order.provider] = reason.value
    return rank_fitting(fitting, Scorer(shape, score), ranked=ranked, newcomer=newcomer, chance=chance), rejected


def candidate_rejection(listed_ask: ListedAsk | None, model: str, deadline: int, now: int, *, tried: bool) -> Reason | None:
    """Returns why a candidate cannot take its job now; None if it can. `deadline`: of its order; `tried`: it had the job."""
    if tried:
        return Reason.FAILED
    if deadline <= now:
        return Reason.ORDER_EXPIRED
    return Reason.ASK_GONE if listed_ask is None else rejection(listed_ask, _any_ask_of(model), now, queues=True)


@lru_cache(maxsize=256)
def _any_ask_of(model: str) -> Demand:
    """Returns the demand that each valid ask for a model meets: the client chose its candidates by its own."""
    return Demand(model=model, batch=True)


def rank_fitting(
    fitting: Sequence[tuple[ListedAsk, T]], scorer: Scorer, *, ranked: bool, newcomer: IsNewcomer, chance: float
) -> list[Ranked[tuple[ListedAsk, T]]]:
    """Returns the candidates that fit, best first; in the client's own order if they are `ranked`.

    Those with a free slot come before those whose engines would queue the job.
    """
    scorer.refer([listed_ask for listed_ask, _ in fitting])
    ranking = rank(fitting, itemgetter(0), scorer)
    if ranked:
        places = {id(entry): place for place, entry in enumerate(fitting)}
        ranking.sort(key=lambda entry: places[id(entry.entry)])
    else:
        ranking = keep_holder(with_exploration(spread_near_ties(ranking, chance), newcomer, chance), scorer.shape.holder)
    return sorted(ranking, key=lambda entry: entry.listed_ask.slot_group.state)  # stable


def check_terms(candidate: Candidate, listed_ask: ListedAsk, *, batch: bool) -> None:
    """Checks an order's terms against the ask that they name. `batch`: the class of its job. Raises Refusal (order_terms)."""
    terms, ask = candidate.terms, listed_ask.message
    if is_batch_only(ask) and not batch:
        raise Refusal(Code.ORDER_TERMS, "terms.ask: expected an ask for interactive jobs, got one for batch jobs alone")
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
