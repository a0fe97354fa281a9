"""Why a provider got work or did not: the last decisions, with the reasons that the predicates gave. In memory, bounded, pure.

It answers "why did I get no work?". Payers are not in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from coordinator.domain.ask_book import AskBook
from tallystick.protocol.demand import Demand, Reason
from tallystick.protocol.types import Address

MAX_REMEMBERED = 2_000
_NAMED = 32
"""Providers whose reason is kept of one decision."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One shortlist, or one match among a shortlist's orders. `won`: who was listed, best first, or who got the job.

    `against`: why others were not. `at` is Unix seconds.
    """

    at: int
    model: str
    match: bool
    won: tuple[Address, ...]
    against: Mapping[Address, str]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one decision meant for one provider. `stage`: "shortlist" or "match"."""

    at: int
    model: str
    stage: str
    won: bool
    why: str


@dataclass(slots=True)
class DecisionLog:
    """The last decisions, oldest first."""

    _kept: deque[Decision] = field(default_factory=lambda: deque(maxlen=MAX_REMEMBERED))

    def listed(self, demand: Demand, won: Iterable[Address], against: Iterable[tuple[Address, Reason]], now: int) -> None:
        """A shortlist was made, or could not be. One that concerned no provider is not kept: it would tell nobody anything."""
        reasons = {provider: reason.value for (provider, reason), _ in zip(against, range(_NAMED), strict=False)}
        won = tuple(won)
        if not won and not reasons:
            return
        self._kept.append(Decision(now, demand.model, match=False, won=won, against=reasons))

    def matched(self, model: str, won: Address | None, against: Mapping[Address, str], now: int) -> None:
        """An order was chosen among those of a job, or none could be."""
        self._kept.append(Decision(now, model, match=True, won=() if won is None else (won,), against=against))

    def why(self, provider: Address, book: AskBook, limit: int) -> list[Verdict]:
        """The last decisions on models that the provider sells, or that named it, newest first."""
        return [verdict for verdict, _ in zip(self._verdicts(provider, book), range(limit), strict=False)]

    def _verdicts(self, provider: Address, book: AskBook) -> Iterator[Verdict]:
        for decision in reversed(self._kept):
            why = _place(provider, decision)
            if why is None and not decision.match and any(book.of_providers(decision.model, [provider])):
                why = (
                    "cheaper or more reliable ones filled the shortlist" if decision.won else "it did not stand in the book then"
                )
            if why is not None:
                stage = "match" if decision.match else "shortlist"
                yield Verdict(decision.at, decision.model, stage, provider in decision.won, why)


def _place(provider: Address, decision: Decision) -> str | None:
    if provider in decision.won:
        if decision.match:
            return "got the job"
        return f"offered to the client, place {decision.won.index(provider) + 1} of {len(decision.won)}"
    return decision.against.get(provider)
