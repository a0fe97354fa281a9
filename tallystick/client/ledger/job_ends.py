"""The end of a job in the ledger: with its receipt (receipt_writes.py), or without one (`end_job`).

Functions of one connection, inside one transaction that holds the file's write lock.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy import Connection, bindparam

from tallystick.client.ledger import open_orders, spending
from tallystick.client.ledger.open_orders import NO_DELIVERIES, Deliveries
from tallystick.client.ledger.schema import IS_UNRESOLVED, JOB_ID, THIS_JOB, JobState, OrderState, jobs, orders
from tallystick.protocol.types import Hash, JobId
from tallystick.runtime.sqlite_statement import SqliteStatement

MAX_REASON = 1_000
"""Characters of a job's reason that are stored."""

_END_JOB = (
    sa.update(jobs)
    .where(THIS_JOB)
    .values(
        state=bindparam("to_state"),
        reason=bindparam("to_reason"),
        finished_at=bindparam("to_finished_at"),
        duration_ms=bindparam("to_duration_ms"),
    )
)
_END_ANY_JOB = SqliteStatement(_END_JOB)
_END_OPEN_JOB = SqliteStatement(_END_JOB.where(jobs.c.state == JobState.OPEN.value))
_END_UNKNOWN_JOB = SqliteStatement(_END_JOB.where(IS_UNRESOLVED))
_CLOSE_ORDERS = SqliteStatement(
    sa.update(orders).where(orders.c.job == JOB_ID, orders.c.state == OrderState.OPEN.value).values(state=OrderState.CLOSED.value)
)


def end_with_receipt(
    c: Connection,
    job: JobId,
    state: JobState,
    reason: str,
    now: int,
    *,
    deliveries: Deliveries,
    duration_ms: int | None,
    others_open: bool,
) -> None:
    """Ends a job whose receipt is recorded. `deliveries`: what arrived for its other orders, of which `others_open` says whether
    any is open. `now` is Unix seconds.
    """
    open_orders.store_deliveries(c, job, deliveries)
    open_orders.mark_dispatched(c, job, deliveries)
    key = {"of_job": bytes(job)}
    _END_ANY_JOB.run(c, _change(state, reason, now, duration_ms) | key)
    if others_open:
        _CLOSE_ORDERS.run(c, key)


def end_job(
    c: Connection,
    job: JobId,
    state: JobState,
    reason: str,
    now: int,
    *,
    deliveries: Deliveries = NO_DELIVERIES,
    matched: Sequence[Hash] = (),
    keep_orders_open: bool = False,
) -> None:
    """Ends a job without a receipt, unless its end is already known.

    Its orders in `deliveries` and `matched` were dispatched: they count until a receipt for them arrives or their `claim_by`
    passes. The other orders were never matched and stop counting. If the job is lost, or with `keep_orders_open`, nobody knows
    which orders were matched, so all of them go on counting. `now` is Unix seconds.
    """
    if state in (JobState.FAILED, JobState.DISPUTED):
        spending.add_failed(c, job, now)
    open_orders.store_deliveries(c, job, deliveries)
    open_orders.mark_dispatched(c, job, [*deliveries, *matched])
    key = {"of_job": bytes(job)}
    statement = {JobState.LOST: _END_OPEN_JOB, JobState.DISPUTED: _END_ANY_JOB}.get(state, _END_UNKNOWN_JOB)
    statement.run(c, _change(state, reason, now, None) | key)
    if state is not JobState.LOST and not keep_orders_open:
        _CLOSE_ORDERS.run(c, key)


def _change(state: JobState, reason: str, now: int, duration_ms: int | None) -> dict[str, object]:
    return {
        "to_state": state.value,
        "to_reason": reason[:MAX_REASON],
        "to_finished_at": now,
        "to_duration_ms": duration_ms,
    }
