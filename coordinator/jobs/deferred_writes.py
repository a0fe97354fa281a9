"""Deferred writes: the ends of jobs and the providers' reputation and speeds, written again until the store accepts them."""

from __future__ import annotations

from coordinator.domain.reputation import Reputation
from coordinator.domain.speeds import Speeds
from coordinator.ports import JobRecord, JobStore
from tallystick.protocol.errors import Unavailable
from tallystick.protocol.types import JobId


class DeferredWrites:
    """Writes to the store whose failure must not end a job. `retry` is called once a second."""

    def __init__(self, store: JobStore, reputation: Reputation, speeds: Speeds) -> None:
        self._store, self._reputation, self._speeds = store, reputation, speeds
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
        """Stores what could not be stored before, and the reputations and speeds that changed."""
        unsaved, self._unsaved = self._unsaved, {}
        for record in unsaved.values():
            self.save_end(record)
        self.save_provider_records()

    def save_provider_records(self) -> None:
        """Stores the reputations and speeds that changed, now or at the next call."""
        records, speeds = self._reputation.take_changed(), self._speeds.take_changed()
        try:
            if records or speeds:
                self._store.enqueue_provider_records(records, speeds)
        except Unavailable:
            self._reputation.mark_unsaved(records)
            self._speeds.mark_unsaved(speeds)
