"""The decision log: why a provider got work or did not, for its last shortlists and matches. Bounded, pure.

It answers the question "why did I get no work?". It does not record payers. A shortlist does not look at every ask, so the log
keeps the demand and judges a provider's asks by the same predicates when the provider asks. Decisions of a former process are
restored; which slots were free then is not known any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from coordinator.domain.ask_book import AskBook, ListedAsk
from coordinator.domain.scoring import ANY_REQUEST, RequestShape, ScoreTerms, price_of
from tallystick.protocol.criteria import Demand, Facts, Reason
from tallystick.protocol.log_facts import INTEGRITY_STEPS
from tallystick.protocol.messages import Ask
from tallystick.protocol.payer_rules import STRANGER
from tallystick.protocol.types import Address

Prices = tuple[int | None, int | None]
"""Prices of input and output that decisions are judged at, in base units per 1,000,000 tokens. None: the ask's own price."""
MAX_DECISIONS = 2_000
_MAX_REASONS = 32
"""Providers whose reason is kept per decision."""
_MAX_KEPT_ADDRESSES = 16
"""Pinned and excluded providers that a kept demand names."""
_MAX_JUDGED = 4_096
"""Asks that one answer judges. A provider with very many asks is told of fewer decisions."""
_NOT_LISTED = "its ask was not listed at that time"


@dataclass(frozen=True, slots=True)
class Decision:
    """One shortlist, or one match among the orders of a shortlist. `at` is Unix seconds, `number` counts all decisions.

    `chosen`: the shortlist, best first, or the provider that got the job. `rejected`: the reason against each other provider.
    `demand`: what a shortlist was made for. `declared`: whether only asks that declare the request's needs were chosen.
    `highest_price`: of the shortlist's asks for this request, in MICRO base units; None if it has places left. `waits`: whether
    all of them were busy, so that a job had to wait. `shape`: of the request. `scores`: the terms of each ask that was ranked.
    """

    number: int
    at: int
    model: str
    match: bool
    chosen: tuple[Address, ...]
    rejected: Mapping[Address, str]
    demand: Demand | None = None
    declared: bool = False
    highest_price: int | None = None
    waits: bool = False
    shape: RequestShape = ANY_REQUEST
    scores: Mapping[Address, ScoreTerms] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one decision meant for one provider. `stage`: "shortlist" or "match"; `won`: whether the provider was chosen.

    `score`: the terms by which its ask was ranked, and their total, in dollars; None if it was not ranked. `best`: those of the
    provider that came first.
    """

    at: int
    model: str
    stage: str
    won: bool
    why: str
    score: dict[str, str] | None = None
    best: dict[str, str] | None = None


@dataclass(slots=True)
class DecisionLog:
    """The last MAX_DECISIONS decisions, oldest first. `count`: the number of all decisions so far."""

    _decisions: deque[Decision] = field(default_factory=lambda: deque(maxlen=MAX_DECISIONS))
    count: int = 0
    _saved: int = 0
    """The number of the first decision that was not taken to be stored yet."""
    _restored: int = 0
    """The number of decisions that are of a former process, which knew another set of connected nodes."""

    def restore(self, decisions: Iterable[Decision]) -> None:
        """Takes the decisions of a former process, oldest first."""
        for decision in decisions:
            self._add(replace(decision, number=self.count))
        self._saved = self._restored = self.count

    def take_unsaved(self) -> list[Decision]:
        """Returns the decisions that are to be stored."""
        fresh = min(self.count - self._saved, len(self._decisions))
        self._saved = self.count
        return list(self._decisions)[len(self._decisions) - fresh :] if fresh else []

    def mark_unsaved(self, decisions: Sequence[Decision]) -> None:
        """Notes that these decisions, the last that were taken, could not be stored."""
        if decisions:
            self._saved = decisions[0].number

    def add_shortlist(
        self,
        demand: Demand,
        chosen: Sequence[ListedAsk],
        rejected: Iterable[tuple[Reason, ListedAsk]],
        now: int,
        *,
        shape: RequestShape = ANY_REQUEST,
        scores: Mapping[Address, ScoreTerms] = MappingProxyType({}),
    ) -> None:
        """Records a shortlist, empty ones too. A decision that concerned no provider is not kept.

        `shape`: of the request; `scores`: the terms of each ask that was ranked.
        """
        reasons = {entry.provider: reason.value for (reason, entry), _ in zip(rejected, range(_MAX_REASONS), strict=False)}
        if not chosen and not reasons:
            return
        full = len(chosen) == demand.limit
        highest = max(price_of(entry.message, shape) for entry in chosen) if full else None
        waits = bool(chosen) and not any(entry.slot_group.free for entry in chosen)
        providers = tuple(entry.provider for entry in chosen)
        strict = demand.strict
        declared = strict is not None and bool(chosen) and strict.spec_objection(chosen[0].message) is None
        kept = _slim(demand)
        result = Decision(self.count, now, demand.model, False, providers, reasons, kept, declared, highest, waits, shape)
        self._add(replace(result, scores=dict(scores)))

    def add_match(
        self,
        model: str,
        chosen: Address | None,
        rejected: Mapping[Address, str],
        now: int,
        scores: Mapping[Address, ScoreTerms] = MappingProxyType({}),
    ) -> None:
        """Records which order of a job was chosen; None if none could be."""
        providers = () if chosen is None else (chosen,)
        self._add(Decision(self.count, now, model, True, providers, rejected, scores=dict(scores)))

    def _add(self, decision: Decision) -> None:
        self._decisions.append(decision)
        self.count += 1

    def verdicts(self, provider: Address, book: AskBook, limit: int, prices: Prices | None = None) -> list[Verdict]:
        """Returns the last decisions that named the provider or concerned a model that it offers, newest first.

        With `prices`, returns what the shortlists would have said of its asks at these prices, of those where that can be said.
        """
        return [verdict for verdict, _ in zip(self._verdicts(provider, book, prices), range(limit), strict=False)]

    def _verdicts(self, provider: Address, book: AskBook, prices: Prices | None) -> Iterator[Verdict]:
        by_model: dict[str, list[ListedAsk]] = {}
        for listed_ask in book.of_provider(provider):
            by_model.setdefault(listed_ask.message.model, []).append(listed_ask)
        left = _MAX_JUDGED
        for decision in reversed(self._decisions):
            if decision.match:
                judged = None if prices else _outcome(provider, decision)
            elif prices is None and (recorded := _outcome(provider, decision)):
                judged = recorded
            else:
                listed_asks = by_model.get(decision.model, [])
                left -= len(listed_asks)
                if left < 0:
                    return
                former = decision.number < self._restored
                all_judged = (_judge(listed_ask, decision, prices, former=former) for listed_ask in listed_asks)
                judged = max(filter(None, all_judged), default=None)
            if judged is not None:
                stage = "match" if decision.match else "shortlist"
                own = None if prices else decision.scores.get(provider)
                best = decision.scores.get(decision.chosen[0]) if own and decision.chosen else None
                scores = (None if terms is None else terms.to_json() for terms in (own, best))
                yield Verdict(decision.at, decision.model, stage, *judged, *scores)


def _outcome(provider: Address, decision: Decision) -> tuple[bool, str] | None:
    """Returns what a decision recorded of a provider, or None."""
    if provider in decision.chosen:
        if decision.match:
            return True, "got the job"
        return True, f"offered to the client, place {decision.chosen.index(provider) + 1} of {len(decision.chosen)}"
    reason = decision.rejected.get(provider)
    return None if reason is None else (False, reason)


def _judge(listed_ask: ListedAsk, decision: Decision, prices: Prices | None, *, former: bool) -> tuple[bool, str] | None:
    """Returns what a shortlist's demand means for an ask that a provider has now. `former`: it is not known whether a slot was
    free then. Returns None for other prices if it is not known what they would have meant, as before the node connected.
    """
    ask, was_free = _repriced(listed_ask.message, prices), listed_ask.slot_group.was_free(decision.number)
    if decision.demand is None or (was_free is None and not former):
        return None if prices else (False, _NOT_LISTED)
    integrity = 100 * listed_ask.integrity / INTEGRITY_STEPS
    facts = Facts(decision.at, listed_ask.node.stake, None if was_free is None else int(was_free), None, integrity)
    reason = decision.demand.objection(ask, facts)
    strict = decision.demand.strict if decision.declared else None
    if reason is None and strict is not None and strict.spec_objection(ask) is not None:
        reason = Reason.UNDECLARED
    if reason is not None and not (reason is Reason.BUSY and decision.waits):
        return False, reason.value
    price = price_of(ask, decision.shape)
    if prices is None:
        cheaper = decision.highest_price is not None
        return (
            False,
            "cheaper or more reliable providers filled the shortlist" if cheaper else "its ask was not listed at that time",
        )
    if decision.highest_price is None or price < decision.highest_price:
        return True, "would have been offered to the client at this price"
    return False, "cheaper or more reliable providers would have filled the shortlist"


def _repriced(ask: Ask, prices: Prices | None) -> Ask:
    input_price, output_price = prices or (None, None)
    return replace(
        ask,
        input_price=ask.input_price if input_price is None else input_price,
        output_price=ask.output_price if output_price is None else output_price,
    )


def _slim(demand: Demand) -> Demand:
    """Returns a demand that is small enough to keep, without long lists of providers, and without its payer."""
    if demand.payer is not None:
        demand = replace(demand, payer=STRANGER)
    if len(demand.pin) + len(demand.exclude) <= _MAX_KEPT_ADDRESSES:
        return demand
    pin, exclude = (frozenset(sorted(names)[:_MAX_KEPT_ADDRESSES]) for names in (demand.pin, demand.exclude))
    return replace(demand, pin=pin, exclude=exclude, prefer=())
