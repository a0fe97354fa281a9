"""The tables of a wallet's audits, which migrations/ creates. They have a file of their own, off the path of jobs."""

from __future__ import annotations

from enum import StrEnum

import sqlalchemy as sa


class AuditKind(StrEnum):
    """What is audited. PLANTED_*: an answer that is known to be good or bad, to check its referee."""

    JOB = "job"
    SYNTHETIC = "synthetic"
    PLANTED_GOOD = "planted-good"
    PLANTED_BAD = "planted-bad"

    @property
    def planted(self) -> bool:
        """Whether it checks the referee instead of the provider."""
        return self in (AuditKind.PLANTED_GOOD, AuditKind.PLANTED_BAD)


class Origin(StrEnum):
    """Why it is audited: by chance, or because a person asked."""

    DRAWN = "drawn"
    ASKED = "asked"


class AuditState(StrEnum):
    """PENDING: it waits, or is being done. DONE: it has its verdict. FAILED: it has none and gets none."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


metadata = sa.MetaData()

audits = sa.Table(
    "audits",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("kind", sa.String(16)),
    sa.Column("origin", sa.String(16)),
    sa.Column("state", sa.String(16)),
    sa.Column("job", sa.String(32)),
    sa.Column("provider", sa.String(42)),
    sa.Column("model", sa.Text),
    sa.Column("precision", sa.String(32)),
    sa.Column("verdict", sa.String(16)),
    sa.Column("reason", sa.Text),
    sa.Column("attempts", sa.Integer),
    sa.Column("created_at", sa.BigInteger),
    sa.Column("due_at", sa.BigInteger),
    sa.Column("finished_at", sa.BigInteger),
    sa.Column("cost", sa.BigInteger),
    sa.Column("kept", sa.LargeBinary),
    sa.Column("tokens", sa.LargeBinary),
    sa.Column("unverifiable", sa.Boolean),
    sa.Column("coverage", sa.Float),
)
"""`kept`: the packed job, until it is not needed. `tokens`: of its answer, for the comparison with later ones. `cost`: of its
referees and of a synthetic job, in base units. `unverifiable`: it could not decide because of what its provider did. `coverage`:
the share of the answer that has evidence; null before that was recorded.
"""
NOT_PLANTED = audits.c.kind.in_([AuditKind.JOB.value, AuditKind.SYNTHETIC.value])
"""Audits of providers, without the checks of referees."""
opinions = sa.Table(
    "opinions",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("audit", sa.Integer),
    sa.Column("referee", sa.String(64)),
    sa.Column("verdict", sa.String(16)),
    sa.Column("findings", sa.Text),
    sa.Column("pool", sa.Text),
    sa.Column("billed", sa.BigInteger),
    sa.Column("counted", sa.BigInteger),
    sa.Column("cost", sa.BigInteger),
    sa.Column("at", sa.BigInteger),
    sa.Column("scores", sa.LargeBinary),
)
"""`pool`: what adds up over answers. `scores`: the scoring job, signed by its referee; the bare JSON of an engine of the user's
own.
"""
disputes = sa.Table(
    "disputes",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("referee", sa.String(64)),
    sa.Column("audit", sa.Integer),
    sa.Column("lost", sa.Boolean),
    sa.Column("at", sa.BigInteger),
)
pardons = sa.Table(
    "pardons",
    metadata,
    sa.Column("provider", sa.String(42), primary_key=True),
    sa.Column("audit", sa.Integer),
)
"""Providers that a person unblocked: audits up to this one no longer count against them."""
reports = sa.Table(
    "reports",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("audit", sa.Integer),
    sa.Column("body", sa.Text),
    sa.Column("state", sa.String(16)),
    sa.Column("answer", sa.Text),
    sa.Column("attempts", sa.Integer),
    sa.Column("due_at", sa.BigInteger),
)
