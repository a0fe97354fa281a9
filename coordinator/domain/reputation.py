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


@dataclass(frozen=True, slots=True)
class RecordChange:
    """What some jobs change in a record: its good and bad jobs fade by the factor `fade`, and then these are added.

    Several processes may record jobs of one provider, each by changes: a record with all of them, in any order, lost none.
    """

    fade: float = 1.0
    good: float = 0.0
    bad: float = 0.0
    jobs: int = 0

    def after(self, outcome: Outcome) -> RecordChange:
        """Returns the change with one more job."""
        added = ProviderRecord(self.good, self.bad, self.jobs).after(outcome)
        fade = self.fade if outcome in _NEUTRAL_OUTCOMES else DECAY * self.fade
        return RecordChange(fade, added.good, added.bad, added.jobs)

    def then(self, later: RecordChange) -> RecordChange:
        """Returns this change and a later one together."""
        good, bad = later.fade * self.good + later.good, later.fade * self.bad + later.bad
        return RecordChange(self.fade * later.fade, good, bad, self.jobs + later.jobs)

    def of(self, record: ProviderRecord) -> ProviderRecord:
        """Returns the record with this change."""
        good, bad = self.fade * record.good + self.good, self.fade * record.bad + self.bad
        return ProviderRecord(good, bad, record.jobs + self.jobs)


UNCHANGED = RecordChange()
UNKNOWN_PROVIDER = ProviderRecord()
_UNKNOWN_SCORE = UNKNOWN_PROVIDER.score


def _ignore(_provider: Address) -> None:
    pass


@dataclass(slots=True)
class Reputation:
    """The records of all providers that were given jobs. `on_change` is called with each provider whose score changed."""

    on_change: Callable[[Address], None] = _ignore
    _records: OrderedDict[Address, ProviderRecord] = field(default_factory=OrderedDict)
    _changed: dict[Address, RecordChange] = field(default_factory=dict)
    """What changed since `take_changed` or `take_changes`."""

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
        self._changed[provider] = self._changed.get(provider, UNCHANGED).after(outcome)

    def restore(self, records: Mapping[Address, ProviderRecord]) -> None:
        """Adds the records that a former process stored."""
        for provider, record in records.items():
            self._put(provider, record)

    def take_changed(self) -> dict[Address, ProviderRecord]:
        """Returns the records that changed since the last call, or that `mark_unsaved` named."""
        return {provider: self._records[provider] for provider in self.take_changes() if provider in self._records}

    def mark_unsaved(self, providers: Iterable[Address]) -> None:
        """Notes that the records of these providers could not be stored."""
        for provider in providers:
            self._changed.setdefault(provider, UNCHANGED)

    # Beside other processes that record jobs of the same providers

    def take_changes(self) -> dict[Address, RecordChange]:
        """Returns what changed since the last call."""
        changed, self._changed = self._changed, {}
        return changed

    def put_back(self, changes: Mapping[Address, RecordChange]) -> None:
        """Takes back changes that could not be stored."""
        for provider, change in changes.items():
            self._changed[provider] = change.then(self._changed.get(provider, UNCHANGED))

    def adopt(self, records: Mapping[Address, ProviderRecord]) -> None:
        """Takes stored records, which have the jobs of other processes too, and adds what is not stored yet."""
        for provider, record in records.items():
            self._put(provider, self._changed.get(provider, UNCHANGED).of(record))

    def _put(self, provider: Address, record: ProviderRecord) -> None:
        self._records[provider] = record
        self._records.move_to_end(provider)
        self.on_change(provider)
        if len(self._records) > MAX_REMEMBERED:
            self._records.popitem(last=False)
