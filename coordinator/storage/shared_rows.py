"""The SQL of jobs and receipts that several replicas write on one PostgreSQL. Its functions run in transactions.

`placed_jobs` has a row for each job. Its key is the guard against replays, and whoever writes the job holds the row's lock. An
open job is written by its owner alone: the replica that placed it, or, once that is gone, the one that has the role `recovery`.
An ended job may get receipts from any replica. Its end is replaced only if nobody saw it, and a receipt says what it was.

Locks are taken in one order, jobs before tabs and each by key, so that no two replicas wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from coordinator.ports import JobRecord
from coordinator.storage.job_codec import JobDoc, Receipts, load_job
from coordinator.storage.job_rows import (
    FORGOTTEN_AT_ONCE,
    JobNumbers,
    JobRows,
    JobUnknown,
    JobWrite,
    Known,
    Tab,
    insert_jobs,
    insert_receipts,
    job_row,
    keep_receipts,
    pack_total,
    update_job,
)
from coordinator.storage.replica_form import to_replicas
from coordinator.storage.roles import living
from coordinator.storage.schema import jobs, open_jobs, placed_jobs
from tallystick.protocol.jobs import TERMINAL
from tallystick.protocol.messages import Receipt
from tallystick.protocol.types import Amount, JobId

_LOCK = "SELECT job, owner, number FROM placed_jobs WHERE job = ANY($1::bytea[]) ORDER BY job FOR UPDATE"
_PLACE = """
INSERT INTO placed_jobs (job, owner, placed_at)
SELECT job, $2::text, placed_at FROM unnest($1::bytea[], $3::bigint[]) AS placed(job, placed_at) ORDER BY job
ON CONFLICT DO NOTHING RETURNING job"""
_OPEN = """
INSERT INTO open_jobs (number, job, doc, owner)
SELECT nextval('job_numbers'), job, doc, $3::text FROM unnest($1::bytea[], $2::bytea[]) AS opened(job, doc)
RETURNING job, number"""
_NUMBERS = "SELECT nextval('job_numbers') FROM generate_series(1, $1::bigint)"
_END = """
UPDATE placed_jobs SET number = ended.number FROM unnest($1::bytea[], $2::bigint[]) AS ended(job, number)
WHERE placed_jobs.job = ended.job"""
_TAB = """
INSERT INTO tabs (tab, provider, payer, total, seq, number)
SELECT nextval('job_numbers'), provider, payer, total, seq, number
FROM unnest($1::text[], $2::text[], $3::bytea[], $4::bigint[], $5::bigint[]) AS written(provider, payer, total, seq, number)
ON CONFLICT (provider, payer) DO UPDATE SET
    total = GREATEST(tabs.total, excluded.total), seq = GREATEST(tabs.seq, excluded.seq),
    number = CASE WHEN excluded.seq < tabs.seq THEN tabs.number ELSE excluded.number END
RETURNING provider, payer, tab"""
GONE_SECONDS = 3.0
"""A replica whose last beat is so old is gone."""
_OWNERS = """
SELECT owner, owner NOT IN (SELECT id FROM replicas WHERE beat_at > extract(epoch FROM clock_timestamp()) - $2::float8)
FROM (SELECT DISTINCT owner FROM open_jobs WHERE owner IS NOT NULL AND owner <> $1::text) AS owners"""

_OWNER = """
SELECT NOT EXISTS (SELECT FROM replicas WHERE id = $1::text AND beat_at > extract(epoch FROM clock_timestamp()) - $2::float8)"""


class JobElsewhere(Exception):
    """A receipt of a job that another replica runs."""


class SharedJobNumbers(JobNumbers):
    """None: a replica asks the database for all numbers."""

    def note(self, write: JobWrite) -> None:
        """See JobNumbers."""


class SharedJobRows(JobRows):
    """Writes and reads rows for the replica `owner`."""

    def __init__(self, owner: str) -> None:
        super().__init__(SharedJobNumbers())
        self._owner = owner

    # Writing

    def place(self, connection: Connection, docs: Mapping[JobId, tuple[JobDoc, bytes]]) -> dict[JobId, int]:
        """Stores jobs, each with its newest attempt, before they are dispatched. Returns the numbers of their open rows.

        A job with one attempt is new. Those that were placed before, and those that ended meanwhile, are not among the numbers.
        """
        new = {job: doc.record.created_at for job, (doc, _) in docs.items() if len(doc.record.attempts) == 1}
        taken = _place(connection, new, self._owner)
        again = [job for job in docs if job not in new]
        taken |= {job for job, row in _lock(connection, again).items() if row.owner == self._owner and row.number is None}
        return self._open(connection, {job: data for job, (_, data) in docs.items() if job in taken})

    def _open(self, connection: Connection, docs: Mapping[JobId, bytes]) -> dict[JobId, int]:
        if not docs:
            return {}
        opened = connection.exec_driver_sql(_OPEN, (list(docs), list(docs.values()), self._owner))
        return {JobId(bytes(job)): number for job, number in opened}

    def write(self, connection: Connection, writes: Sequence[JobWrite]) -> None:
        """See JobRows. Of a job that another replica runs, it stores nothing.

        Raises JobUnknown for a receipt alone whose job is not stored, and JobElsewhere for one whose job another replica runs.
        """
        self._write(connection, writes, self._owner)

    def _write(self, connection: Connection, writes: Sequence[JobWrite], owner: str) -> None:
        placed = self._lock_or_place(connection, writes, owner)
        known = self._known(connection, writes, placed, owner)
        opened, ended = dict[JobId, tuple[JobWrite, bytes]](), list[tuple[JobWrite, JobDoc, dict[str, Any]]]()
        receipts = list[tuple[Tab, Receipt, Amount, int]]()
        for write in writes:
            of_job = placed[write.job]
            if of_job.number is None and of_job.owner != owner:
                if write.receipts:
                    raise JobElsewhere(f"job {write.job.hex()} runs at another replica of this coordinator")
                continue
            doc = _merge(write, known.get(write.job), ended=of_job.number is not None)
            row = job_row(doc, write.packed)
            write.ended, write.newest = doc.record.state in TERMINAL, doc.record.finished_at or doc.record.created_at
            if of_job.number is not None:
                write.number = of_job.number
                update_job(connection, of_job.number, row)
                receipts += _new_receipts(doc.receipts, known[write.job].receipts, of_job.number)
            elif write.ended:
                ended.append((write, doc, row))
            else:
                opened[write.job] = write, row["doc"]
        abandoned = [write.job for write, _, _ in ended if not write.whole]
        if abandoned:  # of the rows that a placing left whose answer was lost, nobody knows the numbers
            connection.execute(sa.delete(open_jobs).where(open_jobs.c.owner.is_not(None), open_jobs.c.job.in_(abandoned)))
        for job, number in self._open(connection, {job: data for job, (_, data) in opened.items()}).items():
            opened[job][0].number = number
        receipts += _end(connection, ended)
        _write_receipts(connection, receipts)

    def _lock_or_place(self, connection: Connection, writes: Sequence[JobWrite], owner: str) -> dict[JobId, Row[Any]]:
        """Locks the rows of these jobs, and places those that end before they were. Raises JobUnknown."""
        names = [write.job for write in writes]
        placed = _lock(connection, names)
        missing = {write.job: write.record.created_at for write in writes if write.job not in placed and write.record is not None}
        if missing:
            _place(connection, missing, owner)
            placed |= _lock(connection, list(missing))
        for job in names:
            if job not in placed:
                raise JobUnknown(f"job {job.hex()} is not stored")
        return placed

    @staticmethod
    def _known(
        connection: Connection, writes: Sequence[JobWrite], placed: Mapping[JobId, Row[Any]], owner: str
    ) -> dict[JobId, JobDoc]:
        """Reads what is stored of the jobs that their writer may not know all of."""
        ended = {placed[write.job].number: write.job for write in writes if placed[write.job].number is not None}
        own = [write.job for write in writes if placed[write.job].number is None and placed[write.job].owner == owner]
        partly = set(own) - {write.job for write in writes if write.whole}
        query = sa.select(jobs.c.number, jobs.c.doc).where(jobs.c.number.in_(list(ended)))
        known = {ended[number]: load_job(bytes(doc)) for number, doc in connection.execute(query)} if ended else {}
        return known | (_read_open(connection, list(partly)) if partly else {})

    # Reading

    def load(self, connection: Connection, segment_jobs: int) -> None:  # noqa: ARG002 - JobRows has it
        """Brings the database into the form of replicas."""
        to_replicas(connection)

    def find(self, connection: Connection, job: JobId) -> Known | None:
        """See JobRows."""
        query = sa.select(placed_jobs.c.owner, placed_jobs.c.number, jobs.c.doc)
        query = query.select_from(placed_jobs.outerjoin(jobs, jobs.c.number == placed_jobs.c.number))
        placed = connection.execute(query.where(placed_jobs.c.job == job)).one_or_none()
        if placed is None:
            return None
        if placed.doc is not None:
            return Known(load_job(bytes(placed.doc)), placed.number)
        doc = _read_open(connection, [job]).get(job)
        return None if doc is None else Known(doc, 0, "" if placed.owner == self._owner else placed.owner)

    def is_placed(self, connection: Connection, job: JobId) -> bool:
        """Whether any replica placed this job."""
        return connection.execute(sa.select(placed_jobs.c.job).where(placed_jobs.c.job == job)).first() is not None

    def recent_jobs(self, connection: Connection, since: int) -> tuple[JobId, ...]:  # noqa: ARG002 - JobRows has it
        """See JobRows. The key of `placed_jobs` detects all replays."""
        return ()

    def end_former(self, connection: Connection, end: Mapping[JobId, JobRecord]) -> list[JobWrite]:  # noqa: ARG002 - JobRows has it
        """See JobRows. Open jobs are those of other replicas, which `end_abandoned` ends if they are gone."""
        return []

    # Jobs of replicas that are gone

    def missed_owners(self, connection: Connection) -> dict[str, bool]:
        """Returns the other owners of open jobs whose connection for roles has ended, and whether they have not beaten either."""
        silent = {owner: bool(is_silent) for owner, is_silent in connection.exec_driver_sql(_OWNERS, (self._owner, GONE_SECONDS))}
        alive = living(connection, silent) if silent else set()
        return {owner: is_silent for owner, is_silent in silent.items() if owner not in alive}

    def missed_owner(self, connection: Connection, owner: str) -> bool | None:
        """Whether another replica has not beaten either; None if its connection for roles has not ended."""
        if owner == self._owner or living(connection, [owner]):
            return None
        return bool(connection.exec_driver_sql(_OWNER, (owner, GONE_SECONDS)).scalar_one())

    def end_abandoned(
        self, connection: Connection, owner: str, end: Callable[[JobRecord], JobRecord], only: JobId | None = None
    ) -> int:
        """Ends some of the open jobs of a replica that is gone, and deletes their rows. Returns how many rows there were.

        `only`: ends this job alone.
        """
        query = sa.select(open_jobs.c.number, open_jobs.c.job).where(open_jobs.c.owner == owner).order_by(open_jobs.c.number)
        query = query if only is None else query.where(open_jobs.c.job == only)
        listed = connection.execute(query.limit(FORGOTTEN_AT_ONCE)).all()
        names = {JobId(bytes(job)) for _, job in listed}
        placed = _lock(connection, list(names))
        still_open = [job for job in names if job in placed and placed[job].number is None and placed[job].owner == owner]
        docs = _read_open(connection, still_open) if still_open else {}
        writes = [JobWrite(job, end(doc.record), doc.receipts, whole=True) for job, doc in docs.items()]
        self._write(connection, writes, owner)
        connection.execute(sa.delete(open_jobs).where(open_jobs.c.owner == owner, open_jobs.c.job.in_(list(names))))
        return len(listed)

    # Retention

    def forget_jobs(self, connection: Connection, before: int) -> bool:
        """See JobRows. Jobs are deleted in the order of their ends."""
        query = sa.select(jobs.c.number, jobs.c.job, jobs.c.finished_at, jobs.c.doc).order_by(jobs.c.number)
        listed = connection.execute(query.limit(FORGOTTEN_AT_ONCE)).all()
        old = [row for row in listed if row.finished_at is None or row.finished_at < before]
        if not old:
            return False
        _lock(connection, [JobId(bytes(row.job)) for row in old])
        numbers = [row.number for row in old]
        newest = connection.execute(sa.select(jobs.c.number, jobs.c.doc).where(jobs.c.number.in_(numbers)))
        keep_receipts(connection, [(number, load_job(bytes(doc))) for number, doc in newest])
        connection.execute(sa.delete(jobs).where(jobs.c.number.in_(numbers)))
        connection.execute(
            sa.delete(placed_jobs).where(placed_jobs.c.number.in_(numbers), placed_jobs.c.job.in_([row.job for row in old]))
        )
        return len(old) == FORGOTTEN_AT_ONCE


def _lock(connection: Connection, names: Sequence[JobId]) -> dict[JobId, Row[Any]]:
    if not names:
        return {}
    return {JobId(bytes(row.job)): row for row in connection.exec_driver_sql(_LOCK, (list(names),))}


def _place(connection: Connection, new: Mapping[JobId, int], owner: str) -> set[JobId]:
    """Places jobs, each with its time. Returns those that nobody placed before."""
    if not new:
        return set()
    placed = connection.exec_driver_sql(_PLACE, (list(new), owner, list(new.values())))
    return {JobId(bytes(job)) for job in placed.scalars()}


def _read_open(connection: Connection, names: Sequence[JobId]) -> dict[JobId, JobDoc]:
    """Reads open jobs. Rows of one job may have been written at the same time: attempts and receipts only become more."""
    query = sa.select(open_jobs.c.doc).where(open_jobs.c.owner.is_not(None), open_jobs.c.job.in_(names))
    docs = dict[JobId, JobDoc]()
    for data in connection.execute(query.order_by(open_jobs.c.number)).scalars():
        doc = load_job(bytes(data))
        former = docs.get(doc.record.job)
        if former is not None:
            records = sorted((former.record, doc.record), key=lambda record: len(record.attempts))
            doc = JobDoc(records[-1], dict(doc.receipts) | dict(former.receipts))
        docs[doc.record.job] = doc
    return docs


def _merge(write: JobWrite, known: JobDoc | None, *, ended: bool) -> JobDoc:
    stays = known is not None and (write.record is None or (ended and not known.record.is_corrected_by(write.record)))
    record: JobRecord | None = known.record if known is not None and stays else write.record
    if record is None:
        raise JobUnknown(f"job {write.job.hex()} is not stored")
    return JobDoc(record, dict(write.receipts) | ({} if known is None else dict(known.receipts)))


def _new_receipts(receipts: Receipts, old: Receipts, number: int) -> Iterable[tuple[Tab, Receipt, Amount, int]]:
    for provider, (receipt, total) in receipts.items():
        if provider not in old:
            yield (receipt.message.payer, provider), receipt.message, total, number


def _end(
    connection: Connection, ended: Sequence[tuple[JobWrite, JobDoc, dict[str, Any]]]
) -> list[tuple[Tab, Receipt, Amount, int]]:
    """Stores ended jobs. Returns their receipts."""
    if not ended:
        return []
    numbers = list(connection.exec_driver_sql(_NUMBERS, (len(ended),)).scalars())
    receipts = list[tuple[Tab, Receipt, Amount, int]]()
    for (write, doc, _), number in zip(ended, numbers, strict=True):
        write.number = number
        receipts += _new_receipts(doc.receipts, {}, number)
    insert_jobs(connection, [row | {"number": write.number} for write, _, row in ended])
    connection.exec_driver_sql(_END, ([write.job for write, _, _ in ended], numbers))
    return receipts


def _write_receipts(connection: Connection, receipts: Iterable[tuple[Tab, Receipt, Amount, int]]) -> None:
    by_tab: dict[Tab, list[tuple[int, bytes, int]]] = {}
    for tab, receipt, total, number in receipts:
        by_tab.setdefault(tab, []).append((receipt.seq, pack_total(total), number))
    if not by_tab:
        return
    rows = list[tuple[str, str, bytes, int, int]]()
    for (payer, provider), entries in sorted(by_tab.items(), key=lambda entry: (entry[0][1], entry[0][0])):
        seq, _, number = max(entries)
        rows.append((provider, payer, max(total for _, total, _ in entries), seq, number))
    written = connection.exec_driver_sql(_TAB, tuple(map(list, zip(*rows, strict=True))))
    identifiers = {(payer, provider): tab for provider, payer, tab in written}
    insert_receipts(
        connection,
        [
            {"tab": identifiers[tab], "total": total, "seq": seq, "number": number}
            for tab, entries in by_tab.items()
            for seq, total, number in entries
        ],
    )
