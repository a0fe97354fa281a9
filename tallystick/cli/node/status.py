"""`tally node status`: what a running node does now, once or continuously."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from tallystick.cli.options import Config, Json
from tallystick.cli.output import out, outcome_words, show_json
from tallystick.protocol.errors import TallyError
from tallystick.protocol.types import Amount, format_amount

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from rich.console import RenderableType


def status(
    config: Config = None,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option("--interval", min=0.2, help="Seconds between refreshes of --watch.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Show what the node does now: connections, engines and their slots, asks, latest jobs, alarms, and how coordinators rate it.

    Without --watch it asks each coordinator for the ratings: integrity by audits, availability by jobs, speed.
    Run it on the node's machine, as the node's user. With --watch --json it prints one line of JSON per refresh.
    """
    from node.service.config import load_config
    from node.service.status_socket import read_status

    state = load_config(config).state
    if not watch:
        report = asyncio.run(read_status(state))
        if as_json:
            show_json(report | {"ratings": asyncio.run(_ratings(report))})
        else:
            out.print(_draw(report))
            _show_ratings(asyncio.run(_ratings(report)))
        return
    try:
        asyncio.run(_watch(state, interval, as_json=as_json))
    except KeyboardInterrupt:
        return


async def _ratings(report: dict[str, Any]) -> dict[str, Any]:
    """What each connected coordinator says of this node, by URL; null for one that does not answer."""
    from tallystick.cli.node.why import fetch_decisions

    ratings: dict[str, Any] = {}
    for url, coordinator in report["coordinators"].items():
        if coordinator is not None and report.get("provider"):
            try:
                connected = (replica for replica, account in report.get("replicas", {}).get(url, {}).items() if account)
                base = next(connected, url).replace("ws", "http", 1).removesuffix("/v1/node")
                answer = await fetch_decisions(base, report["provider"], "limit=1")
            except TallyError:
                ratings[url] = None
            else:
                ratings[url] = {name: answer.get(name) for name in ("availability", "ratings")}
    return ratings


def _show_ratings(ratings: dict[str, Any]) -> None:
    from tallystick.cli.node.why import show_ratings

    for url, rating in ratings.items():
        if rating is None:
            out.print(f"{url} does not tell how it rates this node", highlight=False, markup=False)
        else:
            show_ratings(rating, url if len(ratings) > 1 else "the coordinator")


async def _watch(state: Path, interval: float, *, as_json: bool) -> None:
    """Refreshes for ever. An unreachable node is shown as an error, since it may come back."""
    from node.service.status_socket import read_status

    if as_json:
        while True:
            out.print_json(data=await read_status(state), indent=None)
            await asyncio.sleep(interval)
    with Live(console=out, screen=out.is_terminal, auto_refresh=False) as live:
        while True:
            began = time.monotonic()
            try:
                view: RenderableType = _draw(await read_status(state))
            except TallyError as error:
                view = Panel(escape(str(error)), border_style="red")
            live.update(view, refresh=True)
            await asyncio.sleep(max(0.0, interval - (time.monotonic() - began)))


def _draw(report: dict[str, Any]) -> RenderableType:
    ok = bool(report["ok"])
    title = "ready to earn" if ok else f"not earning: {report['trouble'] or 'no engine answers with a model, so there is no ask'}"
    parts: list[RenderableType] = [
        Panel(_summary(report), title=escape(title), border_style="green" if ok else "red"),
        _engines(report),
        _asks(report),
    ]
    if report["last"]:
        parts.append(_jobs(report))
    wrong = {name: check for name, check in report.get("checks", {}).items() if check["status"] != "pass"}
    if wrong:
        checks = _table("dependency", "state", "what is wrong", "remedy", title="Dependencies that need attention")
        for name, check in wrong.items():
            checks.add_row(*(escape(text) for text in (name, check["status"], check["output"], check["remedy"])))
        parts.append(checks)
    if report["alarms"]:
        alarms = _table("alarm", "payer", "owes, dollars", "claim by", "remedy", title="Alarms")
        for alarm in report["alarms"]:
            alarms.add_row(*(escape(alarm[name]) for name in ("what", "payer", "due", "claim_by", "remedy")))
        parts.append(alarms)
    return Group(*parts)


def _summary(report: dict[str, Any]) -> Table:
    from tallystick.chain.state_explainer import span

    grid = Table.grid(padding=(0, 2))
    for name, value in (
        ("up for", span(int(report["upSeconds"]))),
        ("coordinators", ", ".join(_links(report["coordinators"]))),
        *(("replicas", ", ".join(_links(accounts))) for accounts in report.get("replicas", {}).values()),
        ("chain", "reachable" if report["chain_reachable"] else "unreachable: settlement waits, jobs continue"),
        ("running jobs", f"{report['running']}; free slots: {report['free_slots']}"),
        ("speed", _speed(report["tokens_per_second"], report["first_token_ms"])),
        (
            "earned",
            f"{_dollars(report['revenue'])} dollars since the start, {_dollars(report['revenueLastHour'])} an hour now",
        ),
        (
            "unsecured credit",
            f"{_dollars(report['unsecured'])} dollars; to newcomers in 24 hours: {_dollars(report['unearned_credit_today'])}",
        ),
        ("written off", f"{_dollars(report['written_off'])} dollars"),
        ("left unpaid", _unpaid(report["coordinator_credit"])),
        ("fees", _fees(report)),
        ("payout", _payout(report["payout"])),
        *(("config", text) for text in _config(report)),
        ("jobs", ", ".join(f"{count} {outcome_words(name)}" for name, count in sorted(report["jobs"].items())) or "none yet"),
    ):
        grid.add_row(f"[dim]{name}[/dim]", escape(value))
    return grid


def _links(accounts: Mapping[str, str | None]) -> Iterator[str]:
    for url, account in accounts.items():
        yield f"{url} {'disconnected' if account is None else 'connected'}"


def _engines(report: dict[str, Any]) -> Table:
    table = _table("engine", "state", "used slots", "queue places", "takes now", title="Engines")
    for name, state in report["engines"].items():
        slots = report["slots"][name]
        colour = "green" if state == "up" else "red"
        counts = f"{slots['taken']}/{slots['of']}", str(slots["queue"]), str(slots["free"])
        table.add_row(escape(name), f"[{colour}]{state}[/]", *counts)
    return table


def _asks(report: dict[str, Any]) -> Table:
    table = _table(
        "model", "engine", "input", "output", "context", "evidence", title="Asks; prices in dollars per million tokens"
    )
    for ask in report["asks"]:
        model = escape(ask["model"]) + (f" (for {escape(ask['audience'])})" if ask.get("audience") else "")
        prices = (_dollars(ask["inputPrice"]), _dollars(ask["outputPrice"]))
        evidence = {True: "yes", False: "no"}.get(ask.get("evidence"), "")
        table.add_row(model, escape(ask["engine"]), *prices, str(ask["contextTokens"]), evidence)
    return table


def _jobs(report: dict[str, Any]) -> Table:
    table = _table("job", "model", "outcome", "tokens", "first token, ms", "seconds", "dollars", title="Latest jobs")
    for job in report["last"]:
        tokens, first = f"{job['tokens'][0]} + {job['tokens'][1]}", "" if job["firstMs"] is None else str(job["firstMs"])
        figures = (tokens, first, f"{job['seconds']:.2f}", _dollars(job["cost"]))
        table.add_row(job["job"][:8], escape(job["model"]), outcome_words(job["outcome"]), *figures)
    return table


def _config(report: dict[str, Any]) -> list[str]:
    """What a changed config did not change, if the node was told to read it again (SIGHUP)."""
    problem, settings = report.get("config_problem"), report.get("settings_for_restart")
    lines = [f"the changed config is NOT applied, the former one is in effect: {problem}"] if problem else []
    return lines + ([f"changed settings that need a restart: {', '.join(settings)}"] if settings else [])


def _unpaid(accounts: dict[str, Any]) -> str:
    """What coordinators left unpaid within a day, and whether they are still served."""
    lines = [
        f"{_dollars(account['writtenOff'])} dollars by {url}{'' if account['served'] else ', which is not served for now'}"
        for url, account in accounts.items()
        if account["writtenOff"] != "0"
    ]
    return "; ".join(lines) or "nothing within a day"


def _payout(payout: dict[str, Any]) -> str:
    """When the node pays out by itself, what it waits for, and its last payout."""
    if payout["minAmount"] is None:
        return "not automatic: tally cash-out"
    words = [f"automatic from {_dollars(payout['minAmount'])} dollars on"]
    if payout["address"]:
        words.append(f"to {payout['address']}")
    if payout["waitingFor"]:
        words.append(f"now: {payout['waitingFor']}")
    if payout["last"]:
        words.append(f"last: {_dollars(payout['last']['amount'])} dollars to {payout['last']['address']}")
    return "; ".join(words)


def _table(*columns: str, title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column)
    return table


def _fees(report: dict[str, Any]) -> str:
    """The fees that the coordinators have registered, and the highest that this node accepts."""
    fees = ", ".join(f"{url}: {'unknown' if bps is None else f'{bps / 100:g} %'}" for url, bps in report["fees_bps"].items())
    return f"{fees or 'no coordinator'}; accepted up to {report['max_fee_bps'] / 100:g} %"


def _speed(tokens_per_second: int, first_token_ms: int) -> str:
    """The measured speed in words. Zero means that it is not measured: whole responses do not show the time to a first token."""
    rate = f"{tokens_per_second} tokens/s per stream" if tokens_per_second else "not measured yet"
    return rate + (f", first token after {first_token_ms} ms" if first_token_ms else "")


def _dollars(units: str) -> str:
    return format_amount(Amount(int(units)))
