"""Earnings reports from the node's store, as functions of one connection, for readers outside the daemon."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from node.domain.earned_money import TabMoney
from node.domain.tabs import Funds
from node.ports import PayoutRecord
from node.storage.schema import gas, orders, payouts, receipts, tabs
from node.storage.store import best_order
from tallystick.protocol.messages import Outcome
from tallystick.protocol.types import Address, Amount


@dataclass(frozen=True, slots=True)
class EarningsLine:
    """Receipts of one UTC day, model and payer. `revenue` is base units."""

    day: str
    model: str
    payer: Address
    jobs: int
    input_tokens: int
    output_tokens: int
    revenue: Amount


@dataclass(frozen=True, slots=True)
class GasSpent:
    """What this provider paid for its own settlements: number of transactions, gas, and fees in wei."""

    transactions: int
    gas_used: int
    fee: int


def read_payouts(c: Connection, limit: int) -> list[PayoutRecord]:
    """Returns the last payouts, newest first."""
    query = sa.select(payouts).order_by(payouts.c.at.desc(), payouts.c.tx).limit(limit)
    return [PayoutRecord(row.tx, row.at, row.amount, Address(row.address)) for row in c.execute(query)]


def read_gas(c: Connection, since: int) -> GasSpent:
    """Returns the gas spent since `since` (Unix seconds). It is often 0, because coordinators pay for the claims that they
    settle.
    """
    rows = c.execute(sa.select(gas.c.gas_used, gas.c.fee).where(gas.c.at >= since)).all()
    return GasSpent(len(rows), sum(row.gas_used for row in rows), sum(int(row.fee) for row in rows))


def read_lines(c: Connection, since: int) -> list[EarningsLine]:
    """Returns the earnings since `since` (Unix seconds), newest day first, then largest revenue first."""
    day = sa.func.date(receipts.c.finished_at, "unixepoch").label("day")
    revenue = sa.func.sum(sa.cast(sa.type_coerce(receipts.c.cost, sa.String), sa.BigInteger)).label("revenue")
    query = (
        sa.select(
            day,
            orders.c.model,
            receipts.c.payer,
            sa.func.count().label("jobs"),
            sa.func.sum(receipts.c.input_tokens).label("input"),
            sa.func.sum(receipts.c.output_tokens).label("output"),
            revenue,
        )
        .join(orders, (orders.c.job == receipts.c.job) & (orders.c.digest == receipts.c.order_digest))
        .where(orders.c.admitted_at.is_not(None))
        .where(receipts.c.finished_at >= since, orders.c.outcome.is_distinct_from(int(Outcome.REFUSED)))
        .group_by(day, orders.c.model, receipts.c.payer)
        .order_by(day.desc(), revenue.desc())
    )
    return [
        EarningsLine(row.day, row.model, Address(row.payer), row.jobs, row.input, row.output, Amount(row.revenue))
        for row in c.execute(query)
    ]


def read_tab_money(c: Connection, now: int) -> list[TabMoney]:
    """Returns all tabs with the state of the chain that was last recorded, and the orders that are claimable at `now` (Unix
    seconds).
    """
    columns = (tabs.c.payer, tabs.c.cumulative, tabs.c.settled, tabs.c.reserved, orders.c.ceiling, orders.c.claim_by)
    query = sa.select(*columns).select_from(tabs.outerjoin(orders, orders.c.id == best_order(now)))
    return [
        TabMoney(
            Address(row.payer), row.cumulative, row.ceiling or Amount(0), row.claim_by or 0, Funds(row.settled, row.reserved)
        )
        for row in c.execute(query)
    ]
