"""Earnings reports from the node's store, as functions of one connection, for readers outside the daemon."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from node.domain.earned_money import TabMoney
from node.domain.tabs import Funds
from node.ports import PayoutRecord
from node.storage.rows import read_address, read_receipt
from node.storage.schema import ceilings, earned_days, gas, payouts, receipts, tabs
from node.storage.store import has_best_order
from tallystick.protocol.messages import Outcome
from tallystick.protocol.pricing import Usage, usage_of
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
    """Returns the earnings since `since` (Unix seconds), newest day first, then largest revenue first.

    Of the day of `since`, receipts that are no longer kept count as a whole day.
    """
    day = sa.func.date(receipts.c.finished_at, "unixepoch")
    kept = sa.select(
        day.label("day"),
        receipts.c.model,
        receipts.c.payer,
        sa.literal(1).label("jobs"),
        receipts.c.input_tokens,
        receipts.c.output_tokens,
        sa.type_coerce(receipts.c.cost, sa.BigInteger).label("revenue"),
    ).where(
        receipts.c.model.is_not(None),
        receipts.c.finished_at >= since,
        receipts.c.outcome.is_distinct_from(int(Outcome.REFUSED)),
    )
    summed = sa.select(
        *(column for column in earned_days.columns if column.key != "revenue"),
        sa.type_coerce(earned_days.c.revenue, sa.BigInteger).label("revenue"),
    ).where(earned_days.c.day >= sa.func.date(since, "unixepoch"))
    parts = sa.union_all(kept, summed).subquery()
    revenue = sa.func.sum(parts.c.revenue).label("revenue")
    query = (
        sa.select(
            parts.c.day,
            parts.c.model,
            parts.c.payer,
            sa.func.sum(parts.c.jobs).label("jobs"),
            sa.func.sum(parts.c.input_tokens).label("input"),
            sa.func.sum(parts.c.output_tokens).label("output"),
            revenue,
        )
        .group_by(parts.c.day, parts.c.model, parts.c.payer)
        .order_by(parts.c.day.desc(), revenue.desc())
    )
    return [
        EarningsLine(row.day, row.model, read_address(row.payer), row.jobs, row.input, row.output, Amount(row.revenue))
        for row in c.execute(query)
    ]


def read_paid_jobs(c: Connection, model: str, since: int, limit: int) -> list[tuple[Usage, int]]:
    """Returns usage and cost in base units of a model's receipts since `since` (Unix seconds), the newest ones."""
    query = (
        sa.select(receipts.c.document)
        .where(receipts.c.model == model, receipts.c.finished_at >= since, receipts.c.document.is_not(None))
        .order_by(receipts.c.id.desc())
        .limit(limit)
    )
    messages = (read_receipt(document).message for document in c.execute(query).scalars())
    return [(usage_of(message), int(message.cost)) for message in messages]


def read_tab_money(c: Connection, now: int) -> list[TabMoney]:
    """Returns all tabs with the state of the chain that was last recorded, and the orders that are claimable at `now` (Unix
    seconds).
    """
    columns = (tabs.c.payer, tabs.c.cumulative, tabs.c.settled, tabs.c.reserved, ceilings.c.ceiling, ceilings.c.claim_by)
    query = sa.select(*columns).select_from(tabs.outerjoin(ceilings, has_best_order(now)))
    return [
        TabMoney(
            Address(row.payer), row.cumulative, row.ceiling or Amount(0), row.claim_by or 0, Funds(row.settled, row.reserved)
        )
        for row in c.execute(query)
    ]
