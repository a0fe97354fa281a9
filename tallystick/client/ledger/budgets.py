"""The budgets of a day: how much of each is spent and reserved, and which orders still fit.

Every signed order counts against its budgets with its whole cap while its provider may collect on it. It counts from the
transaction that signs it until one of these: its receipt, whose cost replaces the cap; the end of its job, if the order was never
matched; or its `claim_by`. Days are UTC, and a job belongs to the day of its receipt. Functions of one connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection, bindparam

from tallystick.client.config import Budget
from tallystick.client.ledger.schema import IS_COLLECTABLE, orders, spent, tabs, workloads
from tallystick.client.ledger.spending import DAY_SECONDS
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.messages import Terms
from tallystick.protocol.types import Address, Amount, format_amount
from tallystick.runtime.sqlite_statement import SqliteStatement

_SPENT_TODAY = sa.select(sa.func.coalesce(sa.func.sum(spent.c.cost), 0).label("amount")).where(
    spent.c.payer == bindparam("of_payer"), spent.c.day == bindparam("of_day")
)
_OPEN_CAPS = (
    sa.select(orders.c.cap, workloads.c.label)
    .join(tabs, tabs.c.id == orders.c.tab)
    .join(workloads, workloads.c.id == orders.c.workload)
    .where(
        tabs.c.payer == bindparam("of_payer"),
        IS_COLLECTABLE,
        orders.c.claim_by > bindparam("of_now"),
    )
    .subquery()
)
_RESERVED = sa.select(sa.func.coalesce(sa.func.sum(_OPEN_CAPS.c.cap), 0).label("amount"))


def _is_below(label: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    """`Budget.covers` in SQL. It avoids LIKE, which ignores case."""
    below: sa.BindParameter[str] = bindparam("of_prefix")
    return (label == bindparam("of_label")) | (sa.func.substr(label, 1, sa.func.length(below)) == below)


_SUMS = SqliteStatement(_SPENT_TODAY), SqliteStatement(_RESERVED)
_SUMS_OF_LABEL = (
    SqliteStatement(_SPENT_TODAY.where(_is_below(spent.c.label))),
    SqliteStatement(_RESERVED.where(_is_below(_OPEN_CAPS.c.label))),
)


@dataclass(frozen=True, slots=True)
class BudgetStatus:
    """The state of a budget today, in base units.

    `reserved`: the caps of all orders that may still be collected, of any day and provider.
    """

    budget: Budget
    spent: Amount
    reserved: Amount

    @property
    def left(self) -> int:
        """What further jobs may cost; negative if the budget was lowered below what is used."""
        return self.budget.per_day - self.spent - self.reserved

    @property
    def percent(self) -> int:
        """The percentage of the budget that is spent or reserved."""
        return 100 if self.budget.per_day == 0 else (self.spent + self.reserved) * 100 // self.budget.per_day


def budget_status(c: Connection, payer: Address, budget: Budget, now: int) -> BudgetStatus:
    """Returns the state of a budget on the UTC day of `now` (Unix seconds)."""
    spent_today, reserved = _SUMS if budget.label is None else _SUMS_OF_LABEL
    of = {"of_payer": payer, "of_now": now, "of_day": now // DAY_SECONDS}
    if budget.label is not None:
        of |= {"of_label": budget.label, "of_prefix": budget.label + "/"}
    cost, open_caps = (statement.all(c, of)[0].amount for statement in (spent_today, reserved))
    return BudgetStatus(budget, Amount(cost), Amount(open_caps))


def fit_budgets(drafts: Sequence[tuple[Address, Terms]], statuses: Sequence[BudgetStatus]) -> list[tuple[Address, Terms]]:
    """Selects the drafts, in order, whose caps together fit every budget: any of their providers might collect.

    Raises Refusal (over_budget) if no draft fits.
    """
    left = min(status.left for status in statuses) if statuses else None
    fitting: list[tuple[Address, Terms]] = []
    for draft in drafts:
        if left is None:
            fitting.append(draft)
        elif draft[1].max_cost <= left:
            fitting.append(draft)
            left -= draft[1].max_cost
    if drafts and not fitting:
        cheapest = min(drafts, key=lambda draft: draft[1].max_cost)[1].max_cost
        tightest = min(statuses, key=lambda status: status.left)
        raise Refusal(
            Code.OVER_BUDGET,
            f"{tightest.budget.name} has {format_amount(Amount(max(tightest.left, 0)))} dollars left until midnight UTC "
            f"({format_amount(tightest.spent)} spent, {format_amount(tightest.reserved)} reserved for orders that may still be "
            f"collected), but this request may cost {format_amount(cheapest)}; lower max_tokens or raise the budget",
        )
    return fitting
