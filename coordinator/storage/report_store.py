"""Storage of reports of audits, and of the integrity that they make of each product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from coordinator.domain.integrity_records import MAX_REMEMBERED, IntegrityRecord, ProductKey, RecordChange
from coordinator.jobs.report_store import Finding, StoredReport
from coordinator.storage.schema import audit_reports, integrity, settlements
from coordinator.storage.upserts import upsert
from tallystick.audit.integrity import Integrity
from tallystick.protocol.types import Address, Amount, Hash, JobId
from tallystick.runtime.storage import Database

_MAX_SETTLEMENTS = 10_000
"""Tabs of one payer that its weight is read from."""
_PRODUCT = ("provider", "model", "precision")


class SqlReportStore:
    """Implements ReportStore on a database."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def put_report(self, report: StoredReport, change: RecordChange, since: int) -> None:
        """See ReportStore."""
        job, provider, convicts = report.finding
        row = {
            "job": job,
            "provider": provider,
            "convicts": convicts,
            "payer": report.payer,
            "model": report.product.model,
            "precision": report.product.precision,
            "at": report.at,
            "leaf": report.index,
            "report_hash": report.report_hash,
            "leaf_hash": report.leaf_hash,
            "praises": report.praises,
            "effect": report.effect,
        }

        def work(connection: Connection) -> None:
            upsert(connection, audit_reports, row, ("job", "provider", "convicts"))
            if change.record is not None:
                upsert(connection, integrity, change.product._asdict() | _posterior(change.record), _PRODUCT)
            for product in change.forgotten:
                connection.execute(sa.delete(integrity).filter_by(**product._asdict()))
            connection.execute(sa.delete(audit_reports).where(audit_reports.c.at < since))

        await self._db.write(work)

    async def report(self, finding: Finding) -> StoredReport | None:
        """See ReportStore."""
        job, provider, convicts = finding
        columns = audit_reports.c
        query = sa.select(audit_reports).where(columns.job == job, columns.provider == provider, columns.convicts == convicts)
        row = await self._db.read(lambda connection: connection.execute(query).mappings().one_or_none())
        return None if row is None else _load(row)

    async def count_reports(self, payer: Address, product: ProductKey) -> int:
        """See ReportStore."""
        columns = audit_reports.c
        mine = sa.and_(columns.payer == payer, columns.provider == product.provider)
        same = sa.and_(columns.model == product.model, columns.precision == product.precision)
        query = sa.select(sa.func.count()).where(mine, same)
        return int(await self._db.read(lambda connection: connection.execute(query).scalar_one()))

    async def sum_effects(self, product: ProductKey, since: int, *, praises: bool) -> int:
        """See ReportStore."""
        columns = audit_reports.c
        same = sa.and_(
            columns.provider == product.provider, columns.model == product.model, columns.precision == product.precision
        )
        effects = sa.func.coalesce(sa.func.sum(columns.effect), 0)
        query = sa.select(effects).where(same, columns.at >= since, columns.praises == praises)
        return int(await self._db.read(lambda connection: connection.execute(query).scalar_one()))

    async def settled_by(self, payer: Address) -> Mapping[Address, Amount]:
        """See ReportStore."""
        query = (
            sa.select(settlements.c.provider, settlements.c.settled).where(settlements.c.payer == payer).limit(_MAX_SETTLEMENTS)
        )
        rows = await self._db.read(lambda connection: connection.execute(query).all())
        return {Address(provider): Amount(int(settled)) for provider, settled in rows}

    async def integrity(self) -> list[tuple[ProductKey, IntegrityRecord]]:
        """See ReportStore."""
        found_false = integrity.c.probe_failures > 0
        newest = sa.select(integrity).order_by(found_false.desc(), integrity.c.leaf.desc()).limit(MAX_REMEMBERED)
        rows = await self._db.read(lambda connection: connection.execute(newest).mappings().all())
        return [
            (
                ProductKey(Address(row["provider"]), row["model"], row["precision"]),
                IntegrityRecord(Integrity(row["passes"], row["failures"], row["audits"]), row["probe_failures"], row["leaf"]),
            )
            for row in sorted(rows, key=lambda row: row["leaf"])
        ]


def _posterior(record: IntegrityRecord) -> dict[str, Any]:
    return {
        "passes": record.integrity.passes,
        "failures": record.integrity.failures,
        "audits": record.integrity.audits,
        "probe_failures": record.probe_failures,
        "leaf": record.leaf,
    }


def _load(row: Mapping[Any, Any]) -> StoredReport:
    provider = Address(row["provider"])
    return StoredReport(
        (JobId(bytes(row["job"])), provider, bool(row["convicts"])),
        Address(row["payer"]),
        ProductKey(provider, row["model"], row["precision"]),
        row["at"],
        row["leaf"],
        Hash(bytes(row["report_hash"])),
        Hash(bytes(row["leaf_hash"])),
        bool(row["praises"]),
        int(row["effect"]),
    )
