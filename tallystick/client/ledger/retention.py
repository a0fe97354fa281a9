"""Retention: ended jobs are deleted with their orders and receipts once they are old enough.

What is still needed stays, however old it is: tabs, sums of spending and evidence; jobs whose end is unknown; jobs with an
order that counts against its tab or may be claimed still, or with an idempotency key; and the newest receipt of each tab, which
the next one is checked against. The space of deleted rows is used again, so the file stops growing. Functions of one connection,
inside one write transaction.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection, bindparam

from tallystick.client.ledger.schema import IS_COLLECTABLE, JobState, jobs, keys, orders, receipts, tabs, workloads
from tallystick.protocol.types import Address

FORGOTTEN_AT_ONCE = 500
"""Jobs that one write deletes."""

_BEFORE: sa.BindParameter[int] = bindparam("of_before")
_FIRST_NEWER = sa.select(jobs.c.id).where(jobs.c.created_at >= _BEFORE).order_by(jobs.c.id).limit(1).scalar_subquery()
_AT_LEAST = 1 << 62
_COUNTS = sa.exists().where(orders.c.job == jobs.c.id, IS_COLLECTABLE)
_CLAIMABLE = sa.exists().where(orders.c.job == jobs.c.id, orders.c.claim_by > bindparam("of_now"))
_others = receipts.alias("others")
_NEWEST_SEQ = sa.select(sa.func.max(_others.c.seq)).where(_others.c.tab == receipts.c.tab).scalar_subquery()
_HAS_NEWEST_RECEIPT = sa.exists().where(
    orders.c.job == jobs.c.id, receipts.c.order_id == orders.c.id, receipts.c.seq == _NEWEST_SEQ
)
_HAS_KEY = sa.func.lower(sa.func.hex(jobs.c.job)).in_(sa.select(keys.c.job))
_OLD_JOBS = (
    sa.select(jobs.c.id)
    .join(workloads, workloads.c.id == jobs.c.workload)
    .where(jobs.c.id < sa.func.coalesce(_FIRST_NEWER, _AT_LEAST), workloads.c.payer == bindparam("of_payer"))
    .where(jobs.c.finished_at < _BEFORE, ~_COUNTS, ~_CLAIMABLE, ~_HAS_NEWEST_RECEIPT, ~_HAS_KEY)
    .where(jobs.c.state.not_in([JobState.OPEN.value, JobState.LOST.value]))
    .order_by(jobs.c.id)
    .limit(bindparam("of_limit"))
)
_OF_THESE: sa.BindParameter[list[int]] = bindparam("of_jobs", expanding=True)
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
        c.execute(sa.delete(receipts).where(receipts.c.order_id.in_(sa.select(orders.c.id).where(_THEIR_ORDERS))), these)
        c.execute(sa.delete(orders).where(_THEIR_ORDERS), these)
        c.execute(sa.delete(jobs).where(jobs.c.id.in_(_OF_THESE)), these)
    return len(old)
