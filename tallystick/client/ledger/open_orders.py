"""Orders that may still be collected although their jobs have ended, and the deliveries that their receipts will be checked
against.

An order that a provider had counts with its whole cap until a receipt for it is recorded or its `claim_by` passes. What arrived
for the order is stored with it, so a receipt that comes later may charge only for that. Functions of one connection, inside one
transaction that holds the file's write lock, like those of receipt_writes.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection, bindparam

from tallystick.client.ledger.schema import THIS_JOB, THIS_ORDER, JobState, OrderState, orders, tabs
from tallystick.client.ledger.tabs import TAB_ID, THIS_TAB
from tallystick.client.receipts.delivery_check import (
    MAX_UNDELIVERED_QUARTERS,
    QUARTERS_DELIVERED,
    QUARTERS_UNDELIVERED,
    Delivery,
    StreamEnd,
    UndeliveredCharge,
)
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.types import ZERO_HASH, Address, Hash, JobId
from tallystick.protocol.wire import dumps, loads
from tallystick.runtime.sqlite_statement import SqliteStatement

Deliveries = Mapping[Hash, Delivery]
"""What arrived for each order of a job that a provider had, by the order's digest."""
NO_DELIVERIES: Deliveries = {}


class OrderKey(NamedTuple):
    """Names an order of a job by its digest."""

    job: JobId
    digest: Hash

    @property
    def parameters(self) -> dict[str, object]:
        """The bound parameters that select it."""
        return {"of_job": bytes(self.job), "of_order": bytes(self.digest)}


_UNMATCHED = Delivery(0, 0, ZERO_HASH, finished=False, bounded=False)
"""The delivery of an order whose job ended here without the order being matched."""

_IS_OPEN, _IS_CLOSED, _IS_DISPATCHED = (
    orders.c.state == state.value for state in (OrderState.OPEN, OrderState.CLOSED, OrderState.DISPATCHED)
)
_MARK_DISPATCHED = SqliteStatement(
    sa.update(orders).where(THIS_ORDER, _IS_OPEN | _IS_CLOSED).values(state=OrderState.DISPATCHED.value)
)
_STORE_DELIVERY = SqliteStatement(
    sa.update(orders).where(THIS_ORDER, _IS_OPEN | _IS_DISPATCHED).values(delivered_doc=bindparam("to_doc"))
)
_SELECT_ORDER = SqliteStatement(
    sa.select(orders.c.delivered_doc, orders.c.undelivered_quarters, orders.c.state).where(THIS_ORDER)
)
_SELECT_JOB = SqliteStatement(sa.select(orders.c.job_state, orders.c.cancelled).where(THIS_JOB).limit(1))
_MARK_CANCELLED = sa.update(orders).where(THIS_JOB).values(cancelled=True)
_SET_QUARTERS = SqliteStatement(
    sa.update(orders)
    .where(THIS_ORDER)
    .values(undelivered_quarters=bindparam("to_quarters"), undelivered_at=bindparam("to_undelivered_at"))
)
_NEW_SUM = sa.func.max(0, tabs.c.undelivered_quarters + bindparam("to_quarters", type_=sa.Integer))
_ADD_QUARTERS = SqliteStatement(
    sa.update(tabs)
    .where(THIS_TAB)
    .values(
        undelivered_quarters=_NEW_SUM,
        blocked_reason=sa.case(
            ((tabs.c.blocked_reason == "") & (_NEW_SUM >= MAX_UNDELIVERED_QUARTERS), bindparam("to_blocked_reason")),
            else_=tabs.c.blocked_reason,
        ),
    )
)
_QUARTERS_SINCE = sa.select(sa.func.coalesce(sa.func.sum(orders.c.undelivered_quarters), 0)).where(
    orders.c.tab == TAB_ID,
    orders.c.digest != bindparam("of_order"),
    sa.text("orders.undelivered_at > 0"),  # the condition of the partial index
    orders.c.undelivered_at > bindparam("of_since"),
)
_JOB_CREATED_AT = sa.select(orders.c.created_at).where(THIS_JOB).limit(1)


def store_deliveries(c: Connection, job: JobId, deliveries: Deliveries) -> None:
    """Stores what arrived for orders of a job without a receipt. A finished delivery is never overwritten."""
    for digest, delivery in deliveries.items():
        order = OrderKey(job, digest)
        stored = _read_stored(c, order)
        if stored is None or not stored.finished:
            _STORE_DELIVERY.run(c, order.parameters | {"to_doc": dumps(delivery.to_json()).decode()})


def mark_dispatched(c: Connection, job: JobId, digests: Iterable[Hash]) -> None:
    """Marks orders of a job that a provider had and that have no receipt: they count until their `claim_by`."""
    for digest in digests:
        _MARK_DISPATCHED.run(c, OrderKey(job, digest).parameters)


def mark_cancelled(c: Connection, job: JobId) -> None:
    """Notes that this client asks for the end of a job; from now on a receipt may say that the client cancelled."""
    c.execute(_MARK_CANCELLED, {"of_job": bytes(job)})


def set_reader(c: Connection, job: JobId, reader: str) -> None:
    """Stores the name of the process that reads a job; see process_locks.py."""
    c.execute(sa.update(orders).where(THIS_JOB).values(reader=reader), {"of_job": bytes(job)})


def read_delivery(c: Connection, job: JobId, receipt: Receipt, delivery: Delivery | None) -> Delivery | None:
    """Returns the delivery to check a receipt against.

    It is `delivery`, what the job's reader saw, or else what was stored of an earlier stream. For an order that was never matched
    it is an empty delivery. It is None if nobody knows, because the job's reader crashed.
    """
    known = delivery if delivery is not None else _read_stored(c, OrderKey(job, receipt.order_hash))
    if known is None or known.cancelled or receipt.outcome != Outcome.CLIENT_CANCELLED:
        return known
    row = _SELECT_JOB.first(c, {"of_job": bytes(job)})
    return replace(known, cancelled=row is not None and bool(row.cancelled))


def _read_stored(c: Connection, order: OrderKey) -> Delivery | None:
    row = _SELECT_ORDER.first(c, order.parameters)
    if row is not None and row.state == OrderState.CLOSED.value:
        return _UNMATCHED
    if row is None or row.delivered_doc is None:
        return None
    return Delivery.from_json(loads(row.delivered_doc, "delivered"))


def job_state(c: Connection, job: JobId) -> JobState | None:
    """Returns the state of a job; None if the ledger does not have it."""
    row = _SELECT_JOB.first(c, {"of_job": bytes(job)})
    return None if row is None else JobState(row.job_state)


def count_undelivered(
    c: Connection,
    tab_key: Mapping[str, object],
    order: OrderKey,
    quarters: int,
    reason: str,
    *,
    delivery: Delivery | None,
    now: int,
) -> None:
    """Counts an order as so many quarters of an undelivered answer; see `delivery_check.QUARTERS_UNDELIVERED`.

    Replaces what the order counted before. Blocks the provider if the sum reaches the limit; `reason`
    describes the last event. Streams that were lost together (say this machine's network failed under many jobs) count together
    as the largest of them. Therefore what was counted since the order's job was placed is subtracted. `now` is Unix seconds.
    """
    key = order.parameters
    row = _SELECT_ORDER.first(c, key)
    before = 0 if row is None else row.undelivered_quarters
    stream_lost = quarters != QUARTERS_DELIVERED and delivery is not None and delivery.stream is not StreamEnd.ENDED
    if stream_lost:
        placed_at = c.execute(_JOB_CREATED_AT, key).scalar() or 0
        counted_since = c.execute(_QUARTERS_SINCE, {**tab_key, **key, "of_since": placed_at}).scalar_one()
        quarters = max(quarters - counted_since, 0)
    if quarters == before:
        return
    _SET_QUARTERS.run(c, key | {"to_quarters": quarters, "to_undelivered_at": now if stream_lost else 0})
    add_undelivered(c, tab_key, quarters - before, reason)


def add_undelivered(c: Connection, tab_key: Mapping[str, object], quarters: int, reason: str) -> None:
    """Adds quarters of an answer to what a provider charged without delivering; see `count_undelivered`."""
    answers = MAX_UNDELIVERED_QUARTERS // QUARTERS_UNDELIVERED
    text = f"it charged for {answers} or more answers that did not arrive; the last: {reason}"
    _ADD_QUARTERS.run(c, {**tab_key, "to_quarters": quarters, "to_blocked_reason": text[:1_000]})


def refuse_receipt(
    c: Connection,
    tab_key: Mapping[str, object],
    order: OrderKey,
    delivery: Delivery | None,
    error: UndeliveredCharge,
    *,
    now: int,
) -> None:
    """Notes that a receipt was refused for charging what did not arrive: its order counts on, and the answer is undelivered."""
    mark_dispatched(c, order.job, [order.digest])
    if delivery is not None:
        store_deliveries(c, order.job, {order.digest: delivery})
    count_undelivered(c, tab_key, order, QUARTERS_UNDELIVERED, str(error), delivery=delivery, now=now)


def reset_undelivered(c: Connection, payer: Address, provider: Address) -> None:
    """Sets the count of undelivered quarters to zero, because a person unblocked the provider."""
    own_tabs = (tabs.c.payer == payer) & (tabs.c.provider == provider)
    c.execute(sa.update(tabs).where(own_tabs).values(undelivered_quarters=0))
