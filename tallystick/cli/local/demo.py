"""`tally demo`: a whole market on this machine, and one job through it, without mocks.

Chain, coordinator, two nodes with an engine each, and gateway run as separate processes. The demo streams one chat through the
official OpenAI SDK, then shows the job's trace: its order, its receipt, its payment on chain, and its audit by the other node.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tallystick.cli.local.processes import ProcessGroup, free_port, still_free
from tallystick.cli.local.services import (
    GAS_MONEY,
    LocalMarket,
    Ports,
    environment,
    is_healthy,
    prepare,
    prepare_embedded_engine,
    start_chain,
    start_coordinator,
    start_engines,
    start_node,
    to_toml,
)
from tallystick.cli.options import Json, StandIn
from tallystick.cli.output import err, json_fields, note, out, show_fields, show_json, step
from tallystick.cli.progress import activity
from tallystick.protocol.errors import TallyError
from tallystick.protocol.types import Amount, format_amount
from tallystick.runtime.ports import describe_holder

if TYPE_CHECKING:
    from tallystick.chain.deployment import Deployment

PROMPT = "In two sentences: what is the capital of France, and what is it known for?"
DEPOSIT = Amount(10_000_000)
SETTLE_SECONDS = 60


def demo(
    once: Annotated[bool, typer.Option("--once", help="Exit after the job.")] = False,
    prompt: Annotated[str, typer.Option(help="Question to ask.")] = PROMPT,
    stand_in: StandIn = False,
    as_json: Json = False,
) -> None:
    """Run a whole market on this machine and one paid, streamed chat through it, then keep it running until Ctrl-C.

    Sells the engine that OPENAI_BASE_URL (with OPENAI_API_KEY) names, or one that answers on its usual port (Ollama, vLLM,
    SGLang, llama.cpp); otherwise SmolLM2-135M with llama.cpp, which the first run downloads (127 MB). With `--once --json` it
    prints one JSON object at the end.
    """
    folder = Path(tempfile.mkdtemp(prefix="tallystick-demo-"))
    try:
        asyncio.run(_run(folder, prompt, once=once, stand_in=stand_in, as_json=as_json))
    except TallyError:
        note(f"the logs are in {folder}")
        raise
    shutil.rmtree(folder)


async def _run(folder: Path, prompt: str, *, once: bool, stand_in: bool, as_json: bool) -> None:
    stopped = asyncio.Event()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signal_number, stopped.set)
    market = prepare_market(folder)
    async with ProcessGroup(folder, environment(folder)) as processes:
        work = _show(market, processes, prompt, once=once, stand_in=stand_in, as_json=as_json)
        show = asyncio.create_task(work)
        stop = asyncio.create_task(stopped.wait())
        await asyncio.wait({show, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not show.done():
            note("stopping …")
            show.cancel()
        stop.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await show
    step("all processes are stopped")


async def _show(market: LocalMarket, processes: ProcessGroup, prompt: str, *, once: bool, stand_in: bool, as_json: bool) -> None:
    embedded = None if stand_in else await prepare_embedded_engine()
    started = time.monotonic()
    deployment, model = await _start_market(market, processes, embedded)
    step(f"the market is up after {time.monotonic() - started:.1f} s")
    from tallystick.chain.escrow import Escrow
    from tallystick.chain.rpc import Rpc
    from tallystick.cli.local.job_audit import audit_traced_job
    from tallystick.cli.local.job_trace import JobTracer, show_trace

    rpc = Rpc(deployment.rpc)
    try:
        tracer = JobTracer(
            escrow=Escrow(rpc, deployment),
            gateway=market.url(market.ports.gateway),
            coordinator=market.url(market.ports.coordinator),
            payer=market.signers["payer"],
            settle_seconds=SETTLE_SECONDS,
        )
        trace = await tracer.run(model, prompt, market.providers, quiet=as_json)
        coordinator = market.url(market.ports.coordinator)
        payer = market.signers["payer"]
        trace["audit"] = await audit_traced_job(coordinator, payer, market.folder, trace["job"], market.providers)
    finally:
        await rpc.close()
    if as_json:
        show_json(json_fields(trace) | market.addresses | {"token": deployment.token, "providers": market.providers})
    else:
        show_trace(trace)
    if not once:
        if not as_json:
            _show_addresses(market, deployment, model)
        raise (await processes.first_exit()).exited()


def prepare_market(folder: Path) -> LocalMarket:
    """Makes the wallets and chooses the ports of a market with two nodes."""
    engines = {"node-a": _port("engine", 8431), "node-b": _port("engine", 8432)}
    ports = Ports(_port("chain", 8545), _port("coordinator", 8420), _port("gateway", 8421), engines)
    return prepare(folder, folder / "deployment.json", ports, ("payer",))


def _port(service: str, preferred: int) -> int:
    """A port for a service. Says so if it is not the preferred one."""
    port = free_port(preferred)
    if port != preferred:
        note(f"port {preferred} is taken ({describe_holder(preferred) or 'another program'}): the {service} gets port {port}")
    return port


def _still_free(service: str, port: int) -> int:
    """The port that was chosen for a service, or another one if a program took it meanwhile. Says so."""
    other = still_free(port)
    if other != port:
        note(f"port {port} was taken meanwhile ({describe_holder(port) or 'another program'}): the {service} gets port {other}")
    return other


async def _start_market(market: LocalMarket, processes: ProcessGroup, embedded: Path | None) -> tuple[Deployment, str]:
    """Starts every service. Returns the deployment and the name of a model on offer."""
    ports = market.ports
    ports.chain = _still_free("chain", ports.chain)
    await start_chain(market, processes)
    with activity("deploying the contracts"):
        deployment = await deploy_and_fund(market)
    step(f"contracts deployed, payer's purse funded with {format_amount(DEPOSIT)} test dollars")
    ports.engines.update({name: _still_free("engine", port) for name, port in ports.engines.items()})
    ports.coordinator = _still_free("coordinator", ports.coordinator)
    engine, _ = await asyncio.gather(start_engines(market, processes, embedded), start_coordinator(market, processes))
    ports.gateway = _still_free("gateway", ports.gateway)
    nodes = (start_node(market, processes, name, engine) for name in market.providers)
    await asyncio.gather(start_gateway(market, processes), *nodes)
    return deployment, engine.models[0].name


async def deploy_and_fund(market: LocalMarket) -> Deployment:
    """Deploys the contracts, gives coordinator and payer coins, and fills the payer's purse. Raises TallyError."""
    from tallystick.chain.deploy import LOCAL_RULES, deploy
    from tallystick.chain.devnet import dev_accounts
    from tallystick.chain.escrow import Escrow
    from tallystick.chain.rpc import Rpc
    from tallystick.cli.money.purse import fund_purse
    from tallystick.cli.transactions import ShownSender

    rpc = Rpc(market.url(market.ports.chain))
    try:
        funder = ShownSender(rpc, dev_accounts()[0])
        deployment = await deploy(rpc, funder, rules=LOCAL_RULES)
        deployment.save(market.deployment)
        for name in ("coordinator", "payer"):
            await funder.send(market.signers[name].address, b"", value=GAS_MONEY)
        payer = market.signers["payer"]
        await fund_purse(Escrow(rpc, deployment), ShownSender(rpc, payer), payer, DEPOSIT, mint=True)
    finally:
        await rpc.close()
    return deployment


async def start_gateway(market: LocalMarket, processes: ProcessGroup) -> None:
    """Starts the payer's gateway. Raises Unavailable."""
    config = market.folder / "gateway.toml"
    settings = {
        "coordinator": market.url(market.ports.coordinator),
        "deployment": str(market.deployment),
        "port": market.ports.gateway,
    }
    config.write_text(to_toml(settings))
    arguments = ("gateway", "--config", str(config), "--wallet", market.keystore("payer"))
    port, url = market.ports.gateway, market.url(market.ports.gateway)
    await processes.start("gateway", *arguments, ready=lambda: is_healthy(f"{url}/healthz"), port=port)
    step(f"gateway on {url}/v1")


def _show_addresses(market: LocalMarket, deployment: Deployment, model: str) -> None:
    gateway, coordinator = market.url(market.ports.gateway), market.url(market.ports.coordinator)
    request = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    rows = [
        ("OpenAI API", f"{gateway}/v1"),
        ("chat and spending", f"{gateway}/tally/chat"),
        ("market", f"{coordinator}/market"),
        ("coordinator", f"{coordinator}/docs"),
        ("chain", deployment.rpc),
        ("escrow", deployment.escrow),
        ("token", deployment.token),
        *((name, signer.address) for name, signer in market.signers.items()),
        ("logs, configs, keys", str(market.folder)),
    ]
    show_fields(rows, title="Still running")
    out.print("Try it:", style="bold")
    sys.stdout.write(f"curl {gateway}/v1/chat/completions -H 'content-type: application/json' -d '{request}'\n")
    err.print("Ctrl-C stops everything.")
