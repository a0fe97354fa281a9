"""What the ledger has around a receipt that arrives: its order, its tab, and the recorded receipts next to it.

One statement reads all of it, because each statement costs more than the rows that it reads.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, bindparam

from tallystick.client.ledger.open_orders import OrderKey
from tallystick.client.ledger.schema import THIS_ORDER, orders, receipts, tabs, workloads
from tallystick.client.ledger.tabs import THIS_TAB
from tallystick.client.receipts.sequence_check import AdjacentReceipts
from tallystick.protocol.messages import Receipt
from tallystick.protocol.stored import load_signed
from tallystick.runtime.sqlite_statement import Parameters, SqliteStatement

MAX_PARSED = 256
"""Receipts whose parsed form is kept."""

_SEQ: sa.BindParameter[int] = bindparam("of_seq")
_ON_TAB = sa.select(receipts.c.receipt_doc).where(receipts.c.tab == tabs.c.id).correlate(tabs).limit(1)
_OF_ORDER = sa.select(receipts.c.receipt_doc).where(receipts.c.id == orders.c.receipt).correlate(orders).limit(1)
_CONTEXT = SqliteStatement(
    sa.select(
        tabs.c.id.label("tab_id"),
        tabs.c.accepted,
        tabs.c.total,
        tabs.c.total_order_seq,
        tabs.c.ceiling,
        tabs.c.order_seq,
        tabs.c.undelivered_quarters,
        orders.c.job_state,
        orders.c.id.label("order_id"),
        orders.c.receipt.label("receipt_id"),
        orders.c.undelivered_quarters.label("order_quarters"),
        orders.c.undelivered_at,
        workloads.c.payer.label("workload_payer"),
        workloads.c.label,
        workloads.c.model,
        _OF_ORDER.scalar_subquery().label("of_order"),
        _ON_TAB.where(receipts.c.seq == _SEQ).scalar_subquery().label("same_seq"),
        _ON_TAB.where(receipts.c.seq < _SEQ).order_by(receipts.c.seq.desc()).scalar_subquery().label("below"),
        _ON_TAB.where(receipts.c.seq > _SEQ).order_by(receipts.c.seq.asc()).scalar_subquery().label("above"),
    ).select_from(
        sa.select(sa.literal(1).label("always"))
        .subquery("arrival")
        .outerjoin(tabs, THIS_TAB)
        .outerjoin(orders, THIS_ORDER)
        .outerjoin(workloads, workloads.c.id == orders.c.workload)
    )
)
_parsed: OrderedDict[str | bytes, Receipt] = OrderedDict()
"""Receipts by their documents. The receipt below the next one is usually the last that was recorded."""


def read_context(c: Connection, tab_key: Parameters, order: OrderKey, seq: int) -> Any:
    """Reads what is stored around a receipt with this seq for an order. What the ledger lacks is None.

    The row has `tab_id` and what a receipt changes of the tab, `job_state`, `order_id`, the number of its receipt (`receipt_id`),
    `order_quarters`, `undelivered_at`, and the workload's `label`, `model` and `workload_payer`. `of_order`, `same_seq`, `below`
    and `above` are the documents of the recorded receipts: of that order, with that seq, and with the next lower and higher one.
    """
    return _CONTEXT.first(c, {**tab_key, **order.parameters, "of_seq": seq})


def adjacent(context: Any, receipt: Receipt) -> AdjacentReceipts:
    """The recorded receipts with which a new one is compared."""
    docs = dict.fromkeys((context.same_seq, context.above, context.below, context.of_order))
    return AdjacentReceipts.of(receipt, [parse(doc) for doc in docs if doc is not None])


def parse(doc: str | bytes) -> Receipt:
    """The receipt in a stored document."""
    known = _parsed.get(doc)
    if known is None:
        known = load_signed(Receipt, doc).message
        remember(doc, known)
    return known


def remember(doc: str | bytes, receipt: Receipt) -> None:
    """Keeps the parsed form of a stored document for the next receipt of the tab."""
    _parsed[doc] = receipt
    if len(_parsed) > MAX_PARSED:
        _parsed.popitem(last=False)
