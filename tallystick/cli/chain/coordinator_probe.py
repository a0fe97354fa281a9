"""`tally coordinator probe`: audits providers from a purse of the coordinator's own."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.options import Config, CoordinatorUrl, Json, PasswordFile, unlock
from tallystick.cli.output import note, show_json, step
from tallystick.cli.progress import activity
from tallystick.protocol.errors import BadMessage, TallyError
from tallystick.protocol.types import parse_amount

if TYPE_CHECKING:
    from tallystick.client.config import ClientConfig
    from tallystick.client.sdk.prober import Probe
    from tallystick.protocol.eip712 import Signer


def probe(
    wallet: Annotated[str, typer.Option("--wallet", "-w", help="Wallet whose purse pays for the probes.")],
    coordinator_wallet: Annotated[str, typer.Option(help="Wallet of the coordinator, which seals the reports.")],
    per_day: Annotated[str, typer.Option(help="The most that probes may cost in a UTC day, in dollars.")] = "1",
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two probes.")] = 300,
    once: Annotated[bool, typer.Option("--once", help="Probe one provider, report at once, and exit.")] = False,
    report_delay: Annotated[
        int, typer.Option(min=0, max=86_400, help="Seconds that a report waits at most; how long is drawn.")
    ] = 900,
    config: Config = None,
    password_file: PasswordFile = None,
    coordinator_password_file: Annotated[
        Path | None, typer.Option(help="File with the password of the coordinator's keystore; default: as for the other wallet.")
    ] = None,
    coordinator_url: CoordinatorUrl = None,
    as_json: Json = False,
) -> None:
    """Audit providers with made-up requests, newcomers and idle ones first, and publish what is found.

    A probe is an ordinary job of another wallet than the coordinator's, so that providers cannot tell it from traffic: use a key
    that nothing links to you, and change it now and then (tally wallet rotate). Referees are other providers that sell scoring,
    and the engines under [[referees]] in the config. Each verdict is a leaf of the match log, and counts in full. Its report
    waits for a random time, because the log would tell a provider with few jobs which one was a probe; what waits when the
    command ends is sent when it runs again.
    """
    from tallystick.client.config import Budget, load_config

    payer, coordinator = unlock(wallet, password_file), unlock(coordinator_wallet, coordinator_password_file or password_file)
    if payer.address == coordinator.address:
        raise BadMessage("--wallet: expected another wallet than the coordinator's, by which providers would know a probe")
    loaded = load_config(config, {"coordinator": coordinator_url})
    budget = Budget(per_day=parse_amount(per_day, field="--per-day"))
    audits = replace(loaded.audits, report_delay=0 if once else report_delay)
    loaded = replace(loaded, budgets=(*loaded.budgets, budget), audits=audits)
    asyncio.run(_run(loaded, payer, coordinator, every=None if once else every, as_json=as_json))


async def _run(loaded: ClientConfig, payer: Signer, coordinator: Signer, *, every: float | None, as_json: bool) -> None:
    from tallystick.client.coordinator.http_client import CoordinatorClient
    from tallystick.client.sdk.market import Market, seal_reports
    from tallystick.client.sdk.prober import Prober, seal_report

    async with Market.of(loaded, payer) as market, CoordinatorClient(loaded.coordinator, loaded) as client:
        seal_reports(market, lambda request, domain: seal_report(request, coordinator, domain))
        prober = Prober(market, client, coordinator, lambda: int(time.time()), os.urandom)
        while True:
            try:
                with activity("auditing a provider"):
                    result = await prober.probe()
            except TallyError as error:
                if every is None:
                    raise
                note(f"no verdict: {error}")
            else:
                _show(result, as_json=as_json)
            if every is None:
                return
            await asyncio.sleep(every)


def _show(result: Probe | None, *, as_json: bool) -> None:
    if result is None:
        note("no provider with a free slot sells chats now")
        return
    target, conclusion = result.target, result.conclusion
    if as_json:
        document: dict[str, Any] = {
            "provider": target.provider,
            "model": target.model,
            "job": conclusion.audit.job,
            "verdict": conclusion.verdict.value,
            "providerVerdict": conclusion.provider.value,
            "found": conclusion.reason,
        }
        show_json(document)
    else:
        step(f"{target.provider}, {target.model}: {conclusion.verdict.value}. {conclusion.reason}")
