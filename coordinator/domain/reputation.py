"""Reputation of providers, from how their jobs ended. Only what was the provider's doing counts. Pure.

A score is the mean of a Beta posterior: (1 + good) / (4 + good + bad). So a newcomer starts at 25 %, stands above 90 % after 27
good jobs, and one that always fails goes to 0. Old jobs fade: each new one that counts takes what came before down, to a half
after 500. A provider that pays itself for jobs can raise its own score; what a score then earns is bounded by the prices that
clients accept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tallystick.protocol.messages import Outcome
from tallystick.protocol.types import Address

PRIOR_GOOD, PRIOR_BAD = 1.0, 3.0
DECAY = 0.5 ** (1 / 500)
NEWCOMER_JOBS = 10
"""A provider is a newcomer until so many jobs were given to it, however they ended."""
MAX_REMEMBERED = 100_000
"""Providers; those whose last job is the longest ago are forgotten first."""

_BLAMED = {Outcome.PROVIDER_ERROR, Outcome.TIMED_OUT}
_IGNORED = {Outcome.UPSTREAM_ERROR, Outcome.CLIENT_CANCELLED, Outcome.REFUSED}


@dataclass(frozen=True, slots=True)
class ProviderRecord:
    """What a provider is known for: good and bad jobs, faded, and how many were given to it at all."""

    good: float = 0.0
    bad: float = 0.0
    jobs: int = 0

    @property
    def score(self) -> float:
        """From 0 (fails always) to 1 (never)."""
        return (PRIOR_GOOD + self.good) / (PRIOR_GOOD + PRIOR_BAD + self.good + self.bad)

    def after(self, outcome: Outcome) -> ProviderRecord:
        """The record with one more job."""
        if outcome in _IGNORED:
            return ProviderRecord(self.good, self.bad, self.jobs + 1)
        bad = outcome in _BLAMED
        return ProviderRecord(DECAY * self.good + (not bad), DECAY * self.bad + bad, self.jobs + 1)


UNKNOWN_PROVIDER = ProviderRecord()


@dataclass(slots=True)
class Reputation:
    """The records of all providers that were given jobs."""

    _records: OrderedDict[Address, ProviderRecord] = field(default_factory=OrderedDict)
    _changed: set[Address] = field(default_factory=set)

    def score(self, provider: Address) -> float:
        """The provider's score, from 0 to 1; 0.25 if nothing is known of it."""
        return self._records.get(provider, UNKNOWN_PROVIDER).score

    def newcomer(self, provider: Address) -> bool:
        """Whether too little is known of a provider to judge it."""
        return self._records.get(provider, UNKNOWN_PROVIDER).jobs < NEWCOMER_JOBS

    def record(self, provider: Address, outcome: Outcome) -> None:
        """Counts the end of a job."""
        self._keep(provider, self._records.get(provider, UNKNOWN_PROVIDER).after(outcome))
        self._changed.add(provider)

    def restore(self, records: Mapping[Address, ProviderRecord]) -> None:
        """Takes up what a former process knew."""
        for provider, record in records.items():
            self._keep(provider, record)

    def changed(self) -> dict[Address, ProviderRecord]:
        """The records that changed since this was last asked, or was taken back by `unsaved`."""
        changed, self._changed = self._changed, set()
        return {provider: self._records[provider] for provider in changed if provider in self._records}

    def unsaved(self, providers: Iterable[Address]) -> None:
        """These records could not be stored."""
        self._changed.update(providers)

    def _keep(self, provider: Address, record: ProviderRecord) -> None:
        self._records[provider] = record
        self._records.move_to_end(provider)
        if len(self._records) > MAX_REMEMBERED:
            self._records.popitem(last=False)
