"""What a wallet spent, by day, workload label, model and provider, and the budgets that bound it.

Every signed order counts in its budgets with its whole cap as long as its provider may collect on it: from the transaction that
signs it until its receipt, which takes the cap's place, until its job ends and it was never matched, or until its `claim_by`.
Days are UTC, and a job belongs to the day of its receipt. Functions of one connection.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection, bindparam
from sqlalchemy.dialects.sqlite import insert

from tallystick.client.config import Budget
from tallystick.client.ledger.schema import COLLECTABLE, JobState, OrderState, jobs, orders, receipts, spent
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.messages import Receipt, Terms
from tallystick.protocol.types import Address, Amount, JobId, format_amount

DAY_SECONDS = 86_400
GROUPS = ("day", "label", "model", "provider")
_SUMS = ("requests", "failed", "cost", "input_tokens", "cached_tokens", "output_tokens", "hits", "saved")
_PAID = _SUMS[1:6]

_THIS = sa.select(
    jobs.c.payer,
    bindparam("to_day", type_=sa.BigInteger),
    jobs.c.label,
    jobs.c.model,
    bindparam("to_provider", type_=sa.String),
    bindparam("to_requests", type_=sa.BigInteger),
    *(bindparam(f"to_{name}", type_=sa.BigInteger) for name in _PAID),
    sa.literal(0),
    sa.literal(0),
).where(jobs.c.job == bindparam("of_job"))
_COLUMNS = ("payer", *GROUPS, *_SUMS)


def _adding(source: sa.Select[tuple[object, ...]]) -> sa.Executable:
    new = insert(spent).from_select(_COLUMNS, source)
    return new.on_conflict_do_update(
        index_elements=["payer", *GROUPS], set_={name: spent.c[name] + new.excluded[name] for name in _SUMS}
    )


_ADD = _adding(_THIS)
_ADD_FAILED = _adding(_THIS.where(jobs.c.state.in_([JobState.OPEN.value, JobState.LOST.value])))
_NEW_HIT = insert(spent)
_ADD_HIT = _NEW_HIT.on_conflict_do_update(
    index_elements=["payer", *GROUPS],
    set_={"hits": spent.c.hits + _NEW_HIT.excluded.hits, "saved": spent.c.saved + _NEW_HIT.excluded.saved},
)
_ADD_UNPROVEN = _NEW_HIT.on_conflict_do_update(
    index_elements=["payer", *GROUPS], set_={"cost": spent.c.cost + _NEW_HIT.excluded.cost}
)
_SPENT = sa.select(sa.func.coalesce(sa.func.sum(spent.c.cost), 0)).where(
    spent.c.payer == bindparam("of_payer"), spent.c.day == bindparam("of_day")
)
_CAPS = (
    sa.select(orders.c.cap, jobs.c.label)
    .join(jobs, jobs.c.job == orders.c.job)
    .where(
        orders.c.payer == bindparam("of_payer"),
        orders.c.state.in_(COLLECTABLE),
        orders.c.claim_by > bindparam("of_now"),
    )
    .subquery()
)
_RESERVED = sa.select(sa.func.coalesce(sa.func.sum(_CAPS.c.cap), 0))


def add_receipt(c: Connection, job: JobId, receipt: Receipt, now: int, *, failed: bool, counted: bool = False) -> None:
    """A receipt was booked. `counted`: its request counts already, as one that failed."""
    told = {
        "of_job": job.hex(),
        "to_day": now // DAY_SECONDS,
        "to_provider": receipt.provider,
        "to_requests": int(not counted),
        "to_failed": int(failed and not counted),
        "to_cost": int(receipt.cost),
        "to_input_tokens": receipt.input_tokens,
        "to_cached_tokens": receipt.cached_input_tokens,
        "to_output_tokens": receipt.output_tokens,
    }
    c.execute(_ADD, told)


def add_failed(c: Connection, job: JobId, now: int) -> None:
    """A job ends without a receipt; to be called before its state is changed."""
    none = dict.fromkeys((f"to_{name}" for name in _PAID[1:]), 0)
    c.execute(
        _ADD_FAILED,
        none | {"of_job": job.hex(), "to_day": now // DAY_SECONDS, "to_provider": "", "to_requests": 1, "to_failed": 1},
    )


def add_unproven(c: Connection, tab: dict[str, object], amount: Amount, now: int) -> None:
    """The chain paid a provider this without a receipt that is known here."""
    group = {"payer": tab["of_payer"], "day": now // DAY_SECONDS, "label": "", "model": "", "provider": tab["of_provider"]}
    c.execute(_ADD_UNPROVEN, group | dict.fromkeys(_SUMS, 0) | {"cost": int(amount)})


@dataclass(frozen=True, slots=True)
class CacheHit:
    """A request that was answered from the cache, which saved what its job had cost (base units)."""

    label: str
    model: str
    provider: Address
    saved: Amount


def add_cache_hit(c: Connection, payer: Address, hit: CacheHit, now: int) -> None:
    """The cache saved something."""
    row = dict.fromkeys(_SUMS, 0) | {"hits": 1, "saved": int(hit.saved)}
    group = {"payer": payer, "day": now // DAY_SECONDS, "label": hit.label, "model": hit.model, "provider": hit.provider}
    c.execute(_ADD_HIT, group | row)


@dataclass(frozen=True, slots=True)
class BudgetStatus:
    """How a budget stands today, in base units. `reserved`: the caps of all orders, of any day and provider, that may still be
    collected.
    """

    budget: Budget
    spent: Amount
    reserved: Amount

    @property
    def left(self) -> int:
        """What another job may cost; below zero where the budget was lowered."""
        return self.budget.per_day - self.spent - self.reserved

    @property
    def percent(self) -> int:
        """How much of it is spent or reserved."""
        return 100 if self.budget.per_day == 0 else (self.spent + self.reserved) * 100 // self.budget.per_day


def _under(label: sa.ColumnElement[str], workload: str) -> sa.ColumnElement[bool]:
    """As `Budget.covers`, in SQL; LIKE is blind to case."""
    above = workload + "/"
    return (label == workload) | (sa.func.substr(label, 1, len(above)) == above)


def budget_status(c: Connection, payer: Address, budget: Budget, now: int) -> BudgetStatus:
    """How a budget stands."""
    paid, reserved = _SPENT, _RESERVED
    if budget.label is not None:
        paid, reserved = paid.where(_under(spent.c.label, budget.label)), reserved.where(_under(_CAPS.c.label, budget.label))
    which = {"of_payer": payer, "of_day": now // DAY_SECONDS}
    open_caps = c.execute(reserved, {"of_payer": payer, "of_now": now}).scalar_one()
    return BudgetStatus(budget, Amount(c.execute(paid, which).scalar_one()), Amount(open_caps))


def fit_budgets(drafts: Sequence[tuple[Address, Terms]], stands: Sequence[BudgetStatus]) -> list[tuple[Address, Terms]]:
    """The drafts that every budget has room for together, the first ones first: any of their providers might collect. Raises
    Refusal if there is none.
    """
    left = min(one.left for one in stands) if stands else None
    fitting: list[tuple[Address, Terms]] = []
    for draft in drafts:
        if left is None:
            fitting.append(draft)
        elif draft[1].max_cost <= left:
            fitting.append(draft)
            left -= draft[1].max_cost
    if drafts and not fitting:
        least = min(drafts, key=lambda draft: draft[1].max_cost)[1].max_cost
        tight = min(stands, key=lambda one: one.left)
        raise Refusal(
            Code.OVER_BUDGET,
            f"{tight.budget.name} has {format_amount(Amount(max(tight.left, 0)))} left until midnight UTC "
            f"(spent {format_amount(tight.spent)}; orders that may still be collected, of jobs under way or without a receipt, "
            f"{format_amount(tight.reserved)}), and this request may cost {format_amount(least)}: lower max_tokens, or raise the "
            "budget",
        )
    return fitting


@dataclass(frozen=True, slots=True)
class SpendingRow:
    """What one group cost, in base units; `group` has a value for each member that was grouped by, days as Unix days."""

    group: tuple[object, ...]
    requests: int
    failed: int
    cost: Amount
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    hits: int = 0
    """Requests answered from the cache, which are not among the others."""
    saved: Amount = Amount(0)
    latency_ms: tuple[int, int, int] | None = None
    """How long its requests took, from asking to the receipt: p50, p95, p99 (nearest rank). None: not known of any."""


def read_spending(c: Connection, payer: Address, since: int, by: Sequence[str]) -> list[SpendingRow]:
    """What was spent since that Unix time's day, grouped by some of GROUPS, newest day first, then the dearest first."""
    groups = [spent.c[name] for name in by]
    sums = [sa.func.sum(spent.c[name]).label(name) for name in _SUMS]
    query = sa.select(*groups, *sums).where(spent.c.payer == payer, spent.c.day >= since // DAY_SECONDS).group_by(*groups)
    newest = [spent.c.day.desc()] if "day" in by else []
    rows = c.execute(query.order_by(*newest, sums[2].desc(), *groups)).all()
    if not by:
        rows = [row for row in rows if row[0] is not None]
    took = _latencies(c, payer, since, by)
    told: list[SpendingRow] = []
    for row in rows:
        group = tuple(row[: len(by)])
        told.append(SpendingRow(group, **{name: getattr(row, name) for name in _SUMS}, latency_ms=took.get(group)))
    return told


def _latencies(c: Connection, payer: Address, since: int, by: Sequence[str]) -> dict[tuple[object, ...], tuple[int, int, int]]:
    day = receipts.c.recorded_at // DAY_SECONDS
    of = {"day": day, "label": jobs.c.label, "model": jobs.c.model, "provider": receipts.c.provider}
    query = (
        sa.select(*(of[name] for name in by), jobs.c.duration_ms)
        .join(orders, orders.c.job == jobs.c.job)
        .join(receipts, receipts.c.order_digest == orders.c.digest)
        .where(jobs.c.payer == payer, day >= since // DAY_SECONDS, jobs.c.duration_ms.is_not(None))
        .where(orders.c.state == OrderState.RECORDED.value)
        .order_by(jobs.c.duration_ms)
    )
    found: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for *group, took in c.execute(query):
        found[tuple(group)].append(took)
    return {group: (_rank(sorted_, 50), _rank(sorted_, 95), _rank(sorted_, 99)) for group, sorted_ in found.items()}


def _rank(ordered: Sequence[int], percent: int) -> int:
    return ordered[-(-len(ordered) * percent // 100) - 1]
