"""The ledger's three writes of a job: `sign_orders`, `record_receipt` (which may end the job), and `end_job` without a receipt.

Functions of one connection, inside one transaction that holds the file's write lock. They run once or twice for every job. Their
statements are built once at import, because building a statement costs more than running it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, bindparam
from sqlalchemy.dialects.sqlite import insert

from tallystick.client.ledger import open_orders, spending
from tallystick.client.ledger.open_orders import NO_DELIVERIES, Deliveries, OrderKey
from tallystick.client.ledger.schema import (
    IS_UNRESOLVED,
    JOB_ID,
    THIS_JOB,
    THIS_ORDER,
    JobState,
    OrderState,
    deployment_id,
    evidence,
    jobs,
    orders,
    receipts,
    tabs,
    workloads,
)
from tallystick.client.ledger.tabs import (
    INSERT_TAB,
    SELECT_TAB,
    TAB_ID,
    THIS_TAB,
    read_tabs,
    tab_key,
    tab_of,
)
from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.orders.tab import Tab
from tallystick.client.receipts.delivery_check import Delivery, UndeliveredCharge, undelivered_quarters
from tallystick.client.receipts.price_check import check_against_order
from tallystick.client.receipts.proof import Proof
from tallystick.client.receipts.sequence_check import AdjacentReceipts, check_sequence
from tallystick.client.receipts.token_audit import AuditFinding, check_audit
from tallystick.protocol.eip712 import Domain, Verified
from tallystick.protocol.errors import BadReceipt, Fault
from tallystick.protocol.jobs import ENDS, Event
from tallystick.protocol.messages import Outcome, Receipt, Terms
from tallystick.protocol.stored import load_signed, pack_signed, pack_struct, store_signed, store_struct
from tallystick.protocol.types import Address, Hash, JobId, format_amount
from tallystick.protocol.wire import dumps
from tallystick.runtime.sqlite_statement import SqliteStatement

SignOrder = Callable[[Tab, Address, Terms], PlacedOrder]
MAX_REASON = 1_000
"""Characters of a job's reason that are stored."""

_STATE_AFTER: dict[Event, JobState] = {
    Event.FINISH: JobState.COMPLETED,
    Event.CANCEL: JobState.CANCELLED,
    Event.FAIL: JobState.FAILED,
    Event.EXPIRE: JobState.FAILED,
}
_AWAITING_END = (JobState.OPEN, JobState.LOST, JobState.COMPLETED)
"""States in which a receipt at no cost may still end the job. A completed job was delivered whole and awaits its receipt."""
_END_UNKNOWN = (JobState.OPEN, JobState.LOST)
_COUNTED_AS_FAILED = (JobState.FAILED, JobState.DISPUTED)


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job about to be submitted.

    `commitment_key` opens the job's commitments, `created_at` is Unix seconds, and `label` names the job's workload.
    """

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


_RAISE_TAB = SqliteStatement(
    INSERT_TAB.on_conflict_do_update(
        index_elements=[tabs.c.deployment_id, tabs.c.payer, tabs.c.provider],
        set_={"ceiling": sa.func.max(tabs.c.ceiling, INSERT_TAB.excluded.ceiling), "order_seq": INSERT_TAB.excluded.order_seq},
    ),
    "deployment_id payer provider accepted total total_order_seq ceiling order_seq blocked_reason",
)
_WORKLOAD = ("deployment_id", "payer", "model", "path", "label")
_ADD_WORKLOAD = SqliteStatement(insert(workloads).on_conflict_do_nothing(), " ".join(_WORKLOAD))
_INSERT_JOB = SqliteStatement(
    sa.insert(jobs).from_select(
        ["job", "workload", "state", "reason", "commitment_key", "created_at", "reader"],
        sa.select(
            bindparam("to_job", type_=sa.LargeBinary),
            workloads.c.id,
            sa.literal(JobState.OPEN.value),
            sa.literal(""),
            bindparam("to_commitment_key", type_=sa.LargeBinary),
            bindparam("to_created_at", type_=sa.BigInteger),
            bindparam("to_reader", type_=sa.String),
        ).where(*(workloads.c[name] == bindparam(name) for name in _WORKLOAD)),
    )
)
_INSERT_ORDER = SqliteStatement(
    sa.insert(orders).values(
        job=JOB_ID,
        tab=TAB_ID,
        state=OrderState.OPEN.value,
        **{name: bindparam(f"to_{name}") for name in ("seq", "cap", "claim_by", "digest", "order_doc", "terms_doc")},
    )
)
_INSERT_RECEIPT = SqliteStatement(
    sa.insert(receipts).values(
        order_id=sa.select(orders.c.id).where(THIS_ORDER).scalar_subquery(),
        tab=TAB_ID,
        **{name: bindparam(f"to_{name}") for name in ("seq", "receipt_doc", "whole", "recorded_at")},
    )
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
    sa.select(receipts.c.receipt_doc).where(receipts.c.order_id.in_(sa.select(orders.c.id).where(THIS_ORDER)))
)

_ACCEPT = SqliteStatement(
    sa.update(tabs)
    .where(THIS_TAB)
    .values(accepted=bindparam("to_accepted"), total=bindparam("to_total"), total_order_seq=bindparam("to_total_order_seq"))
)
_BLOCK = sa.update(tabs).where(THIS_TAB, tabs.c.blocked_reason == "").values(blocked_reason=bindparam("to_blocked_reason"))
_TOUCH_TAB = sa.update(tabs).where(THIS_TAB).values(blocked_reason=tabs.c.blocked_reason)
_DISPUTE = (
    sa.update(orders).where(THIS_ORDER, orders.c.state != OrderState.RECORDED.value).values(state=OrderState.DISPUTED.value)
)
_SET_ORDER_STATE = SqliteStatement(sa.update(orders).where(THIS_ORDER).values(state=bindparam("to_state")))
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
_IS_OPEN = sa.select(jobs.c.job).where(THIS_JOB, jobs.c.state == JobState.OPEN.value)
_END_ANY_JOB = SqliteStatement(_END_JOB)
_END_OPEN_JOB = SqliteStatement(_END_JOB.where(jobs.c.state == JobState.OPEN.value))
_END_UNKNOWN_JOB = SqliteStatement(_END_JOB.where(IS_UNRESOLVED))
_CLOSE_ORDERS = SqliteStatement(
    sa.update(orders).where(orders.c.job == JOB_ID, orders.c.state == OrderState.OPEN.value).values(state=OrderState.CLOSED.value)
)


def sign_orders(
    c: Connection, job: NewJob, drafts: Sequence[tuple[Address, Terms]], sign: SignOrder, reader: str = ""
) -> list[PlacedOrder]:
    """Signs an order for each draft whose provider is not excluded (see `Tab.exclusion_reason`), and stores the orders as open.

    `reader` names the process that will read the answer; see process_locks.py.
    """
    placed_orders = _sign(c, job, drafts, sign)
    if placed_orders:
        row = _job_row(job, reader)
        if not _INSERT_JOB.run(c, row):
            _ADD_WORKLOAD.run(c, row)
            _INSERT_JOB.run(c, row)
        _store_orders(c, job, placed_orders)
    return placed_orders


def sign_further_orders(
    c: Connection, job: NewJob, drafts: Sequence[tuple[Address, Terms]], sign: SignOrder
) -> list[PlacedOrder]:
    """Like `sign_orders`, for a job that is stored. Signs nothing for a job that is not open any more."""
    if c.execute(_IS_OPEN, {"of_job": bytes(job.job)}).first() is None:
        return []
    placed_orders = _sign(c, job, drafts, sign)
    if placed_orders:
        _store_orders(c, job, placed_orders)
    return placed_orders


def _sign(c: Connection, job: NewJob, drafts: Sequence[tuple[Address, Terms]], sign: SignOrder) -> list[PlacedOrder]:
    payer_tabs = read_tabs(c, job.domain, job.payer, [provider for provider, _ in drafts], job.created_at)
    return [
        sign(payer_tabs[provider], provider, terms) for provider, terms in drafts if not payer_tabs[provider].exclusion_reason
    ]


def _store_orders(c: Connection, job: NewJob, placed_orders: Sequence[PlacedOrder]) -> None:
    deployment = deployment_id(job.domain)
    _RAISE_TAB.run_many(c, [_tab_row(deployment, placed) for placed in placed_orders])
    _INSERT_ORDER.run_many(c, [_order_row(job, placed) for placed in placed_orders])


def _job_row(job: NewJob, reader: str) -> dict[str, object]:
    return {
        "deployment_id": deployment_id(job.domain),
        "payer": job.payer,
        "model": job.model,
        "path": job.path,
        "label": job.label,
        "to_job": bytes(job.job),
        "to_commitment_key": job.commitment_key,
        "to_created_at": job.created_at,
        "to_reader": reader,
    }


def _order_row(job: NewJob, placed: PlacedOrder) -> dict[str, object]:
    order = placed.order.message
    return tab_key(job.domain, order.payer, order.provider) | {
        "of_job": bytes(job.job),
        "to_seq": order.seq,
        "to_cap": int(placed.terms.max_cost),
        "to_claim_by": order.claim_by,
        "to_digest": bytes(placed.order.digest),
        "to_order_doc": pack_signed(placed.order),
        "to_terms_doc": pack_struct(placed.terms),
    }


def _tab_row(deployment: str, placed: PlacedOrder) -> dict[str, object]:
    order = placed.order.message
    return {
        "deployment_id": deployment,
        "payer": order.payer,
        "provider": order.provider,
        "accepted": 0,
        "total": 0,
        "total_order_seq": 0,
        "ceiling": int(order.ceiling),
        "order_seq": order.seq,
        "blocked_reason": "",
    }


def record_receipt(c: Connection, incoming: IncomingReceipt) -> BadReceipt | None:
    """Checks a receipt, records it, and ends its job if the receipt is final.

    Returns None if the tab contains the receipt now or already did, otherwise the error. An error that is the provider's fault
    blocks the provider and is stored as evidence.
    """
    receipt = incoming.receipt.message
    incoming = replace(incoming, delivery=open_orders.read_delivery(c, incoming.job, receipt, incoming.delivery))
    try:
        known, tab_row = check_receipt(c, incoming)
    except UndeliveredCharge as error:
        open_orders.refuse_receipt(c, incoming.tab_key, incoming.order_key, incoming.delivery, error, now=incoming.now)
        if incoming.final:
            end_job(c, incoming.job, JobState.FAILED, str(error), incoming.now, deliveries=incoming.other_deliveries)
        return error
    except BadReceipt as error:
        if error.fault is Fault.PROVIDER:
            same_order = _SAME_ORDER.first(c, OrderKey(incoming.job, incoming.receipt.message.order_hash).parameters)
            _block(c, incoming, _adjacent_docs(c, incoming, same_order), str(error))
        return error
    if not known:
        store_receipt(c, incoming, tab_row)
    elif incoming.final and open_orders.job_state(c, incoming.job) in _END_UNKNOWN:
        # It came as the receipt at no cost of an attempt. The job's end was lost with its stream: no other attempt followed.
        _SET_ORDER_STATE.run(c, incoming.order_key.parameters | {"to_state": OrderState.RECORDED.value})
        _end_with_receipt(c, incoming, counted=False)
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


def check_receipt(c: Connection, incoming: IncomingReceipt) -> tuple[bool, Any | None]:
    """Checks a receipt against its order, the delivery, its tab and the audit.

    Returns whether the receipt was recorded before, and the row of its tab. Raises BadReceipt if it must not be recorded.
    """
    receipt = incoming.receipt.message
    check_against_order(incoming.placed, receipt, incoming.delivery)
    recorded = _SAME_ORDER.first(c, OrderKey(incoming.job, receipt.order_hash).parameters)
    if recorded is not None and load_signed(Receipt, recorded.receipt_doc).message == receipt:
        return True, None
    adjacent = (load_signed(Receipt, doc).message for doc in _adjacent_docs(c, incoming, recorded))
    check_sequence(receipt, AdjacentReceipts.of(receipt, adjacent))
    check_audit(incoming.audit_finding)
    return False, SELECT_TAB.first(c, incoming.tab_key)


def _adjacent_docs(c: Connection, incoming: IncomingReceipt, same_order: Any | None) -> list[str | bytes]:
    """The signed documents of the recorded receipts around a new one: same seq, next above, next below and `same_order`."""
    key = incoming.tab_key | {"of_seq": incoming.receipt.message.seq}
    docs = [row.receipt_doc for row in (*_FROM_SEQ.all(c, key), *_BELOW_SEQ.all(c, key))]
    return docs if same_order is None or same_order.receipt_doc in docs else [*docs, same_order.receipt_doc]


def store_receipt(c: Connection, incoming: IncomingReceipt, tab_row: Any | None) -> None:
    """Stores a receipt that passed `check_receipt`, and ends its job if it is final; `tab_row` is the row of its tab."""
    receipt, delivery, tab = incoming.receipt.message, incoming.delivery, tab_of(tab_row)
    values = {
        "to_seq": receipt.seq,
        "to_receipt_doc": pack_signed(incoming.receipt),
        "to_whole": delivery is not None and delivery.finished,
        "to_recorded_at": incoming.now,
    }
    _INSERT_RECEIPT.run(c, {**incoming.tab_key, **incoming.order_key.parameters, **values})
    total, total_order_seq = (tab.total, tab_row.total_order_seq if tab_row is not None else 0)
    if tab.total < receipt.cumulative_cost <= tab.ceiling:  # a total above every ceiling known here proves nothing
        total, total_order_seq = receipt.cumulative_cost, tab.order_seq
    change = {"to_accepted": int(tab.accepted + receipt.cost), "to_total": int(total), "to_total_order_seq": total_order_seq}
    _ACCEPT.run(c, incoming.tab_key | change)
    state_before = open_orders.job_state(c, incoming.job)
    final = receipt.cost > 0 or (incoming.final and state_before in _AWAITING_END)
    order_state = OrderState.RECORDED if final else OrderState.RELEASED
    _SET_ORDER_STATE.run(c, incoming.order_key.parameters | {"to_state": order_state.value})
    _count_undelivered(c, incoming)
    if final:
        _end_with_receipt(c, incoming, counted=state_before in _COUNTED_AS_FAILED)


def _end_with_receipt(c: Connection, incoming: IncomingReceipt, *, counted: bool) -> None:
    """Ends the job of a recorded receipt. `counted`: the job already counts as a failed request."""
    receipt = incoming.receipt.message
    outcome = Outcome(receipt.outcome)
    state = _STATE_AFTER[ENDS[outcome]]
    spending.add_receipt(
        c,
        incoming.job,
        receipt,
        incoming.now,
        failed=state is JobState.FAILED,
        counted=counted,
        hedge_cost=incoming.hedge_cost,
    )
    reason = "" if state is JobState.COMPLETED else outcome.name.lower()
    if incoming.audit_finding is not None:
        reason = f"flagged: {incoming.audit_finding.reason}"
    open_orders.store_deliveries(c, incoming.job, incoming.other_deliveries)
    open_orders.mark_dispatched(c, incoming.job, incoming.other_deliveries)
    change = {
        "to_state": state.value,
        "to_reason": reason[:MAX_REASON],
        "to_finished_at": incoming.now,
        "to_duration_ms": incoming.duration_ms,
    }
    _END_ANY_JOB.run(c, {**change, "of_job": bytes(incoming.job)})
    _CLOSE_ORDERS.run(c, {"of_job": bytes(incoming.job)})


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
        end_job(c, incoming.job, JobState.DISPUTED, reason, incoming.now, deliveries=incoming.other_deliveries)


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
    change = {"to_state": state.value, "to_reason": reason[:MAX_REASON], "to_finished_at": now, "to_duration_ms": None}
    statement.run(c, {**change, **key})
    if state is not JobState.LOST and not keep_orders_open:
        _CLOSE_ORDERS.run(c, key)
