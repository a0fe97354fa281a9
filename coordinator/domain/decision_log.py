"""The decision log: why a provider got work or did not, for its last shortlists and matches. In memory, bounded, pure.

It answers the question "why did I get no work?". It does not record payers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from coordinator.domain.ask_book import AskBook
from tallystick.protocol.criteria import Demand, Reason
from tallystick.protocol.types import Address

MAX_DECISIONS = 2_000
_MAX_REASONS = 32
"""Providers whose reason is kept per decision."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One shortlist, or one match among the orders of a shortlist. `at` is Unix seconds.

    `chosen`: the shortlist, best first, or the provider that got the job. `rejected`: the reason against each other provider.
    """

    at: int
    model: str
    match: bool
    chosen: tuple[Address, ...]
    rejected: Mapping[Address, str]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one decision meant for one provider. `stage`: "shortlist" or "match"; `won`: whether the provider was chosen."""

    at: int
    model: str
    stage: str
    won: bool
    why: str


@dataclass(slots=True)
class DecisionLog:
    """The last MAX_DECISIONS decisions, oldest first."""

    _decisions: deque[Decision] = field(default_factory=lambda: deque(maxlen=MAX_DECISIONS))

    def add_shortlist(
        self, demand: Demand, chosen: Iterable[Address], rejected: Iterable[tuple[Address, Reason]], now: int
    ) -> None:
        """Records a shortlist, empty ones too. A decision that concerned no provider is not kept."""
        reasons = {provider: reason.value for (provider, reason), _ in zip(rejected, range(_MAX_REASONS), strict=False)}
        chosen = tuple(chosen)
        if not chosen and not reasons:
            return
        self._decisions.append(Decision(now, demand.model, match=False, chosen=chosen, rejected=reasons))

    def add_match(self, model: str, chosen: Address | None, rejected: Mapping[Address, str], now: int) -> None:
        """Records which order of a job was chosen; None if none could be."""
        providers = () if chosen is None else (chosen,)
        self._decisions.append(Decision(now, model, match=True, chosen=providers, rejected=rejected))

    def verdicts(self, provider: Address, book: AskBook, limit: int) -> list[Verdict]:
        """Returns the last decisions that named the provider or concerned a model that it offers, newest first."""
        return [verdict for verdict, _ in zip(self._verdicts(provider, book), range(limit), strict=False)]

    def _verdicts(self, provider: Address, book: AskBook) -> Iterator[Verdict]:
        for decision in reversed(self._decisions):
            why = _outcome(provider, decision)
            if why is None and not decision.match and any(book.of_providers(decision.model, [provider])):
                why = (
                    "cheaper or more reliable providers filled the shortlist"
                    if decision.chosen
                    else "its ask was not listed at that time"
                )
            if why is not None:
                stage = "match" if decision.match else "shortlist"
                yield Verdict(decision.at, decision.model, stage, provider in decision.chosen, why)


def _outcome(provider: Address, decision: Decision) -> str | None:
    if provider in decision.chosen:
        if decision.match:
            return "got the job"
        return f"offered to the client, place {decision.chosen.index(provider) + 1} of {len(decision.chosen)}"
    return decision.rejected.get(provider)
