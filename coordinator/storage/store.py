"""The coordinator's store: SQLAlchemy Core on SQLite or PostgreSQL. Signed documents are stored as they arrived."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
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
    Cursor,
    JobRecord,
    KnownJob,
    PendingClaim,
    Settlement,
    StoredResponse,
    StoredState,
    too_many_claims,
)
from coordinator.storage.account_store import SqlAccountStore
from coordinator.storage.job_store import SEGMENT_JOBS, SqlJobStore
from coordinator.storage.log_store import SqlLogStore
from coordinator.storage.provider_records import write_records
from coordinator.storage.report_store import SqlReportStore
from coordinator.storage.roles import AllRoles, ReplicaRoles, Roles
from coordinator.storage.schema import claims, cursors, responses, settlements, tabs
from coordinator.storage.session_store import SqlSessionStore
from coordinator.storage.shared_job_store import SharedJobStore
from coordinator.storage.upserts import inserting, upsert, upserting
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.link import ClaimRequest, LateReceipt
from tallystick.protocol.messages import Receipt
from tallystick.protocol.types import Address, Amount, JobId
from tallystick.runtime.single_instance import instance_lock
from tallystick.runtime.storage import Database

log = structlog.get_logger()
MIGRATIONS = Path(__file__).parents[1] / "migrations"
_EVENTS = "escrow"
_LOCK_AGAIN_SECONDS = 1.0
ROOM_CHECK_INTERVAL = 16
"""The space that stored responses take is checked once per this many responses."""
FORGOTTEN_AT_ONCE = 4
"""Old responses that the write of a new one may delete."""


class Store:
    """Implements JobStore, TabStore, ResponseStore and ClaimStore on one database."""

    def __init__(self, url: str, segment_jobs: int = SEGMENT_JOBS, *, replica: str = "") -> None:
        """`segment_jobs`: the number of ended jobs that are indexed, and later deleted, together. `replica`: the id of this
        process among the replicas that share the database, another one at each start; empty for a lone coordinator.

        Raises BadMessage for an address that is not understood, or for a replica whose database is not PostgreSQL.
        """
        self.replica = replica
        self._db, self._instance_lock = Database(url), instance_lock(url, "coordinator", shared=bool(replica))
        self.roles: Roles = ReplicaRoles(self._db.url, replica) if replica else AllRoles()
        self._log_db = Database(url) if replica else None
        self._shared = None if self._log_db is None else SharedJobStore(self._db, self._log_db, replica)
        self._jobs = self._shared or SqlJobStore(self._db, segment_jobs)
        self.match_log = SqlLogStore(self._db, self._jobs.writer)
        self.reports, self.sessions = SqlReportStore(self._db), SqlSessionStore(self._db)
        self.accounts = SqlAccountStore(self._db, self._jobs.writer.flush)
        self._put = 0

    async def start(self) -> None:
        """Connects and migrates. Raises Unavailable, also if another coordinator uses the database."""
        await self._instance_lock.acquire()
        await self._db.start(MIGRATIONS)
        if self._log_db is not None:
            await self._log_db.start(MIGRATIONS)
        await self._jobs.start()

    async def close(self) -> None:
        """Writes the queue and releases the database."""
        await self._jobs.close()
        if self._log_db is not None:
            await self._log_db.close()
        await self._db.close()
        await self._instance_lock.release()

    @property
    def shared(self) -> SharedJobStore | None:
        """What this replica shares with the others; None for a lone coordinator."""
        return self._shared

    async def recover(self) -> None:
        """Ends the open jobs of replicas that are gone, until cancelled: the work of the role `recovery`."""
        if self._shared is None:
            await asyncio.Event().wait()
        else:
            await self._shared.recovery.run()

    @property
    def database(self) -> Database:
        """The database, for metrics."""
        return self._db

    @property
    def queued(self) -> int:
        """Writes that wait for a transaction, for metrics."""
        return self._jobs.writer.queued + self._db.queued

    async def ping(self) -> float:
        """Waits for the database; returns the seconds that its answer took. Raises Unavailable."""
        return await self._db.ping()

    async def guard(self) -> None:
        """Waits while this coordinator holds the lock of the database. Raises Unavailable when the lock is lost.

        A replica takes the lost lock again as soon as the database answers, and ends only if a lone coordinator was faster.
        """
        while True:
            await self._instance_lock.lost()
            if not self.replica:
                log.error("database lock lost: another coordinator may take it, so this one stops")
                raise Unavailable(Code.DATABASE_UNAVAILABLE, "the connection that held this coordinator's database was lost")
            log.warning("database lock lost: this replica takes it again when the database answers")
            await self._take_again()
            log.info("database lock taken again")

    async def _take_again(self) -> None:
        while True:
            await self._instance_lock.release()
            try:
                await self._instance_lock.acquire()
            except Unavailable as error:
                if error.code is Code.ALREADY_RUNNING:
                    raise
                await asyncio.sleep(_LOCK_AGAIN_SECONDS)
            else:
                return

    # Jobs and tabs

    def enqueue_job(self, record: JobRecord) -> None:
        """See ports.JobStore."""
        self._jobs.enqueue_job(record)

    async def put_receipt(self, job: JobId, receipt: Verified[Receipt], total: Amount, record: JobRecord | None = None) -> None:
        """See ports.JobStore."""
        await self._jobs.put_receipt(job, receipt, total, record)

    async def job(self, job: JobId) -> KnownJob | None:
        """See ports.JobStore."""
        return await self._jobs.job(job)

    async def load_state(self, now: int, since: int) -> StoredState:
        """See ports.JobStore."""
        return await self._jobs.load_state(now, since)

    async def forget_jobs(self, before: int) -> bool:
        """See ports.JobStore."""
        return await self._jobs.forget_jobs(before)

    def enqueue_provider_records(
        self, records: Mapping[Address, ProviderRecord], speeds: Mapping[Key, SpeedRecord] = MappingProxyType({})
    ) -> None:
        """See ports.JobStore."""
        self._jobs.writer.add(_write_records, (dict(records), dict(speeds)), waited=False)

    async def last_receipts(self, provider: Address, after: str, limit: int) -> list[LateReceipt]:
        """See ports.TabStore."""
        return await self._jobs.last_receipts(provider, after, limit)

    async def receipts_of(self, payer: Address, provider: Address, limit: int) -> list[LateReceipt]:
        """See ports.TabStore."""
        return await self._jobs.receipts_of(payer, provider, limit)

    async def load_totals(self, payer: Address) -> list[tuple[Address, Amount, Amount]]:
        """Returns a payer's tabs: provider, highest total, and what the chain has paid. Raises Unavailable."""
        paid = sa.and_(settlements.c.payer == tabs.c.payer, settlements.c.provider == tabs.c.provider)
        query = sa.select(tabs.c.provider, tabs.c.total, settlements.c.settled).where(tabs.c.payer == payer)
        rows = await self._db.read(lambda c: c.execute(query.select_from(tabs.outerjoin(settlements, paid))).all())
        return [(Address(to), Amount(int.from_bytes(total, "big")), Amount(int(settled or 0))) for to, total, settled in rows]

    # Responses

    async def put_response(self, stored: StoredResponse, *, since: int, max_bytes: int) -> None:
        """See ports.ResponseStore. The space is checked once per ROOM_CHECK_INTERVAL responses."""
        row = {
            "job": stored.job,
            "fingerprint": stored.fingerprint,
            "payer": stored.payer,
            "ended_at": stored.ended_at,
            "size": len(stored.frames),
            "frames": stored.frames,
        }
        self._put += 1
        room = max_bytes if self._put % ROOM_CHECK_INTERVAL == 0 else None
        await self._jobs.writer.add(_write_responses, (row, since, room), waited=True).done

    async def response(self, job: JobId, since: int) -> StoredResponse | None:
        """See ports.ResponseStore."""
        query = sa.select(responses).where(responses.c.job == job, responses.c.ended_at >= since)
        row = await self._db.read(lambda c: c.execute(query).mappings().one_or_none())
        if row is None:
            return None
        return StoredResponse(job, bytes(row["fingerprint"]), bytes(row["frames"]), row["ended_at"], row["payer"])

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


def _write_responses(connection: Connection, writes: Sequence[tuple[dict[str, Any], int, int | None]]) -> None:
    """Stores responses, and deletes some that are too old or have no room."""
    _delete_old_responses(connection, max(since for _, since, _ in writes), FORGOTTEN_AT_ONCE * len(writes))
    upsert = upserting(connection.dialect.name, responses, writes[0][0], ("job",))
    for row, _, room in writes:
        connection.execute(upsert, row)
        if room is not None:
            _evict_responses(connection, room)


def _delete_old_responses(connection: Connection, since: int, limit: int) -> None:
    columns = responses.c
    oldest = sa.select(columns.number, columns.ended_at).order_by(columns.number).limit(limit).subquery()
    last = connection.execute(sa.select(sa.func.max(oldest.c.number)).where(oldest.c.ended_at < since)).scalar_one()
    if last is not None:
        connection.execute(sa.delete(responses).where(columns.number <= last, columns.ended_at < since))


def _evict_responses(connection: Connection, max_bytes: int) -> None:
    """Deletes the oldest responses of the payer that holds most, until all fit."""
    columns = responses.c
    sizes = sa.select(columns.payer, sa.func.sum(columns.size)).group_by(columns.payer)
    held = {payer: int(size) for payer, size in connection.execute(sizes)}
    while sum(held.values()) > max_bytes:
        most = max(held, key=held.__getitem__)
        oldest = sa.select(columns.number, columns.size).where(columns.payer == most).order_by(columns.number).limit(1)
        number, size = connection.execute(oldest).one()
        connection.execute(sa.delete(responses).where(columns.number == number))
        held[most] -= size


def _write_records(
    connection: Connection, batches: Sequence[tuple[Mapping[Address, ProviderRecord], Mapping[Key, SpeedRecord]]]
) -> None:
    for records, speeds in batches:
        write_records(connection, records, speeds)
