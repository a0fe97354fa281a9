"""Deferred writes: the ends of jobs and the providers' reputation and speeds, written again until the store accepts them."""

from __future__ import annotations

import asyncio

from coordinator.domain.reputation import Reputation
from coordinator.domain.speeds import Speeds
from coordinator.jobs.shared_store import SharedStore
from coordinator.ports import JobRecord, JobStore
from tallystick.protocol.errors import Unavailable
from tallystick.protocol.types import JobId


class DeferredWrites:
    """Writes to the store whose failure must not end a job. `retry` is called once a second."""

    def __init__(self, store: JobStore, reputation: Reputation, speeds: Speeds, shared: SharedStore | None = None) -> None:
        """`shared`: what a replica shares with others, which change the same records; None for a lone coordinator."""
        self._store, self._reputation, self._speeds, self._shared = store, reputation, speeds, shared
        self._changing: asyncio.Task[None] | None = None
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
        if self._shared is not None:
            if self._changing is None or self._changing.done():
                self._changing = asyncio.create_task(self._change(self._shared), name="provider-records")
            return
        records, speeds = self._reputation.take_changed(), self._speeds.take_changed()
        try:
            if records or speeds:
                self._store.enqueue_provider_records(records, speeds)
        except Unavailable:
            self._reputation.mark_unsaved(records)
            self._speeds.mark_unsaved(speeds)

    async def _change(self, shared: SharedStore) -> None:
        """Stores what changed as changes, and takes the records that result: they have the jobs of all replicas."""
        changes, speeds = self._reputation.take_changes(), self._speeds.take_changed()
        if not changes and not speeds:
            return
        try:
            self._reputation.adopt(await shared.change_records(changes, speeds))
        except Unavailable:
            self._reputation.put_back(changes)
            self._speeds.mark_unsaved(speeds)

    async def close(self) -> None:
        """Waits for what is being stored, and stores the rest."""
        for _ in range(2):
            if self._changing is not None:
                await asyncio.wait({self._changing})
            self.save_provider_records()
        if self._changing is not None:
            await asyncio.wait({self._changing})
