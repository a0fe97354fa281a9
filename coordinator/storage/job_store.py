"""Stored jobs and receipts, on the side of the event loop: it knows the jobs that run, so the writer never looks for them.

A job is stored when it begins, when a further attempt begins, and once with its receipt when it ends. Changes of a job that wait
for the same transaction are one write: a short job may be stored by its end alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import structlog

from coordinator.ports import AttemptRecord, JobRecord, KnownJob, StoredState
from coordinator.storage.job_codec import Packed
from coordinator.storage.job_rows import (
    JobNumbers,
    JobRows,
    JobUnknown,
    JobWrite,
    read_last_receipts,
    read_receipts_of,
    totals_of_tabs,
)
from coordinator.storage.provider_records import read_records
from tallystick.protocol.eip712 import Signed, Verified
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.jobs import TERMINAL, State
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Receipt
from tallystick.protocol.types import Address, Amount, JobId
from tallystick.runtime.group_writer import Entry, GroupWriter
from tallystick.runtime.storage import Database

log = structlog.get_logger()
SEGMENT_JOBS = 4_096
"""Ended jobs whose ids are in memory before they are written in a segment of their own."""
STALE_ROWS = 256
"""Rows of open jobs that one write deletes."""
MAX_UNWRITTEN = 4_096
"""Jobs whose write failed and is to be repeated; at more, no job begins."""


@dataclass(slots=True, eq=False)
class StoredJob:
    """A job that runs, or whose end is not committed yet."""

    record: JobRecord
    receipts: dict[Address, tuple[Signed[Receipt], Amount]] = field(default_factory=dict)
    entry: Entry | None = None
    """Its newest write, until that is committed."""
    packed: Packed = field(default_factory=dict)
    row: int = 0
    """Its row among the open jobs; 0 without any."""

    @property
    def ended(self) -> bool:
        """Whether the job has ended."""
        return self.record.state in TERMINAL


class SqlJobStore:
    """Implements JobStore but for the providers' records, and TabStore. `segment_jobs`: see SEGMENT_JOBS."""

    def __init__(self, database: Database, segment_jobs: int = SEGMENT_JOBS, rows: JobRows | None = None) -> None:
        """`rows`: the SQL of jobs; by default that of a lone coordinator."""
        self._db, self._segment_jobs = database, segment_jobs
        self._rows = rows or JobRows(JobNumbers())
        self._numbers = self._rows.numbers
        self._jobs: dict[JobId, StoredJob] = {}
        self._late: dict[JobId, Entry] = {}
        """Writes of jobs that do not run here, until they are committed."""
        self._stale: list[int] = []
        self._failed = set[JobId]()
        """Jobs whose newest write failed, until one succeeds."""
        self._again = list[StoredJob]()
        """Those of them that are to be queued again."""
        self._segment_due = True
        self.writer = GroupWriter(database, lambda: len(self._jobs))

    async def start(self) -> None:
        """Loads what the next write needs. Raises Unavailable."""
        await self._db.write(lambda connection: self._rows.load(connection, self._segment_jobs), synced=False)

    async def close(self) -> None:
        """Commits what is queued."""
        self._write_again()
        await self.writer.close()

    # Writing

    def enqueue_job(self, record: JobRecord) -> None:
        """See ports.JobStore."""
        self._write_again()
        job = self._jobs.get(record.job)
        if job is None and record.state in TERMINAL:
            self._add_late(record.job, record, {}, waited=False)
            return
        if job is None:
            if len(self._failed) >= MAX_UNWRITTEN:
                raise Unavailable(Code.DATABASE_UNAVAILABLE, "the database does not take the ends of jobs")
            job = StoredJob(record)
        elif not job.ended:
            job.record = record
        self._add(job, waited=False)
        self._jobs[record.job] = job

    async def put_receipt(self, job_id: JobId, receipt: Verified[Receipt], total: Amount, record: JobRecord | None) -> None:
        """See ports.JobStore."""
        self._write_again()
        provider, stored = receipt.message.provider, (Signed(receipt.message, receipt.signature), total)
        job = self._jobs.get(job_id)
        if job is None:
            entry = self._add_late(job_id, record, {provider: stored}, waited=True)
        else:
            if record is not None and not job.ended:
                job.record = record
            job.receipts.setdefault(provider, stored)
            entry = self._add(job, waited=True)
        try:
            await entry.done
        except JobUnknown as error:  # it was deleted since its receipt was checked
            raise Unavailable(Code.DATABASE_UNAVAILABLE, f"{error} any more; send the receipt again") from error

    def _add(self, job: StoredJob, *, waited: bool) -> Entry:
        """Queues a job that runs, or changes its write that is queued already. Raises Unavailable."""
        entry = job.entry
        if entry is not None and not entry.taken:
            entry.item.record, entry.item.receipts = job.record, dict(job.receipts)
            if waited:
                self.writer.hurry()
            return entry
        ending = entry is not None and entry.item.record.state in TERMINAL
        write = JobWrite(job.record.job, job.record, dict(job.receipts), whole=not ending, packed=job.packed)
        entry = self.writer.add(self._rows.write, write, waited=waited, brief=True)
        job.entry = entry
        entry.then(lambda error: self._written(job, entry, error))
        return entry

    def _add_late(
        self, job_id: JobId, record: JobRecord | None, receipts: dict[Address, tuple[Signed[Receipt], Amount]], *, waited: bool
    ) -> Entry:
        entry = self._late.get(job_id)
        if entry is not None and not entry.taken:
            write: JobWrite = entry.item
            write.record = write.record or record
            write.receipts = receipts | dict(write.receipts)
            if waited:
                self.writer.hurry()
            return entry
        late = JobWrite(job_id, record, receipts, whole=False)
        entry = self.writer.add(self._rows.write, late, waited=waited, brief=True)
        self._late[job_id] = entry
        entry.then(lambda error: self._late_written(entry, error))
        return entry

    def _written(self, job: StoredJob, entry: Entry, error: Exception | None) -> None:
        """Takes note of a committed write, and repeats one that failed with the next write."""
        newest, write = job.entry is entry, entry.item
        if newest:
            job.entry = None
        if error is None:
            self._numbers.note(write)
            self._failed.discard(write.job)
            if job.row:
                self._stale.append(job.row)
            job.row = 0 if write.ended else write.number
            if newest and job.ended and self._jobs.get(write.job) is job:
                del self._jobs[write.job]
            self._tidy()
        elif newest:
            if isinstance(error, Unavailable):
                self._failed.add(write.job)
                self._again.append(job)
            else:  # the group writer logged why; no repetition would help
                self._jobs.pop(write.job, None)
                self._failed.discard(write.job)

    def _late_written(self, entry: Entry, error: Exception | None) -> None:
        if self._late.get(entry.item.job) is entry:
            del self._late[entry.item.job]
        if error is None:
            self._numbers.note(entry.item)
            self._tidy()

    def _write_again(self) -> None:
        while self._again:
            job = self._again[-1]
            if job.entry is None:
                self._add(job, waited=False)
            self._again.pop()

    def _tidy(self) -> None:
        """Queues the deletion of stale rows, and the next segment, once there are enough of them."""
        try:
            if len(self._stale) >= STALE_ROWS:
                self.writer.add(self._rows.delete_open, tuple(self._stale), waited=False)
                self._stale.clear()
            if self._segment_due and len(self._numbers.recent) >= self._segment_jobs:
                segment = dict(self._numbers.recent)
                entry = self.writer.add(self._rows.write_segment, segment, waited=False)
                self._segment_due = False
                entry.then(lambda error: self._segment_written(segment, error))
        except Unavailable:
            return  # tried again with the next write

    def _segment_written(self, segment: dict[JobId, tuple[int, int]], error: Exception | None) -> None:
        self._segment_due = True
        if error is None:
            recent = self._numbers.recent
            for job, entry in segment.items():
                if recent.get(job) == entry:
                    del recent[job]
            self._numbers.last_segment = max(number for number, _ in segment.values())

    # Reading

    async def job(self, job_id: JobId) -> KnownJob | None:
        """See ports.JobStore. It sees all earlier writes."""
        await self.writer.flush()
        job = self._jobs.get(job_id)
        if job is not None:
            return KnownJob(job.record, {provider: receipt for provider, (receipt, _) in job.receipts.items()})
        known = await self._db.read(lambda connection: self._rows.find(connection, job_id))
        if known is None:
            return None
        receipts = {provider: receipt for provider, (receipt, _) in known.doc.receipts.items()}
        return KnownJob(known.doc.record, receipts, known.replica)

    async def load_state(self, now: int, since: int) -> StoredState:
        """See ports.JobStore."""
        end = {job: ended(doc.record, now) for job, doc in self._numbers.former.items()}
        writes = await self._db.write(lambda connection: self._rows.end_former(connection, end))
        self._numbers.former = {}
        for write in writes:
            self._numbers.note(write)

        recent, totals, (records, speeds) = await self._db.read(
            lambda connection: (self._rows.recent_jobs(connection, since), totals_of_tabs(connection), read_records(connection))
        )
        return StoredState(recent, totals, records, speeds, follows=bool(recent or totals))

    async def last_receipts(self, provider: Address, after: str, limit: int) -> list[LateReceipt]:
        """See ports.TabStore. It sees all earlier writes."""
        await self.writer.flush()
        stored = await self._db.read(lambda connection: read_last_receipts(connection, provider, after, limit))
        last = {late.receipt.message.payer: late for late in stored}
        whole = len(stored) == limit
        for late, _ in self._running_receipts(provider):
            payer = late.receipt.message.payer
            if payer > after and not (whole and payer > stored[-1].receipt.message.payer):
                known = last.get(payer)
                if known is None or known.receipt.message.seq < late.receipt.message.seq:
                    last[payer] = late
        return [last[payer] for payer in sorted(last)][:limit]

    async def receipts_of(self, payer: Address, provider: Address, limit: int) -> list[LateReceipt]:
        """See ports.TabStore. It sees all earlier writes."""
        await self.writer.flush()
        stored = await self._db.read(lambda connection: read_receipts_of(connection, payer, provider, limit))
        running = [entry for entry in self._running_receipts(provider) if entry[0].receipt.message.payer == payer]
        ranked = sorted([*stored, *running], key=lambda entry: (entry[1], entry[0].receipt.message.seq), reverse=True)
        return [late for late, _ in ranked[:limit]]

    def _running_receipts(self, provider: Address) -> Iterator[tuple[LateReceipt, Amount]]:
        """Yields the receipts of a provider for jobs that go on with another one, each with the total of its tab."""
        for job in self._jobs.values():
            attempt = job.record.attempt_of(provider) if provider in job.receipts else None
            if attempt is not None and not job.ended:
                receipt, total = job.receipts[provider]
                yield LateReceipt(receipt, attempt.order, attempt.terms), total

    # Retention

    async def forget_jobs(self, before: int) -> bool:
        """See ports.JobStore."""
        return await self._db.write(lambda connection: self._rows.forget_jobs(connection, before), synced=False)


def ended(record: JobRecord, now: int, why: str = "the coordinator was restarted") -> JobRecord:
    """Returns the end of a job that a process left open which is gone."""
    return replace(record, state=State.FAILED, finished_at=now, attempts=tuple(_close(record.attempts, why)))


def _close(attempts: Iterable[AttemptRecord], why: str) -> Iterator[AttemptRecord]:
    for attempt in attempts:
        yield attempt if attempt.state in TERMINAL else replace(attempt, state=State.FAILED, reason=why, unseen=True)
