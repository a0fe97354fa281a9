"""Matching, as predicates that say why. The same ones make the shortlist, choose among the candidates and explain a no.

Pure: the book, a demand and the time go in; a ranking or the reasons come out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from itertools import islice

from coordinator.book import Standing
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.types import Address

MAX_LISTED = 8
_SCAN = 256
"""Asks looked at for one shortlist, cheapest first; bounds the work however large the book is."""


class Reason(Enum):
    """Why a provider was not chosen, in words that its owner and the client can act on."""

    NOT_PINNED = "not among the providers asked for"
    EXCLUDED = "excluded by the client"
    INPUT_PRICE = "its input price is above the client's maximum"
    OUTPUT_PRICE = "its output price is above the client's maximum"
    OUTPUT_TOKENS = "it writes fewer tokens than asked for"
    ASK_EXPIRED = "its ask has expired or is not valid yet"
    ASK_GONE = "its ask was replaced or withdrawn since the shortlist was made"
    BUSY = "no free slot now"
    FAILED = "it failed this job already"


@dataclass(frozen=True, slots=True)
class Demand:
    """What a client wants. Prices are maxima in base units per 1,000,000 tokens; empty sets do not restrict."""

    model: str
    max_input_price: int | None = None
    max_output_price: int | None = None
    providers: frozenset[Address] = frozenset()
    exclude: frozenset[Address] = frozenset()
    max_output_tokens: int = 0
    limit: int = MAX_LISTED

    def __post_init__(self) -> None:
        if not 1 <= self.limit <= MAX_LISTED:
            raise BadMessage(f"limit: expected 1 to {MAX_LISTED}")


_Predicate = Callable[[Standing, Demand, int], bool]

PREDICATES: tuple[tuple[Reason, _Predicate], ...] = (
    (Reason.NOT_PINNED, lambda s, d, _: bool(d.providers) and s.ask.message.provider not in d.providers),
    (Reason.EXCLUDED, lambda s, d, _: s.ask.message.provider in d.exclude),
    (Reason.INPUT_PRICE, lambda s, d, _: d.max_input_price is not None and s.ask.message.input_price > d.max_input_price),
    (Reason.OUTPUT_PRICE, lambda s, d, _: d.max_output_price is not None and s.ask.message.output_price > d.max_output_price),
    (Reason.OUTPUT_TOKENS, lambda s, d, _: s.ask.message.max_output_tokens < d.max_output_tokens),
    (Reason.ASK_EXPIRED, lambda s, _, now: not s.ask.message.valid_from <= now < s.ask.message.valid_until),
    (Reason.BUSY, lambda s, _, __: s.node.free < 1),
)


def judge(standing: Standing, demand: Demand, now: int) -> Reason | None:
    """The first reason against this ask for this demand, or None."""
    return next((reason for reason, excludes in PREDICATES if excludes(standing, demand, now)), None)


def shortlist(standings: list[Standing], demand: Demand, now: int) -> list[Standing]:
    """The best asks for a demand, cheapest first, at most `demand.limit`. Raises Refusal or Unavailable that say why none."""
    reasons: Counter[Reason] = Counter()
    found: list[Standing] = []
    for standing in islice(standings, _SCAN):
        reason = judge(standing, demand, now)
        if reason is None:
            found.append(standing)
            if len(found) == demand.limit:
                break
        else:
            reasons[reason] += 1
    if not found:
        raise explain_none(demand, reasons, standings)
    return found


def explain_none(demand: Demand, reasons: Counter[Reason], standings: Iterable[Standing]) -> TallyError:
    """The error that tells a client why nobody can take its job, and what would change that."""
    if not reasons:
        return Refusal(Code.UNKNOWN_MODEL, f"no provider offers the model {demand.model!r}")
    told = "; ".join(f"{count} x {reason.value}" for reason, count in reasons.most_common())
    if set(reasons) <= {Reason.INPUT_PRICE, Reason.OUTPUT_PRICE}:
        asks = [s.ask.message for s in standings]
        lowest = f"{min(a.input_price for a in asks)} in and {min(a.output_price for a in asks)} out"
        message = f"every provider of {demand.model!r} is above the price cap; the lowest prices per million tokens are {lowest}"
        return Refusal(Code.PRICE_ABOVE_CAP, message)
    if Reason.BUSY in reasons:
        return Unavailable(Code.NODE_BUSY, f"providers of {demand.model!r} are busy: {told}", fault=Fault.PROVIDER)
    return Refusal(Code.NO_PROVIDER, f"no provider of {demand.model!r} fits: {told}")
