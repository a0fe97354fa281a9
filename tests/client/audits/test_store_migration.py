from __future__ import annotations

import shutil
from pathlib import Path

import sqlalchemy as sa

from tallystick.audit.audit_counts import AuditCounts
from tallystick.client.audits.store import MIGRATIONS, AuditStore
from tallystick.protocol.types import Address
from tallystick.runtime.database_url import sqlite_url
from tallystick.runtime.storage import Database

PROVIDER = Address("0x" + "11" * 20)
COLUMNS = "kind, origin, state, job, provider, model, precision, verdict, reason, attempts, created_at, due_at, cost, tokens"


async def test_a_file_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    """Its audits count as they did: with evidence in full, and without a quarter; none of them is unverifiable."""
    former, path = tmp_path / MIGRATIONS.parent.name / MIGRATIONS.name, tmp_path / "audits.db"
    shutil.copytree(MIGRATIONS, former, ignore=shutil.ignore_patterns("0002_*", "__pycache__"))
    database = Database(sqlite_url(path), "ledger_file")
    await database.start(former)

    def fill(c: sa.Connection) -> None:
        for job, verdict, tokens in (("01", "pass", "x''"), ("02", "pass", "null"), ("03", "inconclusive", "null")):
            row = f"'job', 'drawn', 'done', '{job}', '{PROVIDER}', 'm', 'bf16', '{verdict}', '', 0, 1, 1, 0, {tokens}"
            c.execute(sa.text(f"insert into audits ({COLUMNS}) values ({row})"))

    await database.write(fill)
    await database.close()
    store = await AuditStore.open(path)
    try:
        (known,) = await store.all_provider_audits()
        assert known.counts == AuditCounts(passed=2, inconclusive=1)
        assert 1.24 < known.integrity.passes <= 1.25
        assert [(audit.unverifiable, audit.coverage) for audit in await store.latest(9)] == [(False, None)] * 3
    finally:
        await store.close()
