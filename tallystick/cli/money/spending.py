"""`tally spending`: what a wallet spent, and how much of its budgets is used."""

from __future__ import annotations

import csv
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.jobs.jobs import with_ledger
from tallystick.cli.options import DEFAULT_WALLET, Config, Json, Wallet
from tallystick.cli.output import dollars, show_json, show_table, step
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
    by: Annotated[str, typer.Option("--by", help="Grouping: some of day, label, model, provider, with commas.")] = "day,model",
    days: Annotated[int, typer.Option("--days", min=1, max=10_000, help="Number of days back, including today.")] = 30,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
    as_json: Json = False,
) -> None:
    """Show what this wallet spent, by day, model, workload label or provider, and how much of the budgets is used.

    Days are UTC; a job counts on the day of its receipt. Running jobs are not included. Needs no password.
    """
    from tallystick.client.ledger.spending import DAY_SECONDS, GROUPS
    from tallystick.client.ledger.upstream_spending import UPSTREAM_PREFIX

    groups = tuple(part.strip() for part in by.split(",") if part.strip())
    if len(set(groups)) != len(groups) or not set(groups) <= set(GROUPS):
        raise BadMessage(f"--by: expected some of {', '.join(GROUPS)}, got {by!r}")

    async def run(ledger: Ledger, loaded: ClientConfig) -> None:
        now = int(time.time())
        since = now - (days - 1) * DAY_SECONDS
        lines = [_line(spent, groups) for spent in await ledger.spending(since, groups)]
        by_provider = [_line(spent, ("provider",)) for spent in await ledger.spending(since, ("provider",))]
        upstreams = [
            line | {"upstream": line["provider"].removeprefix(UPSTREAM_PREFIX)}
            for line in by_provider
            if line["provider"].startswith(UPSTREAM_PREFIX)
        ]
        budgets = [await ledger.budget_status(budget, now) for budget in loaded.budgets]
        if as_csv:
            writer = csv.DictWriter(sys.stdout, [*groups, *_FIGURES, *_LATENCY], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(lines)
        elif as_json:
            hosted = [_upstream_json(line) for line in upstreams]
            show_json({"spent": lines, "upstreams": hosted, "budgets": [_budget_json(budget) for budget in budgets]})
        else:
            _show(lines, groups, budgets)
            _show_upstreams(upstreams)

    with_ledger(config, wallet, None, run)


_USED = ("requests", "failed", "inputTokens", "cachedInputTokens", "outputTokens", "cost", "costDollars")
_FIGURES = (*_USED, "cacheHits", "saved", "hedged", "hedgeCost")
_LATENCY = ("latencyMsP50", "latencyMsP95", "latencyMsP99")


def _line(spent: SpendingRow, groups: tuple[str, ...]) -> dict[str, Any]:
    """One group's figures. `cost`, `saved` and `hedgeCost` are base units as text."""
    named = dict(zip(groups, spent.group, strict=True))
    if isinstance(day := named.get("day"), int):
        named["day"] = f"{datetime.fromtimestamp(day * 86_400, UTC):%F}"
    counts = (spent.requests, spent.failed, spent.input_tokens, spent.cached_tokens, spent.output_tokens)
    money = (str(int(spent.cost)), format_amount(Amount(spent.cost)), spent.hits, str(int(spent.saved)))
    hedges = (spent.hedged, str(spent.hedge_cost))
    figures = dict(zip(_FIGURES, (*counts, *money, *hedges), strict=True))
    return named | figures | dict(zip(_LATENCY, spent.latency_ms or (None, None, None), strict=True))


def _upstream_json(line: dict[str, Any]) -> dict[str, Any]:
    """What an upstream's requests cost, which `spent` includes: nobody sealed them or signed for them."""
    return {"upstream": line["upstream"], "sealed": False, "signed": False} | {figure: line[figure] for figure in _USED}


def _show_upstreams(lines: list[dict[str, Any]]) -> None:
    if lines:
        rows = ((line["upstream"], line["requests"], line["failed"], _tokens(line), line["costDollars"]) for line in lines)
        title = "Of which at hosted upstreams: unsealed, unsigned, as their answers say"
        show_table(("upstream", "requests", "failed", "tokens", "dollars"), rows, title=title)


def _tokens(line: dict[str, Any]) -> str:
    return f"{line['inputTokens']} + {line['outputTokens']}"


def _budget_json(status: BudgetStatus) -> dict[str, Any]:
    return {
        "label": status.budget.label,
        "perDay": str(int(status.budget.per_day)),
        "spent": str(int(status.spent)),
        "reserved": str(int(status.reserved)),
        "left": str(max(status.left, 0)),
        "percent": status.percent,
    }


def _show(lines: list[dict[str, Any]], groups: tuple[str, ...], budgets: list[BudgetStatus]) -> None:
    rows = [_row([_abbreviated(group, line[group]) for group in groups], line) for line in lines]
    if len(lines) > 1:
        total = {name: sum(int(line[name]) for line in lines) for name in _FIGURES if name != "costDollars"}
        rows.append(_row(["total", *("" for _ in groups[1:])], total))
    columns = (*groups, "requests", "failed", "tokens", "dollars", "dollars a request", "ms p50/95/99")
    show_table(columns, rows, title="Spending")
    hits, saved = (sum(int(line[name]) for line in lines) for name in ("cacheHits", "saved"))
    if hits:
        step(f"{hits} more requests were answered from the cache, which saved {dollars(saved)}")
    hedged, extra = (sum(int(line[name]) for line in lines) for name in ("hedged", "hedgeCost"))
    if hedged:
        change = "less" if extra < 0 else "more"
        step(f"{hedged} requests ran at two providers, as the first was late: {dollars(abs(extra))} {change} than at the first")
    if budgets:
        budget_rows = (
            (status.budget.label or "everything", *map(format_amount, amounts), f"{status.percent} %")
            for status in budgets
            for amounts in [(status.budget.per_day, status.spent, status.reserved)]
        )
        show_table(("budget", "a day", "spent", "reserved", "used"), budget_rows, title="Budgets today (UTC), in dollars")


def _abbreviated(group: str, value: object) -> object:
    """A provider's address in short; --json prints it whole."""
    text = str(value)
    return f"{text[:8]}…{text[-4:]}" if group == "provider" and text.startswith("0x") else value or "-"


def _row(named: list[object], line: dict[str, Any]) -> tuple[object, ...]:
    requests, cost = line["requests"], int(line["cost"])
    average = format_amount(Amount(cost // requests)) if requests else ""
    latency = " / ".join(str(line[name]) for name in _LATENCY) if line.get(_LATENCY[0]) is not None else ""
    return (*named, requests, line["failed"], _tokens(line), format_amount(Amount(cost)), average, latency)
