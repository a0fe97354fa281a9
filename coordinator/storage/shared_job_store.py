"""Stored jobs of one replica among several: it knows the jobs that it runs, and asks the database about all others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

from sqlalchemy import Connection

from coordinator.domain.integrity_records import IntegrityRecord, ProductKey
from coordinator.domain.reputation import ProviderRecord, RecordChange
from coordinator.domain.speeds import Key, SpeedRecord
from coordinator.jobs.report_store import ReportDraft, StoredReport
from coordinator.jobs.shared_store import MakeHead, MakeLeaf
from coordinator.ports import JobRecord, LogRow
from coordinator.storage.job_codec import JobDoc, dump_job
from coordinator.storage.job_store import SqlJobStore, StoredJob
from coordinator.storage.provider_records import change_records
from coordinator.storage.recovery import Recovery
from coordinator.storage.report_store import integrity_since, log_report
from coordinator.storage.shared_log import SharedLog
from coordinator.storage.shared_rows import JobElsewhere, SharedJobRows
from tallystick.protocol.eip712 import Signed, Verified
from tallystick.protocol.errors import Code, Fault, Refusal, Unavailable
from tallystick.protocol.messages import LogHead, Receipt
from tallystick.protocol.types import Address, Amount, JobId
from tallystick.runtime.storage import Database


class SharedJobStore(SqlJobStore):
    """Implements SharedStore beside what SqlJobStore does. `log_database`: for the transactions of the match log alone."""

    def __init__(self, database: Database, log_database: Database, replica: str) -> None:
        self.shared_rows = SharedJobRows(replica)
        super().__init__(database, rows=self.shared_rows)
        self.recovery = Recovery(database, self.shared_rows)
        self._log = SharedLog(log_database, self.shared_rows)
        self._placing: dict[JobId, asyncio.Event] = {}
        """Jobs whose next attempt is being stored: receipts of the former ones wait for that."""

    async def close(self) -> None:
        """See SqlJobStore."""
        await self._log.close()
        await super().close()

    async def place(self, record: JobRecord, at: int, make: MakeLeaf) -> LogRow:
        """See SharedStore."""
        job = self._jobs.get(record.job)
        if job is None:
            return await self._place(StoredJob(record), record, at, make)
        if job.entry is not None:
            with contextlib.suppress(Unavailable):
                await job.entry.done
        self._placing[record.job] = placed = asyncio.Event()
        try:
            return await self._place(job, record, at, make)
        finally:
            del self._placing[record.job]
            placed.set()

    async def _place(self, job: StoredJob, record: JobRecord, at: int, make: MakeLeaf) -> LogRow:
        receipts = dict(job.receipts)
        doc = JobDoc(record, receipts), dump_job(record, receipts, job.packed)
        appended = await self._log.append(at, make, doc)
        if appended is None and len(record.attempts) == 1:
            text = f"job {record.job.hex()} was placed before, here or at another replica; GET /v1/jobs/ID shows its state"
            raise Refusal(Code.ORDER_REPLAYED, text)
        if appended is None:
            text = f"job {record.job.hex()} was ended by another replica, which did not see this one beat"
            raise Unavailable(Code.COORDINATOR_UNAVAILABLE, text, fault=Fault.COORDINATOR)
        job.record = record
        if job.row:
            self._stale.append(job.row)
        job.row = appended.open_row
        self._jobs[record.job] = job
        return appended.row

    async def put_receipt(self, job_id: JobId, receipt: Verified[Receipt], total: Amount, record: JobRecord | None) -> None:
        """See ports.JobStore. Raises Unavailable also for a job that another replica runs: that one checks the receipt."""
        if placing := self._placing.get(job_id):
            await placing.wait()
        try:
            await super().put_receipt(job_id, receipt, total, record)
        except JobElsewhere as error:
            raise Unavailable(Code.COORDINATOR_UNAVAILABLE, f"{error}; send it there, or again when the job has ended") from error

    async def change_records(
        self, changes: Mapping[Address, RecordChange], speeds: Mapping[Key, SpeedRecord]
    ) -> Mapping[Address, ProviderRecord]:
        """See SharedStore."""
        return await self._log.run(lambda connection: change_records(connection, changes, speeds))

    async def is_placed(self, job: JobId) -> bool:
        """See SharedStore."""
        return job in self._jobs or await self._db.read(lambda connection: self.shared_rows.is_placed(connection, job))

    async def end_lost(self, job: JobId, replica: str, *, cancelled: bool = False) -> bool:
        """See SharedStore."""
        return job not in self._jobs and await self.recovery.end_job(job, replica, cancelled=cancelled)

    # The match log

    async def append(self, at: int, make: MakeLeaf) -> LogRow:
        """See SharedStore."""
        appended = await self._log.append(at, make)
        if appended is None:
            raise RuntimeError("a leaf without a job was not appended")
        return appended.row

    async def sign_head(self, make: MakeHead) -> Signed[LogHead] | None:
        """See SharedStore."""
        return await self._log.sign_head(make)

    async def log_state(self) -> tuple[Signed[LogHead] | None, int]:
        """See SharedStore."""
        return await self._log.state()

    # Reports of audits

    async def log_report(self, draft: ReportDraft, at: int, keep_seconds: int) -> tuple[StoredReport, bool]:
        """See SharedStore."""

        def work(connection: Connection, at: int, number: int) -> tuple[tuple[StoredReport, bool], bytes | None]:
            report, leaf = log_report(connection, draft, at, number, since=at - keep_seconds)
            return (report, leaf is not None), None if leaf is None else leaf.dumps()

        return await self._log.decide(at, work)

    async def integrity_since(self, leaf: int) -> list[tuple[ProductKey, IntegrityRecord]]:
        """See SharedStore."""
        return await self._db.read(lambda connection: integrity_since(connection, leaf))
