"""Orders that may still be collected, though their jobs have ended: what arrived for them, and what that says of their providers.

An order that a provider had counts, with its whole cap, until a receipt for it is booked or its `claim_by` passes. What had
arrived is kept with it, so that a receipt which comes later charges for that and nothing else. Functions of one connection,
inside one transaction that holds the file's write lock, like those of books.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import sqlalchemy as sa
from sqlalchemy import Connection, bindparam

from tallystick.client.ledger.schema import JobState, OrderState, jobs, orders, tabs
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

Deliveries = Mapping[Hash, Delivery]
"""What arrived for each order of a job that a provider had."""
NO_DELIVERIES: Deliveries = {}

_ORDER = orders.c.digest == bindparam("of_order")
_UNDECIDED = orders.c.state.in_([OrderState.OPEN.value, OrderState.DISPATCHED.value])
_DISPATCH = (
    sa.update(orders)
    .where(_ORDER, orders.c.state.in_([OrderState.OPEN.value, OrderState.CLOSED.value]))
    .values(state=OrderState.DISPATCHED.value)
)
_KEEP = sa.update(orders).where(_ORDER, _UNDECIDED).values(delivered_doc=bindparam("to_doc"))
_WHAT = sa.select(orders.c.delivered_doc, orders.c.undelivered_quarters, orders.c.state).where(_ORDER)
_UNMATCHED = Delivery(0, 0, ZERO_HASH, finished=False, bounded=False)
"""What arrived for an order whose job ended here, and which nobody was told to have."""
_JOB = sa.select(jobs.c.state, jobs.c.cancelled).where(jobs.c.job == bindparam("of_job"))
_CANCELLED = sa.update(jobs).where(jobs.c.job == bindparam("of_job")).values(cancelled=True)
_COUNT = (
    sa.update(orders)
    .where(_ORDER)
    .values(undelivered_quarters=bindparam("to_quarters"), undelivered_at=bindparam("to_undelivered_at"))
)
_THEIRS = (
    (tabs.c.deployment_id == bindparam("of_deployment_id"))
    & (tabs.c.payer == bindparam("of_payer"))
    & (tabs.c.provider == bindparam("of_provider"))
)
_SUM = sa.func.max(0, tabs.c.undelivered_quarters + bindparam("to_quarters", type_=sa.Integer))
_ADD = (
    sa.update(tabs)
    .where(_THEIRS)
    .values(
        undelivered_quarters=_SUM,
        blocked_reason=sa.case(
            ((tabs.c.blocked_reason == "") & (_SUM >= MAX_UNDELIVERED_QUARTERS), bindparam("to_blocked_reason")),
            else_=tabs.c.blocked_reason,
        ),
    )
)


_TOGETHER = sa.select(sa.func.coalesce(sa.func.sum(orders.c.undelivered_quarters), 0)).where(
    orders.c.deployment_id == bindparam("of_deployment_id"),
    orders.c.payer == bindparam("of_payer"),
    orders.c.provider == bindparam("of_provider"),
    orders.c.digest != bindparam("of_order"),
    sa.text("orders.undelivered_at > 0"),  # as the index says
    orders.c.undelivered_at > bindparam("of_since"),
)
_PLACED = sa.select(jobs.c.created_at).join(orders, orders.c.job == jobs.c.job).where(_ORDER)


def store_deliveries(c: Connection, arrived: Deliveries) -> None:
    """Keeps what arrived for orders that have no receipt yet. What arrived in full is not overwritten by less."""
    for order, delivered in arrived.items():
        which = {"of_order": order.hex()}
        before = _read(c, order)
        if before is None or not before.finished:
            c.execute(_KEEP, which | {"to_doc": dumps(delivered.to_json()).decode()})


def mark_dispatched(c: Connection, digests: Iterable[Hash]) -> None:
    """A provider had these orders, and their job goes on or ended without a receipt for them: they count until `claim_by`."""
    for order in digests:
        c.execute(_DISPATCH, {"of_order": order.hex()})


def mark_cancelled(c: Connection, job: JobId) -> None:
    """This client asks for the end of a job: a receipt may say so from now on."""
    c.execute(_CANCELLED, {"of_job": job.hex()})


def set_reader(c: Connection, job: JobId, reader: str) -> None:
    """A process takes a job up."""
    c.execute(sa.update(jobs).where(jobs.c.job == job.hex()).values(reader=reader))


def read_delivery(c: Connection, job: JobId, receipt: Receipt, delivered: Delivery | None) -> Delivery | None:
    """What to hold a receipt against: what its reader saw, else what was kept of an earlier stream; nothing, where the order was
    never matched; None if nobody knows, since the job's reader crashed.
    """
    seen = delivered if delivered is not None else _read(c, receipt.order_hash)
    if seen is None or seen.cancelled or receipt.outcome != Outcome.CLIENT_CANCELLED:
        return seen
    row = c.execute(_JOB, {"of_job": job.hex()}).first()
    return replace(seen, cancelled=row is not None and bool(row.cancelled))


def _read(c: Connection, order: Hash) -> Delivery | None:
    row = c.execute(_WHAT, {"of_order": order.hex()}).first()
    if row is not None and row.state == OrderState.CLOSED.value:
        return _UNMATCHED
    if row is None or row.delivered_doc is None:
        return None
    return Delivery.from_json(loads(row.delivered_doc, "delivered"))


def job_state(c: Connection, job: JobId) -> JobState | None:
    """Where a job is."""
    row = c.execute(_JOB, {"of_job": job.hex()}).first()
    return None if row is None else JobState(row.state)


def count_undelivered(
    c: Connection, tab: Mapping[str, object], order: Hash, quarters: int, reason: str, *, seen: Delivery | None, now: int
) -> None:
    """Counts an order of a tab as so many quarters of an answer (see payer.NOT_DELIVERED); what it counted before is taken back.

    Freezes the tab where that is too much: `reason` says what happened last. Streams that were lost together, as when this
    machine's network fails under many jobs, count together as the one that counts most: so what was counted since a job was
    placed is taken off.
    """
    which = {"of_order": order.hex()}
    row = c.execute(_WHAT, which).first()
    before = 0 if row is None else row.undelivered_quarters
    lost = quarters != QUARTERS_DELIVERED and seen is not None and seen.stream is not StreamEnd.ENDED
    if lost:
        placed_at = c.execute(_PLACED, which).scalar() or 0
        others = c.execute(_TOGETHER, {**tab, **which, "of_since": placed_at}).scalar_one()
        quarters = max(quarters - others, 0)
    if quarters == before:
        return
    c.execute(_COUNT, which | {"to_quarters": quarters, "to_undelivered_at": now if lost else 0})
    add_undelivered(c, tab, quarters - before, reason)


def add_undelivered(c: Connection, tab: Mapping[str, object], quarters: int, reason: str) -> None:
    """Adds quarters of an answer to what a provider charged and did not deliver; see `count`."""
    answers = MAX_UNDELIVERED_QUARTERS // QUARTERS_UNDELIVERED
    text = f"it charged for {answers} answers or more that did not arrive, at last: {reason}"
    c.execute(_ADD, {**tab, "to_quarters": quarters, "to_blocked_reason": text[:1_000]})


def refuse_receipt(
    c: Connection, tab: Mapping[str, object], order: Hash, seen: Delivery | None, complaint: UndeliveredCharge, *, now: int
) -> None:
    """A receipt was not booked, since what it charges for did not arrive: its order counts on, and so does this answer."""
    mark_dispatched(c, [order])
    if seen is not None:
        store_deliveries(c, {order: seen})
    count_undelivered(c, tab, order, QUARTERS_UNDELIVERED, str(complaint), seen=seen, now=now)


def reset_undelivered(c: Connection, payer: Address, provider: Address) -> None:
    """A person forgives a provider what it did not deliver."""
    mine = (tabs.c.payer == payer) & (tabs.c.provider == provider)
    c.execute(sa.update(tabs).where(mine).values(undelivered_quarters=0))
