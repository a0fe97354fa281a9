"""The coordinator's store: SQLAlchemy Core on SQLite or PostgreSQL. Signed documents are stored as they arrived."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy import Connection

from coordinator.domain.reputation import ProviderRecord
from coordinator.domain.speeds import Key, SpeedRecord
from coordinator.ports import (
    WAITING_CLAIMS,
    AttemptRecord,
    Cursor,
    JobRecord,
    KnownJob,
    PendingClaim,
    Settlement,
    StoredResponse,
    StoredState,
    too_many_claims,
)
from coordinator.storage.log_store import SqlLogStore
from coordinator.storage.provider_records import read_records, write_records
from coordinator.storage.schema import claims, cursors, jobs, receipts, responses, settlements
from coordinator.storage.upserts import inserting, upsert, upserting
from tallystick.protocol.eip712 import Signed, Verified, read_signed
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.jobs import TERMINAL, State
from tallystick.protocol.link import ClaimRequest, LateReceipt
from tallystick.protocol.messages import Order, Receipt, Terms
from tallystick.protocol.stored import load_signed, load_struct, store_signed, store_struct
from tallystick.protocol.types import Address, Amount, JobId
from tallystick.protocol.wire import dumps
from tallystick.runtime.single_instance import instance_lock
from tallystick.runtime.storage import Database

log = structlog.get_logger()
MIGRATIONS = Path(__file__).parents[1] / "migrations"
_EVENTS = "escrow"
_FLAGS = ("delivered", "cancelled", "unseen", "hedged", "outrun")
"""Flags of an attempt that are written only if they are set."""
ROOM_CHECK_INTERVAL = 16
"""The space that stored responses take is checked once per this many responses."""


class Store:
    """Implements JobStore, TabStore, ResponseStore and ClaimStore on one database."""

    def __init__(self, url: str) -> None:
        self._db, self._instance_lock = Database(url), instance_lock(url, "coordinator")
        self.match_log = SqlLogStore(self._db)
        self._put = 0

    async def start(self) -> None:
        """Connects and migrates. Raises Unavailable, also if another coordinator uses the database."""
        await self._instance_lock.acquire()
        await self._db.start(MIGRATIONS)

    async def close(self) -> None:
        """Writes the queue and releases the database."""
        await self._db.close()
        await self._instance_lock.release()

    @property
    def database(self) -> Database:
        """The database, for metrics."""
        return self._db

    async def ping(self) -> float:
        """Waits for the database; returns the seconds that its answer took. Raises Unavailable."""
        return await self._db.ping()

    async def guard(self) -> None:
        """Waits while this coordinator holds the lock of the database. Raises Unavailable when the lock is lost."""
        await self._instance_lock.lost()
        log.error("database lock lost: another coordinator may take it, so this one stops")
        raise Unavailable(Code.DATABASE_UNAVAILABLE, "the connection that held this coordinator's database was lost")

    # Jobs

    def enqueue_job(self, record: JobRecord) -> None:
        """See ports.JobStore."""
        row = _job_row(record)
        self._db.enqueue(lambda c: _put_job(c, row))

    async def put_receipt(self, job: JobId, receipt: Verified[Receipt], total: Amount, record: JobRecord | None = None) -> None:
        """See ports.JobStore."""
        message = receipt.message
        row = {
            "job": job.hex(),
            "provider": message.provider,
            "payer": message.payer,
            "seq": message.seq,
            "total": f"{int(total):029}",
            "receipt_doc": store_signed(receipt),
        }
        job_row = None if record is None else _job_row(record)

        def work(connection: Connection) -> None:
            if job_row is not None:
                _put_job(connection, job_row)
            connection.execute(_receipt_insert(connection.dialect.name), row)

        await self._db.write(work, synced=False)

    async def job(self, job: JobId) -> KnownJob | None:
        """See ports.JobStore. The read is queued among the writes, so it sees all earlier ones."""
        stored = await self._db.write(lambda c: _read_job(c, job.hex()), synced=False)
        if stored is None:
            return None
        row, docs = stored
        signed = [load_signed(Receipt, doc) for doc in docs]
        return KnownJob(_job_record(row), {receipt.message.provider: receipt for receipt in signed})

    async def load_state(self, now: int, since: int) -> StoredState:
        """See ports.JobStore."""
        recent = sa.select(jobs.c.job).where(jobs.c.created_at >= since)
        tabs = (receipts.c.payer, receipts.c.provider)
        totals = sa.select(*tabs, sa.func.max(receipts.c.total)).group_by(*tabs)  # equal length, so text sorts like numbers

        def work(connection: Connection) -> tuple[Any, Any, Any]:
            _close_stale(connection, now)
            job_ids, sums = (connection.execute(query).all() for query in (recent, totals))
            return job_ids, sums, read_records(connection)

        job_ids, sums, (records, speeds) = await self._db.write(work)
        return StoredState(
            tuple(JobId(bytes.fromhex(job)) for (job,) in job_ids),
            {(Address(payer), Address(provider)): Amount(int(total)) for payer, provider, total in sums},
            records,
            speeds,
        )

    def enqueue_provider_records(
        self, records: Mapping[Address, ProviderRecord], speeds: Mapping[Key, SpeedRecord] = MappingProxyType({})
    ) -> None:
        """See ports.JobStore."""
        self._db.enqueue(functools.partial(write_records, records=dict(records), measured=dict(speeds)))

    async def last_receipts(self, provider: Address, after: str, limit: int) -> list[LateReceipt]:
        """See ports.TabStore."""
        mine = (receipts.c.provider == provider, receipts.c.payer > after)
        last = sa.select(receipts.c.payer, sa.func.max(receipts.c.seq).label("seq")).where(*mine)
        newest = last.group_by(receipts.c.payer).order_by(receipts.c.payer).limit(limit).subquery()
        query = (
            sa.select(receipts.c.receipt_doc, jobs.c.attempts_doc)
            .join(newest, sa.and_(receipts.c.payer == newest.c.payer, receipts.c.seq == newest.c.seq))
            .join(jobs, jobs.c.job == receipts.c.job)
            .where(receipts.c.provider == provider)
            .order_by(receipts.c.payer)
        )
        rows = await self._db.read(lambda c: c.execute(query).all())
        return [_late(provider, receipt, attempts) for receipt, attempts in rows]

    async def receipts_of(self, payer: Address, provider: Address, limit: int) -> list[LateReceipt]:
        """See ports.TabStore. The read is queued among the writes, so it sees all earlier ones."""
        query = (
            sa.select(receipts.c.receipt_doc, jobs.c.attempts_doc)
            .join(jobs, jobs.c.job == receipts.c.job)
            .where(receipts.c.payer == payer, receipts.c.provider == provider)
            .order_by(receipts.c.total.desc(), receipts.c.seq.desc())
            .limit(limit)
        )
        rows = await self._db.write(lambda c: c.execute(query).all(), synced=False)
        return [_late(provider, receipt, attempts) for receipt, attempts in rows]

    # Responses

    async def put_response(self, stored: StoredResponse, *, since: int, max_bytes: int) -> None:
        """See ports.ResponseStore. The space is checked once per ROOM_CHECK_INTERVAL responses."""
        row = {
            "job": stored.job.hex(),
            "fingerprint": stored.fingerprint.hex(),
            "payer": stored.payer,
            "ended_at": stored.ended_at,
            "size": len(stored.frames),
            "frames": stored.frames,
        }
        self._put += 1
        check_room = self._put % ROOM_CHECK_INTERVAL == 0

        def work(connection: Connection) -> None:
            connection.execute(sa.delete(responses).where(responses.c.ended_at < since))
            upsert(connection, responses, row, ("job",))
            if check_room:
                _evict_responses(connection, max_bytes)

        await self._db.write(work, synced=False)

    async def response(self, job: JobId, since: int) -> StoredResponse | None:
        """See ports.ResponseStore."""
        query = sa.select(responses).where(responses.c.job == job.hex(), responses.c.ended_at >= since)
        row = await self._db.read(lambda c: c.execute(query).mappings().one_or_none())
        if row is None:
            return None
        return StoredResponse(job, bytes.fromhex(row["fingerprint"]), row["frames"], row["ended_at"], row["payer"])

    # Claims

    async def put_claim(self, request: ClaimRequest, now: int) -> None:
        """See ports.ClaimStore."""
        doc = json.dumps(request.to_json())
        row = {
            "digest": hashlib.sha256(doc.encode()).hexdigest(),
            "provider": request.claim.message.provider,
            "received_at": now,
            "claim_doc": doc,
            "tx": None,
        }

        def work(connection: Connection) -> bool:
            insert = inserting(connection.dialect.name, claims)
            same, mine = claims.c.digest == row["digest"], claims.c.provider == row["provider"]
            waiting = sa.select(sa.func.count()).where(mine, ~same, claims.c.tx.is_(None))
            if connection.execute(waiting).scalar_one() >= WAITING_CLAIMS:
                return False
            connection.execute(sa.delete(claims).where(mine, ~same, claims.c.tx.is_not(None), ~claims.c.tx.startswith("0x")))
            pending_again = {"received_at": insert.excluded.received_at, "tx": None}
            connection.execute(insert.on_conflict_do_update(index_elements=("digest",), set_=pending_again), row)
            return True

        if not await self._db.write(work):
            raise too_many_claims(request.claim.message.provider)

    async def pending_claims(self, limit: int, skipped: Iterable[Address] = ()) -> list[PendingClaim]:
        """See ports.ClaimStore."""
        pending = sa.and_(claims.c.tx.is_(None), claims.c.provider.not_in(list(skipped)))
        turn = sa.func.row_number().over(partition_by=claims.c.provider, order_by=claims.c.id)
        query = sa.select(claims.c.id, claims.c.claim_doc).where(pending).order_by(turn, claims.c.id).limit(limit)
        rows = await self._db.read(lambda c: c.execute(query).all())
        return [PendingClaim(number, ClaimRequest.from_json(json.loads(doc))) for number, doc in rows]

    async def close_claims(self, ids: list[int], tx: str) -> None:
        """See ports.ClaimStore."""
        query = sa.update(claims).where(claims.c.id.in_(ids)).values(tx=tx)
        await self._db.write(lambda c: c.execute(query))

    async def cursor(self) -> Cursor | None:
        """See ports.ClaimStore."""
        query = sa.select(cursors.c.block, cursors.c.tip).where(cursors.c.name == _EVENTS)
        row = await self._db.read(lambda c: c.execute(query).one_or_none())
        return None if row is None else Cursor(*row)

    async def put_settlements(self, settled: list[Settlement], cursor: Cursor) -> None:
        """See ports.ClaimStore."""

        def work(connection: Connection) -> None:
            for settlement in settled:
                row = {
                    "payer": settlement.payer,
                    "provider": settlement.provider,
                    "settled": str(settlement.settled),
                    "tx": settlement.tx,
                    "block": settlement.block,
                }
                upsert(connection, settlements, row, ("payer", "provider"))
            upsert(connection, cursors, {"name": _EVENTS, "block": cursor.block, "tip": cursor.tip}, ("name",))

        await self._db.write(work)

    async def forget_settlements(self) -> None:
        """See ports.ClaimStore."""

        def work(connection: Connection) -> None:
            connection.execute(sa.delete(settlements))
            connection.execute(sa.delete(cursors).where(cursors.c.name == _EVENTS))
            connection.execute(sa.update(claims).where(claims.c.tx.startswith("0x")).values(tx=None))

        await self._db.write(work)

    async def settlement(self, payer: Address, provider: Address) -> Settlement | None:
        """See ports.ClaimStore."""
        query = sa.select(settlements).where(settlements.c.payer == payer, settlements.c.provider == provider)
        row = await self._db.read(lambda c: c.execute(query).mappings().one_or_none())
        if row is None:
            return None
        return Settlement(payer, provider, Amount(int(row["settled"])), row["tx"], row["block"])


def _evict_responses(connection: Connection, max_bytes: int) -> None:
    """Deletes the oldest responses of the payer that holds most, until all fit."""
    columns = responses.c
    sizes = sa.select(columns.payer, sa.func.sum(columns.size)).group_by(columns.payer)
    held = {payer: int(size) for payer, size in connection.execute(sizes)}
    while sum(held.values()) > max_bytes:
        most = max(held, key=held.__getitem__)
        oldest = sa.select(columns.job, columns.size).where(columns.payer == most).order_by(columns.ended_at).limit(1)
        job, size = connection.execute(oldest).one()
        connection.execute(sa.delete(responses).where(responses.c.job == job))
        held[most] -= size


_OPEN = sa.and_(*(jobs.c.state != sa.literal_column(f"'{state.value}'") for state in sorted(TERMINAL)))
"""Without bound values: SQLAlchemy would expand a list of them for every statement."""


@functools.cache
def _job_upsert(dialect: str) -> sa.Insert:
    """Cached, since a job's two rows are most of this store's work."""
    return upserting(dialect, jobs, jobs.c.keys(), ("job",), where=_OPEN)


@functools.cache
def _receipt_insert(dialect: str) -> sa.Insert:
    insert: sa.Insert = inserting(dialect, receipts).on_conflict_do_nothing()
    return insert


def _put_job(connection: Connection, row: dict[str, Any]) -> None:
    connection.execute(_job_upsert(connection.dialect.name), row)


def _read_job(connection: Connection, job: str) -> tuple[Any, list[str]] | None:
    row = connection.execute(sa.select(jobs).where(jobs.c.job == job)).mappings().one_or_none()
    docs = sa.select(receipts.c.receipt_doc).where(receipts.c.job == job)
    return None if row is None else (dict(row), list(connection.execute(docs).scalars()))


def _close_stale(connection: Connection, now: int) -> None:
    """Ends the jobs that a former process left open as failed."""
    for row in connection.execute(sa.select(jobs).where(_OPEN)).mappings().all():
        attempts = json.loads(row["attempts_doc"])
        for attempt in attempts:
            if State(attempt["state"]) not in TERMINAL:
                attempt |= {"state": State.FAILED.value, "reason": "the coordinator was restarted", "unseen": True}
        ended = {"state": State.FAILED.value, "finished_at": now, "attempts_doc": json.dumps(attempts)}
        connection.execute(sa.update(jobs).where(jobs.c.job == row["job"]).values(ended))


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


def _attempt(doc: dict[str, Any]) -> AttemptRecord:
    flags = {name: doc.get(name, False) for name in _FLAGS}
    return AttemptRecord(*_order_and_terms(doc), State(doc["state"]), doc["reason"], **flags)


def _order_and_terms(doc: dict[str, Any]) -> tuple[Signed[Order], Terms]:
    order, terms = doc["order"], doc["terms"]
    if isinstance(order, dict):  # as release 0.1 stored it
        return read_signed(Order, order), Terms.from_json(terms)
    return load_signed(Order, order), load_struct(Terms, terms)


def _late(provider: Address, receipt: str, attempts: str) -> LateReceipt:
    tried = map(_order_and_terms, json.loads(attempts))
    order, terms = next((order, terms) for order, terms in tried if order.message.provider == provider)
    return LateReceipt(load_signed(Receipt, receipt), order, terms)


def _job_record(row: dict[str, Any]) -> JobRecord:
    return JobRecord(
        job=JobId(bytes.fromhex(row["job"])),
        payer=Address(row["payer"]),
        state=State(row["state"]),
        created_at=row["created_at"],
        finished_at=row["finished_at"],
        attempts=tuple(map(_attempt, json.loads(row["attempts_doc"]))),
    )
