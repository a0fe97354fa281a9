"""`tally node status`: what a node that works is doing, once or as it changes."""

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
from tallystick.cli.output import out, show_json
from tallystick.protocol.errors import TallyError
from tallystick.protocol.types import Amount, format_amount

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType


def status(
    config: Config = None,
    watch: Annotated[bool, typer.Option("--watch", help="Keep showing it; Ctrl-C ends.")] = False,
    seconds: Annotated[float, typer.Option("--interval", min=0.2, help="How often, with --watch.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Shows what the node is doing now: connections, engines and their slots, what it sells, its last jobs, alarms.

    Runs on the node's machine, as its user. With --watch --json, one line of JSON each time.
    """
    from node.service.config import load_config
    from node.service.status_socket import read_status

    state = load_config(config).state
    if not watch:
        said = asyncio.run(read_status(state))
        if as_json:
            show_json(said)
        else:
            out.print(_draw(said))
        return
    try:
        asyncio.run(_watch(state, seconds, as_json=as_json))
    except KeyboardInterrupt:
        return


async def _watch(state: Path, seconds: float, *, as_json: bool) -> None:
    """A node that is away may come back, so that is shown and not the end."""
    from node.service.status_socket import read_status

    if as_json:
        while True:
            out.print_json(data=await read_status(state), indent=None)
            await asyncio.sleep(seconds)
    with Live(console=out, screen=out.is_terminal, auto_refresh=False) as live:
        while True:
            began = time.monotonic()
            try:
                shown: RenderableType = _draw(await read_status(state))
            except TallyError as error:
                shown = Panel(escape(str(error)), border_style="red")
            live.update(shown, refresh=True)
            await asyncio.sleep(max(0.0, seconds - (time.monotonic() - began)))


def _draw(said: dict[str, Any]) -> RenderableType:
    good = bool(said["ok"])
    head = "ready to earn" if good else f"not earning: {said['trouble'] or 'nothing to offer, no engine answers with a model'}"
    facts = Table.grid(padding=(0, 2))
    for name, value in (
        ("up", _span(int(said["upSeconds"]))),
        ("coordinators", ", ".join(f"{url} {'connected' if who else 'away'}" for url, who in said["coordinators"].items())),
        ("chain", "answers" if said["chain_reachable"] else "does not answer: settlement waits, jobs go on"),
        ("running", f"{said['running']}, {said['free_slots']} free"),
        ("speed", f"{said['tokens_per_second']} tokens/s a stream, first after {said['first_token_ms']} ms"),
        ("earned", f"{_dollars(said['revenue'])} since the start, {_dollars(said['revenueLastHour'])} an hour"),
        (
            "owed on trust",
            f"{_dollars(said['unsecured'])}, {_dollars(said['unearned_credit_today'])} given to newcomers in 24 hours",
        ),
        ("written off", _dollars(said["written_off"])),
        ("left unpaid", _unpaid(said["coordinator_credit"])),
        ("fees", _fees(said)),
        ("jobs", ", ".join(f"{count} {outcome}" for outcome, count in sorted(said["jobs"].items())) or "none yet"),
    ):
        facts.add_row(f"[dim]{name}[/dim]", escape(value))
    engines = _table("engine", "state", "slots taken", title="engines")
    for name, state in said["engines"].items():
        slots = said["slots"][name]
        shown = f"[{'green' if state == 'up' else 'red'}]{state}[/]"
        engines.add_row(escape(name), shown, f"{slots['taken']}/{slots['of']}")
    asks = _table("model", "engine", "input", "output", "context", title="on offer, dollars per million tokens")
    for ask in said["asks"]:
        prices = (_dollars(ask["inputPrice"]), _dollars(ask["outputPrice"]))
        asks.add_row(escape(ask["model"]), escape(ask["engine"]), *prices, str(ask["contextTokens"]))
    jobs = _table("job", "model", "outcome", "tokens", "first ms", "seconds", "cost", title="last jobs")
    for job in said["last"]:
        tokens, first = f"{job['tokens'][0]} + {job['tokens'][1]}", "" if job["firstMs"] is None else str(job["firstMs"])
        spent = (tokens, first, f"{job['seconds']:.2f}", _dollars(job["cost"]))
        jobs.add_row(job["job"][:8], escape(job["model"]), job["outcome"], *spent)
    parts: list[RenderableType] = [Panel(facts, title=escape(head), border_style="green" if good else "red"), engines, asks]
    if said["last"]:
        parts.append(jobs)
    if said["alarms"]:
        alarms = _table("alarm", "payer", "owes", "claim by", "what helps", title="alarms")
        for alarm in said["alarms"]:
            alarms.add_row(*(escape(alarm[name]) for name in ("what", "payer", "due", "claim_by", "remedy")))
        parts.append(alarms)
    return Group(*parts)


def _unpaid(dealings: dict[str, Any]) -> str:
    """What coordinators left unpaid within a day, and which of them are served no more for it."""
    told = [
        f"{_dollars(one['writtenOff'])} by {where}{'' if one['served'] else ', which is served no more for now'}"
        for where, one in dealings.items()
        if one["writtenOff"] != "0"
    ]
    return "; ".join(told) or "nothing within a day"


def _table(*columns: str, title: str) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        made.add_column(column)
    return made


def _fees(said: dict[str, Any]) -> str:
    """What the coordinators have registered to keep, and what this node bears."""
    told = ", ".join(f"{who}: {'not known' if bps is None else f'{bps / 100:g} %'}" for who, bps in said["fees_bps"].items())
    return f"{told or 'no coordinator'}; at most {said['max_fee_bps'] / 100:g} % is borne"


def _dollars(units: str) -> str:
    return format_amount(Amount(int(units)))


def _span(seconds: int) -> str:
    days, rest = divmod(seconds, 86_400)
    hours, rest = divmod(rest, 3_600)
    return f"{days} d {hours} h" if days else f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
