"""Writes of receipts: each is checked against its order, the delivery and its tab, recorded, and may end its job (job_ends.py).

Functions of one connection, inside one transaction that holds the file's write lock. Statements of jobs are built once at import,
because building a statement costs more than running it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, bindparam

from tallystick.client.ledger import job_ends, open_orders, spending
from tallystick.client.ledger.job_ends import RecordedOrder
from tallystick.client.ledger.open_orders import Deliveries, OrderKey
from tallystick.client.ledger.receipt_context import adjacent, parse, read_context, remember
from tallystick.client.ledger.schema import THIS_ORDER, JobState, OrderState, deployment_id, evidence, orders, receipts, tabs
from tallystick.client.ledger.tabs import TAB_ID, THIS_TAB, tab_key
from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.receipts.delivery_check import QUARTERS_DELIVERED, Delivery, UndeliveredCharge, undelivered_quarters
from tallystick.client.receipts.price_check import check_against_order
from tallystick.client.receipts.proof import Proof
from tallystick.client.receipts.sequence_check import check_sequence
from tallystick.client.receipts.token_audit import AuditFinding, check_audit
from tallystick.protocol.eip712 import Domain, Verified
from tallystick.protocol.errors import BadReceipt, Fault
from tallystick.protocol.jobs import ENDS, Event
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.stored import load_signed, pack_signed, store_signed, store_struct
from tallystick.protocol.types import JobId, format_amount
from tallystick.protocol.wire import dumps
from tallystick.runtime.sqlite_statement import SqliteStatement

_STATE_AFTER: dict[Event, JobState] = {
    Event.FINISH: JobState.COMPLETED,
    Event.CANCEL: JobState.CANCELLED,
    Event.FAIL: JobState.FAILED,
    Event.EXPIRE: JobState.FAILED,
}
_AWAITING_END = (JobState.OPEN, JobState.LOST, JobState.COMPLETED)
"""States in which a receipt at no cost may still end the job. A completed job was delivered whole and awaits its receipt."""
_END_UNKNOWN = (JobState.OPEN.value, JobState.LOST.value)
_COUNTED_AS_FAILED = (JobState.FAILED, JobState.DISPUTED)


@dataclass(frozen=True, slots=True)
class IncomingReceipt:
    """A receipt that arrived for an order of a job.

    `delivery`: what the reader saw of the answer; None to use what the ledger stored. `now`: Unix seconds. `duration_ms`: time
    from the request to the receipt, if known. `audit_finding`: the objection of the token audit, if any.
    """

    domain: Domain
    job: JobId
    placed: PlacedOrder
    receipt: Verified[Receipt]
    delivery: Delivery | None
    now: int
    duration_ms: int | None = None
    audit_finding: AuditFinding | None = None
    proof: Proof | None = field(default=None, repr=False)
    """The job's proof with its plaintexts, if they were kept."""
    hedge_cost: int | None = None
    """What hedging added to the cost, in base units, possibly below 0; None if the job ran at one provider."""
    final: bool = True
    """Whether the receipt ends its job. If not, it charges nothing and only releases the cap of its order."""
    other_deliveries: Deliveries = field(default_factory=dict)
    """What arrived for the job's other orders that a provider had without giving a receipt."""

    @property
    def tab_key(self) -> dict[str, object]:
        """The bound parameters that select the receipt's tab."""
        order = self.placed.order.message
        return tab_key(self.domain, order.payer, order.provider)

    @property
    def order_key(self) -> OrderKey:
        """Names the receipt's order."""
        return OrderKey(self.job, self.placed.order.digest)


_INSERT_RECEIPT = SqliteStatement(
    sa.insert(receipts).values({name: bindparam(f"to_{name}") for name in ("tab", "seq", "receipt_doc", "whole", "recorded_at")})
)
_INSERT_EVIDENCE = sa.insert(evidence)

_SEQ: sa.BindParameter[int] = bindparam("of_seq")
_ON_TAB = receipts.c.tab == TAB_ID
_FROM_SEQ = SqliteStatement(
    sa.select(receipts.c.receipt_doc).where(_ON_TAB, receipts.c.seq >= _SEQ).order_by(receipts.c.seq.asc()).limit(2)
)
_BELOW_SEQ = SqliteStatement(
    sa.select(receipts.c.receipt_doc).where(_ON_TAB, receipts.c.seq < _SEQ).order_by(receipts.c.seq.desc()).limit(1)
)
_SAME_ORDER = SqliteStatement(
    sa.select(receipts.c.receipt_doc).where(receipts.c.id == sa.select(orders.c.receipt).where(THIS_ORDER).scalar_subquery())
)

_ACCEPT = SqliteStatement(
    sa.update(tabs)
    .where(tabs.c.id == bindparam("of_tab_id"))
    .values(accepted=bindparam("to_accepted"), total=bindparam("to_total"), total_order_seq=bindparam("to_total_order_seq"))
)
_BLOCK = sa.update(tabs).where(THIS_TAB, tabs.c.blocked_reason == "").values(blocked_reason=bindparam("to_blocked_reason"))
_TOUCH_TAB = sa.update(tabs).where(THIS_TAB).values(blocked_reason=tabs.c.blocked_reason)
_DISPUTE = (
    sa.update(orders).where(THIS_ORDER, orders.c.state != OrderState.RECORDED.value).values(state=OrderState.DISPUTED.value)
)
_RELEASE_ORDER = SqliteStatement(
    sa.update(orders)
    .where(orders.c.id == bindparam("of_order_id"))
    .values(state=OrderState.RELEASED.value, receipt=bindparam("to_receipt"), undelivered_quarters=bindparam("to_quarters"))
)


def record_receipt(c: Connection, incoming: IncomingReceipt) -> BadReceipt | None:
    """Checks a receipt, records it, and ends its job if the receipt is final.

    Returns None if the tab contains the receipt now or already did, otherwise the error. An error that is the provider's fault
    blocks the provider and is stored as evidence.
    """
    receipt = incoming.receipt.message
    delivery = open_orders.read_delivery(c, incoming.job, receipt, incoming.delivery)
    if delivery is not incoming.delivery:
        incoming = replace(incoming, delivery=delivery)
    try:
        known, context = check_receipt(c, incoming)
    except UndeliveredCharge as error:
        open_orders.refuse_receipt(c, incoming.tab_key, incoming.order_key, incoming.delivery, error, now=incoming.now)
        if incoming.final:
            job_ends.end_job(c, incoming.job, JobState.FAILED, str(error), incoming.now, deliveries=incoming.other_deliveries)
        return error
    except BadReceipt as error:
        if error.fault is Fault.PROVIDER:
            same_order = _SAME_ORDER.first(c, OrderKey(incoming.job, incoming.receipt.message.order_hash).parameters)
            _block(c, incoming, _adjacent_docs(c, incoming, same_order), str(error))
        return error
    if not known:
        store_receipt(c, incoming, context)
    elif incoming.final and context.job_state in _END_UNKNOWN:
        # It came as the receipt at no cost of an attempt. The job's end was lost with its stream: no other attempt followed.
        recorded = RecordedOrder(context.order_id, context.receipt_id, context.order_quarters)
        _end_with_receipt(c, incoming, context, recorded, counted=False)
    elif incoming.delivery is not None and incoming.delivery.finished:
        # The receipt was recorded when the stream was lost; now the whole answer was fetched.
        _count_undelivered(c, incoming)
    return None


def _count_undelivered(c: Connection, incoming: IncomingReceipt) -> None:
    receipt = incoming.receipt.message
    quarters = undelivered_quarters(receipt, incoming.delivery)
    if quarters:
        reason = f"job {incoming.job.hex()}, which charged {format_amount(receipt.cost)} dollars"
        open_orders.count_undelivered(
            c,
            incoming.tab_key,
            incoming.order_key,
            quarters,
            reason,
            delivery=incoming.delivery,
            now=incoming.now,
        )


def check_receipt(c: Connection, incoming: IncomingReceipt) -> tuple[bool, Any]:
    """Checks a receipt against its order, the delivery, its tab and the audit.

    Returns whether the receipt was recorded before, and its context (`read_context`). Raises BadReceipt if it must not be
    recorded.
    """
    receipt = incoming.receipt.message
    check_against_order(incoming.placed, receipt, incoming.delivery)
    context = read_context(c, incoming.tab_key, incoming.order_key, receipt.seq)
    if context.of_order is not None and parse(context.of_order) == receipt:
        return True, context
    check_sequence(receipt, adjacent(context, receipt))
    check_audit(incoming.audit_finding)
    return False, context


def _adjacent_docs(c: Connection, incoming: IncomingReceipt, same_order: Any | None) -> list[str | bytes]:
    """The signed documents of the recorded receipts around a new one: same seq, next above, next below and `same_order`."""
    key = incoming.tab_key | {"of_seq": incoming.receipt.message.seq}
    docs = [row.receipt_doc for row in (*_FROM_SEQ.all(c, key), *_BELOW_SEQ.all(c, key))]
    return docs if same_order is None or same_order.receipt_doc in docs else [*docs, same_order.receipt_doc]


def store_receipt(c: Connection, incoming: IncomingReceipt, context: Any) -> None:
    """Stores a receipt that passed `check_receipt`, which returned the context, and ends its job if it is final."""
    receipt, delivery, doc = incoming.receipt.message, incoming.delivery, pack_signed(incoming.receipt)
    number = _INSERT_RECEIPT.insert(
        c,
        {
            "to_tab": context.tab_id,
            "to_seq": receipt.seq,
            "to_receipt_doc": doc,
            "to_whole": delivery is not None and delivery.finished,
            "to_recorded_at": incoming.now,
        },
    )
    remember(doc, receipt)
    _accept(c, context, receipt)
    state_before = None if context.job_state is None else JobState(context.job_state)
    final = receipt.cost > 0 or (incoming.final and state_before in _AWAITING_END)
    delivered = undelivered_quarters(receipt, delivery) == QUARTERS_DELIVERED
    # of a tab that counts nothing undelivered, nothing can be subtracted
    counts_nothing = not (context.undelivered_quarters or context.order_quarters or context.undelivered_at)
    quarters = QUARTERS_DELIVERED if delivered and counts_nothing else context.order_quarters
    if final:
        recorded = RecordedOrder(context.order_id, number, quarters)
        _end_with_receipt(c, incoming, context, recorded, counted=state_before in _COUNTED_AS_FAILED)
    else:
        _RELEASE_ORDER.run(c, {"of_order_id": context.order_id, "to_receipt": number, "to_quarters": quarters})
    if not (delivered and counts_nothing):
        _count_undelivered(c, incoming)


def _accept(c: Connection, context: Any, receipt: Receipt) -> None:
    """Adds a receipt to the row of its tab."""
    total, total_order_seq = context.total, context.total_order_seq
    if total < receipt.cumulative_cost <= context.ceiling:  # a total above every ceiling known here proves nothing
        total, total_order_seq = int(receipt.cumulative_cost), context.order_seq
    accepted = context.accepted + int(receipt.cost)
    change = {"to_accepted": accepted, "to_total": total, "to_total_order_seq": total_order_seq}
    _ACCEPT.run(c, {"of_tab_id": context.tab_id, **change})


def _end_with_receipt(c: Connection, incoming: IncomingReceipt, context: Any, recorded: RecordedOrder, *, counted: bool) -> None:
    """Ends the job of a recorded receipt. `counted`: the job already counts as a failed request."""
    receipt = incoming.receipt.message
    outcome = Outcome(receipt.outcome)
    state = _STATE_AFTER[ENDS[outcome]]
    if context.order_id is not None:
        spending.add_receipt(
            c,
            spending.Workload(context.workload_payer, context.label, context.model),
            receipt,
            incoming.now,
            failed=state is JobState.FAILED,
            counted=counted,
            hedge_cost=incoming.hedge_cost,
        )
    reason = "" if state is JobState.COMPLETED else outcome.name.lower()
    if incoming.audit_finding is not None:
        reason = f"flagged: {incoming.audit_finding.reason}"
    job_ends.end_with_receipt(
        c,
        incoming.job,
        recorded,
        state,
        reason,
        now=incoming.now,
        deliveries=incoming.other_deliveries,
        duration_ms=incoming.duration_ms,
    )


def touch_tab(c: Connection, key: Mapping[str, object]) -> None:
    """Writes a tab as it is: a synced transaction syncs earlier ones only if it writes something."""
    c.execute(_TOUCH_TAB, key)


def block_provider(c: Connection, key: Mapping[str, object], reason: str) -> bool:
    """Lets a provider with a tab have no more orders. Returns whether it was not blocked before."""
    return c.execute(_BLOCK, {**key, "to_blocked_reason": reason}).rowcount > 0


def _block(c: Connection, incoming: IncomingReceipt, other_docs: list[str | bytes], reason: str) -> None:
    order, delivery = incoming.placed.order, incoming.delivery
    values = {
        "deployment_id": deployment_id(incoming.domain),
        "payer": order.message.payer,
        "provider": order.message.provider,
        "job": incoming.job.hex(),
        "reason": reason,
        "receipt_doc": store_signed(incoming.receipt),
        "order_doc": store_signed(order),
        "terms_doc": store_struct(incoming.placed.terms),
        "other_doc": dumps([load_signed(Receipt, doc).to_json() for doc in other_docs]).decode(),
        "delivered_doc": None if delivery is None else dumps(delivery.to_json()).decode(),
        "recorded_at": incoming.now,
    }
    c.execute(_INSERT_EVIDENCE, values)
    c.execute(_BLOCK, incoming.tab_key | {"to_blocked_reason": reason})
    c.execute(_DISPUTE, incoming.order_key.parameters)
    if incoming.final:
        job_ends.end_job(c, incoming.job, JobState.DISPUTED, reason, incoming.now, deliveries=incoming.other_deliveries)
