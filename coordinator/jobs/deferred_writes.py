"""Deferred writes: the ends of jobs and the providers' reputation, written again until the store accepts them."""

from __future__ import annotations

from coordinator.domain.reputation import Reputation
from coordinator.ports import JobRecord, JobStore
from tallystick.protocol.errors import Unavailable
from tallystick.protocol.types import JobId


class DeferredWrites:
    """Writes to the store whose failure must not end a job. `retry` is called once a second."""

    def __init__(self, store: JobStore, reputation: Reputation) -> None:
        self._store, self._reputation = store, reputation
        self._unsaved: dict[JobId, JobRecord] = {}

    @property
    def pending(self) -> bool:
        """Whether the end of a job could not be stored yet."""
        return bool(self._unsaved)

    def unsaved(self, job: JobId) -> JobRecord | None:
        """Returns the end of a job that could not be stored yet, or None."""
        return self._unsaved.get(job)

    def save_end(self, record: JobRecord) -> None:
        """Stores the end of a job, now or as soon as the store accepts it."""
        try:
            self._store.enqueue_job(record)
        except Unavailable:
            self._unsaved[record.job] = record

    def retry(self) -> None:
        """Stores what could not be stored before, and the reputations that changed."""
        unsaved, self._unsaved = self._unsaved, {}
        for record in unsaved.values():
            self.save_end(record)
        self.save_reputations()

    def save_reputations(self) -> None:
        """Stores the reputations that changed, now or at the next call."""
        changed = self._reputation.take_changed()
        try:
            if changed:
                self._store.enqueue_provider_records(changed)
        except Unavailable:
            self._reputation.mark_unsaved(changed)
