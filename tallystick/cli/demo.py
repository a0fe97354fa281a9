"""`tally demo`: the whole market on this machine, and one job through it, nothing mocked.

An embedded chain, the contracts, a coordinator, two nodes (each beside an engine), a funded payer and a gateway, as separate
processes; then a streamed chat through the official OpenAI SDK, and the story of that job as order, receipt and chain tell it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlencode

import typer

from tallystick.cli.options import Json
from tallystick.cli.output import err, out, show_facts, show_json, step
from tallystick.cli.processes import Children, free_port
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, TallyError, Unavailable
from tallystick.protocol.types import Address, Amount, format_amount
from tallystick.runtime.keys import PASSWORD_FILE_ENV, create_keystore, write_private

if TYPE_CHECKING:
    from node.engines.discover import Finding
    from tallystick.chain.deployment import Deployment

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
    engines: dict[str, int]
    """Of the stand-ins, by node."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The demo's folder, its wallets and its ports."""

    folder: Path
    ports: Ports
    signers: dict[str, Signer]

    def url(self, port: int) -> str:
        """An address on this machine."""
        return f"http://127.0.0.1:{port}"

    @property
    def addresses(self) -> dict[str, str]:
        """Where programs find the market."""
        ports = self.ports
        return {"gateway": self.url(ports.gateway), "coordinator": self.url(ports.coordinator), "rpc": self.url(ports.chain)}

    @property
    def providers(self) -> dict[str, Address]:
        """The nodes' providers, by name."""
        return {name: self.signers[name].address for name in ("node-a", "node-b")}

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
    from tallystick.cli.story import Witness, show_story

    rpc = Rpc(deployment.rpc)
    try:
        view = Witness(
            Escrow(rpc, deployment), stage.url(stage.ports.gateway), stage.url(stage.ports.coordinator), SETTLE_SECONDS
        )
        story = await view.tell(model, prompt, stage.signers["payer"].address, stage.providers, quiet=as_json)
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
        raise Unavailable(Code.COORDINATOR_UNAVAILABLE, f"{dead.name} ended by itself; see {dead.log}")


def _prepare(folder: Path) -> Stage:
    password = secrets.token_hex(16)
    write_private(folder / "password", password.encode())
    names = ("coordinator", "node-a", "node-b", "payer")
    signers = {name: create_keystore(folder / "keys" / f"{name}.json", password, cost=KEYSTORE_COST) for name in names}
    ports = Ports(free_port(8545), free_port(8420), free_port(8421), {"node-a": free_port(8431), "node-b": free_port(8432)})
    return Stage(folder, ports, signers)


async def _raise_market(stage: Stage, children: Children) -> tuple[Deployment, str]:
    ports = stage.ports
    chain_port = str(ports.chain)
    await children.start("chain", "chain", "--port", chain_port, ready=lambda: _answers(f"{stage.url(ports.chain)}/health"))
    step(f"chain on {stage.url(ports.chain)}")
    deployment = await _deploy_and_fund(stage)
    step(f"contracts deployed, payer's purse funded with {format_amount(DEPOSIT)} test dollars")
    found, _ = await asyncio.gather(_start_engines(stage, children), _start_coordinator(stage, children))
    await asyncio.gather(
        _start_gateway(stage, children), *(_start_node(stage, children, name, found) for name in stage.providers)
    )
    return deployment, found.models[0].name


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
    config.write_text(_toml(settings))
    url = f"{stage.url(stage.ports.coordinator)}/v1/health"
    wallet = ("--config", str(config), "--wallet", stage.keystore("coordinator"))
    await children.start("coordinator", "coordinator", "run", *wallet, ready=lambda: _answers(url))
    step(f"coordinator on {stage.url(stage.ports.coordinator)}")


async def _start_engines(stage: Stage, children: Children) -> Finding:
    """The engine that is named or found here, if it has a model; else a stand-in for each node."""
    from node.engines.discover import discover, look
    from node.engines.kinds import Kind

    found = await discover(os.environ)
    real = next((one for one in found if one.kind is not Kind.DEMO and one.models), None)
    if real is not None:
        step(f"engine: {real.kind.value} at {real.url}, model {real.models[0].name}")
        return real
    await asyncio.gather(*(_start_stand_in(stage, children, port) for port in stage.ports.engines.values()))
    step("no engine found on this machine: two stand-ins serve instead, and say so")
    return await look(stage.url(stage.ports.engines["node-a"]))


async def _start_stand_in(stage: Stage, children: Children, port: int) -> None:
    url = f"{stage.url(port)}/v1/models"
    await children.start(f"engine-{port}", "node", "demo-engine", "--port", str(port), ready=lambda: _answers(url))


async def _start_node(stage: Stage, children: Children, name: str, found: Finding) -> None:
    """One node beside the engine that was found, or beside its own stand-in; ready when its asks are in the book."""
    from node.engines.kinds import Kind

    settings = {
        "coordinator": stage.url(stage.ports.coordinator),
        "deployment": str(stage.folder / "deployment.json"),
        "state": str(stage.folder / name),
    }
    engine = {"url": stage.url(stage.ports.engines[name]) if found.kind is Kind.DEMO else found.url}
    if found.api_key:
        engine["api_key_env"] = "OPENAI_API_KEY"
    claims = {"check": 0.5, "age": 0.5}
    config = stage.folder / f"{name}.toml"
    config.write_text(f"{_toml(settings)}[claims]\n{_toml(claims)}[[engines]]\n{_toml(engine)}")
    wallet = ("--config", str(config), "--wallet", stage.keystore(name))
    model, provider = found.models[0].name, stage.signers[name].address
    await children.start(name, "node", "run", *wallet, ready=lambda: _sells(stage, model, provider))
    step(f"{name} connected, provider {provider}")


async def _sells(stage: Stage, model: str, provider: Address) -> bool:
    book = await _get(f"{stage.url(stage.ports.coordinator)}/v1/asks?{urlencode({'model': model})}")
    return book is not None and any(ask["ask"]["message"]["provider"] == provider for ask in book["asks"])


async def _start_gateway(stage: Stage, children: Children) -> None:
    config = stage.folder / "gateway.toml"
    settings = {
        "coordinator": stage.url(stage.ports.coordinator),
        "deployment": str(stage.folder / "deployment.json"),
        "port": stage.ports.gateway,
    }
    config.write_text(_toml(settings))
    arguments = ("gateway", "--config", str(config), "--wallet", stage.keystore("payer"))
    await children.start("gateway", *arguments, ready=lambda: _answers(f"{stage.url(stage.ports.gateway)}/health"))
    step(f"gateway on {stage.url(stage.ports.gateway)}/v1")


async def _answers(url: str) -> bool:
    return await _get(url) is not None


async def _get(url: str) -> Any:
    import httpx

    try:
        async with httpx.AsyncClient(timeout=2, trust_env=False) as client:
            response = await client.get(url)
            return response.json() if response.status_code == 200 else None
    except (httpx.HTTPError, ValueError):
        return None


def _toml(settings: Mapping[str, object]) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())


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
