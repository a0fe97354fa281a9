"""Storage of reports of audits, and of the integrity that they make of each product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from coordinator.domain.integrity_records import (
    DAY_SECONDS,
    MAX_REMEMBERED,
    IntegrityRecord,
    IntegrityRecords,
    ProductKey,
    RecordChange,
)
from coordinator.jobs.report_store import Finding, ReportDraft, ReportFacts, StoredReport
from coordinator.storage.schema import audit_reports, integrity
from coordinator.storage.settled_rows import read_settled
from coordinator.storage.upserts import upsert
from tallystick.audit.integrity import Integrity
from tallystick.protocol.log_leaves import ReportLeaf
from tallystick.protocol.types import Address, Amount, Hash, JobId
from tallystick.runtime.storage import Database

_PRODUCT = ("provider", "model", "precision")


class SqlReportStore:
    """Implements ReportStore on a database."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def put_report(self, report: StoredReport, change: RecordChange, since: int) -> None:
        """See ReportStore."""
        await self._db.write(lambda connection: _write_report(connection, report, change, since))

    async def report(self, finding: Finding) -> StoredReport | None:
        """See ReportStore."""
        return await self._db.read(lambda connection: _read_report(connection, finding))

    async def count_reports(self, payer: Address, product: ProductKey) -> int:
        """See ReportStore."""
        return await self._db.read(lambda connection: _count_reports(connection, payer, product))

    async def sum_effects(self, product: ProductKey, since: int, *, praises: bool) -> int:
        """See ReportStore."""
        return await self._db.read(lambda connection: _sum_effects(connection, product, since, praises=praises))

    async def settled_by(self, payer: Address) -> Mapping[Address, Amount]:
        """See ReportStore."""
        return await self._db.read(lambda connection: read_settled(connection, payer))

    async def integrity(self) -> list[tuple[ProductKey, IntegrityRecord]]:
        """See ReportStore."""
        found_false = integrity.c.probe_failures > 0
        newest = sa.select(integrity).order_by(found_false.desc(), integrity.c.leaf.desc()).limit(MAX_REMEMBERED)
        return await self._db.read(lambda connection: _read_records(connection, newest))


# In transactions


def log_report(
    connection: Connection, draft: ReportDraft, at: int, number: int, *, since: int
) -> tuple[StoredReport, ReportLeaf | None]:
    """Weighs and stores a report that is leaf `number` of the log of several replicas, of which this one holds the tail.

    Returns the report and its leaf; without a leaf, the report that another replica stored before.
    """
    known = _read_report(connection, draft.finding)
    if known is not None:
        return known, None
    settled, earlier = read_settled(connection, draft.payer), _count_reports(connection, draft.payer, draft.product)
    day_effect = _sum_effects(connection, draft.product, at - DAY_SECONDS, praises=draft.praises)
    leaf = replace(draft.make(ReportFacts(settled, earlier, day_effect)), at=at, epoch=draft.epoch)
    records = IntegrityRecords()
    records.restore(_read_records(connection, sa.select(integrity).where(integrity.c.provider == leaf.provider)))
    report = draft.store(leaf, number)
    _write_report(connection, report, records.apply(leaf, number), since)
    return report, leaf


def integrity_since(connection: Connection, leaf: int) -> list[tuple[ProductKey, IntegrityRecord]]:
    """Returns the records whose last report has this number or a later one, those with the oldest reports first."""
    query = sa.select(integrity).where(integrity.c.leaf >= leaf).order_by(integrity.c.leaf).limit(MAX_REMEMBERED)
    return _read_records(connection, query)


def _write_report(connection: Connection, report: StoredReport, change: RecordChange, since: int) -> None:
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
    upsert(connection, audit_reports, row, ("job", "provider", "convicts"))
    if change.record is not None:
        upsert(connection, integrity, change.product._asdict() | _posterior(change.record), _PRODUCT)
    for product in change.forgotten:
        connection.execute(sa.delete(integrity).filter_by(**product._asdict()))
    connection.execute(sa.delete(audit_reports).where(audit_reports.c.at < since))


def _read_report(connection: Connection, finding: Finding) -> StoredReport | None:
    job, provider, convicts = finding
    columns = audit_reports.c
    query = sa.select(audit_reports).where(columns.job == job, columns.provider == provider, columns.convicts == convicts)
    row = connection.execute(query).mappings().one_or_none()
    return None if row is None else _load(row)


def _count_reports(connection: Connection, payer: Address, product: ProductKey) -> int:
    columns = audit_reports.c
    mine = sa.and_(columns.payer == payer, columns.provider == product.provider)
    same = sa.and_(columns.model == product.model, columns.precision == product.precision)
    return int(connection.execute(sa.select(sa.func.count()).where(mine, same)).scalar_one())


def _sum_effects(connection: Connection, product: ProductKey, since: int, *, praises: bool) -> int:
    columns = audit_reports.c
    same = sa.and_(columns.provider == product.provider, columns.model == product.model, columns.precision == product.precision)
    effects = sa.func.coalesce(sa.func.sum(columns.effect), 0)
    query = sa.select(effects).where(same, columns.at >= since, columns.praises == praises)
    return int(connection.execute(query).scalar_one())


def _read_records(connection: Connection, query: sa.Select[Any]) -> list[tuple[ProductKey, IntegrityRecord]]:
    """Returns records, those with the oldest reports first."""
    rows = connection.execute(query).mappings().all()
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
