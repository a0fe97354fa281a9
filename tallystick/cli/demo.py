"""`tally demo`: the whole market on this machine, and one job through it, nothing mocked.

An embedded chain, the contracts, a coordinator, two nodes (each beside an engine), a funded payer and a gateway, as separate
processes; then a streamed chat through the official OpenAI SDK, and the story of that job as order, receipt and chain tell it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.options import Json
from tallystick.cli.output import err, out, show_facts, show_json, step
from tallystick.cli.processes import Children, free_port
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.types import Amount, format_amount
from tallystick.runtime.keys import PASSWORD_FILE_ENV, create_keystore, write_private

if TYPE_CHECKING:
    from tallystick.chain.deployment import Deployment
    from tallystick.chain.escrow import Escrow

PROMPT = "In one sentence: what is a split tally stick, and why did both sides keep a half?"
DEPOSIT = Amount(10_000_000)
GAS_MONEY = 10**18
SETTLE_SECONDS = 60
KEYSTORE_COST = 1 << 12
"""The demo's keys live minutes and hold play money; a cheap key derivation starts eight processes faster."""


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the demo's processes listen."""

    chain: int
    coordinator: int
    gateway: int
    engines: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Stage:
    """The demo's folder, its wallets and its ports."""

    folder: Path
    ports: Ports
    signers: dict[str, Signer]

    def url(self, port: int) -> str:
        """An address on this machine."""
        return f"http://127.0.0.1:{port}"

    def keystore(self, name: str) -> str:
        """A wallet's keystore file."""
        return str(self.folder / "keys" / f"{name}.json")


def demo(
    once: Annotated[bool, typer.Option("--once", help="Exit after the job.")] = False,
    prompt: Annotated[str, typer.Option(help="What to ask.")] = PROMPT,
    as_json: Json = False,
) -> None:
    """Runs the whole market on this machine and one paid, streamed chat through it; then stays up until Ctrl-C.

    The engine is real if OPENAI_BASE_URL (with OPENAI_API_KEY) is set or Ollama, vLLM, SGLang or llama.cpp answers on its usual
    port; otherwise a stand-in that says so. With `--once --json` it prints one JSON object last.
    """
    with tempfile.TemporaryDirectory(prefix="tallystick-demo-") as folder:
        asyncio.run(_run(Path(folder), prompt, once=once, as_json=as_json))


async def _run(folder: Path, prompt: str, *, once: bool, as_json: bool) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    stage = _prepare(folder)
    environment = {PASSWORD_FILE_ENV: str(folder / "password"), "TALLYSTICK_HOME": str(folder)}
    async with Children(folder, environment) as children:
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

    rpc = Rpc(deployment.rpc)
    try:
        story = await _tell_job(stage, Escrow(rpc, deployment), model, prompt, quiet=as_json)
    finally:
        await rpc.close()
    if as_json:
        show_json(story)
    else:
        _print_story(story)
    if not once:
        _print_addresses(stage, deployment, model)
        while (dead := children.dead()) is None:
            await asyncio.sleep(0.5)
        raise Unavailable(Code.COORDINATOR_UNAVAILABLE, f"{dead.name} ended by itself; see {dead.log}")


def _prepare(folder: Path) -> Stage:
    password = secrets.token_hex(16)
    write_private(folder / "password", password.encode())
    names = ("coordinator", "node-a", "node-b", "payer")
    signers = {name: create_keystore(folder / "keys" / f"{name}.json", password, cost=KEYSTORE_COST) for name in names}
    ports = Ports(free_port(8545), free_port(8420), free_port(8421), (free_port(8431), free_port(8432)))
    return Stage(folder, ports, signers)


async def _raise_market(stage: Stage, children: Children) -> tuple[Deployment, str]:
    ports = stage.ports
    chain_port = str(ports.chain)
    await children.start("chain", "chain", "--port", chain_port, ready=lambda: _answers(f"{stage.url(ports.chain)}/health"))
    step(f"chain on {stage.url(ports.chain)}")
    deployment = await _deploy_and_fund(stage)
    step(f"contracts deployed, payer's purse funded with {format_amount(DEPOSIT)} test dollars")
    await _start_coordinator(stage, children)
    step(f"coordinator on {stage.url(ports.coordinator)}")
    model = await _start_nodes(stage, children)
    await _start_gateway(stage, children, model)
    step(f"gateway on {stage.url(ports.gateway)}/v1")
    return deployment, model


async def _deploy_and_fund(stage: Stage) -> Deployment:
    from tallystick.chain.deploy import LOCAL_RULES, deploy
    from tallystick.chain.devnet import dev_accounts
    from tallystick.chain.escrow import Escrow
    from tallystick.chain.rpc import Rpc, Sender
    from tallystick.cli.money import fill_purse

    rpc = Rpc(stage.url(stage.ports.chain))
    try:
        rich = Sender(rpc, dev_accounts()[0])
        deployment = await deploy(rpc, rich, rules=LOCAL_RULES)
        deployment.save(stage.folder / "deployment.json")
        for name in ("coordinator", "payer"):
            await rich.send(stage.signers[name].address, b"", value=GAS_MONEY)
        payer = stage.signers["payer"]
        await fill_purse(Escrow(rpc, deployment), Sender(rpc, payer), payer, DEPOSIT, mint=True)
    finally:
        await rpc.close()
    return deployment


async def _start_coordinator(stage: Stage, children: Children) -> None:
    config = stage.folder / "coordinator.toml"
    settings = {
        "deployment": str(stage.folder / "deployment.json"),
        "port": stage.ports.coordinator,
        "db": f"sqlite:///{stage.folder}/coordinator.db",
        "settle_every": 0.5,
        "name": "demo",
    }
    config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    url = f"{stage.url(stage.ports.coordinator)}/v1/health"
    wallet = ("--config", str(config), "--wallet", stage.keystore("coordinator"))
    await children.start("coordinator", "coordinator", "run", *wallet, ready=lambda: _answers(url))
