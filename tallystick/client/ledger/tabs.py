"""Reading a payer's tabs: the stored row of each tab, with the caps of its orders that may still be collected.

Functions of one connection. Bound parameters that select rows start with `of_`, those that change rows start with `to_`.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy import Connection, bindparam
from sqlalchemy.dialects.sqlite import insert

from tallystick.client.ledger.schema import IS_COLLECTABLE, OrderState, deployment_id, orders, tabs
from tallystick.client.orders.tab import Tab
from tallystick.protocol.eip712 import Domain
from tallystick.protocol.types import Address, Amount

DEPLOYMENT_ID: sa.BindParameter[str] = bindparam("of_deployment_id")
PAYER: sa.BindParameter[str] = bindparam("of_payer")
PROVIDER: sa.BindParameter[str] = bindparam("of_provider")
_PROVIDERS: sa.BindParameter[list[str]] = bindparam("of_providers", expanding=True)

THIS_TAB = (tabs.c.deployment_id == DEPLOYMENT_ID) & (tabs.c.payer == PAYER) & (tabs.c.provider == PROVIDER)
SELECT_TAB = sa.select(tabs).where(THIS_TAB)
INSERT_TAB = insert(tabs)
_SELECT_TABS = sa.select(tabs).where(
    tabs.c.deployment_id == DEPLOYMENT_ID, tabs.c.payer == PAYER, tabs.c.provider.in_(_PROVIDERS)
)
_NOT_EXPIRED = orders.c.claim_by > bindparam("of_now")


def _caps_where(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    return sa.func.sum(sa.case((condition, orders.c.cap), else_=0))


_SELECT_CAPS = (
    sa.select(
        orders.c.provider,
        _caps_where(_NOT_EXPIRED).label("open"),
        sa.func.sum(sa.case((_NOT_EXPIRED & (orders.c.state == OrderState.DISPATCHED.value), 1), else_=0)).label(
            "awaiting_receipts"
        ),
        _caps_where(_NOT_EXPIRED & (orders.c.seq <= tabs.c.total_order_seq)).label("early"),
        _caps_where(~_NOT_EXPIRED).label("expired"),
    )
    .join(
        tabs,
        (tabs.c.deployment_id == orders.c.deployment_id)
        & (tabs.c.payer == orders.c.payer)
        & (tabs.c.provider == orders.c.provider),
    )
    .where(
        orders.c.payer == PAYER,
        IS_COLLECTABLE,
        orders.c.provider.in_(_PROVIDERS),
        orders.c.deployment_id == DEPLOYMENT_ID,
    )
    .group_by(orders.c.provider)
)


def tab_key(domain: Domain, payer: Address, provider: Address) -> dict[str, object]:
    """The bound parameters that select one tab."""
    return {"of_deployment_id": deployment_id(domain), "of_payer": payer, "of_provider": provider}


def read_tabs(c: Connection, domain: Domain, payer: Address, providers: Sequence[Address], now: int) -> dict[Address, Tab]:
    """The payer's tabs with these providers. Orders whose `claim_by` is not after `now` (Unix seconds) count as expired."""
    key = {"of_deployment_id": deployment_id(domain), "of_payer": payer, "of_providers": list(providers)}
    rows = {row.provider: row for row in c.execute(_SELECT_TABS, key)}
    caps = {row.provider: row for row in c.execute(_SELECT_CAPS, key | {"of_now": now})}
    return {provider: tab_of(rows.get(provider), caps.get(provider)) for provider in providers}


def tab_of(row: sa.Row[tuple[object, ...]] | None, caps: sa.Row[tuple[object, ...]] | None = None) -> Tab:
    """Builds a Tab from its row and from the sums over its collectable orders. Without `caps`, those sums are zero."""
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
