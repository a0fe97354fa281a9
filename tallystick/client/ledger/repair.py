"""Changing a tab outside of jobs: what other orders and the chain prove beyond these books, what the chain paid without proof,
and a freeze that was a mistake.

Functions of one connection, inside one transaction that holds the file's write lock, like those of books.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import sqlalchemy as sa
from sqlalchemy import Connection, bindparam

from tallystick.client.ledger import budgets, open_orders
from tallystick.client.ledger.schema import OrderState, domain_of, evidence, orders, tabs
from tallystick.client.ledger.writes import (
    DEPLOYMENT_ID,
    NEW_TAB,
    PAYER,
    TAB,
    THIS_TAB,
    IncomingReceipt,
    check_receipt,
    read_tabs,
    store_receipt,
)
from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.orders.tab import Tab
from tallystick.client.receipts.delivery_check import QUARTERS_UNDELIVERED, Delivery
from tallystick.protocol.eip712 import Verified, loads_signed
from tallystick.protocol.errors import BadReceipt
from tallystick.protocol.messages import Order, Receipt, Terms
from tallystick.protocol.types import Address, Amount, JobId, format_amount
from tallystick.protocol.wire import loads


@dataclass(frozen=True, slots=True)
class OrderEvidence:
    """An order of this payer and a receipt for it, both verified, that somebody else kept."""

    order: Verified[Order]
    receipt: Verified[Receipt]


@dataclass(frozen=True, slots=True)
class PaidOrder:
    """An order of this payer's key, verified, on which the chain paid its provider, and the transaction."""

    order: Verified[Order]
    transaction: str


@dataclass(frozen=True, slots=True)
class RecoveryResult:
    """What came of looking: by how much the tab's total rose (base units), when an order was last signed into another state
    file while this one was in use (Unix seconds; 0: none was), what the chain paid beyond all that receipts show, and why the
    provider gets no more orders for that (empty: it may have some).
    """

    raised: Amount = Amount(0)
    elsewhere: int = 0
    unexplained: Amount = Amount(0)
    blocked: str = ""


_KNOWN_ORDERS = sa.select(orders.c.digest).where(orders.c.digest.in_(bindparam("of_orders", expanding=True)))
_FIRST_ORDER = sa.select(sa.func.min(orders.c.seq)).where(orders.c.payer == PAYER, orders.c.deployment_id == DEPLOYMENT_ID)
_ADOPT = NEW_TAB.on_conflict_do_update(
    index_elements=[tabs.c.deployment_id, tabs.c.payer, tabs.c.provider],
    set_={name: NEW_TAB.excluded[name] for name in ("total", "total_order_seq", "ceiling", "order_seq", "recovered")},
)
_SETTLED = sa.update(tabs).where(THIS_TAB).values(settled=bindparam("to_settled"))
_BLOCK = sa.update(tabs).where(THIS_TAB, tabs.c.blocked_reason == "").values(blocked_reason=bindparam("to_blocked_reason"))


def merge_proven(
    c: Connection,
    where: dict[str, object],
    shown: Sequence[OrderEvidence],
    settled: Amount,
    now: int,
    *,
    paid: Sequence[PaidOrder] | None = None,
) -> RecoveryResult:
    """Takes up what a tab was found to have beyond these books. The total is believed as far as orders that these books lack
    were signed for it: what they do know is settled by `book`. An order on which nothing can be collected (see
    IEscrow.secure) proves no payment.

    `settled` is what the chain says that it paid, `paid` the orders that it shows for that; None where it was not searched.
    A number alone raises nothing: without an order of this key that these books lack, whose ceiling allows it, what was paid
    beyond receipts and the orders that may still be collected blocks the provider, and a person is asked.
    """
    backing = [one.order for one in shown] + [one.order for one in paid or ()]
    known = set(c.execute(_KNOWN_ORDERS, {"of_orders": [order.digest.hex() for order in backing]}).scalars())
    lacking = [order.message for order in backing if order.digest.hex() not in known]
    row = c.execute(TAB, where).first()
    tab = _tab(c, where, now)
    told = max((one.receipt.message.cumulative_cost for one in shown), default=0)
    ceiling = max((order.ceiling for order in lacking), default=0)
    collected = [one.order.message for one in paid or () if one.order.message.claim_by and one.order.digest.hex() not in known]
    proven = max((order.ceiling for order in collected), default=0)
    total = max(tab.explained_total, min(told, ceiling), min(settled, proven))
    if lacking:
        seq = max([tab.order_seq, *(order.seq for order in lacking)])
        rise = replace(tab, ceiling=Amount(max(tab.ceiling, ceiling)), order_seq=seq)
        if total > tab.explained_total:
            rise = replace(rise, total=Amount(total), recovered=Amount(max(tab.recovered, total - tab.accepted)))
        _raise(c, where, rise, tab.order_seq if row is None or total > tab.explained_total else row.total_order_seq)
    first = c.execute(_FIRST_ORDER, where).scalar()
    later = max((order.seq for order in lacking), default=0)
    elsewhere = 0 if first is None or later < first else later // 1_000_000_000
    unexplained = Amount(max(settled - total, 0))
    blocked = _doubt(c, where, settled, now, paid) if unexplained else ""
    return RecoveryResult(Amount(total - tab.explained_total), elsewhere, unexplained, blocked)


def _tab(c: Connection, where: dict[str, object], now: int) -> Tab:
    provider = Address(str(where["of_provider"]))
    return read_tabs(c, domain_of(str(where["of_deployment_id"])), Address(str(where["of_payer"])), [provider], now)[provider]


def _raise(c: Connection, where: dict[str, object], tab: Tab, mark: int) -> None:
    values = {
        "deployment_id": where["of_deployment_id"],
        "payer": where["of_payer"],
        "provider": where["of_provider"],
        "accepted": 0,
        "total": int(tab.total),
        "total_order_seq": mark,
        "ceiling": int(tab.ceiling),
        "order_seq": tab.order_seq,
        "blocked_reason": "",
        "recovered": int(tab.recovered),
    }
    c.execute(_ADOPT, values)


def _doubt(c: Connection, where: dict[str, object], settled: Amount, now: int, paid: Sequence[PaidOrder] | None) -> str:
    """Judges what the chain paid beyond the receipts, by the tab as it is now. Returns why its provider is blocked, if it is."""
    if c.execute(TAB, where).first() is None:
        _raise(c, where, Tab(), 0)
    row = c.execute(TAB, where).one()
    tab = _tab(c, where, now)
    excess = settled - tab.explained_total
    if settled <= row.settled_at_unblock or (paid is None and settled > tab.ceiling):
        return ""
    fresh = settled > row.settled
    c.execute(_SETTLED, where | {"to_settled": int(max(settled, row.settled))})
    if settled > tab.protocol_tab.accepted + tab.open_caps or settled > tab.ceiling:
        text = _why_blocked(tab, settled, paid or ())
        c.execute(_BLOCK, where | {"to_blocked_reason": text})
        return text
    if fresh and excess > tab.open_caps - _dispatched(c, where, now):
        open_orders.add_undelivered(c, where, QUARTERS_UNDELIVERED, f"{excess} base units taken on chain without a receipt")
    return ""


def _dispatched(c: Connection, where: dict[str, object], now: int) -> int:
    """Caps of the orders of ended jobs that have no receipt."""
    mine = (orders.c.deployment_id == DEPLOYMENT_ID) & (orders.c.payer == PAYER) & (orders.c.provider == bindparam("of_provider"))
    query = sa.select(sa.func.coalesce(sa.func.sum(orders.c.cap), 0)).where(mine, orders.c.claim_by > now)
    return int(c.execute(query.where(orders.c.state == OrderState.DISPATCHED.value), where).scalar_one())


def _why_blocked(tab: Tab, settled: Amount, paid: Sequence[PaidOrder]) -> str:
    txs = ", ".join(dict.fromkeys(one.transaction for one in paid)) or "none was shown"
    if settled > tab.ceiling:
        what = f"this wallet's books never allowed it more than {format_amount(tab.ceiling)}, and no order of this key does"
        advice = "check the RPC address and whether this key signs elsewhere"
    else:
        what = (
            f"its receipts show {format_amount(tab.explained_total)}, and open orders explain {format_amount(tab.open_caps)} more"
        )
        advice = "a claim above its receipts can be slashed: tally receipt report"
    return (
        f"the chain says that it was paid {format_amount(settled)}; {what} (transactions: {txs}). {advice}. If all is well: "
        "tally receipt unblock PROVIDER"
    )


def unblock(c: Connection, payer: Address, provider: Address, now: int) -> bool:
    """Takes a freeze back; whether there was one. What it did not deliver is forgotten, and what the chain paid it within the
    ceilings that were signed counts as spent. Receipts that were refused for what was doubted alone are booked now: else the
    provider's tab would be ahead of this one.
    """
    mine = (tabs.c.payer == payer) & (tabs.c.provider == provider) & (tabs.c.blocked_reason != "")
    rows = c.execute(sa.select(tabs).where(mine)).all()
    if not rows:
        return False
    for row in rows:
        _excuse(c, row, now)
    open_orders.reset_undelivered(c, payer, provider)
    theirs = (evidence.c.payer == payer) & (evidence.c.provider == provider)
    for row in c.execute(sa.select(evidence).where(theirs).order_by(evidence.c.id)).all():
        domain = domain_of(row.deployment_id)
        placed = PlacedOrder(loads_signed(Order, row.order_doc).verify(domain), Terms.from_json(loads(row.terms_doc, "terms")))
        receipt = loads_signed(Receipt, row.receipt_doc).verify(domain)
        seen = None if row.delivered_doc is None else Delivery.from_json(loads(row.delivered_doc, "delivered"))
        arrival = IncomingReceipt(domain, JobId(bytes.fromhex(row.job)), placed, receipt, seen, now)
        with contextlib.suppress(BadReceipt):
            known, tab = check_receipt(c, arrival)
            if not known:
                store_receipt(c, arrival, tab)
    return True


def _excuse(c: Connection, row: sa.Row[tuple[object, ...]], now: int) -> None:
    """Believes the chain for what it paid, as far as ceilings were signed for it."""
    where: dict[str, object] = {"of_deployment_id": row.deployment_id, "of_payer": row.payer, "of_provider": row.provider}
    tab = _tab(c, where, now)
    paid = min(row.settled, row.ceiling)
    values = {"blocked_reason": "", "settled_at_unblock": row.settled}
    if paid > tab.explained_total:
        recovered = max(tab.recovered, paid - tab.accepted)
        values |= {"total": paid, "total_order_seq": row.order_seq, "recovered": recovered}
        budgets.add_unproven(c, where, Amount(paid - tab.explained_total), now)
    c.execute(sa.update(tabs).where(THIS_TAB).values(**values), where)
