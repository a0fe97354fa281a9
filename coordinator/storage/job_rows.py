"""The SQL of jobs and receipts. Its functions run in transactions.

| table | what it has |
|---|---|
| `open_jobs` | the newest document of each job that has not ended; rows are appended, and older ones deleted in batches |
| `jobs` | one document for each ended job with its receipts, appended in the order of their ends |
| `job_segments`, `job_index` | the numbers of ended jobs by id, a sorted segment of some thousand jobs at a time |
| `tabs` | the total, the last seq and the last job of each tab |
| `tab_receipts` | the numbers of the jobs whose receipts are of a tab, by total |
| `kept_receipts` | the highest receipts of a tab, once their jobs were deleted |

Job ids are random: an index that grows with each job would write a page of its own for each. So the newest ids are in memory, and
a segment is appended when there are enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from coordinator.ports import JobRecord
from coordinator.storage.job_codec import JobDoc, Packed, Receipts, dump_job, load_job
from coordinator.storage.replica_form import to_lone
from coordinator.storage.schema import job_index, job_segments, jobs, kept_receipts, open_jobs, tab_receipts, tabs
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.jobs import TERMINAL
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Receipt
from tallystick.protocol.types import Address, Amount, JobId
from tallystick.runtime.prepared import Prepared

Tab = tuple[Address, Address]
"""Payer and provider."""
FORGOTTEN_AT_ONCE = 256
"""Jobs that one write deletes."""


_INSERT_OPEN = Prepared(sa.insert(open_jobs), ("number", "job", "doc"))
_INSERT_JOB, _INSERT_RECEIPT = (Prepared(sa.insert(table)) for table in (jobs, tab_receipts))
_UPDATE_TAB = Prepared(
    sa.update(tabs)
    .where(tabs.c.tab == sa.bindparam("own_tab"))
    .values({name: sa.bindparam(name) for name in ("total", "seq", "number")})
)
_TAB = sa.select(tabs.c.tab, tabs.c.total, tabs.c.seq, tabs.c.number).where(
    tabs.c.provider == sa.bindparam("provider"), tabs.c.payer == sa.bindparam("payer")
)


class JobUnknown(Exception):
    """A receipt of a job that is not stored."""


@dataclass(slots=True, eq=False)
class JobWrite:
    """What is to be stored of a job. `record`: its newest state; None leaves the stored one. `whole`: whether `receipts` are all
    that the job has, so nothing is stored that this process does not know.

    `number` is set by the write: of the row in `jobs` or, with `ended` unset, in `open_jobs`. `newest`: when the job ended.
    """

    job: JobId
    record: JobRecord | None
    receipts: Receipts
    whole: bool
    packed: Packed = field(default_factory=dict)
    number: int = 0
    ended: bool = False
    newest: int = 0


@dataclass(slots=True)
class JobNumbers:
    """The numbers of the newest ended jobs, which no segment has yet, each with the time of its end."""

    next_open: int = 1
    next_ended: int = 1
    recent: dict[JobId, tuple[int, int]] = field(default_factory=dict)
    last_segment: int = 0
    """The number of the last job that a segment has."""
    former: dict[JobId, JobDoc] = field(default_factory=dict)
    """Jobs that a former process left open."""

    def note(self, write: JobWrite) -> None:
        """Notes a committed write."""
        if write.ended and write.number > self.last_segment:
            self.recent[write.job] = write.number, write.newest


class JobRows:
    """Writes and reads rows. `numbers` is changed by the writer's thread alone while it counts, otherwise by the event loop."""

    def __init__(self, numbers: JobNumbers) -> None:
        self.numbers = numbers

    # Writing

    def write(self, connection: Connection, writes: Sequence[JobWrite]) -> None:
        """Stores jobs and receipts. A terminal state that somebody saw, and an attempt's first receipt, are never replaced.

        Raises JobUnknown for a receipt alone whose job is not stored.
        """
        opened, ended, receipts = list[dict[str, Any]](), list[dict[str, Any]](), list[tuple[Tab, Receipt, Amount, int]]()
        for write in writes:
            doc, known = self._merge(connection, write)
            row = job_row(doc, write.packed)
            write.ended, write.newest = doc.record.state in TERMINAL, doc.record.finished_at or doc.record.created_at
            if known is not None and known.number:
                write.number = known.number
                update_job(connection, known.number, row)
            elif write.ended:
                write.number, self.numbers.next_ended = self.numbers.next_ended, self.numbers.next_ended + 1
                ended.append(row | {"number": write.number})
            else:
                write.number, self.numbers.next_open = self.numbers.next_open, self.numbers.next_open + 1
                opened.append({"number": write.number, "job": row["job"], "doc": row["doc"]})
            if write.ended:
                old = known.doc.receipts if known is not None and known.number else {}
                receipts += (
                    ((receipt.message.payer, provider), receipt.message, total, write.number)
                    for provider, (receipt, total) in doc.receipts.items()
                    if provider not in old
                )
        if opened:
            _INSERT_OPEN.run(connection, *opened)
        insert_jobs(connection, ended)
        _write_receipts(connection, receipts)

    def _merge(self, connection: Connection, write: JobWrite) -> tuple[JobDoc, Known | None]:
        """Returns what is to be stored of a job now, and what is stored already if this process does not know all of it."""
        if write.whole and write.record is not None:
            return JobDoc(write.record, write.receipts), None
        known = self.find(connection, write.job)
        if known is None:
            if write.record is None:
                raise JobUnknown(f"job {write.job.hex()} is not stored")
            return JobDoc(write.record, write.receipts), None
        record = known.doc.record
        if record.state not in TERMINAL or record.is_corrected_by(write.record):
            record = write.record or record
        return JobDoc(record, dict(write.receipts) | dict(known.doc.receipts)), known

    def write_segment(self, connection: Connection, segments: Sequence[Mapping[JobId, tuple[int, int]]]) -> None:
        """Writes the numbers of jobs by id."""
        for segment in segments:
            numbers = [number for number, _ in segment.values()]
            last, newest = max(numbers), max(at for _, at in segment.values())
            connection.execute(sa.insert(job_segments), {"segment": last, "first": min(numbers), "newest_at": newest})
            rows = [{"segment": last, "job": job, "number": number} for job, (number, _) in sorted(segment.items())]
            connection.execute(sa.insert(job_index), rows)

    @staticmethod
    def delete_open(connection: Connection, batches: Sequence[Sequence[int]]) -> None:
        """Deletes rows of `open_jobs` that newer ones replaced, or whose jobs ended."""
        for numbers in batches:
            connection.execute(sa.delete(open_jobs).where(open_jobs.c.number.in_(numbers)))

    # Reading

    def load(self, connection: Connection, segment_jobs: int) -> None:
        """Loads what the next write needs, and the jobs that a former process left open. `segment_jobs`: a segment's jobs."""
        to_lone(connection, segment_jobs)
        newest, last = (connection.execute(sa.select(sa.func.max(t.c.number))).scalar_one() for t in (open_jobs, jobs))
        segment = connection.execute(sa.select(sa.func.max(job_segments.c.segment))).scalar_one() or 0
        columns = jobs.c
        query = sa.select(columns.job, columns.number, columns.created_at, columns.finished_at).where(columns.number > segment)
        self.numbers.next_open, self.numbers.next_ended = (newest or 0) + 1, max(last or 0, segment) + 1
        self.numbers.last_segment = segment
        self.numbers.recent = {
            JobId(bytes(job)): (number, finished or created) for job, number, created, finished in connection.execute(query)
        }
        docs = (load_job(bytes(doc)) for (doc,) in connection.execute(sa.select(open_jobs.c.doc).order_by(open_jobs.c.number)))
        left = {doc.record.job: doc for doc in docs}
        self.numbers.former = {job: doc for job, doc in left.items() if self._number(connection, job) is None}

    def find(self, connection: Connection, job: JobId) -> Known | None:
        """Returns what is stored of a job; of a job that runs in this process, what is stored may be older than that."""
        number = self._number(connection, job)
        if number is not None:
            doc = connection.execute(sa.select(jobs.c.doc).where(jobs.c.number == number)).scalar_one_or_none()
            if doc is not None:
                return Known(load_job(bytes(doc)), number)
        former = self.numbers.former.get(job)
        return None if former is None else Known(former, 0)

    def _number(self, connection: Connection, job: JobId) -> int | None:
        recent = self.numbers.recent.get(job)
        if recent is not None:
            return recent[0]
        within = sa.and_(job_index.c.segment == job_segments.c.segment, job_index.c.job == job)
        query = sa.select(sa.func.max(job_index.c.number)).select_from(job_segments.join(job_index, within))
        number: int | None = connection.execute(query).scalar_one()
        return number

    def end_former(self, connection: Connection, end: Mapping[JobId, JobRecord]) -> list[JobWrite]:
        """Stores the ends of the jobs that a former process left open."""
        docs = self.numbers.former
        writes = [JobWrite(job, record, docs[job].receipts, whole=True) for job, record in end.items()]
        self.write(connection, writes)
        connection.execute(sa.delete(open_jobs))
        return writes

    def recent_jobs(self, connection: Connection, since: int) -> tuple[JobId, ...]:
        """Returns the jobs that were created at or after `since`, as far as no constraint detects their replays."""
        return jobs_since(connection, since)

    def forget_jobs(self, connection: Connection, before: int) -> bool:
        """See `forget_jobs`."""
        return forget_jobs(connection, before)


@dataclass(frozen=True, slots=True)
class Known:
    """A stored job. `number`: its row in `jobs`, or 0 for one that has not ended. `replica`: another one that runs it."""

    doc: JobDoc
    number: int
    replica: str = ""


def insert_jobs(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends ended jobs."""
    if rows:
        _INSERT_JOB.run(connection, *rows)


def update_job(connection: Connection, number: int, row: Mapping[str, Any]) -> None:
    """Replaces an ended job, which got a receipt."""
    connection.execute(sa.update(jobs).where(jobs.c.number == number), row)


def insert_receipts(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends receipts to their tabs."""
    if rows:
        _INSERT_RECEIPT.run(connection, *rows)


def job_row(doc: JobDoc, packed: Packed) -> dict[str, Any]:
    """Returns the row of a job, without its number."""
    record = doc.record
    return {
        "job": record.job,
        "state": record.state.value,
        "created_at": record.created_at,
        "finished_at": record.finished_at,
        "doc": dump_job(record, doc.receipts, packed),
    }


def pack_total(total: Amount) -> bytes:
    """A total as bytes that are sorted like numbers."""
    return total.to_bytes(12, "big")


def _write_receipts(connection: Connection, receipts: Iterable[tuple[Tab, Receipt, Amount, int]]) -> None:
    by_tab: dict[Tab, list[tuple[int, bytes, int]]] = {}
    for tab, receipt, total, number in receipts:
        by_tab.setdefault(tab, []).append((receipt.seq, pack_total(total), number))
    rows = list[dict[str, Any]]()
    for tab, entries in by_tab.items():
        identifier = _update_tab(connection, tab, max(entries), max(total for _, total, _ in entries))
        rows += ({"tab": identifier, "total": total, "seq": seq, "number": number} for seq, total, number in entries)
    insert_receipts(connection, rows)


def _update_tab(connection: Connection, tab: Tab, newest: tuple[int, bytes, int], total: bytes) -> int:
    payer, provider = tab
    columns, (seq, _, number) = tabs.c, newest
    row = connection.execute(_TAB, {"provider": provider, "payer": payer}).one_or_none()
    if row is None:
        identifier: int = (connection.execute(sa.select(sa.func.max(columns.tab))).scalar_one() or 0) + 1
        values = {"tab": identifier, "payer": payer, "provider": provider, "total": total, "seq": seq, "number": number}
        connection.execute(sa.insert(tabs), values)
        return identifier
    identifier = row.tab
    if seq < row.seq:
        seq, number = row.seq, row.number
    changed = {"own_tab": identifier, "total": max(total, bytes(row.total)), "seq": seq, "number": number}
    _UPDATE_TAB.run(connection, changed)
    return identifier


def jobs_since(connection: Connection, since: int) -> tuple[JobId, ...]:
    """Returns the jobs that were created at or after `since`. A segment that ended before has none of them."""
    first = connection.execute(sa.select(sa.func.min(job_segments.c.first)).where(job_segments.c.newest_at >= since)).scalar_one()
    if first is None:
        first = (connection.execute(sa.select(sa.func.max(job_segments.c.segment))).scalar_one() or 0) + 1
    query = sa.select(jobs.c.job).where(jobs.c.number >= first, jobs.c.created_at >= since).order_by(jobs.c.number)
    return tuple(JobId(bytes(job)) for job in connection.execute(query).scalars())


# Tabs


def totals_of_tabs(connection: Connection) -> dict[Tab, Amount]:
    """Returns the highest total of each tab."""
    query = sa.select(tabs.c.payer, tabs.c.provider, tabs.c.total)
    return {
        (Address(payer), Address(provider)): Amount(int.from_bytes(total, "big"))
        for payer, provider, total in connection.execute(query)
    }


def read_last_receipts(connection: Connection, provider: Address, after: str, limit: int) -> list[LateReceipt]:
    """Returns the last receipt of each of a provider's tabs, by payer, for payers after `after`."""
    mine = sa.and_(tabs.c.provider == provider, tabs.c.payer > after)
    kept = sa.and_(kept_receipts.c.tab == tabs.c.tab, kept_receipts.c.seq == tabs.c.seq)
    source = tabs.outerjoin(jobs, jobs.c.number == tabs.c.number).outerjoin(kept_receipts, kept)
    query = sa.select(sa.func.coalesce(jobs.c.doc, kept_receipts.c.doc)).select_from(source).where(mine)
    docs = connection.execute(query.order_by(tabs.c.payer).limit(limit)).scalars()
    return [_late(provider, load_job(bytes(doc))) for doc in docs if doc is not None]


def read_receipts_of(connection: Connection, payer: Address, provider: Address, limit: int) -> list[tuple[LateReceipt, Amount]]:
    """Returns the receipts of one tab, highest total first, each with the total of its tab."""
    of_tab = sa.select(tabs.c.tab).where(tabs.c.provider == provider, tabs.c.payer == payer)
    tab = connection.execute(of_tab).scalar_one_or_none()
    if tab is None:
        return []
    columns, kept = tab_receipts.c, kept_receipts.c
    stored = sa.select(columns.total, columns.seq, jobs.c.doc).join(jobs, jobs.c.number == columns.number)
    stored = stored.where(columns.tab == tab).order_by(columns.total.desc(), columns.seq.desc()).limit(limit)
    rows = [tuple(row) for row in connection.execute(stored)]
    rows += (tuple(row) for row in connection.execute(sa.select(kept.total, kept.seq, kept.doc).where(kept.tab == tab)))
    rows.sort(key=lambda row: (bytes(row[0]), row[1]), reverse=True)
    return [(_late(provider, load_job(bytes(doc))), Amount(int.from_bytes(total, "big"))) for total, _, doc in rows[:limit]]


def _late(provider: Address, doc: JobDoc) -> LateReceipt:
    attempt = doc.record.attempt_of(provider)
    if attempt is None:
        raise ValueError(f"stored job {doc.record.job.hex()}: no attempt of {provider}")
    return LateReceipt(doc.receipts[provider][0], attempt.order, attempt.terms)


# Retention


def forget_jobs(connection: Connection, before: int) -> bool:
    """Deletes some jobs of the oldest segment if all of it ended before `before`. Returns whether there may be more.

    The receipts with the highest seq and the highest total of each tab are kept.
    """
    columns = job_segments.c
    oldest = connection.execute(sa.select(columns.segment, columns.newest_at).order_by(columns.segment).limit(1)).one_or_none()
    if oldest is None or oldest.newest_at >= before:
        return False
    query = sa.select(jobs.c.number, jobs.c.doc).where(jobs.c.number <= oldest.segment).order_by(jobs.c.number)
    rows = connection.execute(query.limit(FORGOTTEN_AT_ONCE)).all()
    if rows:
        keep_receipts(connection, [(number, load_job(bytes(doc))) for number, doc in rows])
        connection.execute(sa.delete(jobs).where(jobs.c.number <= rows[-1].number))
    if len(rows) < FORGOTTEN_AT_ONCE:
        connection.execute(sa.delete(job_index).where(job_index.c.segment == oldest.segment))
        connection.execute(sa.delete(job_segments).where(columns.segment == oldest.segment))
    return True


def keep_receipts(connection: Connection, docs: Sequence[tuple[int, JobDoc]]) -> None:
    """Deletes the rows of these jobs' receipts, and keeps the highest ones of each tab in `kept_receipts`."""
    by_tab: dict[Tab, list[tuple[Signed[Receipt], Amount, int, JobDoc]]] = {}
    for number, doc in docs:
        for provider, (receipt, total) in doc.receipts.items():
            by_tab.setdefault((receipt.message.payer, provider), []).append((receipt, total, number, doc))
    for (payer, provider), entries in by_tab.items():
        of_tab = sa.select(tabs.c.tab).where(tabs.c.provider == provider, tabs.c.payer == payer)
        tab = connection.execute(of_tab).scalar_one()
        columns = tab_receipts.c
        key = [columns[name] == sa.bindparam(f"own_{name}") for name in ("tab", "total", "seq", "number")]
        old = [
            {"own_tab": tab, "own_total": pack_total(total), "own_seq": receipt.message.seq, "own_number": number}
            for receipt, total, number, _ in entries
        ]
        connection.execute(sa.delete(tab_receipts).where(*key), old)
        kept = kept_receipts.c
        candidates = {
            receipt.message.seq: (pack_total(total), receipt.message.seq, _alone(doc, provider))
            for receipt, total, _, doc in entries
        }
        for row in connection.execute(sa.select(kept.total, kept.seq, kept.doc).where(kept.tab == tab)):
            candidates[row.seq] = max(candidates.get(row.seq, (b"", 0, b"")), (bytes(row.total), row.seq, bytes(row.doc)))
        highest = max(candidates.values()), max(candidates.values(), key=lambda entry: entry[1])
        connection.execute(sa.delete(kept_receipts).where(kept.tab == tab))
        rows = {seq: {"tab": tab, "total": total, "seq": seq, "doc": doc} for total, seq, doc in highest}
        connection.execute(sa.insert(kept_receipts), list(rows.values()))


def _alone(doc: JobDoc, provider: Address) -> bytes:
    """The document of a job with the attempt and the receipt of one provider alone."""
    attempts = tuple(attempt for attempt in doc.record.attempts if attempt.provider == provider)
    return dump_job(replace(doc.record, attempts=attempts), {provider: doc.receipts[provider]})
