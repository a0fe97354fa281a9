"""Match errors: what tells a client why nobody can take its job, and what would change that. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from coordinator.domain.ask_book import AskBook
from coordinator.domain.listed_ask import ListedAsk
from tallystick.protocol.criteria import Demand, Reason, context_refusal
from tallystick.protocol.errors import Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.features import MEANINGS
from tallystick.protocol.messages import Ask
from tallystick.protocol.requirements import Requirements
from tallystick.protocol.routes import serves
from tallystick.protocol.types import format_amount

_MAX_SCANNED = 5_000
"""Asks that are looked at for models that could take the job."""
_PRICE = frozenset({Reason.INPUT_PRICE, Reason.OUTPUT_PRICE})
_CHOICE = frozenset({Reason.NOT_PINNED, Reason.EXCLUDED})
_UNABLE = frozenset({Reason.ROUTE, Reason.UNSUPPORTED, Reason.TOO_LONG})
_FURTHER = frozenset({Reason.BATCH_ONLY, Reason.PAYER})
"""Reasons that are nearly always against a second ask of a provider that is judged by its first."""
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
    if reasons.keys() - _FURTHER:
        for reason in _FURTHER:
            del reasons[reason]
    if not_requested:
        reasons[Reason.NOT_PINNED] += not_requested
    if not reasons:
        return Refusal(Code.UNKNOWN_MODEL, f"no provider offers the model {demand.model!r}")
    counts = "; ".join(f"{count} x {reason.value}" for reason, count in reasons.most_common())
    if Reason.BUSY in reasons:
        return Unavailable(Code.NODE_BUSY, f"providers of {demand.model!r} are busy: {counts}", fault=Fault.PROVIDER)
    asks = [listed_ask.message for reason, listed_ask in rejected if reason in _PRICE]
    if asks and set(reasons) <= _PRICE | _CHOICE:
        among = "every provider asked for" if set(reasons) & _CHOICE else "every provider"
        lowest_input = format_amount(min(ask.input_price for ask in asks))
        lowest_output = format_amount(min(ask.output_price for ask in asks))
        text = f"{among} of {demand.model!r} is above the price cap; the lowest prices in dollars per million tokens are "
        return Refusal(Code.PRICE_ABOVE_CAP, f"{text}{lowest_input} for input and {lowest_output} for output")
    longest = max((entry.message.context_tokens for reason, entry in rejected if reason is Reason.TOO_LONG), default=0)
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
        if any(_is_able(listed_ask.message, demand, wanted) for listed_ask in listed_asks):
            able.append(model)
        if len(able) >= _MAX_NAMED or scanned >= _MAX_SCANNED:
            break
    return able


def _is_able(ask: Ask, demand: Demand, wanted: Requirements) -> bool:
    served = demand.route is None or serves(ask.spec.features, demand.route)
    return served and wanted.first_unmet(ask) is None
