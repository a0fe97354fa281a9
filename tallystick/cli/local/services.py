"""The parts of a market on this machine, each in a process of its own: what `tally demo` and `tally start` raise."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tallystick.cli.local.processes import Children
from tallystick.cli.output import step
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Fault, TallyError, Unavailable
from tallystick.protocol.types import Address
from tallystick.runtime.keystore import PASSWORD_FILE_ENV, create_keystore, write_private

if TYPE_CHECKING:
    from node.engines.discover import DiscoveredEngine

GAS_MONEY = 10**18
LOOKS = 10
KEYSTORE_COST = 1 << 12
"""These keys live minutes and hold play money; a cheap key derivation starts eight processes faster."""


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the processes listen."""

    chain: int
    coordinator: int
    gateway: int
    engines: dict[str, int]
    """Of the stand-ins, by node."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A folder with throw-away wallets, the deployment file, the ports."""

    folder: Path
    deployment: Path
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
        return {name: self.signers[name].address for name in self.ports.engines}

    def keystore(self, name: str) -> str:
        """A wallet's keystore file."""
        return str(self.folder / "keys" / f"{name}.json")


def prepare(folder: Path, deployment: Path, ports: Ports, others: tuple[str, ...]) -> Stage:
    """Makes the wallets: one for the coordinator, one for each node, and the others."""
    password = secrets.token_hex(16)
    write_private(folder / "password", password.encode())
    names = ("coordinator", *ports.engines, *others)
    signers = {name: create_keystore(folder / "keys" / f"{name}.json", password, cost=KEYSTORE_COST) for name in names}
    return Stage(folder, deployment, ports, signers)


def environment(folder: Path) -> dict[str, str]:
    """What the processes run in: they see nothing of the user's own wallets."""
    return {PASSWORD_FILE_ENV: str(folder / "password"), "TALLYSTICK_HOME": str(folder)}


async def start_chain(stage: Stage, children: Children) -> None:
    """A local chain, empty."""
    url = stage.url(stage.ports.chain)
    await children.start("chain", "chain", "--port", str(stage.ports.chain), ready=lambda: answers(f"{url}/health"))
    step(f"chain on {url}")


async def start_coordinator(stage: Stage, children: Children) -> None:
    """A coordinator that settles within seconds; its wallet has coins already."""
    config = stage.folder / "coordinator.toml"
    settings = {
        "deployment": str(stage.deployment),
        "port": stage.ports.coordinator,
        "db": f"sqlite:///{stage.folder}/coordinator.db",
        "settle_interval": 0.5,
        "name": "demo",
    }
    config.write_text(toml(settings))
    url = f"{stage.url(stage.ports.coordinator)}/v1/health"
    wallet = ("--config", str(config), "--wallet", stage.keystore("coordinator"))
    await children.start("coordinator", "coordinator", "run", *wallet, ready=lambda: answers(url))
    step(f"coordinator on {stage.url(stage.ports.coordinator)}")


async def start_engines(stage: Stage, children: Children) -> DiscoveredEngine:
    """The engine that is named or found here, if it has a model; else a stand-in for each node."""
    from node.engines.discover import discover, inspect_engine
    from node.engines.kinds import EngineKind

    found = await discover(os.environ)
    real = next((one for one in found if one.kind is not EngineKind.DEMO and one.models), None)
    if real is not None:
        step(f"engine: {real.kind.value} at {real.url}, model {real.models[0].name}")
        return real
    ports = list(stage.ports.engines.values())
    await asyncio.gather(*(start_stand_in(stage, children, port) for port in ports))
    step(f"no engine found on this machine: {'stand-ins serve' if len(ports) > 1 else 'a stand-in serves'} instead, saying so")
    for _ in range(LOOKS):
        found_here = await inspect_engine(stage.url(ports[0]))
        if found_here.models:
            return found_here
        await asyncio.sleep(1)  # a busy machine
    raise Unavailable(Code.ENGINE_UNAVAILABLE, f"the stand-in engine at {stage.url(ports[0])} tells no model", fault=Fault.ENGINE)


async def start_stand_in(stage: Stage, children: Children, port: int) -> None:
    """An engine that says it is none."""
    url = f"{stage.url(port)}/v1/models"
    await children.start(f"engine-{port}", "node", "demo-engine", "--port", str(port), ready=lambda: answers(url))


async def start_node(stage: Stage, children: Children, name: str, found: DiscoveredEngine) -> None:
    """One node beside the engine that was found, or beside its own stand-in; ready when its asks are in the book."""
    from node.engines.kinds import EngineKind

    settings = {
        "coordinator": stage.url(stage.ports.coordinator),
        "deployment": str(stage.deployment),
        "state": str(stage.folder / name),
    }
    engine = {"url": stage.url(stage.ports.engines[name]) if found.kind is EngineKind.DEMO else found.url}
    if found.api_key:
        engine["api_key_env"] = "OPENAI_API_KEY"
    claims = {"check_interval": 0.5, "max_age": 0.5}
    config = stage.folder / f"{name}.toml"
    config.write_text(f"{toml(settings)}[claims]\n{toml(claims)}[[engines]]\n{toml(engine)}")
    wallet = ("--config", str(config), "--wallet", stage.keystore(name))
    model, provider = found.models[0].name, stage.signers[name].address
    await children.start(name, "node", "run", *wallet, ready=lambda: _sells(stage, model, provider))
    step(f"{name} connected, provider {provider}")


async def _sells(stage: Stage, model: str, provider: Address) -> bool:
    from tallystick.client.config import ClientConfig
    from tallystick.client.coordinator.http_client import CoordinatorClient

    try:
        async with CoordinatorClient(stage.url(stage.ports.coordinator), ClientConfig(request_seconds=2)) as coordinator:
            return any(ask.message.provider == provider for ask in await coordinator.asks(model))
    except TallyError:
        return False


async def answers(url: str) -> bool:
    """Whether there is someone who says that all is well."""
    return await get(url) is not None


async def get(url: str) -> Any:
    """The JSON there; None where there is none."""
    import httpx

    try:
        async with httpx.AsyncClient(timeout=2, trust_env=False) as client:
            response = await client.get(url)
            return response.json() if response.status_code == 200 else None
    except (httpx.HTTPError, ValueError):
        return None


def toml(settings: Mapping[str, object]) -> str:
    """Lines of a config."""
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
