"""Writing the ledger: `take` signs orders, `book` checks a receipt, which may end its job, `end` ends a job without one.

Functions of one connection, inside one transaction that holds the file's write lock. They run once or twice for every job, so
their statements are built once: building one costs more than running it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import sqlalchemy as sa
from sqlalchemy import Connection, bindparam
from sqlalchemy.dialects.sqlite import insert

from tallystick.client.ledger import budgets, open_orders
from tallystick.client.ledger.open_orders import NO_DELIVERIES, Deliveries
from tallystick.client.ledger.schema import (
    COLLECTABLE,
    JobState,
    OrderState,
    deployment_id,
    evidence,
    jobs,
    orders,
    receipts,
    tabs,
)
from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.orders.tab import Tab
from tallystick.client.receipts.delivery_check import Delivery, UndeliveredCharge, undelivered_quarters
from tallystick.client.receipts.price_check import check_against_order
from tallystick.client.receipts.proof import Proof
from tallystick.client.receipts.sequence_check import AdjacentReceipts, check_sequence
from tallystick.client.receipts.token_audit import AuditFinding, check_audit
from tallystick.protocol.eip712 import Domain, Verified, loads_signed
from tallystick.protocol.errors import BadReceipt, Fault
from tallystick.protocol.jobs import ENDS, Event
from tallystick.protocol.messages import Outcome, Receipt, Terms
from tallystick.protocol.types import Address, Amount, Hash, JobId
from tallystick.protocol.wire import dumps

SignOrder = Callable[[Tab, Address, Terms], PlacedOrder]

_ENDED: dict[Event, JobState] = {
    Event.FINISH: JobState.COMPLETED,
    Event.CANCEL: JobState.CANCELLED,
    Event.FAIL: JobState.FAILED,
    Event.EXPIRE: JobState.FAILED,
}


_AWAITING = (JobState.OPEN, JobState.LOST, JobState.COMPLETED)
"""Jobs whose end a receipt at no cost may still tell; a completed one was delivered whole, and its receipt is outstanding."""
_COUNTED = (JobState.FAILED, JobState.DISPUTED)


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job about to be submitted. `commitment_key` opens its commitments; times are Unix seconds; `label`: its workload."""

    domain: Domain
    payer: Address
    job: JobId
    model: str
    path: str
    commitment_key: bytes = field(repr=False)
    created_at: int
    label: str = ""


@dataclass(frozen=True, slots=True)
class IncomingReceipt:
    """A receipt that came for an order of a job, what its reader saw of the answer (None: what the ledger kept of it), when, how
    long after the request (None: nobody knows), and what a recount has against it.
    """

    domain: Domain
    job: JobId
    placed: PlacedOrder
    receipt: Verified[Receipt]
    delivered: Delivery | None
    now: int
    duration_ms: int | None = None
    doubt: AuditFinding | None = None
    proof: Proof | None = field(default=None, repr=False)
    """With the plaintexts, where they were kept."""
    final: bool = True
    """Whether it ends its job; if not, it only releases the cap of its order, since it charges nothing."""
    arrived: Deliveries = field(default_factory=dict)
    """What arrived for the job's other orders that a provider had and gave no receipt for."""

    @property
    def tab(self) -> dict[str, object]:
        """What finds its tab."""
        order = self.placed.order.message
        return {"of_deployment_id": deployment_id(self.domain), "of_payer": order.payer, "of_provider": order.provider}


# Statements. Bound names begin with `of_` where they find rows, with `to_` where they change them.

DEPLOYMENT_ID: sa.BindParameter[str] = bindparam("of_deployment_id")
PAYER: sa.BindParameter[str] = bindparam("of_payer")
_PROVIDER: sa.BindParameter[str] = bindparam("of_provider")
_PROVIDERS: sa.BindParameter[list[str]] = bindparam("of_providers", expanding=True)
_SEQ: sa.BindParameter[int] = bindparam("of_seq")

THIS_TAB = (tabs.c.deployment_id == DEPLOYMENT_ID) & (tabs.c.payer == PAYER) & (tabs.c.provider == _PROVIDER)
_TABS = sa.select(tabs).where(tabs.c.deployment_id == DEPLOYMENT_ID, tabs.c.payer == PAYER, tabs.c.provider.in_(_PROVIDERS))
TAB = sa.select(tabs).where(THIS_TAB)
_LIVE = orders.c.claim_by > bindparam("of_now")


def _sum_of(which: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    return sa.func.sum(sa.case((which, orders.c.cap), else_=0))


_CAPS = (
    sa.select(
        orders.c.provider,
        _sum_of(_LIVE).label("open"),
        sa.func.sum(sa.case((_LIVE & (orders.c.state == OrderState.DISPATCHED.value), 1), else_=0)).label("awaiting_receipts"),
        _sum_of(_LIVE & (orders.c.seq <= tabs.c.total_order_seq)).label("early"),
        _sum_of(~_LIVE).label("expired"),
    )
    .join(
        tabs,
        (tabs.c.deployment_id == orders.c.deployment_id)
        & (tabs.c.payer == orders.c.payer)
        & (tabs.c.provider == orders.c.provider),
    )
    .where(
        orders.c.payer == PAYER,
        orders.c.state.in_(COLLECTABLE),
        orders.c.provider.in_(_PROVIDERS),
        orders.c.deployment_id == DEPLOYMENT_ID,
    )
    .group_by(orders.c.provider)
)
NEW_TAB = insert(tabs)
_RAISE_TAB = NEW_TAB.on_conflict_do_update(
    index_elements=[tabs.c.deployment_id, tabs.c.payer, tabs.c.provider],
    set_={"ceiling": sa.func.max(tabs.c.ceiling, NEW_TAB.excluded.ceiling), "order_seq": NEW_TAB.excluded.order_seq},
)
_NEW_JOB, _NEW_ORDER, _NEW_RECEIPT, _NEW_EVIDENCE = sa.insert(jobs), sa.insert(orders), sa.insert(receipts), sa.insert(evidence)

_ON_TAB = (receipts.c.deployment_id == DEPLOYMENT_ID) & (receipts.c.payer == PAYER) & (receipts.c.provider == _PROVIDER)
_FROM = sa.select(receipts.c.receipt_doc).where(_ON_TAB, receipts.c.seq >= _SEQ).order_by(receipts.c.seq.asc()).limit(2)
_BELOW = sa.select(receipts.c.receipt_doc).where(_ON_TAB, receipts.c.seq < _SEQ).order_by(receipts.c.seq.desc()).limit(1)
_SAME_ORDER = sa.select(receipts.c.digest, receipts.c.receipt_doc).where(receipts.c.order_digest == bindparam("of_order"))

_ACCEPT = (
    sa.update(tabs)
    .where(THIS_TAB)
    .values(accepted=bindparam("to_accepted"), total=bindparam("to_total"), total_order_seq=bindparam("to_mark"))
)
_FREEZE = sa.update(tabs).where(THIS_TAB, tabs.c.blocked_reason == "").values(blocked_reason=bindparam("to_blocked_reason"))
_DISPUTE = (
    sa.update(orders)
    .where(orders.c.digest == bindparam("of_order"), orders.c.state != OrderState.RECORDED.value)
    .values(state=OrderState.DISPUTED.value)
)
_MARK_ORDER = sa.update(orders).where(orders.c.digest == bindparam("of_order")).values(state=bindparam("to_state"))
_END_JOB = (
    sa.update(jobs)
    .where(jobs.c.job == bindparam("of_job"))
    .values(
        state=bindparam("to_state"),
        reason=bindparam("to_reason"),
        finished_at=bindparam("to_finished"),
        duration_ms=bindparam("to_took"),
    )
)
_LOSE_JOB = _END_JOB.where(jobs.c.state == JobState.OPEN.value)
_LEAVE_JOB = _END_JOB.where(jobs.c.state.in_([JobState.OPEN.value, JobState.LOST.value]))
_CLOSE_ORDERS = (
    sa.update(orders)
    .where(orders.c.job == bindparam("of_job"), orders.c.state == OrderState.OPEN.value)
    .values(state=OrderState.CLOSED.value)
)


def read_tabs(c: Connection, domain: Domain, payer: Address, providers: Sequence[Address], now: int) -> dict[Address, Tab]:
    """The payer's tabs with these providers; orders whose `claim_by` is not after `now` are expired."""
    which = {"of_deployment_id": deployment_id(domain), "of_payer": payer, "of_providers": list(providers)}
    rows = {row.provider: row for row in c.execute(_TABS, which)}
    caps = {row.provider: row for row in c.execute(_CAPS, which | {"of_now": now})}
    return {provider: tab_of(rows.get(provider), caps.get(provider)) for provider in providers}


def tab_of(row: sa.Row[tuple[object, ...]] | None, caps: sa.Row[tuple[object, ...]] | None = None) -> Tab:
    """A tab's row, with the caps of its orders that may still be collected or expired, and how many of them were dispatched."""
    if row is None:
        return Tab()
    if caps is None:
        open_caps, early_caps, expired, awaiting_receipts = 0, 0, 0, 0
    else:
        open_caps, early_caps, expired, awaiting_receipts = caps.open, caps.early, caps.expired, caps.awaiting_receipts
    return Tab(
        accepted=Amount(row.accepted),
        total=Amount(row.total),
        open_caps=Amount(open_caps),
        early_caps=Amount(early_caps),
        ceiling=Amount(row.ceiling),
        order_seq=row.order_seq,
        blocked_reason=row.blocked_reason,
        awaiting_receipts=awaiting_receipts,
        undelivered_quarters=row.undelivered_quarters,
        expired_caps=Amount(expired),
        recovered=Amount(row.recovered),
    )


def sign_orders(
    c: Connection, job: NewJob, drafts: Sequence[tuple[Address, Terms]], sign: SignOrder, reader: str = ""
) -> list[PlacedOrder]:
    """Signs an order for each draft whose provider is not barred (see `Tab.barred`), and remembers them as open. `reader`: the
    process that will read the answer, see presence.py.
    """
    found = read_tabs(c, job.domain, job.payer, [provider for provider, _ in drafts], job.created_at)
    placed = [sign(found[provider], provider, terms) for provider, terms in drafts if not found[provider].exclusion_reason]
    if not placed:
        return []
    where = deployment_id(job.domain)
    c.execute(_NEW_JOB, _job_row(where, job) | {"reader": reader})
    c.execute(_NEW_ORDER, [_order_row(where, job, p) for p in placed])
    c.execute(_RAISE_TAB, [_tab_row(where, p) for p in placed])
    return placed


def _job_row(where: str, job: NewJob) -> dict[str, object]:
    return {
        "job": job.job.hex(),
        "deployment_id": where,
        "payer": job.payer,
        "model": job.model,
        "path": job.path,
        "state": JobState.OPEN.value,
        "reason": "",
        "commitment_key": job.commitment_key,
        "created_at": job.created_at,
        "label": job.label,
    }


def _order_row(where: str, job: NewJob, placed: PlacedOrder) -> dict[str, object]:
    order = placed.order.message
    return {
        "digest": placed.order.digest.hex(),
        "job": job.job.hex(),
        "deployment_id": where,
        "payer": order.payer,
        "provider": order.provider,
        "seq": order.seq,
        "cap": int(placed.terms.max_cost),
        "ceiling": int(order.ceiling),
        "claim_by": order.claim_by,
        "state": OrderState.OPEN.value,
        "order_doc": placed.order.dumps(),
        "terms_doc": dumps(placed.terms.to_json()).decode(),
    }


def _tab_row(where: str, placed: PlacedOrder) -> dict[str, object]:
    order = placed.order.message
    return {
        "deployment_id": where,
        "payer": order.payer,
        "provider": order.provider,
        "accepted": 0,
        "total": 0,
        "total_order_seq": 0,
        "ceiling": int(order.ceiling),
        "order_seq": order.seq,
        "blocked_reason": "",
    }


def record_receipt(c: Connection, arrival: IncomingReceipt) -> BadReceipt | None:
    """Checks a receipt and, where it is final, ends its job. None if the tab now contains it, or did before."""
    receipt = arrival.receipt.message
    arrival = replace(arrival, delivered=open_orders.read_delivery(c, arrival.job, receipt, arrival.delivered))
    try:
        known, tab = check_receipt(c, arrival)
    except UndeliveredCharge as complaint:
        open_orders.refuse_receipt(c, arrival.tab, receipt.order_hash, arrival.delivered, complaint, now=arrival.now)
        if arrival.final:
            end_job(c, arrival.job, JobState.FAILED, str(complaint), arrival.now, arrived=arrival.arrived)
        return complaint
    except BadReceipt as complaint:
        if complaint.fault is Fault.PROVIDER:
            _freeze(c, arrival, _around(c, arrival), str(complaint))
        return complaint
    if not known:
        store_receipt(c, arrival, tab)
    elif arrival.delivered is not None and arrival.delivered.finished:
        _weigh(c, arrival)  # booked before, when the stream was lost: now the whole answer was fetched
    return None


def _weigh(c: Connection, arrival: IncomingReceipt) -> None:
    receipt = arrival.receipt.message
    quarters = undelivered_quarters(receipt, arrival.delivered)
    if quarters:
        reason = f"job {arrival.job.hex()}, of which it charged {receipt.cost}"
        open_orders.count_undelivered(
            c, arrival.tab, receipt.order_hash, quarters, reason, seen=arrival.delivered, now=arrival.now
        )


def check_receipt(c: Connection, arrival: IncomingReceipt) -> tuple[bool, sa.Row[tuple[object, ...]] | None]:
    """Whether a receipt was booked before, and the tab's row. Raises BadReceipt for what must not be booked."""
    receipt = arrival.receipt.message
    check_against_order(arrival.placed, receipt, arrival.delivered)
    booked = c.execute(_SAME_ORDER, {"of_order": receipt.order_hash.hex()}).first()
    if booked is not None and booked.digest == arrival.receipt.digest.hex():
        return True, None
    check_sequence(receipt, AdjacentReceipts.of(receipt, (loads_signed(Receipt, doc).message for doc in _around(c, arrival))))
    check_audit(arrival.doubt)
    return False, c.execute(TAB, arrival.tab).first()


def _around(c: Connection, arrival: IncomingReceipt) -> list[str]:
    """The receipts held around a new one, as they were signed: of its order, of its seq, next above and below."""
    receipt = arrival.receipt.message
    which = arrival.tab | {"of_seq": receipt.seq}
    found = [*c.execute(_FROM, which).scalars(), *c.execute(_BELOW, which).scalars()]
    same_order = c.execute(_SAME_ORDER, {"of_order": receipt.order_hash.hex()}).first()
    return found if same_order is None or same_order.receipt_doc in found else [*found, same_order.receipt_doc]


def store_receipt(c: Connection, arrival: IncomingReceipt, row: sa.Row[tuple[object, ...]] | None) -> None:
    """Books a receipt that was examined, and ends its job where it is final; `row` is its tab's."""
    receipt, delivered, tab = arrival.receipt.message, arrival.delivered, tab_of(row)
    order = arrival.placed.order.digest.hex()
    values = {
        "digest": arrival.receipt.digest.hex(),
        "deployment_id": deployment_id(arrival.domain),
        "payer": receipt.payer,
        "provider": receipt.provider,
        "seq": receipt.seq,
        "order_digest": order,
        "receipt_doc": arrival.receipt.dumps(),
        "whole": delivered is not None and delivered.finished,
        "recorded_at": arrival.now,
    }
    c.execute(_NEW_RECEIPT, values)
    total, mark = (tab.total, row.total_order_seq if row is not None else 0)
    if tab.total < receipt.cumulative_cost <= tab.ceiling:  # above all that these books know to be signed it says nothing
        total, mark = receipt.cumulative_cost, tab.order_seq
    change = {"to_accepted": int(tab.accepted + receipt.cost), "to_total": int(total), "to_mark": mark}
    c.execute(_ACCEPT, arrival.tab | change)
    before = open_orders.job_state(c, arrival.job)
    final = receipt.cost > 0 or (arrival.final and before in _AWAITING)
    c.execute(_MARK_ORDER, {"of_order": order, "to_state": (OrderState.RECORDED if final else OrderState.RELEASED).value})
    _weigh(c, arrival)
    if final:
        _finish(c, arrival, counted=before in _COUNTED)


def _finish(c: Connection, arrival: IncomingReceipt, *, counted: bool) -> None:
    """Ends the job of a receipt that was booked. `counted`: it counts as a failed request already."""
    receipt = arrival.receipt.message
    outcome = Outcome(receipt.outcome)
    state = _ENDED[ENDS[outcome]]
    budgets.add_receipt(c, arrival.job, receipt, arrival.now, failed=state is JobState.FAILED, counted=counted)
    reason = "" if state is JobState.COMPLETED else outcome.name.lower()
    if arrival.doubt is not None:
        reason = f"doubted: {arrival.doubt.reason}"
    open_orders.store_deliveries(c, arrival.arrived)
    open_orders.mark_dispatched(c, arrival.arrived)
    told = {"to_state": state.value, "to_reason": reason[:1_000], "to_finished": arrival.now, "to_took": arrival.duration_ms}
    c.execute(_END_JOB, {"of_job": arrival.job.hex()} | told)
    c.execute(_CLOSE_ORDERS, {"of_job": arrival.job.hex()})


def _freeze(c: Connection, arrival: IncomingReceipt, others: list[str], reason: str) -> None:
    order, delivered = arrival.placed.order, arrival.delivered
    values = {
        "deployment_id": deployment_id(arrival.domain),
        "payer": order.message.payer,
        "provider": order.message.provider,
        "job": arrival.job.hex(),
        "reason": reason,
        "receipt_doc": arrival.receipt.dumps(),
        "order_doc": order.dumps(),
        "terms_doc": dumps(arrival.placed.terms.to_json()).decode(),
        "other_doc": f"[{','.join(others)}]",
        "delivered_doc": None if delivered is None else dumps(delivered.to_json()).decode(),
        "recorded_at": arrival.now,
    }
    c.execute(_NEW_EVIDENCE, values)
    c.execute(_FREEZE, arrival.tab | {"to_blocked_reason": reason})
    c.execute(_DISPUTE, {"of_order": order.digest.hex()})
    if arrival.final:
        end_job(c, arrival.job, JobState.DISPUTED, reason, arrival.now, arrived=arrival.arrived)


def end_job(
    c: Connection,
    job: JobId,
    state: JobState,
    reason: str,
    now: int,
    *,
    arrived: Deliveries = NO_DELIVERIES,
    matched: Sequence[Hash] = (),
    keep: bool = False,
) -> None:
    """Ends a job that has no receipt, unless its end is known.

    Its orders in `arrived` and `matched` were dispatched, and count until a receipt for them or their `claim_by`; the others were
    never matched, and stop counting. With `keep`, and where the job is lost, nobody knows which were matched: all go on counting.
    """
    if state in (JobState.FAILED, JobState.DISPUTED):
        budgets.add_failed(c, job, now)
    open_orders.store_deliveries(c, arrived)
    open_orders.mark_dispatched(c, [*arrived, *matched])
    which = {"of_job": job.hex()}
    statement = {JobState.LOST: _LOSE_JOB, JobState.DISPUTED: _END_JOB}.get(state, _LEAVE_JOB)
    told = {"to_state": state.value, "to_reason": reason[:1_000], "to_finished": now, "to_took": None}
    c.execute(statement, which | told)
    if state is not JobState.LOST and not keep:
        c.execute(_CLOSE_ORDERS, which)
