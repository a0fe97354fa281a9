"""The end of a job in the ledger: with its receipt (receipt_writes.py), or without one (`end_job`).

Functions of one connection, inside one transaction that holds the file's write lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection, bindparam

from tallystick.client.ledger import open_orders, spending
from tallystick.client.ledger.open_orders import NO_DELIVERIES, Deliveries
from tallystick.client.ledger.schema import IS_UNRESOLVED, THIS_JOB, JobState, OrderState, orders
from tallystick.protocol.types import Hash, JobId
from tallystick.runtime.sqlite_statement import SqliteStatement

MAX_REASON = 1_000
"""Characters of a job's reason that are stored."""

_END_JOB = (
    sa.update(orders)
    .where(THIS_JOB)
    .values(
        job_state=bindparam("to_state"),
        reason=bindparam("to_reason"),
        finished_at=bindparam("to_finished_at"),
        duration_ms=bindparam("to_duration_ms"),
    )
)
_END_ANY_JOB = SqliteStatement(_END_JOB)
_END_OPEN_JOB = SqliteStatement(_END_JOB.where(orders.c.job_state == JobState.OPEN.value))
_END_UNKNOWN_JOB = SqliteStatement(_END_JOB.where(IS_UNRESOLVED))
_IS_OPEN = orders.c.state == OrderState.OPEN.value
_CLOSE_ORDERS = SqliteStatement(sa.update(orders).where(THIS_JOB, _IS_OPEN).values(state=OrderState.CLOSED.value))
_IS_RECORDED = orders.c.id == bindparam("of_order_id")
_END_WITH_RECEIPT = SqliteStatement(
    _END_JOB.values(
        state=sa.case((_IS_RECORDED, OrderState.RECORDED.value), (_IS_OPEN, OrderState.CLOSED.value), else_=orders.c.state),
        receipt=sa.case((_IS_RECORDED, bindparam("to_receipt")), else_=orders.c.receipt),
        undelivered_quarters=sa.case((_IS_RECORDED, bindparam("to_quarters")), else_=orders.c.undelivered_quarters),
    )
)


class RecordedOrder(NamedTuple):
    """An order whose receipt ends its job: the numbers of both, and what the order counts as undelivered."""

    number: int
    receipt: int
    undelivered_quarters: int


def end_with_receipt(
    c: Connection,
    job: JobId,
    recorded: RecordedOrder,
    state: JobState,
    reason: str,
    *,
    now: int,
    deliveries: Deliveries,
    duration_ms: int | None,
) -> None:
    """Ends a job with the receipt of one of its orders. `deliveries`: what arrived for its other orders; those that are open and
    not among these were never matched. `now` is Unix seconds.
    """
    open_orders.store_deliveries(c, job, deliveries)
    open_orders.mark_dispatched(c, job, deliveries)
    change = _change(state, reason, now, duration_ms)
    order = {"of_order_id": recorded.number, "to_receipt": recorded.receipt, "to_quarters": recorded.undelivered_quarters}
    _END_WITH_RECEIPT.run(c, change | order | {"of_job": bytes(job)})


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
