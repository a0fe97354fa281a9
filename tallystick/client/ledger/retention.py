"""Retention: ended jobs are deleted with their orders and receipts once they are old enough.

What is still needed stays, however old it is: tabs, sums of spending and evidence; jobs whose end is unknown; jobs with an
order that counts against its tab or may be claimed still, or with an idempotency key; and the newest receipt of each tab, which
the next one is checked against. The space of deleted rows is used again, so the file stops growing. Functions of one connection,
inside one write transaction.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection, bindparam

from tallystick.client.ledger.schema import COLLECTABLE, JobState, keys, order_docs, orders, receipts, tabs, workloads
from tallystick.protocol.types import Address

FORGOTTEN_AT_ONCE = 500
"""Jobs that one write deletes."""

_BEFORE: sa.BindParameter[int] = bindparam("of_before")
_FIRST_NEWER = sa.select(orders.c.id).where(orders.c.created_at >= _BEFORE).order_by(orders.c.id).limit(1).scalar_subquery()
_AT_LEAST = 1 << 62
_siblings = orders.alias("siblings")
"""All orders of a job."""
_OF_JOB = _siblings.c.job == orders.c.job
_HAS_EARLIER = sa.exists().where(_OF_JOB, _siblings.c.id < orders.c.id)
_COUNTS = sa.exists().where(_OF_JOB, _siblings.c.state.in_([state.value for state in COLLECTABLE]))
_CLAIMABLE = sa.exists().where(_OF_JOB, _siblings.c.claim_by > bindparam("of_now"))
_others = receipts.alias("others")
_NEWEST_SEQ = sa.select(sa.func.max(_others.c.seq)).where(_others.c.tab == receipts.c.tab).scalar_subquery()
_HAS_NEWEST_RECEIPT = sa.exists().where(_OF_JOB, receipts.c.id == _siblings.c.receipt, receipts.c.seq == _NEWEST_SEQ)
_HAS_KEY = sa.func.lower(sa.func.hex(orders.c.job)).in_(sa.select(keys.c.job))
_OLD_JOBS = (
    sa.select(orders.c.job)
    .join(workloads, workloads.c.id == orders.c.workload)
    .where(orders.c.id < sa.func.coalesce(_FIRST_NEWER, _AT_LEAST), workloads.c.payer == bindparam("of_payer"))
    .where(orders.c.finished_at < _BEFORE, ~_HAS_EARLIER, ~_COUNTS, ~_CLAIMABLE, ~_HAS_NEWEST_RECEIPT, ~_HAS_KEY)
    .where(orders.c.job_state.not_in([JobState.OPEN.value, JobState.LOST.value]))
    .order_by(orders.c.id)
    .limit(bindparam("of_limit"))
)
_OF_THESE: sa.BindParameter[list[bytes]] = bindparam("of_jobs", expanding=True)
_THEIR_ORDERS = orders.c.job.in_(_OF_THESE)
_LAST_SEQS = sa.select(orders.c.tab, sa.func.max(orders.c.seq).label("seq")).where(_THEIR_ORDERS).group_by(orders.c.tab)
_RAISE_MARK = (
    sa.update(tabs)
    .where(tabs.c.id == bindparam("of_tab"))
    .values(forgotten_seq=sa.func.max(tabs.c.forgotten_seq, bindparam("to_seq")))
)


def forget_jobs(c: Connection, payer: Address, now: int, keep: int, limit: int) -> int:
    """Deletes up to `limit` jobs that ended more than `keep` seconds before `now` (Unix seconds), oldest first.

    Returns how many it deleted.
    """
    of = {"of_payer": payer, "of_now": now, "of_before": now - keep, "of_limit": limit}
    old = list(c.execute(_OLD_JOBS, of).scalars())
    if old:
        these = {"of_jobs": old}
        for row in c.execute(_LAST_SEQS, these).all():
            c.execute(_RAISE_MARK, {"of_tab": row.tab, "to_seq": row.seq})
        c.execute(sa.delete(receipts).where(receipts.c.id.in_(sa.select(orders.c.receipt).where(_THEIR_ORDERS))), these)
        c.execute(sa.delete(order_docs).where(order_docs.c.id.in_(sa.select(orders.c.id).where(_THEIR_ORDERS))), these)
        c.execute(sa.delete(orders).where(_THEIR_ORDERS), these)
    return len(old)
