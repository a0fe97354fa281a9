"""Changing a tab outside of jobs: what other orders and the chain prove beyond these books, and a freeze that was a mistake.

Functions of one connection, inside one transaction that holds the file's write lock, like those of books.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection, bindparam

from tallystick.client import spending
from tallystick.client.books import NEW_TAB, PAYER, TAB, THIS_TAB, VENUE, Arrival, accept, examine, tab_of
from tallystick.client.payer import Placed
from tallystick.client.tables import domain_of, evidence, orders, tabs
from tallystick.protocol.eip712 import Verified, loads_signed
from tallystick.protocol.errors import BadReceipt
from tallystick.protocol.messages import Order, Receipt, Terms
from tallystick.protocol.types import Address, Amount, JobId
from tallystick.protocol.wire import loads


@dataclass(frozen=True, slots=True)
class Shown:
    """An order of this payer and a receipt for it, both verified, that somebody else kept."""

    order: Verified[Order]
    receipt: Verified[Receipt]


@dataclass(frozen=True, slots=True)
class Found:
    """What came of looking: by how much the tab's total rose (base units), when an order was last signed into another state
    file while this one was in use (Unix seconds; 0: none was), and what the chain paid beyond all that receipts show.
    """

    raised: Amount = Amount(0)
    elsewhere: int = 0
    unexplained: Amount = Amount(0)


MAX_UNPROVEN = 2
"""How often a tab without any receipt follows what the chain paid within known ceilings; see `adopt`."""
_COUNT_UNPROVEN = sa.update(tabs).where(THIS_TAB).values(unproven=tabs.c.unproven + 1)
_KNOWN_ORDERS = sa.select(orders.c.digest).where(orders.c.digest.in_(bindparam("of_orders", expanding=True)))
_FIRST_ORDER = sa.select(sa.func.min(orders.c.seq)).where(orders.c.payer == PAYER, orders.c.venue == VENUE)
_ADOPT = NEW_TAB.on_conflict_do_update(
    index_elements=[tabs.c.venue, tabs.c.payer, tabs.c.provider],
    set_={name: NEW_TAB.excluded[name] for name in ("total", "total_mark", "ceiling", "order_seq")},
)


def adopt(c: Connection, where: dict[str, object], shown: Sequence[Shown], settled: Amount, now: int) -> Found:
    """Takes up what a tab was found to have beyond these books. The total is believed as far as orders that these books lack
    were signed for it: what they do know is settled by `book`.

    What the chain paid within the ceilings that these books know, without a receipt, may be for jobs that the provider did before
    the books were lost, or that it refused and collected all the same. It is taken up MAX_UNPROVEN times on a tab that never
    brought a receipt, so that such books heal; it counts as spent, and no provider climbs far by it.
    """
    digests = [one.order.digest.hex() for one in shown]
    known = set(c.execute(_KNOWN_ORDERS, {"of_orders": digests}).scalars())
    strange = [one for one in shown if one.order.digest.hex() not in known]
    lacking = [one.order.message for one in strange]
    row = c.execute(TAB, where).first()
    tab = tab_of(row)
    told = max((one.receipt.message.cumulative_cost for one in shown), default=0)
    proven = max((one.receipt.message.cumulative_cost for one in strange), default=0)
    unproven = tab.total < settled <= tab.ceiling and proven < settled
    healing = unproven and tab.accepted == 0 and row is not None and row.unproven < MAX_UNPROVEN
    paid = settled if healing or not unproven else tab.total
    ceiling = max([paid, *(order.ceiling for order in lacking)])
    total = max(tab.total, paid, min(told, ceiling))
    if lacking or total > tab.total:
        values = {
            "venue": where["of_venue"],
            "payer": where["of_payer"],
            "provider": where["of_provider"],
            "accepted": 0,
            "total": int(total),
            "total_mark": tab.order_seq if row is None or total > tab.total else row.total_mark,
            "ceiling": int(max(tab.ceiling, ceiling)),
            "order_seq": max([tab.order_seq, *(order.seq for order in lacking)]),
            "frozen": "",
            "unproven": 0,
        }
        c.execute(_ADOPT, values)
    if healing:
        c.execute(_COUNT_UNPROVEN, where)
        spending.add_unproven(c, where, Amount(settled - tab.total), now)
    first = c.execute(_FIRST_ORDER, where).scalar()
    later = max((order.seq for order in lacking), default=0)
    elsewhere = 0 if first is None or later < first else later // 1_000_000_000
    return Found(Amount(total - tab.total), elsewhere, Amount(max(settled - total, 0)))


def forgive(c: Connection, payer: Address, provider: Address, now: int) -> bool:
    """Takes a freeze back; whether there was one. Receipts that were refused for what was doubted alone are booked now: else the
    provider's tab would be ahead of this one.
    """
    mine = (tabs.c.payer == payer) & (tabs.c.provider == provider) & (tabs.c.frozen != "")
    if not c.execute(sa.update(tabs).where(mine).values(frozen="")).rowcount:
        return False
    theirs = (evidence.c.payer == payer) & (evidence.c.provider == provider)
    for row in c.execute(sa.select(evidence).where(theirs).order_by(evidence.c.id)).all():
        domain = domain_of(row.venue)
        placed = Placed(loads_signed(Order, row.order_doc).verify(domain), Terms.from_json(loads(row.terms_doc, "terms")))
        receipt = loads_signed(Receipt, row.receipt_doc).verify(domain)
        arrival = Arrival(domain, JobId(bytes.fromhex(row.job)), placed, receipt, None, now)
        with contextlib.suppress(BadReceipt):
            known, tab = examine(c, arrival)
            if not known:
                accept(c, arrival, tab)
    return True
