"""Matching, as predicates that say why. The same ones make the shortlist, choose among the candidates and explain a no.

Pure: the book, a demand and the time go in; a ranking or the reasons come out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from operator import itemgetter

from coordinator.domain.ask_book import AskBook, ListedAsk
from coordinator.domain.ranking import PROVEN, IsNewcomer, Score, limited, sort_by_cost, sort_reliable_first, with_exploration
from tallystick.protocol.demand import Demand, Facts, Reason
from tallystick.protocol.errors import Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.types import Address
from tallystick.protocol.wire import Candidate

_SCAN, _SCAN_UNPROVEN, _ENOUGH = 256, 64, 64
"""Asks judged for one shortlist, cheapest first, beside those that are excluded: of proven providers, and of all others; it ends
earlier with so many proven ones that fit. So strangers with many cheap asks hide nobody, and the work is bounded.
"""
_WALK = 5_000
"""Asks of one model that are passed over for one shortlist: some seventy nodes can offer so many in the bytes that they have."""


_SORT_KEYS: dict[str, Callable[[ListedAsk], float]] = {
    "price": lambda s: s.price_key[0],
    "latency": lambda s: s.node.capacity.first_token_ms or float("inf"),
    "throughput": lambda s: -s.node.capacity.tokens_per_second,
}
"""How a shortlist is ordered; what is not known yet comes last, and ties go to the cheaper."""


def _anybody(_provider: Address) -> float:
    return 1.0


def _nobody(_provider: Address) -> bool:
    return False


def rejection(listed_ask: ListedAsk, demand: Demand, now: int, score: Score = _anybody) -> Reason | None:
    """The first reason against this ask for this demand, or None."""
    node = listed_ask.node
    return demand.objection(listed_ask.ask.message, Facts(now, node.stake, node.free, 100 * score(node.provider)))


def shortlist(
    book: AskBook,
    demand: Demand,
    now: int,
    rejected: list[tuple[Reason, ListedAsk]] | None = None,
    score: Score = _anybody,
    *,
    newcomer: IsNewcomer = _nobody,
    chance: float = 1.0,
) -> list[ListedAsk]:
    """The best asks for a demand, best first, at most `demand.limit` and one of each provider. Raises Refusal or Unavailable that
    say why none. `chance`: drawn evenly from 0 to 1; see ranking.py.

    `judged` is filled with the asks that were looked at in vain, each with the reason against it.
    """
    listed: Sequence[ListedAsk] = book.of_model(demand.model)
    wanted = listed
    if demand.pin:  # wherever they stand in the list
        wanted = sorted(book.of_providers(demand.model, demand.pin), key=lambda listed_ask: listed_ask.price_key)
    rejected = [] if rejected is None else rejected
    found = _fitting(wanted, demand, now, rejected=rejected, score=score)
    if not found:
        raise no_match_error(demand, rejected, not_requested=len(listed) - len(wanted))
    return limited(with_exploration(sort_by_demand(found, demand, score), _itself, newcomer, chance), demand.limit, newcomer)


def _fitting(
    wanted: Sequence[ListedAsk], demand: Demand, now: int, *, rejected: list[tuple[Reason, ListedAsk]], score: Score
) -> list[ListedAsk]:
    """The cheapest fitting ask of each provider, as far as the scan goes."""
    found: dict[Address, ListedAsk] = {}
    left = {True: _SCAN, False: _SCAN_UNPROVEN}
    enough = _ENOUGH if demand.sort == "price" else _SCAN
    for listed_ask, _ in zip(wanted, range(_WALK), strict=False):
        provider = listed_ask.node.provider
        proven = score(provider) >= PROVEN
        if provider in found or not left[proven]:
            continue
        reason = rejection(listed_ask, demand, now, score)
        if reason is None:
            found[provider] = listed_ask
            enough -= proven
        else:
            rejected.append((reason, listed_ask))
        left[proven] -= reason is not Reason.EXCLUDED
        if not (enough and left[True]):
            break
    return list(found.values())


def sort_by_demand(listed_asks: Sequence[ListedAsk], demand: Demand, score: Score) -> list[ListedAsk]:
    """These in the order that the demand sorts by."""
    if demand.sort == "price":
        return sort_by_cost(listed_asks, _itself, score)
    return sort_reliable_first(listed_asks, _SORT_KEYS[demand.sort], score)


def _itself(listed_ask: ListedAsk) -> ListedAsk:
    return listed_ask


_PRICE = frozenset({Reason.INPUT_PRICE, Reason.OUTPUT_PRICE})
_CHOICE = frozenset({Reason.NOT_PINNED, Reason.EXCLUDED})


def no_match_error(demand: Demand, rejected: Sequence[tuple[Reason, ListedAsk]], *, not_requested: int = 0) -> TallyError:
    """The error that tells a client why nobody can take its job, and what would change that.

    `judged`: the asks looked at, each with the reason against it; `unasked`: how many more the client did not ask for.
    """
    reasons = Counter(reason for reason, _ in rejected)
    if not_requested:
        reasons[Reason.NOT_PINNED] += not_requested
    if not reasons:
        return Refusal(Code.UNKNOWN_MODEL, f"no provider offers the model {demand.model!r}")
    told = "; ".join(f"{count} x {reason.value}" for reason, count in reasons.most_common())
    if Reason.BUSY in reasons:
        return Unavailable(Code.NODE_BUSY, f"providers of {demand.model!r} are busy: {told}", fault=Fault.PROVIDER)
    asks = [listed_ask.ask.message for reason, listed_ask in rejected if reason in _PRICE]
    if asks and set(reasons) <= _PRICE | _CHOICE:
        among = "every provider asked for" if set(reasons) & _CHOICE else "every provider"
        lowest = f"{min(a.input_price for a in asks)} in and {min(a.output_price for a in asks)} out"
        message = f"{among} of {demand.model!r} is above the price cap; the lowest prices per million tokens are {lowest}"
        return Refusal(Code.PRICE_ABOVE_CAP, message)
    if Reason.ROUTE in reasons and set(reasons) <= {Reason.ROUTE} | _CHOICE:
        return Refusal(Code.UNKNOWN_ROUTE, f"no provider of {demand.model!r} serves {demand.route}")
    return Refusal(Code.NO_PROVIDER, f"no provider of {demand.model!r} fits: {told}")


def rank_candidates(
    candidates: Sequence[Candidate],
    book: AskBook,
    *,
    tried: Collection[Address],
    score: Score,
    now: int,
    ranked: bool = False,
    newcomer: IsNewcomer = _nobody,
    chance: float = 1.0,
) -> tuple[list[tuple[ListedAsk, Candidate]], list[str]]:
    """The candidates of a job that can take it now, best first, and why the others cannot. Raises Refusal (order_terms).

    `ranked`: they are in the order in which the client would have them. `chance`: drawn evenly from 0 to 1; see ranking.py.
    """
    fit: list[tuple[ListedAsk, Candidate]] = []
    against: list[str] = []
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
            fit.append((listed_ask, candidate))
        elif reason is not None:
            against.append(f"{order.provider}: {reason.value}")
    if not ranked:
        fit = with_exploration(sort_by_cost(fit, itemgetter(0), score), itemgetter(0), newcomer, chance)
    return fit, against


def check_terms(candidate: Candidate, listed_ask: ListedAsk) -> None:
    """Holds an order's terms against the ask that they name. Raises Refusal (order_terms)."""
    terms, ask = candidate.terms, listed_ask.ask.message
    if ask.provider != candidate.order.message.provider or ask.model != terms.model:
        raise Refusal(Code.ORDER_TERMS, "terms.ask: the ask of another provider or model")
    offered = (ask.input_price, ask.cached_input_price, ask.output_price)
    if offered != (terms.input_price, terms.cached_input_price, terms.output_price):
        raise Refusal(Code.ORDER_TERMS, f"terms: prices differ from the ask's {offered}")
    if terms.max_output_tokens > ask.max_output_tokens:
        raise Refusal(
            Code.ORDER_TERMS, f"terms.maxOutputTokens: {terms.max_output_tokens} is above the ask's {ask.max_output_tokens}"
        )
