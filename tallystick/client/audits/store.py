"""The audits of one wallet in an SQLite file beside its ledger. What a method returned from survives the process."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import orjson
import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.dialects.sqlite import insert

from tallystick.audit.integrity import Integrity
from tallystick.audit.referee_record import RefereeRecord
from tallystick.audit.token_counts import PooledCounts
from tallystick.audit.verdicts import WINDOW, Audit, Verdict
from tallystick.client.audits.findings import MAX_EARLIER
from tallystick.client.audits.kept_job import KeptJob
from tallystick.client.audits.pools import Pool
from tallystick.client.audits.provider_audits import ProviderAudits, audits_of, list_products, read_provider
from tallystick.client.audits.records import (
    AuditEnd,
    KnownAudit,
    NewAudit,
    Opinion,
    WaitingReport,
    finding_json,
    read_audit,
    read_opinion_row,
    reason_text,
)
from tallystick.client.audits.schema import (
    NOT_PLANTED,
    AuditKind,
    AuditState,
    Origin,
    audits,
    disputes,
    opinions,
    pardons,
    reports,
)
from tallystick.protocol.eip712 import Signed, loads_signed
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.messages import ReportAck
from tallystick.protocol.types import Address, Amount, JobId
from tallystick.runtime.database_errors import explain_failed_start
from tallystick.runtime.database_url import sqlite_url
from tallystick.runtime.storage import Database

MIGRATIONS = Path(__file__).parent / "migrations"
MAX_PENDING = 1_000
"""Audits that wait at most; further draws are left out."""
MAX_AUDITS = 20_000
"""Audits that the file keeps."""
MAX_SUSPECTS = 256
"""Suspect answers whose contents the file keeps."""
MAX_REPORTS = 20_000
_DECIDED = (Verdict.PASS.value, Verdict.SUSPECT.value)


class AuditStore:
    """The audits of one wallet. Open with `AuditStore.open`, close with `close`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    async def open(cls, path: Path) -> AuditStore:
        """Opens or creates the file, with mode 0600. Raises Unavailable if that fails."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise explain_failed_start(error, sqlite_url(path), "ledger_file") from error
        database = Database(sqlite_url(path), "ledger_file")
        await database.start(MIGRATIONS)
        return cls(database)

    async def close(self) -> None:
        """Finishes queued writes and closes the file."""
        await self._database.close()

    # Audits

    async def add(self, new: NewAudit, now: int) -> int | None:
        """Adds an audit to be done; returns its number. None if too many wait, or if this job is audited already."""

        def work(c: Connection) -> int | None:
            waiting = c.execute(
                sa.select(sa.func.count()).select_from(audits).where(audits.c.state == AuditState.PENDING.value)
            ).scalar_one()
            if new.origin is Origin.DRAWN and (waiting >= MAX_PENDING or _is_known(c, new)):
                return None
            values = {
                "kind": new.kind.value,
                "origin": new.origin.value,
                "state": AuditState.PENDING.value,
                "job": new.job,
                "provider": new.provider,
                "model": new.model,
                "precision": new.precision,
                "verdict": Verdict.INCONCLUSIVE.value,
                "reason": "",
                "attempts": 0,
                "created_at": now,
                "due_at": now + new.delay,
                "cost": 0,
                "kept": new.kept,
            }
            return c.execute(sa.insert(audits).values(values)).inserted_primary_key[0]  # type: ignore[index,no-any-return]

        return await self._database.write(work)

    async def fill_planted(self, model: str, precision: str, job: str, kept: bytes, now: int) -> None:
        """Gives checks of referees that wait for a good answer this one, and makes them due."""
        waiting = (audits.c.kind == AuditKind.PLANTED_BAD.value) & (audits.c.state == AuditState.PENDING.value)
        product = (audits.c.model == model) & (audits.c.precision == precision)
        fill = sa.update(audits).where(waiting, product, audits.c.kept.is_(None)).values(kept=kept, job=job, due_at=now)
        await self._database.write(lambda c: c.execute(fill) and None)

    async def due(self, now: int, limit: int) -> list[KnownAudit]:
        """The audits whose time has come, those that wait longest first."""
        is_due = (audits.c.state == AuditState.PENDING.value) & (audits.c.due_at <= now)
        query = sa.select(audits).where(is_due).order_by(audits.c.due_at, audits.c.id).limit(limit)
        return await self._database.read(lambda c: [read_audit(row) for row in c.execute(query)])

    async def postpone(self, audit: int, reason: str, due_at: int) -> None:
        """Notes a try in vain, and when the next one is due."""
        values = {"reason": reason_text(reason), "due_at": due_at, "attempts": audits.c.attempts + 1}
        await self._update(audit, values, audits.c.state == AuditState.PENDING.value)

    async def note(self, audit: int, reason: str) -> None:
        """Notes why an audit waits, if that was not known."""
        reason = reason_text(reason)
        await self._update(audit, {"reason": reason}, audits.c.state == AuditState.PENDING.value, audits.c.reason != reason)

    async def record_job(self, audit: int, kept: KeptJob) -> None:
        """Notes the job that was placed for a synthetic audit, who answered it, and what it cost."""
        cost = int(kept.proof.receipt.message.cost)
        values = {"job": kept.job.hex(), "kept": kept.pack(), "provider": kept.provider, "precision": kept.precision}
        await self._update(audit, values | {"cost": audits.c.cost + cost})

    async def finish(self, audit: int, end: AuditEnd, now: int) -> None:
        """Ends an audit."""
        values: dict[str, object] = {"state": AuditState.DONE.value, "verdict": end.verdict.value, "finished_at": now}
        values |= {"reason": reason_text(end.reason), "tokens": end.tokens, "coverage": end.coverage}
        values |= {"unverifiable": end.unverifiable} | ({} if end.keep else {"kept": None})

        def work(c: Connection) -> None:
            c.execute(sa.update(audits).where(audits.c.id == audit).values(values))
            if not end.keep:
                c.execute(sa.update(opinions).where(opinions.c.audit == audit).values(scores=None))

        await self._database.write(work)

    async def fail(self, audit: int, reason: str, now: int) -> None:
        """Ends an audit that can have no verdict. One that has its verdict keeps it."""
        values = {"state": AuditState.FAILED.value, "reason": reason_text(reason), "finished_at": now, "kept": None}
        await self._update(audit, values, audits.c.state == AuditState.PENDING.value)

    async def _update(self, audit: int, values: dict[str, object], *conditions: sa.ColumnElement[bool]) -> None:
        update = sa.update(audits).where(audits.c.id == audit, *conditions).values(values)
        await self._database.write(lambda c: c.execute(update) and None)

    async def get(self, audit: int) -> KnownAudit | None:
        """An audit by its number."""
        query = sa.select(audits).where(audits.c.id == audit)
        return await self._database.read(lambda c: next((read_audit(row) for row in c.execute(query)), None))

    async def find(self, job: JobId) -> KnownAudit | None:
        """The latest audit of a job's answer that ended with a verdict, else the latest one, if there is one."""
        done_first = (audits.c.state == AuditState.DONE.value).desc()
        query = sa.select(audits).where(audits.c.job == job.hex(), NOT_PLANTED).order_by(done_first, audits.c.id.desc()).limit(1)
        return await self._database.read(lambda c: next((read_audit(row) for row in c.execute(query)), None))

    async def latest(self, limit: int) -> list[KnownAudit]:
        """The latest audits, newest first."""
        query = sa.select(audits).order_by(audits.c.id.desc()).limit(limit)
        return await self._database.read(lambda c: [read_audit(row) for row in c.execute(query)])

    async def prune(self, now: int, *, contents_before: int) -> None:
        """Deletes audits beyond MAX_AUDITS, and contents of those that ended before a time, unless they are suspect."""

        def work(c: Connection) -> None:
            newest = c.execute(sa.select(sa.func.max(audits.c.id))).scalar() or 0
            old = audits.c.id <= newest - MAX_AUDITS
            c.execute(sa.delete(opinions).where(opinions.c.audit <= newest - MAX_AUDITS))
            c.execute(sa.delete(audits).where(old))
            stale = (audits.c.finished_at < contents_before) & (audits.c.verdict == Verdict.PASS.value)
            c.execute(sa.update(audits).where(stale, audits.c.kept.is_not(None)).values(kept=None))
            of_stale = opinions.c.audit.in_(sa.select(audits.c.id).where(stale))
            c.execute(sa.update(opinions).where(of_stale, opinions.c.scores.is_not(None)).values(scores=None))
            suspects = sa.select(audits.c.id).where(audits.c.verdict == Verdict.SUSPECT.value, audits.c.kept.is_not(None))
            beyond = c.execute(suspects.order_by(audits.c.id.desc()).offset(MAX_SUSPECTS).limit(1)).scalar() or 0
            c.execute(sa.update(audits).where(audits.c.id <= beyond).values(kept=None))
            c.execute(sa.update(opinions).where(opinions.c.audit <= beyond).values(scores=None))
            abandoned = (audits.c.state == AuditState.PENDING.value) & (audits.c.created_at < now - 7 * 86_400)
            c.execute(
                sa.update(audits).where(abandoned).values(state=AuditState.FAILED.value, reason="it waited too long", kept=None)
            )

        await self._database.write(work, synced=False)

    # Opinions

    async def add_opinion(self, audit: int, opinion: Opinion) -> None:
        """Adds what a referee found."""
        values = {
            "audit": audit,
            "referee": opinion.referee,
            "verdict": opinion.verdict.value,
            "findings": orjson.dumps([finding_json(finding) for finding in opinion.findings]).decode(),
            "pool": orjson.dumps(opinion.pool.to_json()).decode(),
            "billed": opinion.counts.billed,
            "counted": opinion.counts.counted,
            "cost": int(opinion.cost),
            "at": opinion.at,
            "scores": opinion.scores,
        }

        def work(c: Connection) -> None:
            c.execute(sa.insert(opinions).values(values))
            c.execute(sa.update(audits).where(audits.c.id == audit).values(cost=audits.c.cost + int(opinion.cost)))

        await self._database.write(work)

    async def opinions(self, audit: int) -> list[Opinion]:
        """What the referees of an audit found, oldest first."""
        query = sa.select(opinions).where(opinions.c.audit == audit).order_by(opinions.c.id)
        return await self._database.read(lambda c: [read_opinion_row(row) for row in c.execute(query)])

    # What is known of providers and referees

    async def history(self, provider: Address, model: str, precision: str) -> list[Audit]:
        """What each referee found of a provider's answers, oldest first; those of the latest WINDOW audits.

        Audits that ended without a verdict are left out, such as those whose evidence was withheld: a pass in one clears nobody.
        """
        latest = sa.select(audits.c.id).where(*audits_of(provider, model, precision)).order_by(audits.c.id.desc()).limit(WINDOW)
        query = (
            sa.select(audits.c.job, opinions.c.referee, opinions.c.verdict)
            .join(opinions, opinions.c.audit == audits.c.id)
            .where(audits.c.id.in_(latest), audits.c.verdict.is_distinct_from(Verdict.INCONCLUSIVE.value))
            .order_by(audits.c.id, opinions.c.id)
        )
        return await self._database.read(
            lambda c: [Audit(bytes.fromhex(row.job), row.referee.encode(), Verdict(row.verdict)) for row in c.execute(query)]
        )

    async def pardon(self, provider: Address) -> None:
        """Lets a provider begin anew: its audits so far count no more."""

        def work(c: Connection) -> None:
            newest = c.execute(sa.select(sa.func.coalesce(sa.func.max(audits.c.id), 0))).scalar_one()
            row = insert(pardons).values(provider=provider, audit=newest)
            c.execute(row.on_conflict_do_update(index_elements=["provider"], set_={"audit": newest}))

        await self._database.write(work)

    async def integrity(self, provider: Address, model: str, precision: str) -> Integrity:
        """What the audits of a provider say of it."""
        return (await self.provider_audits(provider, model, precision)).integrity

    async def provider_audits(self, provider: Address, model: str, precision: str) -> ProviderAudits:
        """A provider's audits of one product by outcome."""
        return await self._database.read(lambda c: read_provider(c, provider, model, precision))

    async def all_provider_audits(self) -> list[ProviderAudits]:
        """The audits of all providers, by product; those audited last first."""
        return await self._database.read(lambda c: [read_provider(c, *product) for product in list_products(c)])

    async def counts(self, provider: Address, model: str) -> dict[str, PooledCounts]:
        """Billed and counted tokens of a provider's answers by referee."""
        query = (
            sa.select(opinions.c.referee, sa.func.sum(opinions.c.billed), sa.func.sum(opinions.c.counted))
            .join(audits, audits.c.id == opinions.c.audit)
            .where(*audits_of(provider, model), opinions.c.counted > 0)
            .group_by(opinions.c.referee)
        )
        return await self._database.read(
            lambda c: {referee: PooledCounts(billed, counted) for referee, billed, counted in c.execute(query)}
        )

    async def pools(self, provider: Address, model: str, precision: str) -> list[tuple[str, Pool]]:
        """What adds up over a provider's latest WINDOW audits, the oldest first: of each answer once, by the first referee in the
        majority; without a verdict, by the first that passed it: evidence adds up also where its provider withholds the rest.
        """
        latest = sa.select(audits.c.id).where(*audits_of(provider, model, precision)).order_by(audits.c.id.desc()).limit(WINDOW)
        counted = sa.case((audits.c.verdict == Verdict.INCONCLUSIVE.value, Verdict.PASS.value), else_=audits.c.verdict)
        query = (
            sa.select(audits.c.job, opinions.c.referee, opinions.c.pool)
            .join(opinions, opinions.c.audit == audits.c.id)
            .where(audits.c.id.in_(latest), opinions.c.verdict == counted)
            .order_by(opinions.c.id)
        )

        def work(c: Connection) -> list[tuple[str, Pool]]:
            pools = list[tuple[str, Pool]]()
            seen = set[str]()
            for job, referee, packed in c.execute(query):
                if job not in seen:
                    seen.add(job)
                    pools.append((referee, Pool.from_json(orjson.loads(packed))))
            return pools

        return await self._database.read(work)

    async def earlier_tokens(self, provider: Address, model: str, job: str) -> list[bytes]:
        """The packed tokens of a provider's latest audited answers but that of `job`, oldest first."""
        query = (
            sa.select(audits.c.tokens)
            .where(audits.c.provider == provider, audits.c.model == model, audits.c.job != job, audits.c.tokens.is_not(None))
            .order_by(audits.c.id.desc())
            .limit(MAX_EARLIER)
        )
        return await self._database.read(lambda c: list(reversed(c.execute(query).scalars().all())))

    async def suspects(self, provider: Address, model: str, precision: str, limit: int) -> list[KnownAudit]:
        """The latest suspect answers of a provider, newest first."""
        query = sa.select(audits).where(*audits_of(provider, model, precision), audits.c.verdict == Verdict.SUSPECT.value)
        query = query.order_by(audits.c.id.desc()).limit(limit)
        return await self._database.read(lambda c: [read_audit(row) for row in c.execute(query)])

    async def record_dispute(self, audit: int, losers: dict[str, bool], now: int) -> None:
        """Records which referees of a disputed job were in the minority. A later view of the same job replaces an earlier one."""

        def work(c: Connection) -> None:
            for referee, lost in losers.items():
                row = insert(disputes).values(referee=referee, audit=audit, lost=lost, at=now)
                c.execute(row.on_conflict_do_update(index_elements=["referee", "audit"], set_={"lost": lost, "at": now}))

        await self._database.write(work)

    async def referee_records(self) -> dict[str, RefereeRecord]:
        """The disputes that each referee won and lost."""
        query = sa.select(disputes.c.referee, disputes.c.lost, sa.func.count()).group_by(disputes.c.referee, disputes.c.lost)

        def work(c: Connection) -> dict[str, RefereeRecord]:
            records: dict[str, RefereeRecord] = {}
            for referee, lost, number in c.execute(query):
                record = records.get(referee, RefereeRecord())
                records[referee] = RefereeRecord(record.won + (0 if lost else number), record.lost + (number if lost else 0))
            return records

        return await self._database.read(work)

    async def spent_since(self, since: int) -> Amount:
        """What audits that were drawn cost since a time (Unix seconds). Those that a person asked for are not counted."""
        query = sa.select(sa.func.coalesce(sa.func.sum(audits.c.cost), 0)).where(
            audits.c.origin == Origin.DRAWN.value, audits.c.created_at >= since
        )
        return Amount(await self._database.read(lambda c: int(c.execute(query).scalar_one())))

    # Reports

    async def add_report(self, audit: int, body: str, due_at: int) -> None:
        """Adds a report to be sent from a time on. Beyond MAX_REPORTS, the oldest that wait are given up."""
        values = {"audit": audit, "body": body, "state": "pending", "answer": "", "attempts": 0, "due_at": due_at}

        def work(c: Connection) -> None:
            c.execute(sa.insert(reports).values(values))
            newest = c.execute(sa.select(sa.func.max(reports.c.id))).scalar_one()
            c.execute(sa.delete(reports).where(reports.c.id <= newest - MAX_REPORTS))

        await self._database.write(work)

    async def due_reports(self, now: int, limit: int) -> list[WaitingReport]:
        """The reports whose time has come, oldest first."""
        query = (
            sa.select(reports).where(reports.c.state == "pending", reports.c.due_at <= now).order_by(reports.c.id).limit(limit)
        )
        return await self._database.read(
            lambda c: [WaitingReport(row.id, row.audit, row.body, row.attempts) for row in c.execute(query)]
        )

    async def postpone_report(self, report: int, reason: str, due_at: int) -> None:
        """Notes a try in vain, and when the next one is due."""
        values = {"answer": reason_text(reason), "due_at": due_at, "attempts": reports.c.attempts + 1}
        await self._database.write(lambda c: c.execute(sa.update(reports).where(reports.c.id == report).values(values)) and None)

    async def end_report(self, report: int, state: str, answer: str) -> None:
        """Notes that a report was taken (`sent`), or that it will not be (`refused`)."""
        values = {"state": state, "answer": reason_text(answer)}
        await self._database.write(lambda c: c.execute(sa.update(reports).where(reports.c.id == report).values(values)) and None)

    async def promises(self) -> list[Signed[ReportAck]]:
        """The coordinators' signed promises to log reports, newest first. Their signatures were checked when they came."""
        query = sa.select(reports.c.answer).where(reports.c.state == "sent").order_by(reports.c.id.desc()).limit(MAX_REPORTS)
        answers = await self._database.read(lambda c: list(c.execute(query).scalars()))
        promises: list[Signed[ReportAck]] = []
        for answer in answers:
            with contextlib.suppress(BadMessage):  # another release noted something else
                promises.append(loads_signed(ReportAck, answer))
        return promises

    async def report_state(self, audit: int) -> str:
        """What became of an audit's report: pending, sent, or refused with the reason; empty if there is none."""
        query = sa.select(reports.c.state, reports.c.answer).where(reports.c.audit == audit).order_by(reports.c.id.desc())
        row = await self._database.read(lambda c: c.execute(query).first())
        if row is None:
            return ""
        return f"{row.state}: {row.answer}" if row.state == "refused" else str(row.state)


def _is_known(c: Connection, new: NewAudit) -> bool:
    """Whether a job is audited already."""
    if not new.job or new.kind.planted:
        return False
    query = sa.select(audits.c.id).where(audits.c.job == new.job, NOT_PLANTED, audits.c.state != AuditState.FAILED.value)
    return c.execute(query.limit(1)).scalar() is not None
