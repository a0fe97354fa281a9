"""Reading a payer's tabs: the stored row of each tab, with the caps of its orders that may still be collected.

Functions of one connection. Bound parameters that select rows start with `of_`, those that change rows start with `to_`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, bindparam
from sqlalchemy.dialects.sqlite import insert

from tallystick.client.ledger.schema import IS_COLLECTABLE, OrderState, deployment_id, orders, tabs
from tallystick.client.orders.tab import Tab
from tallystick.protocol.eip712 import Domain
from tallystick.protocol.types import Address, Amount
from tallystick.runtime.sqlite_statement import SqliteStatement

DEPLOYMENT_ID: sa.BindParameter[str] = bindparam("of_deployment_id")
PAYER: sa.BindParameter[str] = bindparam("of_payer")
PROVIDER: sa.BindParameter[str] = bindparam("of_provider")

THIS_TAB = (tabs.c.deployment_id == DEPLOYMENT_ID) & (tabs.c.payer == PAYER) & (tabs.c.provider == PROVIDER)
SELECT_TAB = SqliteStatement(sa.select(tabs).where(THIS_TAB))
INSERT_TAB = insert(tabs)
TAB_ID = sa.select(tabs.c.id).where(THIS_TAB).scalar_subquery()
_NOT_EXPIRED = orders.c.claim_by > bindparam("of_now")


def _sum_where(condition: sa.ColumnElement[bool], value: sa.ColumnElement[int]) -> sa.ColumnElement[int]:
    return sa.func.coalesce(sa.func.sum(sa.case((condition, value), else_=0)), 0)


_SELECT_CAPS = SqliteStatement(
    sa.select(
        _sum_where(_NOT_EXPIRED, orders.c.cap).label("open"),
        _sum_where(_NOT_EXPIRED & (orders.c.state == OrderState.DISPATCHED.value), sa.literal(1)).label("awaiting_receipts"),
        _sum_where(_NOT_EXPIRED & (orders.c.seq <= bindparam("of_total_order_seq")), orders.c.cap).label("early"),
        _sum_where(~_NOT_EXPIRED, orders.c.cap).label("expired"),
    ).where(orders.c.tab == bindparam("of_tab"), IS_COLLECTABLE)
)


def tab_key(domain: Domain, payer: Address, provider: Address) -> dict[str, object]:
    """The bound parameters that select one tab."""
    return {"of_deployment_id": deployment_id(domain), "of_payer": payer, "of_provider": provider}


def read_tabs(c: Connection, domain: Domain, payer: Address, providers: Sequence[Address], now: int) -> dict[Address, Tab]:
    """The payer's tabs with these providers. Orders whose `claim_by` is not after `now` (Unix seconds) count as expired."""
    read: dict[Address, Tab] = {}
    for provider in providers:
        key = tab_key(domain, payer, provider)
        row = SELECT_TAB.first(c, key)
        if row is None:
            read[provider] = Tab()
        else:
            caps = _SELECT_CAPS.first(c, {"of_tab": row.id, "of_now": now, "of_total_order_seq": row.total_order_seq})
            read[provider] = tab_of(row, caps)
    return read


def tab_of(row: Any | None, caps: Any | None = None) -> Tab:
    """Builds a Tab from the row of SELECT_TAB and from the sums over its collectable orders, which are zero without `caps`."""
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
