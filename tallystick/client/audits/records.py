"""Audits, opinions and reports as they stand in the file, and how they are read from it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import orjson
import sqlalchemy as sa

from tallystick.audit.token_counts import PooledCounts
from tallystick.audit.verdicts import Finding, Verdict
from tallystick.client.audits.pools import NO_POOL, Pool
from tallystick.client.audits.schema import AuditKind, AuditState, Origin
from tallystick.protocol.types import Address, Amount

MAX_REASON = 1_000


@dataclass(frozen=True, slots=True)
class NewAudit:
    """An audit to be done. `job`: whose answer it is about; empty for a request that is still to be made up.

    `kept`: the packed job, if it is known.
    """

    kind: AuditKind
    origin: Origin
    provider: Address
    model: str
    precision: str
    job: str = ""
    kept: bytes | None = None
    delay: int = 0
    """Seconds until it is done."""


@dataclass(frozen=True, slots=True)
class KnownAudit:
    """An audit in the file. `verdict` is of the job, as all its referees together see it. Times are Unix seconds.

    `attempts`: how often it was tried in vain. `cost`: of its referees and of a synthetic job.
    """

    id: int
    kind: AuditKind
    origin: Origin
    state: AuditState
    job: str
    provider: Address
    model: str
    precision: str
    verdict: Verdict
    reason: str
    attempts: int
    created_at: int
    finished_at: int | None
    cost: Amount
    kept: bytes | None
    unverifiable: bool = False
    """Whether it could not decide because of what the provider did; see tallystick/audit/audit_counts.py."""
    coverage: float | None = None
    """The share of the answer that has evidence, from 0 to 1; None if it is not known."""


@dataclass(frozen=True, slots=True)
class AuditEnd:
    """How an audit ended. `tokens`: of the answer, packed. `keep`: whether its contents are needed further.

    `coverage`: the share of the answer that has evidence, from 0 to 1. `unverifiable`: see `KnownAudit`.
    """

    verdict: Verdict
    reason: str
    tokens: bytes | None = None
    keep: bool = False
    coverage: float | None = None
    unverifiable: bool = False


@dataclass(frozen=True, slots=True)
class Opinion:
    """What one referee found. `billed` and `counted`: tokens of the job by its receipt and by the referee.

    `scores`: what the referee sent. `cost` is in base units.
    """

    referee: str
    verdict: Verdict
    findings: tuple[Finding, ...]
    counts: PooledCounts
    cost: Amount
    at: int
    scores: bytes | None = None
    pool: Pool = NO_POOL


@dataclass(frozen=True, slots=True)
class WaitingReport:
    """A signed report that the coordinator has not taken yet."""

    id: int
    audit: int
    body: str
    attempts: int


def read_audit(row: sa.Row[tuple[object, ...]]) -> KnownAudit:
    """An audit, from its row."""
    return KnownAudit(
        id=row.id,
        kind=AuditKind(row.kind),
        origin=Origin(row.origin),
        state=AuditState(row.state),
        job=row.job,
        provider=Address(row.provider),
        model=row.model,
        precision=row.precision,
        verdict=Verdict(row.verdict),
        reason=row.reason,
        attempts=row.attempts,
        created_at=row.created_at,
        finished_at=row.finished_at,
        cost=Amount(row.cost),
        kept=row.kept,
        unverifiable=bool(row.unverifiable),
        coverage=row.coverage,
    )


def read_opinion_row(row: sa.Row[tuple[object, ...]]) -> Opinion:
    """An opinion, from its row."""
    findings = tuple(
        Finding(
            entry["test"],
            float("nan") if entry["statistic"] is None else entry["statistic"],
            entry["threshold"],
            entry["conclusive"],
        )
        for entry in orjson.loads(row.findings)
    )
    counts = PooledCounts(row.billed, row.counted)
    pool = Pool.from_json(orjson.loads(row.pool))
    return Opinion(row.referee, Verdict(row.verdict), findings, counts, Amount(row.cost), row.at, row.scores, pool)


def finding_json(finding: Finding) -> dict[str, object]:
    """A finding, for a row."""
    return {
        "test": finding.test,
        "statistic": finding.statistic,
        "threshold": finding.threshold,
        "conclusive": finding.conclusive,
    }


def reason_text(text: str) -> str:
    """A reason for the file, which takes no lone surrogates."""
    return text[:MAX_REASON].encode(errors="replace").decode()
