"""Reputation of providers, from how their jobs ended. Only what a provider is responsible for counts. Pure.

A score is the mean of a Beta posterior: (1 + good) / (4 + good + bad). So a newcomer starts at 25 %, rises above 90 % after 27
good jobs, and falls towards 0 if it always fails. Old jobs fade: every job that counts reduces the weight of earlier jobs, to a
half after 500. A provider that pays itself for jobs can raise its own score. What a score then earns is bounded by the prices
that clients accept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from tallystick.protocol.messages import Outcome
from tallystick.protocol.types import Address

PRIOR_GOOD, PRIOR_BAD = 1.0, 3.0
DECAY = 0.5 ** (1 / 500)
NEWCOMER_JOBS = 10
"""A provider is a newcomer until it was given this many jobs, however they ended."""
MAX_REMEMBERED = 100_000
"""Providers. Those whose last job is the longest ago are forgotten first."""

_BAD_OUTCOMES = {Outcome.PROVIDER_ERROR, Outcome.TIMED_OUT}
_NEUTRAL_OUTCOMES = {Outcome.UPSTREAM_ERROR, Outcome.CLIENT_CANCELLED, Outcome.REFUSED}


@dataclass(frozen=True, slots=True)
class ProviderRecord:
    """The good and bad jobs of a provider, faded, and the number of all jobs that it was given."""

    good: float = 0.0
    bad: float = 0.0
    jobs: int = 0

    @property
    def score(self) -> float:
        """The score, from 0 (always fails) to 1 (never fails)."""
        return (PRIOR_GOOD + self.good) / (PRIOR_GOOD + PRIOR_BAD + self.good + self.bad)

    def after(self, outcome: Outcome) -> ProviderRecord:
        """Returns the record with one more job."""
        if outcome in _NEUTRAL_OUTCOMES:
            return ProviderRecord(self.good, self.bad, self.jobs + 1)
        bad = outcome in _BAD_OUTCOMES
        return ProviderRecord(DECAY * self.good + (not bad), DECAY * self.bad + bad, self.jobs + 1)


UNKNOWN_PROVIDER = ProviderRecord()
_UNKNOWN_SCORE = UNKNOWN_PROVIDER.score


def _ignore(_provider: Address) -> None:
    pass


@dataclass(slots=True)
class Reputation:
    """The records of all providers that were given jobs. `on_change` is called with each provider whose score changed."""

    on_change: Callable[[Address], None] = _ignore
    _records: OrderedDict[Address, ProviderRecord] = field(default_factory=OrderedDict)
    _changed: set[Address] = field(default_factory=set)

    def score(self, provider: Address) -> float:
        """Returns the provider's score, from 0 to 1; 0.25 for an unknown provider."""
        record = self._records.get(provider)
        return _UNKNOWN_SCORE if record is None else record.score

    def newcomer(self, provider: Address) -> bool:
        """Whether the provider had too few jobs to be judged."""
        return self._records.get(provider, UNKNOWN_PROVIDER).jobs < NEWCOMER_JOBS

    def record(self, provider: Address, outcome: Outcome) -> None:
        """Records how a job ended."""
        self._put(provider, self._records.get(provider, UNKNOWN_PROVIDER).after(outcome))
        self._changed.add(provider)

    def restore(self, records: Mapping[Address, ProviderRecord]) -> None:
        """Adds the records that a former process stored."""
        for provider, record in records.items():
            self._put(provider, record)

    def take_changed(self) -> dict[Address, ProviderRecord]:
        """Returns the records that changed since the last call, or that `mark_unsaved` named."""
        changed, self._changed = self._changed, set()
        return {provider: self._records[provider] for provider in changed if provider in self._records}

    def mark_unsaved(self, providers: Iterable[Address]) -> None:
        """Notes that the records of these providers could not be stored."""
        self._changed.update(providers)

    def _put(self, provider: Address, record: ProviderRecord) -> None:
        self._records[provider] = record
        self._records.move_to_end(provider)
        self.on_change(provider)
        if len(self._records) > MAX_REMEMBERED:
            self._records.popitem(last=False)
