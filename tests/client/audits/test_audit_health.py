"""When a wallet's audits are a warning: a suspect answer, or audits that come to no verdict."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tallystick.audit.verdicts import Verdict
from tallystick.client.audits.audit_health import DAY, check_audits
from tallystick.client.audits.records import AuditEnd, NewAudit
from tallystick.client.audits.schema import AuditKind, Origin
from tallystick.client.audits.store import AuditStore
from tallystick.protocol.health import Health
from tallystick.protocol.types import Address

NOW = 1_800_000_000
PROVIDER = Address("0x" + "ab" * 20)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[AuditStore]:
    """An empty file of audits."""
    opened = await AuditStore.open(tmp_path / "audits.db")
    yield opened
    await opened.close()


async def _end(store: AuditStore, verdict: Verdict | None, *, at: int = NOW, kind: AuditKind = AuditKind.JOB) -> None:
    """Adds an audit that ended so; None: it failed."""
    number = await store.add(NewAudit(kind, Origin.DRAWN, PROVIDER, "m", "q4", os.urandom(16).hex()), at)
    assert number is not None
    if verdict is None:
        await store.fail(number, "nobody can judge it", at)
    else:
        await store.finish(number, AuditEnd(verdict, ""), at)


async def test_audits_that_pass(store: AuditStore) -> None:
    """None at all, those that pass, and those that wait are no warning."""
    assert ((await check_audits(store, NOW)).status, (await check_audits(store, NOW)).value) == (Health.PASS, 0)
    await _end(store, Verdict.PASS)
    await _end(store, Verdict.INCONCLUSIVE)
    result = await check_audits(store, NOW)
    assert (result.status, result.value) == (Health.PASS, 2)


async def test_a_suspect_answer(store: AuditStore) -> None:
    """One within a day warns and names the command; a day later, and of a planted answer, it does not."""
    await _end(store, Verdict.PASS)
    await _end(store, Verdict.SUSPECT, kind=AuditKind.PLANTED_BAD)
    await _end(store, Verdict.SUSPECT, at=NOW - DAY - 1)
    assert (await check_audits(store, NOW)).status is Health.PASS
    await _end(store, Verdict.SUSPECT, at=NOW - DAY)
    result = await check_audits(store, NOW)
    assert (result.status, result.output) == (Health.WARN, "1 of 2 audits within a day found the answer suspect")
    assert result.remedy == "tally audit providers"


@pytest.mark.parametrize(("failed", "passed", "warns"), [(2, 0, False), (3, 3, True), (3, 4, False)])
async def test_audits_without_a_verdict(store: AuditStore, failed: int, passed: int, warns: bool) -> None:
    """If most audits fail, nothing that is bought is checked; a few failures are normal."""
    for _ in range(failed):
        await _end(store, None)
    for _ in range(passed):
        await _end(store, Verdict.PASS)
    result = await check_audits(store, NOW)
    assert (result.status is Health.WARN) is warns
    if warns:
        assert result.output == f"{failed} of {failed + passed} audits within a day came to no verdict"
        assert "tally audit share --allow" in result.remedy
