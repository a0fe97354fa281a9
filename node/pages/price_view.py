"""What other prices would have brought: the last day's jobs at them, and the coordinator's latest decisions about them. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tallystick.protocol.errors import TallyError
from tallystick.protocol.json_members import read_count, read_items, read_members, read_text
from tallystick.protocol.pricing import Prices, Usage, cost
from tallystick.protocol.types import Amount, format_amount, parse_amount

MAX_DECISIONS = 500
"""Decisions that a coordinator is asked for: the most that it tells."""
MAX_REASONS = 8
OFFERED = ("offered to the client", "would have been offered")
"""How the reason begins that a coordinator gives for a shortlist that names this provider."""


@dataclass(frozen=True, slots=True)
class PriceQuestion:
    """The question of the page's form: a model and its prices, base units per 1,000,000 tokens. `problem`: what is wrong."""

    model: str
    prices: Prices
    problem: str = ""

    @property
    def query(self) -> str:
        """The prices for the coordinator."""
        return f"&inputPrice={self.prices.input}&outputPrice={self.prices.output}"


def read_question(parameters: Mapping[str, str], asks: Sequence[Mapping[str, object]]) -> PriceQuestion | None:
    """Reads the parameters of the page's address; what is missing or wrong is as in the present ask. None without an ask."""
    if not asks:
        return None
    ask = next((ask for ask in asks if ask["model"] == parameters.get("model")), asks[0])
    now = {"input": int(str(ask["inputPrice"])), "output": int(str(ask["outputPrice"]))}
    problems = []
    for name in now:
        if text := parameters.get(name, "").strip()[:40]:
            try:
                now[name] = int(parse_amount(text, field=name.capitalize()))
            except TallyError as error:
                problems.append(str(error))
    return PriceQuestion(str(ask["model"]), Prices(now["input"], now["input"], now["output"]), ". ".join(problems))


@dataclass(frozen=True, slots=True)
class PaidJob:
    """A receipt: its usage and its cost in base units."""

    usage: Usage
    cost: int


@dataclass(frozen=True, slots=True)
class Earnings:
    """What some jobs brought, and what they would have brought at other prices, in base units."""

    jobs: int
    earned: Amount
    at_prices: Amount


def earnings_at(jobs: Iterable[PaidJob], prices: Prices) -> Earnings:
    """Adds up. Cached tokens count at the price of input. Jobs without a charge stay so: another price does not change why."""
    count = earned = other = 0
    for job in jobs:
        count += 1
        earned += job.cost
        other += cost(job.usage, prices) if job.cost else 0
    return Earnings(count, Amount(earned), Amount(other))


@dataclass(frozen=True, slots=True)
class Offers:
    """How a coordinator judged an ask in its latest decisions: how many, in how many of them it was offered, and why not."""

    decisions: int
    offered: int
    reasons: tuple[tuple[str, int], ...]

    @property
    def percent(self) -> int:
        """The share of the decisions in which it was offered."""
        return 100 * self.offered // self.decisions if self.decisions else 0


@dataclass(frozen=True, slots=True)
class OfferComparison:
    """The same requests with the asks as they were, and at other prices. `unknown`: requests that only the first can be told of,
    as of the time before this node connected; they are in neither.
    """

    now: Offers
    then: Offers
    unknown: int


def compare_offers(now: object, then: object, model: str) -> OfferComparison:
    """Compares a coordinator's two answers about the shortlists of one model, from when both begin. Raises BadMessage."""
    as_were, at_prices = _shortlists(now, model), _shortlists(then, model)
    begin = max(min((at for at, _ in listed), default=1 << 62) for listed in (as_were, at_prices))
    return OfferComparison(_offers(as_were, begin), _offers(at_prices, begin), sum(at < begin for at, _ in as_were))


def _shortlists(raw: object, model: str) -> list[tuple[int, str]]:
    """The time and the reason of each shortlist of a model, newest first."""
    (listed,) = read_members(raw, "why", "decisions")
    shortlists = []
    for entry in read_items(listed, "why.decisions", MAX_DECISIONS):
        at, of_model, stage, text = read_members(entry, "why.decisions", "at", "model", "stage", "why")
        if of_model == model and stage == "shortlist":
            shortlists.append((read_count(at, "why.decisions.at"), read_text(text, "why.decisions.why", 500)))
    return shortlists


def _offers(shortlists: Iterable[tuple[int, str]], begin: int) -> Offers:
    told = [reason for at, reason in shortlists if at >= begin]
    reasons = Counter(reason for reason in told if not reason.startswith(OFFERED))
    return Offers(len(told), len(told) - reasons.total(), tuple(reasons.most_common(MAX_REASONS)))


def likely(earnings: Earnings, now: Offers, then: Offers) -> Amount | None:
    """What the jobs would have brought, had their number changed as the offers did; None if there are no offers to compare."""
    return Amount(int(earnings.at_prices) * then.offered // now.offered) if now.offered and then.decisions else None


def form_price(units: int) -> str:
    """A price for a field of the form, in dollars."""
    return format_amount(Amount(units))
