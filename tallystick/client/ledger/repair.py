"""Changes to a tab outside of jobs: merging what orders and the chain prove, payments without proof, and unblocking a provider.

Functions of one connection, inside one transaction that holds the file's write lock, like those of receipt_writes.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import sqlalchemy as sa
from sqlalchemy import Connection, bindparam

from tallystick.client.ledger import open_orders, spending
from tallystick.client.ledger.queries import known_orders
from tallystick.client.ledger.receipt_writes import IncomingReceipt, check_receipt, store_receipt
from tallystick.client.ledger.schema import IS_COLLECTABLE, OrderState, domain_of, evidence, orders, tabs
from tallystick.client.ledger.tabs import DEPLOYMENT_ID, INSERT_TAB, PAYER, SELECT_TAB, TAB_ID, THIS_TAB, read_tabs
from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.orders.tab import Tab
from tallystick.client.receipts.delivery_check import QUARTERS_UNDELIVERED, Delivery
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import BadReceipt
from tallystick.protocol.messages import Order, Receipt, Terms
from tallystick.protocol.stored import load_signed, load_struct
from tallystick.protocol.types import Address, Amount, JobId, format_amount
from tallystick.protocol.wire import loads


@dataclass(frozen=True, slots=True)
class OrderEvidence:
    """An order of this payer and a receipt for it, both verified, that another party kept."""

    order: Verified[Order]
    receipt: Verified[Receipt]


@dataclass(frozen=True, slots=True)
class PaidOrder:
    """An order signed by this payer's key, verified, for which the chain paid its provider, and the transaction that paid."""

    order: Verified[Order]
    transaction: str


@dataclass(frozen=True, slots=True)
class RecoveryResult:
    """The result of `merge_proven`, in base units.

    `raised`: by how much the tab's total rose. `elsewhere`: when an order was last signed with another ledger file while this one
    was in use, in Unix seconds; 0 if none was. `unexplained`: what the chain paid beyond all that receipts show.
    `blocked_reason`: why the provider gets no more orders because of that; empty if it is not blocked.
    """

    raised: Amount = Amount(0)
    elsewhere: int = 0
    unexplained: Amount = Amount(0)
    blocked_reason: str = ""


_FIRST_ORDER_SEQ = sa.select(sa.func.min(orders.c.seq)).where(
    orders.c.tab.in_(sa.select(tabs.c.id).where(tabs.c.payer == PAYER, tabs.c.deployment_id == DEPLOYMENT_ID))
)
_RAISE_TAB = INSERT_TAB.on_conflict_do_update(
    index_elements=[tabs.c.deployment_id, tabs.c.payer, tabs.c.provider],
    set_={name: INSERT_TAB.excluded[name] for name in ("total", "total_order_seq", "ceiling", "order_seq", "recovered")},
)
_SET_SETTLED = sa.update(tabs).where(THIS_TAB).values(settled=bindparam("to_settled"))
_BLOCK = sa.update(tabs).where(THIS_TAB, tabs.c.blocked_reason == "").values(blocked_reason=bindparam("to_blocked_reason"))


def merge_proven(
    c: Connection,
    tab_key: dict[str, object],
    receipts: Sequence[OrderEvidence],
    settled: Amount,
    now: int,
    *,
    paid: Sequence[PaidOrder] | None = None,
) -> RecoveryResult:
    """Raises a tab to what is proven beyond this ledger.

    The total is believed up to the ceilings of orders that this ledger lacks. Orders that it knows are settled by
    `record_receipt`, and those that retention deleted were settled. An order on which nothing can be collected (see
    IEscrow.secure) proves no payment.

    `settled` is the amount that the chain says it paid, and `paid` are the orders that it shows for that amount (None if the
    chain was not searched). A bare number raises nothing: it takes an order of this key that this ledger lacks, with a sufficient
    ceiling. A payment beyond the receipts and the orders that may still be collected blocks the provider until a person decides.
    """
    shown_orders = [shown.order for shown in receipts] + [payment.order for payment in paid or ()]
    row = SELECT_TAB.first(c, tab_key)
    forgotten_seq = 0 if row is None else row.forgotten_seq
    known = {
        *known_orders(c, shown_orders),
        *(order.digest for order in shown_orders if order.message.seq <= forgotten_seq),
    }
    lacking = [order.message for order in shown_orders if order.digest not in known]
    tab = _read_tab(c, tab_key, now)
    shown_total = max((shown.receipt.message.cumulative_cost for shown in receipts), default=0)
    ceiling = max((order.ceiling for order in lacking), default=0)
    collected = [
        payment.order.message for payment in paid or () if payment.order.message.claim_by and payment.order.digest not in known
    ]
    collected_ceiling = max((order.ceiling for order in collected), default=0)
    total = max(tab.explained_total, min(shown_total, ceiling), min(settled, collected_ceiling))
    if lacking:
        order_seq = max([tab.order_seq, *(order.seq for order in lacking)])
        raised_tab = replace(tab, ceiling=Amount(max(tab.ceiling, ceiling)), order_seq=order_seq)
        if total > tab.explained_total:
            recovered = Amount(max(tab.recovered, total - tab.accepted))
            raised_tab = replace(raised_tab, total=Amount(total), recovered=recovered)
        total_order_seq = tab.order_seq if row is None or total > tab.explained_total else row.total_order_seq
        _raise_tab(c, tab_key, raised_tab, total_order_seq)
    first_own_seq = c.execute(_FIRST_ORDER_SEQ, tab_key).scalar()
    last_lacking_seq = max((order.seq for order in lacking), default=0)
    elsewhere = 0 if first_own_seq is None or last_lacking_seq < first_own_seq else last_lacking_seq // 1_000_000_000
    unexplained = Amount(max(settled - total, 0))
    blocked_reason = _judge_payment(c, tab_key, settled, now, paid) if unexplained else ""
    return RecoveryResult(Amount(total - tab.explained_total), elsewhere, unexplained, blocked_reason)


def _read_tab(c: Connection, tab_key: dict[str, object], now: int) -> Tab:
    domain = domain_of(str(tab_key["of_deployment_id"]))
    provider = Address(str(tab_key["of_provider"]))
    return read_tabs(c, domain, Address(str(tab_key["of_payer"])), [provider], now)[provider]


def _raise_tab(c: Connection, tab_key: dict[str, object], tab: Tab, total_order_seq: int) -> None:
    values = {
        "deployment_id": tab_key["of_deployment_id"],
        "payer": tab_key["of_payer"],
        "provider": tab_key["of_provider"],
        "accepted": 0,
        "total": int(tab.total),
        "total_order_seq": total_order_seq,
        "ceiling": int(tab.ceiling),
        "order_seq": tab.order_seq,
        "blocked_reason": "",
        "recovered": int(tab.recovered),
    }
    c.execute(_RAISE_TAB, values)


def _judge_payment(c: Connection, tab_key: dict[str, object], settled: Amount, now: int, paid: Sequence[PaidOrder] | None) -> str:
    """Judges a payment beyond the receipts by the current tab. Returns why the provider is blocked; empty if it is not."""
    if SELECT_TAB.first(c, tab_key) is None:
        _raise_tab(c, tab_key, Tab(), 0)
    (row,) = SELECT_TAB.all(c, tab_key)
    tab = _read_tab(c, tab_key, now)
    excess = settled - tab.explained_total
    if settled <= row.settled_at_unblock or (paid is None and settled > tab.ceiling):
        return ""
    new_payment = settled > row.settled
    c.execute(_SET_SETTLED, tab_key | {"to_settled": int(max(settled, row.settled))})
    if settled > tab.protocol_tab.accepted + tab.open_caps or settled > tab.ceiling:
        reason = _blocked_reason(tab, settled, paid or ())
        c.execute(_BLOCK, tab_key | {"to_blocked_reason": reason})
        return reason
    if new_payment and excess > tab.open_caps - _dispatched_caps(c, tab_key, now):
        reason = f"{format_amount(Amount(excess))} dollars collected on chain without a receipt"
        open_orders.add_undelivered(c, tab_key, QUARTERS_UNDELIVERED, reason)
    return ""


def _dispatched_caps(c: Connection, tab_key: dict[str, object], now: int) -> int:
    """The sum of the caps of dispatched orders: their jobs ended and they have no receipt."""
    query = sa.select(sa.func.coalesce(sa.func.sum(orders.c.cap), 0)).where(orders.c.tab == TAB_ID, orders.c.claim_by > now)
    return int(c.execute(query.where(IS_COLLECTABLE, orders.c.state == OrderState.DISPATCHED.value), tab_key).scalar_one())


def _blocked_reason(tab: Tab, settled: Amount, paid: Sequence[PaidOrder]) -> str:
    transactions = ", ".join(dict.fromkeys(payment.transaction for payment in paid)) or "none was shown"
    if settled > tab.ceiling:
        finding = (
            f"this wallet's ledger allowed it at most {format_amount(tab.ceiling)} dollars, and no order of this key allows more"
        )
        advice = "Check the RPC address, and whether this key signs with another ledger file"
    else:
        explained, open_caps = format_amount(tab.explained_total), format_amount(tab.open_caps)
        finding = f"its receipts show {explained}, and open orders explain {open_caps} more"
        advice = "A claim above its receipts can be slashed: tally receipt report"
    return (
        f"the chain says that it was paid {format_amount(settled)} dollars, but {finding} (transactions: {transactions}). "
        f"{advice}. To accept the payment: tally receipt unblock PROVIDER"
    )


def unblock(c: Connection, payer: Address, provider: Address, now: int) -> bool:
    """Lets a provider have orders again. Returns whether it was blocked.

    Its undelivered answers are forgotten, and what the chain paid it within the signed ceilings counts as spent. Receipts that
    only the token audit refused are recorded now; otherwise the provider's tab would be ahead of this one.
    """
    blocked = (tabs.c.payer == payer) & (tabs.c.provider == provider) & (tabs.c.blocked_reason != "")
    rows = c.execute(sa.select(tabs).where(blocked)).all()
    if not rows:
        return False
    for row in rows:
        _accept_payment(c, row, now)
    open_orders.reset_undelivered(c, payer, provider)
    against_provider = (evidence.c.payer == payer) & (evidence.c.provider == provider)
    for row in c.execute(sa.select(evidence).where(against_provider).order_by(evidence.c.id)).all():
        domain = domain_of(row.deployment_id)
        placed = PlacedOrder(load_signed(Order, row.order_doc).verify(domain), load_struct(Terms, row.terms_doc))
        receipt = load_signed(Receipt, row.receipt_doc).verify(domain)
        delivery = None if row.delivered_doc is None else Delivery.from_json(loads(row.delivered_doc, "delivered"))
        incoming = IncomingReceipt(domain, JobId(bytes.fromhex(row.job)), placed, receipt, delivery, now)
        with contextlib.suppress(BadReceipt):
            known, context = check_receipt(c, incoming)
            if not known:
                store_receipt(c, incoming, context)
    return True


def _accept_payment(c: Connection, row: sa.Row[tuple[object, ...]], now: int) -> None:
    """Believes the chain's payment up to the highest signed ceiling, and lifts the block."""
    tab_key: dict[str, object] = {
        "of_deployment_id": row.deployment_id,
        "of_payer": row.payer,
        "of_provider": row.provider,
    }
    tab = _read_tab(c, tab_key, now)
    paid = min(row.settled, row.ceiling)
    values = {"blocked_reason": "", "settled_at_unblock": row.settled}
    if paid > tab.explained_total:
        recovered = max(tab.recovered, paid - tab.accepted)
        values |= {"total": paid, "total_order_seq": row.order_seq, "recovered": recovered}
        spending.add_unproven(c, tab_key, Amount(paid - tab.explained_total), now)
    c.execute(sa.update(tabs).where(THIS_TAB).values(**values), tab_key)
