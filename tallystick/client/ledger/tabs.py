"""Reading a payer's tabs: the stored row of each tab, with the caps of its orders that may still be collected.

Functions of one connection. Bound parameters that select rows start with `of_`, those that change rows start with `to_`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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


_SELECT_TAB_AND_CAPS = SqliteStatement(
    sa.select(
        tabs.c.id,
        tabs.c.accepted,
        tabs.c.total,
        tabs.c.ceiling,
        tabs.c.order_seq,
        tabs.c.blocked_reason,
        tabs.c.undelivered_quarters,
        tabs.c.recovered,
        _sum_where(_NOT_EXPIRED, orders.c.cap).label("open"),
        _sum_where(_NOT_EXPIRED & (orders.c.state == OrderState.DISPATCHED.value), sa.literal(1)).label("awaiting_receipts"),
        _sum_where(_NOT_EXPIRED & (orders.c.seq <= tabs.c.total_order_seq), orders.c.cap).label("early"),
        _sum_where(~_NOT_EXPIRED, orders.c.cap).label("expired"),
    )
    .select_from(tabs.outerjoin(orders, (orders.c.tab == tabs.c.id) & IS_COLLECTABLE))
    .where(THIS_TAB)
    .group_by(tabs.c.id)
)


class StoredTab(NamedTuple):
    """A tab and the id of its row; 0 for a tab that has none."""

    row: int
    tab: Tab


def tab_key(domain: Domain, payer: Address, provider: Address) -> dict[str, object]:
    """The bound parameters that select one tab."""
    return {"of_deployment_id": deployment_id(domain), "of_payer": payer, "of_provider": provider}


def read_tabs(c: Connection, domain: Domain, payer: Address, providers: Sequence[Address], now: int) -> dict[Address, Tab]:
    """The payer's tabs with these providers. Orders whose `claim_by` is not after `now` (Unix seconds) count as expired."""
    return {provider: stored.tab for provider, stored in read_stored_tabs(c, domain, payer, providers, now).items()}


def read_stored_tabs(
    c: Connection, domain: Domain, payer: Address, providers: Sequence[Address], now: int
) -> dict[Address, StoredTab]:
    """Like `read_tabs`, with the ids of the tabs' rows."""
    read: dict[Address, StoredTab] = {}
    for provider in providers:
        row = _SELECT_TAB_AND_CAPS.first(c, tab_key(domain, payer, provider) | {"of_now": now})
        read[provider] = StoredTab(0, Tab()) if row is None else StoredTab(row.id, _tab_of(row))
    return read


def _tab_of(row: Any) -> Tab:
    """Builds a Tab from its row and from the sums over its collectable orders."""
    return Tab(
        accepted=Amount(row.accepted),
        total=Amount(row.total),
        open_caps=Amount(row.open),
        early_caps=Amount(row.early),
        ceiling=Amount(row.ceiling),
        order_seq=row.order_seq,
        blocked_reason=row.blocked_reason,
        awaiting_receipts=row.awaiting_receipts,
        undelivered_quarters=row.undelivered_quarters,
        expired_caps=Amount(row.expired),
        recovered=Amount(row.recovered),
    )
