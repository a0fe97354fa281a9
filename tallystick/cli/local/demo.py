"""`tally demo`: the whole market on this machine, and one job through it, nothing mocked.

An embedded chain, the contracts, a coordinator, two nodes (each beside an engine), a funded payer and a gateway, as separate
processes; then a streamed chat through the official OpenAI SDK, and the story of that job as order, receipt and chain tell it.
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

from tallystick.cli.local.processes import Children, free_port
from tallystick.cli.local.services import (
    GAS_MONEY,
    Ports,
    Stage,
    answers,
    environment,
    prepare,
    start_chain,
    start_coordinator,
    start_engines,
    start_node,
    toml,
)
from tallystick.cli.options import Json
from tallystick.cli.output import err, out, show_facts, show_json, step
from tallystick.protocol.errors import Code, TallyError, Unavailable
from tallystick.protocol.types import Amount, format_amount

if TYPE_CHECKING:
    from tallystick.chain.deployment import Deployment

PROMPT = "In one sentence: what is a split tally stick, and why did both sides keep a half?"
DEPOSIT = Amount(10_000_000)
SETTLE_SECONDS = 60


def demo(
    once: Annotated[bool, typer.Option("--once", help="Exit after the job.")] = False,
    prompt: Annotated[str, typer.Option(help="What to ask.")] = PROMPT,
    as_json: Json = False,
) -> None:
    """Runs the whole market on this machine and one paid, streamed chat through it; then stays up until Ctrl-C.

    The engine is real if OPENAI_BASE_URL (with OPENAI_API_KEY) is set or Ollama, vLLM, SGLang or llama.cpp answers on its usual
    port; otherwise a stand-in that says so. With `--once --json` it prints one JSON object last.
    """
    folder = Path(tempfile.mkdtemp(prefix="tallystick-demo-"))
    try:
        asyncio.run(_run(folder, prompt, once=once, as_json=as_json))
    except TallyError:
        err.print(f"the logs are in {folder}", highlight=False)
        raise
    shutil.rmtree(folder)


async def _run(folder: Path, prompt: str, *, once: bool, as_json: bool) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    stage = _prepare(folder)
    async with Children(folder, environment(folder)) as children:
        show = asyncio.create_task(_show(stage, children, prompt, once=once, as_json=as_json))
        stop = asyncio.create_task(stopped.wait())
        await asyncio.wait({show, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not show.done():
            err.print("stopping …")
            show.cancel()
        stop.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await show
    step("everything is stopped")


async def _show(stage: Stage, children: Children, prompt: str, *, once: bool, as_json: bool) -> None:
    started = time.monotonic()
    deployment, model = await _raise_market(stage, children)
    step(f"the market is up after {time.monotonic() - started:.1f} s")
    from tallystick.chain.escrow import Escrow
    from tallystick.chain.rpc import Rpc
    from tallystick.cli.local.job_trace import Witness, show_story

    rpc = Rpc(deployment.rpc)
    try:
        view = Witness(
            escrow=Escrow(rpc, deployment),
            gateway=stage.url(stage.ports.gateway),
            coordinator=stage.url(stage.ports.coordinator),
            payer=stage.signers["payer"],
            patience=SETTLE_SECONDS,
        )
        story = await view.tell(model, prompt, stage.providers, quiet=as_json)
    finally:
        await rpc.close()
    if as_json:
        show_json(story | stage.addresses | {"token": deployment.token, "providers": stage.providers})
    else:
        show_story(story)
    if not once:
        if not as_json:
            _show_addresses(stage, deployment, model)
        dead = await children.first_death()
        raise Unavailable(Code.PROCESS_FAILED, f"{dead.name} ended by itself; see {dead.log}")


def _prepare(folder: Path) -> Stage:
    ports = Ports(free_port(8545), free_port(8420), free_port(8421), {"node-a": free_port(8431), "node-b": free_port(8432)})
    return prepare(folder, folder / "deployment.json", ports, ("payer",))


async def _raise_market(stage: Stage, children: Children) -> tuple[Deployment, str]:
    await start_chain(stage, children)
    deployment = await _deploy_and_fund(stage)
    step(f"contracts deployed, payer's purse funded with {format_amount(DEPOSIT)} test dollars")
    found, _ = await asyncio.gather(start_engines(stage, children), start_coordinator(stage, children))
    await asyncio.gather(_start_gateway(stage, children), *(start_node(stage, children, name, found) for name in stage.providers))
    return deployment, found.models[0].name


async def _deploy_and_fund(stage: Stage) -> Deployment:
    from tallystick.chain.deploy import LOCAL_RULES, deploy
    from tallystick.chain.devnet import dev_accounts
    from tallystick.chain.escrow import Escrow
    from tallystick.chain.rpc import Rpc, Sender
    from tallystick.cli.money.balance import fill_purse

    rpc = Rpc(stage.url(stage.ports.chain))
    try:
        rich = Sender(rpc, dev_accounts()[0])
        deployment = await deploy(rpc, rich, rules=LOCAL_RULES)
        deployment.save(stage.deployment)
        for name in ("coordinator", "payer"):
            await rich.send(stage.signers[name].address, b"", value=GAS_MONEY)
        payer = stage.signers["payer"]
        await fill_purse(Escrow(rpc, deployment), Sender(rpc, payer), payer, DEPOSIT, mint=True)
    finally:
        await rpc.close()
    return deployment


async def _start_gateway(stage: Stage, children: Children) -> None:
    config = stage.folder / "gateway.toml"
    settings = {
        "coordinator": stage.url(stage.ports.coordinator),
        "deployment": str(stage.deployment),
        "port": stage.ports.gateway,
    }
    config.write_text(toml(settings))
    arguments = ("gateway", "--config", str(config), "--wallet", stage.keystore("payer"))
    await children.start("gateway", *arguments, ready=lambda: answers(f"{stage.url(stage.ports.gateway)}/health"))
    step(f"gateway on {stage.url(stage.ports.gateway)}/v1")


def _show_addresses(stage: Stage, deployment: Deployment, model: str) -> None:
    gateway, coordinator = stage.url(stage.ports.gateway), stage.url(stage.ports.coordinator)
    question = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    rows = [
        ("OpenAI API", f"{gateway}/v1"),
        ("coordinator", f"{coordinator}/docs"),
        ("chain", deployment.rpc),
        ("escrow", deployment.escrow),
        ("token", deployment.token),
        *((name, signer.address) for name, signer in stage.signers.items()),
        ("logs, configs, keys", str(stage.folder)),
    ]
    show_facts(rows, title="Still running")
    out.print("Try it:", style="bold")
    sys.stdout.write(f"curl {gateway}/v1/chat/completions -H 'content-type: application/json' -d '{question}'\n")
    err.print("Ctrl-C stops everything.")
