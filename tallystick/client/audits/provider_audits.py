"""What the file of audits says of each provider: its audits by outcome, and its integrity. Functions on an open connection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from tallystick.audit.audit_counts import LATEST, UNVERIFIABLE_WEIGHT, AuditCounts
from tallystick.audit.integrity import Integrity, weight_of
from tallystick.audit.verdicts import Verdict
from tallystick.client.audits.schema import NOT_PLANTED, AuditState, audits, pardons
from tallystick.protocol.types import Address

MAX_PROVIDERS = 10_000
"""Products of providers that are listed, those audited last first."""


@dataclass(frozen=True, slots=True)
class ProviderAudits:
    """A provider's audits of one product since it was last unblocked. `counts`: all; `latest`: the latest LATEST."""

    provider: Address
    model: str
    precision: str
    counts: AuditCounts
    latest: AuditCounts
    integrity: Integrity

    @property
    def is_named(self) -> bool:
        """Whether it is named as one whose answers cannot be checked."""
        return self.latest.is_named


def audits_of(provider: Address, model: str, precision: str | None = None) -> tuple[sa.ColumnElement[bool], ...]:
    """The audits of a provider's answers since it was last unblocked; of one class or of all."""
    pardoned = sa.select(pardons.c.audit).where(pardons.c.provider == provider).scalar_subquery()
    since = audits.c.id > sa.func.coalesce(pardoned, 0)
    sold = (audits.c.provider == provider, audits.c.model == model, NOT_PLANTED, since)
    return sold if precision is None else (*sold, audits.c.precision == precision)


def list_products(c: Connection) -> list[tuple[Address, str, str]]:
    """The products that have audits: provider, model and precision, those audited last first."""
    columns = audits.c.provider, audits.c.model, audits.c.precision
    done = sa.select(*columns).where(NOT_PLANTED, audits.c.state == AuditState.DONE.value)
    query = done.group_by(*columns).order_by(sa.func.max(audits.c.id).desc()).limit(MAX_PROVIDERS)
    return [(Address(provider), model, precision) for provider, model, precision in c.execute(query)]


def read_provider(c: Connection, provider: Address, model: str, precision: str) -> ProviderAudits:
    """What the audits of a provider say of it. Of a job that was audited again, the last audit counts."""
    columns = audits.c.job, audits.c.verdict, audits.c.unverifiable, audits.c.coverage, audits.c.tokens.is_not(None)
    query = sa.select(*columns).where(*audits_of(provider, model, precision), audits.c.state == AuditState.DONE.value)
    by_job = {
        job: (Verdict(verdict), bool(unverifiable), float(has_evidence) if coverage is None else coverage)
        for job, verdict, unverifiable, coverage, has_evidence in c.execute(query.order_by(audits.c.id))
    }
    ended = list(by_job.values())
    latest = _count(ended[-LATEST:])
    integrity = Integrity()
    for verdict, unverifiable, coverage in ended:
        if not unverifiable:
            integrity = integrity.after(verdict, weight=weight_of(verdict, coverage))
        elif latest.is_named:
            integrity = integrity.after(Verdict.SUSPECT, weight=UNVERIFIABLE_WEIGHT)
    return ProviderAudits(provider, model, precision, _count(ended), latest, integrity)


def _count(ended: Sequence[tuple[Verdict, bool, float]]) -> AuditCounts:
    kinds = [verdict for verdict, unverifiable, _ in ended if not unverifiable]
    return AuditCounts(
        passed=kinds.count(Verdict.PASS),
        suspect=kinds.count(Verdict.SUSPECT),
        inconclusive=kinds.count(Verdict.INCONCLUSIVE),
        unverifiable=len(ended) - len(kinds),
    )
