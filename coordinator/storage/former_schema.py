"""Converts the tables of releases up to 0.5, which had one row of text for each job and for each receipt, and back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, RowMapping

from coordinator.ports import AttemptRecord, JobRecord
from coordinator.storage.job_codec import JobDoc, load_job
from coordinator.storage.job_rows import JobNumbers, JobRows, JobWrite
from coordinator.storage.schema import jobs, kept_receipts, open_jobs
from tallystick.protocol.eip712 import Signed, read_signed
from tallystick.protocol.jobs import State
from tallystick.protocol.messages import Order, Receipt, Terms
from tallystick.protocol.stored import load_signed, load_struct, store_signed, store_struct
from tallystick.protocol.types import Address, Amount, JobId
from tallystick.protocol.wire import dumps

_AT_ONCE = 1_000
_SEGMENT = 4_096
_FLAGS = ("delivered", "cancelled", "unseen", "hedged", "outrun")


def upgrade_jobs(connection: Connection) -> None:
    """Copies `old_jobs` and `old_receipts` into the present tables."""
    numbers = JobNumbers()
    rows = JobRows(numbers)
    for writes in _batches(connection):
        rows.write(connection, writes)
        numbers.recent |= {write.job: (write.number, write.newest) for write in writes if write.ended}
        if len(numbers.recent) >= _SEGMENT:
            rows.write_segment(connection, [numbers.recent])
            numbers.recent = {}


def _batches(connection: Connection) -> Iterator[list[JobWrite]]:
    order = sa.text("SELECT job FROM old_jobs ORDER BY COALESCE(finished_at, created_at), job")
    names = list(connection.execute(order).scalars())
    for first in range(0, len(names), _AT_ONCE):
        batch = names[first : first + _AT_ONCE]
        by_job: dict[str, dict[Address, tuple[Signed[Receipt], Amount]]] = {}
        receipts = _among("SELECT job, total, receipt_doc FROM old_receipts WHERE job IN :jobs ORDER BY provider")
        for job, total, doc in connection.execute(receipts, {"jobs": batch}):
            receipt = load_signed(Receipt, doc)
            by_job.setdefault(job, {})[receipt.message.provider] = receipt, Amount(int(total))
        stored = _among("SELECT job, payer, state, created_at, finished_at, attempts_doc FROM old_jobs WHERE job IN :jobs")
        records = {row["job"]: _record(row) for row in connection.execute(stored, {"jobs": batch}).mappings()}
        yield [JobWrite(records[job].job, records[job], by_job.get(job, {}), whole=True) for job in batch]


def _among(query: str) -> Any:
    return sa.text(query).bindparams(sa.bindparam("jobs", expanding=True))


def _record(row: RowMapping) -> JobRecord:
    return JobRecord(
        job=JobId(bytes.fromhex(row["job"])),
        payer=Address(row["payer"]),
        state=State(row["state"]),
        created_at=row["created_at"],
        finished_at=row["finished_at"],
        attempts=tuple(map(_attempt, json.loads(row["attempts_doc"]))),
    )


def _attempt(doc: dict[str, Any]) -> AttemptRecord:
    flags = {name: doc.get(name, False) for name in _FLAGS}
    return AttemptRecord(*_order_and_terms(doc), State(doc["state"]), doc["reason"], **flags)


def _order_and_terms(doc: dict[str, Any]) -> tuple[Signed[Order], Terms]:
    order, terms = doc["order"], doc["terms"]
    if isinstance(order, dict):  # as release 0.1 stored it
        return read_signed(Order, order), Terms.from_json(terms)
    return load_signed(Order, order), load_struct(Terms, terms)


def downgrade_jobs(connection: Connection) -> None:
    """Copies the present tables into `old_jobs` and `old_receipts`."""
    job = sa.text(
        "INSERT INTO old_jobs (job, payer, provider, state, created_at, finished_at, attempts_doc) VALUES"
        " (:job, :payer, :provider, :state, :created_at, :finished_at, :attempts_doc) ON CONFLICT DO NOTHING"
    )
    receipt = sa.text(
        "INSERT INTO old_receipts (job, provider, payer, seq, total, receipt_doc)"
        " VALUES (:job, :provider, :payer, :seq, :total, :receipt_doc) ON CONFLICT DO NOTHING"
    )
    orders = ((jobs, jobs.c.number.desc()), (open_jobs, open_jobs.c.number.desc()), (kept_receipts, kept_receipts.c.tab))
    for table, order in orders:
        for data in list(connection.execute(sa.select(table.c.doc).order_by(order)).scalars()):
            doc = load_job(bytes(data))
            connection.execute(job, _job_row(doc.record))
            for row in _receipt_rows(doc):
                connection.execute(receipt, row)


def _job_row(record: JobRecord) -> dict[str, Any]:
    return {
        "job": record.job.hex(),
        "payer": record.payer,
        "provider": record.last.provider,
        "state": record.state.value,
        "created_at": record.created_at,
        "finished_at": record.finished_at,
        "attempts_doc": dumps([_attempt_doc(attempt) for attempt in record.attempts]).decode(),
    }


def _attempt_doc(attempt: AttemptRecord) -> dict[str, Any]:
    order, terms = store_signed(attempt.order), store_struct(attempt.terms)
    doc = {"order": order, "terms": terms, "state": attempt.state.value, "reason": attempt.reason}
    return doc | {name: True for name in _FLAGS if getattr(attempt, name)}


def _receipt_rows(doc: JobDoc) -> Iterator[dict[str, Any]]:
    for provider, (receipt, total) in doc.receipts.items():
        yield {
            "job": doc.record.job.hex(),
            "provider": provider,
            "payer": receipt.message.payer,
            "seq": receipt.message.seq,
            "total": f"{int(total):029}",
            "receipt_doc": store_signed(receipt),
        }
