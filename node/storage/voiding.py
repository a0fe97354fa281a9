"""Voids receipts: takes the last ones of a tab back that no coordinator accepted. Functions of one connection, in a transaction.

Their numbers stay used: two receipts with one number cost the stake. The next receipt has the next number and a total without
them, so no claim may have one with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy import Connection

from node.domain.order_admission import MatchedOrder
from node.ports import DOUBTFUL_SECONDS, DoubtfulReceipt
from node.storage.rows import pack_address, read_order, read_receipt
from node.storage.schema import open_orders, orders, receipts, tabs
from tallystick.protocol.types import Address, Amount, JobId

MAX_DOUBTFUL = 1_024
"""Receipts that a start reads at most, the newest."""


def doubtful(connection: Connection) -> list[DoubtfulReceipt]:
    """See ports.VoidStore.doubtful_receipts."""
    query = sa.select(open_orders.c.coordinator, open_orders.c.job, receipts.c.document)
    query = query.join(receipts, receipts.c.id == open_orders.c.receipt_id).where(receipts.c.cost > Amount(0))
    last = connection.execute(sa.select(receipts.c.finished_at).order_by(receipts.c.id.desc()).limit(1)).scalar_one_or_none() or 0
    query = query.where(receipts.c.finished_at > last - DOUBTFUL_SECONDS)
    newest = connection.execute(query.order_by(receipts.c.id.desc()).limit(MAX_DOUBTFUL)).all()
    found = []
    for coordinator, job, document in reversed(newest):
        message = read_receipt(document).message
        before = Amount(message.cumulative_cost - message.cost)
        found.append(DoubtfulReceipt(Address(coordinator), JobId(job), message.payer, message.seq, before))
    return found


def void(connection: Connection, *, payer: Address, receipts: Sequence[DoubtfulReceipt]) -> dict[int, MatchedOrder]:
    """See ports.VoidStore.void. Returns the orders by their numbers."""
    columns = (tabs.c.seq, tabs.c.settled, tabs.c.claimed)
    tab = connection.execute(sa.select(*columns).where(tabs.c.payer == payer)).one_or_none()
    numbers, before = [receipt.seq for receipt in receipts], receipts[0].before
    last = None if tab is None else list(range(tab.seq - len(numbers) + 1, tab.seq + 1))
    if tab is None or numbers != last or max(tab.settled, tab.claimed) > before:
        return {}
    voided = _orders_of(connection, payer, numbers)
    open_rows = sa.select(sa.func.count()).where(open_orders.c.order_id.in_(voided), open_orders.c.receipt_id.is_not(None))
    if connection.execute(open_rows).scalar_one() != len(numbers):
        return {}  # one of them was confirmed meanwhile
    _remove(connection, payer, numbers)
    connection.execute(sa.update(open_orders).where(open_orders.c.order_id.in_(voided)).values(receipt_id=None))
    connection.execute(sa.update(tabs).where(tabs.c.payer == payer).values(cumulative=before))
    return voided


def _orders_of(connection: Connection, payer: Address, numbers: Sequence[int]) -> dict[int, MatchedOrder]:
    query = sa.select(orders.c.id, orders.c.digest, orders.c.document).join(receipts, receipts.c.order_id == orders.c.id)
    query = query.where(receipts.c.payer == pack_address(payer), receipts.c.seq.in_(numbers)).order_by(receipts.c.seq)
    found = dict[int, MatchedOrder]()
    for number, digest, document in connection.execute(query):
        order, terms = read_order(digest, document)
        found[number] = MatchedOrder(terms.job, order, terms)
    return found


def _remove(connection: Connection, payer: Address, numbers: Sequence[int]) -> None:
    connection.execute(sa.delete(receipts).where(receipts.c.payer == pack_address(payer), receipts.c.seq.in_(numbers)))
