"""What a wallet spent, by day, workload label, model and provider.

Days are UTC, and a job belongs to the day of its receipt. Functions of one connection.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection, bindparam
from sqlalchemy.dialects.sqlite import insert

from tallystick.client.ledger.schema import IS_UNRESOLVED, THIS_JOB, OrderState, orders, receipts, spent, tabs, workloads
from tallystick.protocol.messages import Receipt
from tallystick.protocol.types import Address, Amount, JobId
from tallystick.runtime.sqlite_statement import SqliteStatement

DAY_SECONDS = 86_400
GROUPS = ("day", "label", "model", "provider")
_SUMS = ("requests", "failed", "cost", "input_tokens", "cached_tokens", "output_tokens", "hits", "saved", "hedged", "hedge_cost")
_RECEIPT_SUMS = (*_SUMS[1:6], *_SUMS[8:])

_CACHE_SUMS = ("hits", "saved")
_JOB_ROW = sa.select(
    workloads.c.payer,
    bindparam("to_day", type_=sa.BigInteger),
    workloads.c.label,
    workloads.c.model,
    bindparam("to_provider", type_=sa.String),
    bindparam("to_requests", type_=sa.BigInteger),
    *(sa.literal(0) if name in _CACHE_SUMS else bindparam(f"to_{name}", type_=sa.BigInteger) for name in _SUMS[1:]),
).where(THIS_JOB, workloads.c.id == orders.c.workload)
_COLUMNS = ("payer", *GROUPS, *_SUMS)


def _add_from(source: sa.Select[Any]) -> SqliteStatement:
    row = insert(spent).from_select(_COLUMNS, source)
    return SqliteStatement(
        row.on_conflict_do_update(
            index_elements=["payer", *GROUPS], set_={name: spent.c[name] + row.excluded[name] for name in _SUMS}
        )
    )


_ADD_FAILED = _add_from(_JOB_ROW.where(IS_UNRESOLVED).limit(sa.literal_column("1")))
_INSERT = insert(spent)
_ADD_RECEIPT = SqliteStatement(
    _INSERT.on_conflict_do_update(
        index_elements=["payer", *GROUPS], set_={name: spent.c[name] + _INSERT.excluded[name] for name in _SUMS}
    ),
    " ".join(_COLUMNS),
)
_ADD_CACHE_HIT = _INSERT.on_conflict_do_update(
    index_elements=["payer", *GROUPS],
    set_={"hits": spent.c.hits + _INSERT.excluded.hits, "saved": spent.c.saved + _INSERT.excluded.saved},
)
_ADD_UNPROVEN = _INSERT.on_conflict_do_update(
    index_elements=["payer", *GROUPS], set_={"cost": spent.c.cost + _INSERT.excluded.cost}
)


@dataclass(frozen=True, slots=True)
class CacheHit:
    """A request answered from the response cache. `saved`: the cost of the cached job, in base units."""

    label: str
    model: str
    provider: Address
    saved: Amount


@dataclass(frozen=True, slots=True)
class SpendingRow:
    """The spending of one group, in base units; `group` has a value for each grouping column, days as Unix days."""

    group: tuple[object, ...]
    requests: int
    failed: int
    cost: Amount
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    hits: int = 0
    """Requests answered from the cache; `requests` does not include them."""
    saved: Amount = Amount(0)
    hedged: int = 0
    """Requests that ran at two providers, of which one was paid."""
    hedge_cost: int = 0
    """What they cost more than the first provider would have charged, in base units; below 0 if they were cheaper."""
    latency_ms: tuple[int, int, int] | None = None
    """Time from the request to the receipt: p50, p95, p99 (nearest rank). None if it is not known for any request."""


class Workload(NamedTuple):
    """What a job's spending is counted under."""

    payer: str
    label: str
    model: str


def add_receipt(
    c: Connection,
    workload: Workload,
    receipt: Receipt,
    now: int,
    *,
    failed: bool,
    counted: bool = False,
    hedge_cost: int | None = None,
) -> None:
    """Adds a recorded receipt of a job. `counted`: its request already counts, as a failed one. `hedge_cost`: see `SpendingRow`;
    None if the job ran at one provider.
    """
    _ADD_RECEIPT.run(
        c,
        {
            "payer": workload.payer,
            "day": now // DAY_SECONDS,
            "label": workload.label,
            "model": workload.model,
            "provider": receipt.provider,
            "requests": int(not counted),
            "failed": int(failed and not counted),
            "cost": int(receipt.cost),
            "input_tokens": receipt.input_tokens,
            "cached_tokens": receipt.cached_input_tokens,
            "output_tokens": receipt.output_tokens,
            "hits": 0,
            "saved": 0,
            "hedged": int(hedge_cost is not None),
            "hedge_cost": hedge_cost or 0,
        },
    )


def add_failed(c: Connection, job: JobId, now: int) -> None:
    """Counts a job that ends without a receipt. Call it before the job's state changes."""
    zeros = dict.fromkeys((f"to_{name}" for name in _RECEIPT_SUMS[1:]), 0)
    _ADD_FAILED.run(
        c,
        zeros | {"of_job": bytes(job), "to_day": now // DAY_SECONDS, "to_provider": "", "to_requests": 1, "to_failed": 1},
    )


def add_unproven(c: Connection, tab_key: dict[str, object], amount: Amount, now: int) -> None:
    """Adds base units that the chain paid to a provider without a receipt in this ledger."""
    day = now // DAY_SECONDS
    group = {"payer": tab_key["of_payer"], "day": day, "label": "", "model": "", "provider": tab_key["of_provider"]}
    c.execute(_ADD_UNPROVEN, group | dict.fromkeys(_SUMS, 0) | {"cost": int(amount)})


def add_cache_hit(c: Connection, payer: Address, hit: CacheHit, now: int) -> None:
    """Counts a request that the response cache answered."""
    sums = dict.fromkeys(_SUMS, 0) | {"hits": 1, "saved": int(hit.saved)}
    group = {"payer": payer, "day": now // DAY_SECONDS, "label": hit.label, "model": hit.model, "provider": hit.provider}
    c.execute(_ADD_CACHE_HIT, group | sums)


def read_spending(c: Connection, payer: Address, since: int, by: Sequence[str]) -> list[SpendingRow]:
    """Returns the spending from the UTC day of `since` (Unix seconds) on, grouped by some of GROUPS.

    The newest day comes first, then the most expensive group.
    """
    groups = [spent.c[name] for name in by]
    sums = [sa.func.sum(spent.c[name]).label(name) for name in _SUMS]
    query = sa.select(*groups, *sums).where(spent.c.payer == payer, spent.c.day >= since // DAY_SECONDS).group_by(*groups)
    newest_first = [spent.c.day.desc()] if "day" in by else []
    rows = c.execute(query.order_by(*newest_first, sums[2].desc(), *groups)).all()
    if not by:
        rows = [row for row in rows if row[0] is not None]
    latencies = _latencies(c, payer, since, by)
    spending: list[SpendingRow] = []
    for row in rows:
        group = tuple(row[: len(by)])
        spending.append(SpendingRow(group, **{name: getattr(row, name) for name in _SUMS}, latency_ms=latencies.get(group)))
    return spending


def _latencies(c: Connection, payer: Address, since: int, by: Sequence[str]) -> dict[tuple[object, ...], tuple[int, int, int]]:
    day = receipts.c.recorded_at // DAY_SECONDS
    columns = {"day": day, "label": workloads.c.label, "model": workloads.c.model, "provider": tabs.c.provider}
    query = (
        sa.select(*(columns[name] for name in by), orders.c.duration_ms)
        .join(workloads, workloads.c.id == orders.c.workload)
        .join(receipts, receipts.c.id == orders.c.receipt)
        .join(tabs, tabs.c.id == receipts.c.tab)
        .where(workloads.c.payer == payer, day >= since // DAY_SECONDS, orders.c.duration_ms.is_not(None))
        .where(orders.c.state == OrderState.RECORDED.value)
        .order_by(orders.c.duration_ms)
    )
    durations: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for *group, duration in c.execute(query):
        durations[tuple(group)].append(duration)
    return {group: (_rank(ordered, 50), _rank(ordered, 95), _rank(ordered, 99)) for group, ordered in durations.items()}


def _rank(ordered: Sequence[int], percent: int) -> int:
    return ordered[-(-len(ordered) * percent // 100) - 1]
