"""The services of a market on this machine, each in a process of its own: chain, coordinator, engines, nodes."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tallystick.cli.local.processes import ProcessGroup
from tallystick.cli.output import note, step
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Fault, TallyError, Unavailable
from tallystick.protocol.types import Address
from tallystick.runtime.keystore import PASSWORD_FILE_ENV, create_keystore, write_private

if TYPE_CHECKING:
    from node.engines.discover import DiscoveredEngine

GAS_MONEY = 10**18
"""Coins that a wallet gets for gas, in the chain's smallest unit."""
ENGINE_ATTEMPTS = 10
KEYSTORE_COST = 1 << 12
"""These keys live for minutes and hold play money; a cheap key derivation makes eight processes start faster."""


@dataclass(slots=True)
class Ports:
    """The ports on which the services listen. A port may change until its service starts."""

    chain: int
    coordinator: int
    gateway: int
    engines: dict[str, int]
    """Ports of the stand-in engines, by node."""


@dataclass(frozen=True, slots=True)
class LocalMarket:
    """The market's folder with throw-away wallets, its deployment file and its ports."""

    folder: Path
    deployment: Path
    ports: Ports
    signers: dict[str, Signer]

    def url(self, port: int) -> str:
        """The URL of a port on this machine."""
        return f"http://127.0.0.1:{port}"

    @property
    def addresses(self) -> dict[str, str]:
        """URLs by service."""
        ports = self.ports
        return {"gateway": self.url(ports.gateway), "coordinator": self.url(ports.coordinator), "rpc": self.url(ports.chain)}

    @property
    def providers(self) -> dict[str, Address]:
        """Provider addresses by node."""
        return {name: self.signers[name].address for name in self.ports.engines}

    def keystore(self, name: str) -> str:
        """A wallet's keystore file."""
        return str(self.folder / "keys" / f"{name}.json")


def prepare(folder: Path, deployment: Path, ports: Ports, extra_wallets: tuple[str, ...]) -> LocalMarket:
    """Makes the wallets of the coordinator, of each node, and those named."""
    password = secrets.token_hex(16)
    write_private(folder / "password", password.encode())
    names = ("coordinator", *ports.engines, *extra_wallets)
    signers = {name: create_keystore(folder / "keys" / f"{name}.json", password, cost=KEYSTORE_COST) for name in names}
    return LocalMarket(folder, deployment, ports, signers)


def environment(folder: Path) -> dict[str, str]:
    """Environment of the services: a home folder of their own, apart from the user's wallets."""
    return {PASSWORD_FILE_ENV: str(folder / "password"), "TALLYSTICK_HOME": str(folder)}


async def start_chain(market: LocalMarket, processes: ProcessGroup) -> None:
    """Starts an empty local chain. Raises Unavailable."""
    url = market.url(market.ports.chain)
    port = market.ports.chain
    await processes.start("chain", "chain", "--port", str(port), ready=lambda: is_healthy(f"{url}/health"), port=port)
    step(f"chain on {url}")


async def start_coordinator(market: LocalMarket, processes: ProcessGroup, **options: object) -> None:
    """Starts a coordinator that settles within seconds. Its wallet must have coins. `options`: further settings.

    Raises Unavailable.
    """
    config = market.folder / "coordinator.toml"
    settings = {
        "deployment": str(market.deployment),
        "port": market.ports.coordinator,
        "db": f"sqlite:///{market.folder}/coordinator.db",
        "settle_interval": 0.5,
        "name": "demo",
        **options,
    }
    config.write_text(to_toml(settings))
    url = f"{market.url(market.ports.coordinator)}/healthz"
    arguments = ("--config", str(config), "--wallet", market.keystore("coordinator"))
    port = market.ports.coordinator
    await processes.start("coordinator", "coordinator", "run", *arguments, ready=lambda: is_healthy(url), port=port)
    step(f"coordinator on {market.url(market.ports.coordinator)}")


async def find_engine() -> DiscoveredEngine | None:
    """An engine with a model that runs on this machine or is named by OPENAI_BASE_URL; no stand-in. Raises Unavailable."""
    from node.engines.discover import discover
    from node.engines.kinds import EngineKind

    discovered = await discover(os.environ)
    return next((engine for engine in discovered if engine.kind is not EngineKind.DEMO and engine.models), None)


async def prepare_embedded_engine() -> Path | None:
    """Installs the embedded engine if no engine runs here; returns its folder. None: there is an engine, or it cannot be had."""
    from tallystick.cli.local.embedded_engine import install_embedded_engine

    if await find_engine() is not None:
        return None
    try:
        return await asyncio.to_thread(install_embedded_engine)
    except Unavailable as error:
        note(f"{error}; a stand-in answers instead, and says so")
        return None


async def start_engines(market: LocalMarket, processes: ProcessGroup, embedded: Path | None = None) -> DiscoveredEngine:
    """Returns the engine that the nodes sell: one that runs here, else the embedded one of this folder, else a stand-in for each
    node, of which the first is returned. Raises Unavailable.
    """
    engine = await find_engine()
    if engine is not None:
        step(f"engine: {engine.kind.value} at {engine.url}, model {engine.models[0].name}")
        return engine
    ports = list(market.ports.engines.values())
    url = market.url(ports[0])
    if embedded is not None:
        arguments = ("engine", "--port", str(ports[0]), "--folder", str(embedded))
        await processes.start("engine", *arguments, ready=lambda: is_healthy(f"{url}/health"), port=ports[0])
        engine = await _inspect(url)
        step(f"engine: {engine.kind.value} at {url}, model {engine.models[0].name}")
        return engine
    await asyncio.gather(*(start_stand_in(market, processes, port) for port in ports))
    step("a stand-in answers in place of an engine, and says so")
    return await _inspect(url)


async def _inspect(url: str) -> DiscoveredEngine:
    from node.engines.discover import inspect_engine

    for _ in range(ENGINE_ATTEMPTS):
        engine = await inspect_engine(url)
        if engine.models:
            return engine
        await asyncio.sleep(1)  # on a busy machine
    raise Unavailable(Code.ENGINE_UNAVAILABLE, f"the engine at {url} lists no model; run the command again", fault=Fault.ENGINE)


async def start_stand_in(market: LocalMarket, processes: ProcessGroup, port: int) -> None:
    """Starts a stand-in engine. Raises Unavailable."""
    url = f"{market.url(port)}/v1/models"
    arguments = ("node", "demo-engine", "--port", str(port))
    await processes.start(f"engine-{port}", *arguments, ready=lambda: is_healthy(url), port=port)


async def start_node(market: LocalMarket, processes: ProcessGroup, name: str, engine: DiscoveredEngine) -> None:
    """Starts a node for an engine, or for the node's own stand-in; returns when its asks are published. Raises Unavailable."""
    from node.engines.kinds import QUEUE_DEPTH, QUEUEING, EngineKind

    settings = {
        "coordinator": market.url(market.ports.coordinator),
        "deployment": str(market.deployment),
        "state": str(market.folder / name),
    }
    url = market.url(market.ports.engines[name]) if engine.kind is EngineKind.DEMO else engine.url
    engine_settings: dict[str, object] = {"url": url, "queue_depth": QUEUE_DEPTH if engine.kind in QUEUEING else 0}
    if engine.api_key:
        engine_settings["api_key_env"] = "OPENAI_API_KEY"
    claims = {"check_interval": 0.5, "max_age": 0.5}
    config = market.folder / f"{name}.toml"
    config.write_text(f"{to_toml(settings)}[claims]\n{to_toml(claims)}[[engines]]\n{to_toml(engine_settings)}")
    arguments = ("--config", str(config), "--wallet", market.keystore(name))
    model, provider = engine.models[0].name, market.signers[name].address
    await processes.start(name, "node", "run", *arguments, ready=lambda: has_ask(market, model, provider))
    step(f"{name} connected, provider {provider}")


async def has_ask(market: LocalMarket, model: str, provider: Address) -> bool:
    """Whether the coordinator lists an ask of this provider for this model."""
    from tallystick.client.config import ClientConfig
    from tallystick.client.coordinator.http_client import CoordinatorClient

    try:
        async with CoordinatorClient(market.url(market.ports.coordinator), ClientConfig(request_seconds=2)) as coordinator:
            return any(ask.message.provider == provider for ask in await coordinator.asks(model))
    except TallyError:
        return False


async def is_healthy(url: str) -> bool:
    """Whether a URL answers with JSON and status 200."""
    return await get_json(url) is not None


async def get_json(url: str) -> Any:
    """The JSON that a URL answers with; None if there is no answer or its status is not 200."""
    import httpx

    try:
        async with httpx.AsyncClient(timeout=2, trust_env=False) as client:
            response = await client.get(url)
            return response.json() if response.status_code == 200 else None
    except (httpx.HTTPError, ValueError):
        return None


def to_toml(settings: Mapping[str, object]) -> str:
    """Settings as lines of TOML."""
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
