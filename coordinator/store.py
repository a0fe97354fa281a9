"""The coordinator's store: SQLAlchemy Core on SQLite or PostgreSQL. Signed documents are kept as they came."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import sqlalchemy.dialects.postgresql
import sqlalchemy.dialects.sqlite
from sqlalchemy import Connection

from coordinator.ports import AttemptRecord, JobRecord, PendingClaim, Settlement
from tallystick.protocol.eip712 import Signed, Verified, loads_signed
from tallystick.protocol.jobs import TERMINAL, State
from tallystick.protocol.messages import Order, Receipt, Terms
from tallystick.protocol.types import Address, Amount, JobId
from tallystick.protocol.wire import ClaimRequest
from tallystick.runtime.storage import Database

MIGRATIONS = Path(__file__).parent / "migrations"
_EVENTS = "escrow"

metadata = sa.MetaData()
jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("job", sa.String(32), primary_key=True),
    sa.Column("payer", sa.String(42)),
    sa.Column("provider", sa.String(42)),
    sa.Column("state", sa.String(16)),
    sa.Column("created_at", sa.BigInteger),
    sa.Column("finished_at", sa.BigInteger),
    sa.Column("order_doc", sa.Text),
    sa.Column("terms_doc", sa.Text),
    sa.Column("attempts_doc", sa.Text),
)
receipts = sa.Table(
    "receipts",
    metadata,
    sa.Column("job", sa.String(32), primary_key=True),
    sa.Column("payer", sa.String(42)),
    sa.Column("provider", sa.String(42)),
    sa.Column("seq", sa.BigInteger),
    sa.Column("cumulative", sa.String(29)),
    sa.Column("receipt_doc", sa.Text),
)
claims = sa.Table(
    "claims",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("provider", sa.String(42)),
    sa.Column("received_at", sa.BigInteger),
    sa.Column("claim_doc", sa.Text),
    sa.Column("tx", sa.String(66)),
)
settlements = sa.Table(
    "settlements",
    metadata,
    sa.Column("payer", sa.String(42), primary_key=True),
    sa.Column("provider", sa.String(42), primary_key=True),
    sa.Column("settled", sa.String(29)),
    sa.Column("tx", sa.String(66)),
    sa.Column("block", sa.BigInteger),
)
cursors = sa.Table("cursors", metadata, sa.Column("name", sa.String(32), primary_key=True), sa.Column("block", sa.BigInteger))


class Store:
    """JobStore and ClaimStore over one database."""

    def __init__(self, url: str) -> None:
        self._db = Database(url)

    async def start(self) -> None:
        """Connects and migrates. Raises Unavailable."""
        await self._db.start(MIGRATIONS)

    async def close(self) -> None:
        """Writes what is queued and lets go."""
        await self._db.close()

    # Jobs

    def note_job(self, record: JobRecord) -> None:
        """See ports.JobStore."""
        self._db.note(lambda c: _upsert(c, jobs, _job_row(record), ("job",)))

    async def put_receipt(self, record: JobRecord, receipt: Verified[Receipt]) -> None:
        """See ports.JobStore."""
        message = receipt.message
        row = {
            "job": record.job.hex(),
            "payer": message.payer,
            "provider": message.provider,
            "seq": message.seq,
            "cumulative": str(message.cumulative_cost),
            "receipt_doc": receipt.dumps(),
        }
        job_row = _job_row(record)

        def work(connection: Connection) -> None:
            _upsert(connection, jobs, job_row, ("job",))
            _upsert(connection, receipts, row, ("job",))

        await self._db.write(work)

    async def job(self, job: JobId) -> tuple[JobRecord, Signed[Receipt] | None] | None:
        """See ports.JobStore."""
        query = sa.select(jobs, receipts.c.receipt_doc).outerjoin(receipts, receipts.c.job == jobs.c.job)

        def work(connection: Connection) -> Any:
            return connection.execute(query.where(jobs.c.job == job.hex())).mappings().one_or_none()

        row = await self._db.read(work)
        if row is None:
            return None
        return _job_record(row), loads_signed(Receipt, row["receipt_doc"]) if row["receipt_doc"] else None

    async def recent(self, since: int) -> Iterable[JobId]:
        """See ports.JobStore."""
        query = sa.select(jobs.c.job).where(jobs.c.created_at >= since)
        found = await self._db.read(lambda c: c.execute(query).scalars().all())
        return [JobId(bytes.fromhex(job)) for job in found]

    async def close_stale(self, now: int) -> int:
        """Jobs that were running when the process died end as failed; how many there were."""
        query = (
            sa.update(jobs)
            .where(jobs.c.state.not_in([state.value for state in TERMINAL]))
            .values(state=State.FAILED.value, finished_at=now)
        )
        return await self._db.write(lambda c: c.execute(query).rowcount)

    async def totals(self) -> Iterable[tuple[Address, Address, Amount]]:
        """See ports.JobStore."""
        last = (
            sa.select(receipts.c.payer, receipts.c.provider, sa.func.max(receipts.c.seq).label("seq"))
            .group_by(receipts.c.payer, receipts.c.provider)
            .subquery()
        )
        same = sa.and_(*(receipts.c[name] == last.c[name] for name in ("payer", "provider", "seq")))
        query = sa.select(receipts.c.payer, receipts.c.provider, receipts.c.cumulative).join(last, same)
        rows = await self._db.read(lambda c: c.execute(query).all())
        return [(Address(payer), Address(provider), Amount(int(total))) for payer, provider, total in rows]

    # Claims

    async def put_claim(self, request: ClaimRequest, now: int) -> None:
        """See ports.ClaimStore."""
        row = {
            "provider": request.claim.message.provider,
            "received_at": now,
            "claim_doc": json.dumps(request.to_json()),
        }
        await self._db.write(lambda c: c.execute(sa.insert(claims), row))

    async def pending_claims(self, limit: int) -> list[PendingClaim]:
        """See ports.ClaimStore."""
        query = sa.select(claims.c.id, claims.c.claim_doc).where(claims.c.tx.is_(None)).order_by(claims.c.id).limit(limit)
        rows = await self._db.read(lambda c: c.execute(query).all())
        return [PendingClaim(number, ClaimRequest.from_json(json.loads(doc))) for number, doc in rows]

    async def close_claims(self, ids: list[int], tx: str) -> None:
        """See ports.ClaimStore."""
        query = sa.update(claims).where(claims.c.id.in_(ids)).values(tx=tx)
        await self._db.write(lambda c: c.execute(query))

    async def cursor(self) -> int | None:
        """See ports.ClaimStore."""
        query = sa.select(cursors.c.block).where(cursors.c.name == _EVENTS)
        return await self._db.read(lambda c: c.execute(query).scalar_one_or_none())

    async def put_settlements(self, settled: list[Settlement], cursor: int) -> None:
        """See ports.ClaimStore."""

        def work(connection: Connection) -> None:
            for one in settled:
                row = {
                    "payer": one.payer,
                    "provider": one.provider,
                    "settled": str(one.settled),
                    "tx": one.tx,
                    "block": one.block,
                }
                _upsert(connection, settlements, row, ("payer", "provider"))
            _upsert(connection, cursors, {"name": _EVENTS, "block": cursor}, ("name",))

        await self._db.write(work)

    async def settlement(self, payer: Address, provider: Address) -> Settlement | None:
        """See ports.ClaimStore."""
        query = sa.select(settlements).where(settlements.c.payer == payer, settlements.c.provider == provider)
        row = await self._db.read(lambda c: c.execute(query).mappings().one_or_none())
        if row is None:
            return None
        return Settlement(payer, provider, Amount(int(row["settled"])), row["tx"], row["block"])


def _upsert(connection: Connection, table: sa.Table, row: dict[str, Any], key: tuple[str, ...]) -> None:
    """INSERT … ON CONFLICT DO UPDATE, which SQLite and PostgreSQL spell alike."""
    module = sa.dialects.postgresql if connection.dialect.name == "postgresql" else sa.dialects.sqlite
    insert = module.insert(table)
    changed = {name: insert.excluded[name] for name in row if name not in key}
    connection.execute(insert.on_conflict_do_update(index_elements=key, set_=changed), row)


def _job_row(record: JobRecord) -> dict[str, Any]:
    attempts = [[a.attempt, a.provider, a.state, a.reason] for a in record.attempts]
    return {
        "job": record.job.hex(),
        "payer": record.payer,
        "provider": record.order.message.provider,
        "state": record.state.value,
        "created_at": record.created_at,
        "finished_at": record.finished_at,
        "order_doc": record.order.dumps(),
        "terms_doc": json.dumps(record.terms.to_json()),
        "attempts_doc": json.dumps(attempts),
    }


def _job_record(row: Any) -> JobRecord:
    return JobRecord(
        job=JobId(bytes.fromhex(row["job"])),
        payer=Address(row["payer"]),
        order=loads_signed(Order, row["order_doc"]),
        terms=Terms.from_json(json.loads(row["terms_doc"])),
        state=State(row["state"]),
        created_at=row["created_at"],
        finished_at=row["finished_at"],
        attempts=tuple(
            AttemptRecord(number, Address(p), state, reason) for number, p, state, reason in json.loads(row["attempts_doc"])
        ),
    )
