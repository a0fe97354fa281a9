"""`tally spending`: where the money went, and how the budgets stand."""

from __future__ import annotations

import csv
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.jobs.jobs import with_books
from tallystick.cli.options import DEFAULT_WALLET, Config, Json, Wallet
from tallystick.cli.output import show_json, show_rows, step
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import Amount, format_amount

if TYPE_CHECKING:
    from tallystick.client.config import ClientConfig
    from tallystick.client.ledger.budgets import BudgetStatus
    from tallystick.client.ledger.ledger import Ledger
    from tallystick.client.ledger.spending import SpendingRow


def spending(
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    by: Annotated[str, typer.Option("--by", help="What to group by: some of day, label, model, provider.")] = "day,model",
    days: Annotated[int, typer.Option("--days", min=1, max=10_000, help="How many days back, today among them.")] = 30,
    as_csv: Annotated[bool, typer.Option("--csv", help="Comma-separated values on stdout.")] = False,
    as_json: Json = False,
) -> None:
    """Shows what this wallet spent, by day, model, workload label or provider, and how the config's budgets stand.

    Days are UTC; a job counts on the day of its receipt. Jobs under way are not in it. Needs no password.
    """
    from tallystick.client.ledger.spending import DAY_SECONDS, GROUPS

    groups = tuple(part.strip() for part in by.split(",") if part.strip())
    if len(set(groups)) != len(groups) or not set(groups) <= set(GROUPS):
        raise BadMessage(f"--by: expected some of {', '.join(GROUPS)}, got {by!r}")

    async def run(ledger: Ledger, loaded: ClientConfig) -> None:
        now = int(time.time())
        found = [_tell(one, groups) for one in await ledger.spending(now - (days - 1) * DAY_SECONDS, groups)]
        stands = [await ledger.budget_status(budget, now) for budget in loaded.budgets]
        if as_csv:
            writer = csv.DictWriter(sys.stdout, [*groups, *_FIGURES, *_LATENCY], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(found)
        elif as_json:
            show_json({"spent": found, "budgets": [_tell_standing(one) for one in stands]})
        else:
            _show(found, groups, stands)

    with_books(config, wallet, None, run)


_FIGURES = ("requests", "failed", "inputTokens", "cachedInputTokens", "outputTokens", "cost", "costDollars", "cacheHits", "saved")
_LATENCY = ("latencyMsP50", "latencyMsP95", "latencyMsP99")


def _tell(one: SpendingRow, groups: tuple[str, ...]) -> dict[str, Any]:
    """With `cost` in base units, as text, and dollars beside it."""
    named = dict(zip(groups, one.group, strict=True))
    if isinstance(day := named.get("day"), int):
        named["day"] = f"{datetime.fromtimestamp(day * 86_400, UTC):%F}"
    figures = (one.requests, one.failed, one.input_tokens, one.cached_tokens, one.output_tokens)
    money = (str(int(one.cost)), format_amount(Amount(one.cost)), one.hits, str(int(one.saved)))
    told = dict(zip(_FIGURES, (*figures, *money), strict=True))
    return named | told | dict(zip(_LATENCY, one.latency_ms or (None, None, None), strict=True))


def _tell_standing(one: BudgetStatus) -> dict[str, Any]:
    return {
        "label": one.budget.label,
        "perDay": str(int(one.budget.per_day)),
        "spent": str(int(one.spent)),
        "reserved": str(int(one.reserved)),
        "left": str(max(one.left, 0)),
        "percent": one.percent,
    }


def _show(found: list[dict[str, Any]], groups: tuple[str, ...], stands: list[BudgetStatus]) -> None:
    rows = [_row([_short(group, one[group]) for group in groups], one) for one in found]
    if len(found) > 1:
        total = {name: sum(int(one[name]) for one in found) for name in _FIGURES if name != "costDollars"}
        rows.append(_row(["total", *("" for _ in groups[1:])], total))
    columns = (*groups, "requests", "failed", "tokens", "dollars", "a request", "ms p50/95/99")
    show_rows(columns, rows, title="spent")
    hits, saved = (sum(int(one[name]) for one in found) for name in ("cacheHits", "saved"))
    if hits:
        step(f"answered from the cache: {hits} more, which saved {format_amount(Amount(saved))}")
    if stands:
        budgets = (
            (one.budget.label or "everything", *map(format_amount, amounts), f"{one.percent} %")
            for one in stands
            for amounts in [(one.budget.per_day, one.spent, one.reserved)]
        )
        show_rows(("budget", "a day", "spent", "reserved", "used"), budgets, title="budgets today (UTC)")


def _short(group: str, value: object) -> object:
    """For the eye; --json has it whole."""
    text = str(value)
    return f"{text[:8]}…{text[-4:]}" if group == "provider" and text else value or "-"


def _row(named: list[object], one: dict[str, Any]) -> tuple[object, ...]:
    requests, cost = one["requests"], int(one["cost"])
    each = format_amount(Amount(cost // requests)) if requests else ""
    took = " / ".join(str(one[name]) for name in _LATENCY) if one.get(_LATENCY[0]) is not None else ""
    return (
        *named,
        requests,
        one["failed"],
        f"{one['inputTokens']} + {one['outputTokens']}",
        format_amount(Amount(cost)),
        each,
        took,
    )
