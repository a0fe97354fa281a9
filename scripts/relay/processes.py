"""Starts the processes under test, pins them to cores and measures their CPU time and memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp

from scripts.relay.mock import MODEL
from tallystick.chain.deploy import LOCAL_RULES, deploy
from tallystick.chain.deployment import Deployment
from tallystick.chain.devnet import dev_accounts
from tallystick.chain.escrow import Escrow
from tallystick.chain.rpc import Rpc, Sender
from tallystick.cli.local.processes import ProcessGroup, free_port
from tallystick.cli.money.purse import fund_purse
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.types import Address, Amount
from tallystick.runtime.keystore import PASSWORD_FILE_ENV, create_keystore, keystore_address, write_private

_TICKS = os.sysconf("SC_CLK_TCK")
PURSE = Amount(100_000 * 10**6)
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
TESTED, LOAD = CORES[0], CORES[-1]
"""The measured processes run on one core, the load and the mock engine on another, if there are two."""


def pin(pid: int, core: int) -> None:
    """Pins a process and its threads to one core, if the system allows that."""
    with contextlib.suppress(OSError, AttributeError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and of its ended children, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS


def rss_mib(pid: int) -> float:
    """Resident memory of a process, in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass(frozen=True, slots=True)
class Written:
    """What a process has written so far, to files and sockets: bytes and system calls."""

    bytes: int
    calls: int


def written(pid: int) -> Written:
    """What a process and its ended children have written. Zeros if the system does not count it."""
    try:
        lines = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    except OSError:
        return Written(0, 0)
    return Written(int(lines["wchar"]), int(lines["syscw"]))


@dataclass(frozen=True, slots=True)
class Site:
    """A running market: its addresses, the pids of its processes by name, and its payer.

    `coordinator_url`: where its processes reach the coordinator. `core`: the one that they are pinned to; None for any.
    """

    gateway: str
    coordinator: str
    pids: dict[str, int]
    payer: Signer
    deployment: Deployment
    folder: Path
    coordinator_url: str
    group: ProcessGroup
    core: int | None


@contextlib.asynccontextmanager
async def upstream(core: int | None = None) -> AsyncIterator[str]:
    """Runs the mock engine, on this core if one is given; yields its base URL."""
    port = free_port(0)
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "scripts.relay.mock", str(port))
    try:
        url = f"http://127.0.0.1:{port}"
        await until_answers(f"{url}/v1/models", process)
        if core is not None:
            pin(process.pid, core)
        yield url
    finally:
        await stop(process)


@contextlib.asynccontextmanager
async def market(
    folder: Path,
    engine: str,
    *,
    model: str = MODEL,
    coordinator_port: int = 0,
    proxy_port: int = 0,
    log_level: str = "info",
    slots: int = 256,
    queue_depth: int = 0,
    core: int | None = None,
    engine_table: str = "",
    coordinator: Mapping[str, object] | None = None,
) -> AsyncIterator[Site]:
    """Runs chain, coordinator, gateway and a node that serves an engine, each as a process of the `tally` command.

    `engine`: its base URL. `proxy_port`: the port at which node and gateway reach the coordinator, if a proxy is between them.
    `slots`, `queue_depth`: of the engine. `engine_table`: more of its TOML.
    `core`: the one that coordinator, node and gateway share; None for any. `coordinator`: more of its settings.
    """
    (folder / "keys").mkdir(parents=True)
    write_private(folder / "password", b"bench")
    signers = {n: create_keystore(folder / "keys" / f"{n}.json", "bench", cost=1 << 12) for n in ("coordinator", "node", "payer")}
    ports = {"chain": free_port(0), "coordinator": coordinator_port or free_port(0)}
    urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    coordinator_url = f"http://127.0.0.1:{proxy_port or ports['coordinator']}"
    environment = {PASSWORD_FILE_ENV: str(folder / "password"), "TALLYSTICK_HOME": str(folder)}
    async with ProcessGroup(folder, environment) as group:
        chain = ("chain", "--port", str(ports["chain"]))
        await group.start("chain", *chain, ready=lambda: _answers(f"{urls['chain']}/health"), port=ports["chain"])
        deployment = await _deploy(urls["chain"], folder, signers)
        site = Site("", urls["coordinator"], {}, signers["payer"], deployment, folder, coordinator_url, group, core)
        settings = {
            "port": ports["coordinator"],
            "public_urls": [coordinator_url],
            "db": f"sqlite:///{folder}/coordinator.db",
            "log_level": log_level,
            **(coordinator or {}),
        }
        health = f"{urls['coordinator']}/healthz"
        await _start(
            site, "coordinator", ("coordinator", "run"), settings, port=ports["coordinator"], ready=lambda: _answers(health)
        )
        await add_node(site, "node", engine, model=model, slots=slots, queue_depth=queue_depth, engine_table=engine_table)
        gateway = await add_gateway(site, "gateway")
        yield replace(site, gateway=gateway)


async def add_node(
    site: Site, name: str, engine: str, *, model: str = MODEL, slots: int, queue_depth: int = 0, engine_table: str = ""
) -> Address:
    """Starts a node of an engine and waits until it sells the model. Returns the provider."""
    keystore = site.folder / "keys" / f"{name}.json"
    if not keystore.exists():
        create_keystore(keystore, "bench", cost=1 << 12)
    settings = {"coordinator": site.coordinator_url, "state": str(site.folder / name)}
    engines = f'[[engines]]\nurl = "{engine}/v1"\nslots = {slots}\nqueue_depth = {queue_depth}\n{engine_table}'
    asks, provider = f"{site.coordinator}/v1/asks?model={model}", provider_of(site, name)
    await _start(site, name, ("node", "run"), settings, tables=engines, ready=lambda: _answers(asks, provider, wanted=True))
    return provider


def provider_of(site: Site, node: str) -> Address:
    """The provider whose wallet a node has."""
    return Address(keystore_address(site.folder / "keys" / f"{node}.json"))


async def add_gateway(site: Site, name: str) -> str:
    """Starts a gateway of the payer; returns its base URL. All gateways share the wallet's ledger."""
    port = free_port(0)
    url = f"http://127.0.0.1:{port}"
    settings = {"coordinator": site.coordinator_url, "port": port}
    await _start(site, name, ("gateway",), settings, port=port, ready=lambda: _answers(f"{url}/healthz"), wallet="payer")
    return url


async def _start(
    site: Site,
    name: str,
    command: Sequence[str],
    settings: Mapping[str, object],
    *,
    port: int | None = None,
    ready: Callable[[], Awaitable[bool]],
    tables: str = "",
    wallet: str = "",
) -> None:
    """Starts a process with a config of these settings, and pins it to the core of the site."""
    config = site.folder / f"{name}.toml"
    lines = dict(settings) | {"deployment": str(site.folder / "deployment.json")}
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items()) + tables)
    keystore = site.folder / "keys" / f"{wallet or name}.json"
    child = await site.group.start(name, *command, "--config", str(config), "--wallet", str(keystore), ready=ready, port=port)
    site.pids[name] = child.process.pid
    if site.core is not None:
        pin(child.process.pid, site.core)


async def restart(site: Site, name: str, *command: str, ready: str) -> None:
    """Starts a process again that has ended, with its config, and waits until the URL `ready` answers."""
    config, keystore = site.folder / f"{name}.toml", site.folder / "keys" / f"{name}.json"
    arguments = (name, *command, "--config", str(config), "--wallet", str(keystore))
    child = await site.group.start(f"{name}-again", *arguments, ready=lambda: _answers(ready))
    site.pids[name] = child.process.pid


async def fund(deployment: Deployment, payer: Signer) -> None:
    """Opens the purse of another payer."""
    rpc = Rpc(deployment.rpc or "")
    try:
        await Sender(rpc, dev_accounts()[0]).send(payer.address, b"", value=10**18)
        await fund_purse(Escrow(rpc, deployment), Sender(rpc, payer), payer, PURSE, mint=True)
    finally:
        await rpc.close()


async def reserve(site: Site, node: str, amount: Amount) -> None:
    """Reserves money of the site's payer for a node, which trusts it with no more than that and a little."""
    rpc = Rpc(site.deployment.rpc or "")
    try:
        payer = site.payer
        await Escrow(rpc, site.deployment).reserve(Sender(rpc, payer), payer.address, provider_of(site, node), amount)
    finally:
        await rpc.close()


async def _deploy(chain: str, folder: Path, signers: Mapping[str, Signer]) -> Deployment:
    rpc = Rpc(chain)
    try:
        funder = Sender(rpc, dev_accounts()[0])
        deployment = await deploy(rpc, funder, rules=LOCAL_RULES)
        deployment.save(folder / "deployment.json")
        for name in ("coordinator", "payer"):
            await funder.send(signers[name].address, b"", value=10**18)
        await fund_purse(Escrow(rpc, deployment), Sender(rpc, signers["payer"]), signers["payer"], PURSE, mint=True)
    finally:
        await rpc.close()
    return deployment


LITELLM_CONFIG = """
model_list:
  - model_name: bench
    litellm_params: {{model: openai/bench, api_base: "{mock}/v1", api_key: none}}
litellm_settings: {{telemetry: false}}
general_settings: {{dangerously_permit_weak_or_unset_master_key: true}}
"""


@contextlib.asynccontextmanager
async def litellm(folder: Path, mock: str, commands: Path) -> AsyncIterator[tuple[str, int]]:
    """Runs LiteLLM's proxy with one worker on the same mock engine; yields its base URL and its pid."""
    config, port = folder / "litellm.yaml", free_port(0)
    config.write_text(LITELLM_CONFIG.format(mock=mock))
    options = ("--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1")
    async with _peer(folder, commands / "litellm", options, f"http://127.0.0.1:{port}", "/health/liveliness") as peer:
        yield peer


@contextlib.asynccontextmanager
async def sglang_router(folder: Path, mock: str, commands: Path) -> AsyncIterator[tuple[str, int]]:
    """Runs SGLang's router, which is written in Rust, on the same mock engine; yields its base URL and its pid."""
    port, metrics = free_port(0), free_port(0)
    options = ["launch", "--host", "127.0.0.1", "--port", str(port), "--worker-urls", mock]
    options += ("--policy", "round_robin", "--log-level", "error", "--prometheus-port", str(metrics))
    async with _peer(folder, commands / "sglang-router", options, f"http://127.0.0.1:{port}", "/readiness") as peer:
        yield peer


@contextlib.asynccontextmanager
async def _peer(folder: Path, command: Path, options: Sequence[str], url: str, ready: str) -> AsyncIterator[tuple[str, int]]:
    """Runs a program of another project, pinned to the core of the measured processes."""
    with (folder / f"{command.name}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(str(command), *options, stdout=log, stderr=log)
    try:
        await until_answers(f"{url}{ready}", process)
        pin(process.pid, TESTED)
        yield url, process.pid
    finally:
        await stop(process)


async def stop(process: asyncio.subprocess.Process) -> None:
    """Ends a process and waits for that."""
    if process.returncode is None:
        process.terminate()
    await process.wait()


async def until_answers(url: str, process: asyncio.subprocess.Process, seconds: float = 90) -> None:
    """Waits until a process answers at `url`. Raises RuntimeError if it ends before, TimeoutError after `seconds`."""
    async with asyncio.timeout(seconds):
        while not await _answers(url):
            if process.returncode is not None:
                raise RuntimeError(f"{url} did not answer: its process has ended")
            await asyncio.sleep(0.1)


async def _answers(url: str, text: str = "", wanted: bool = False) -> bool:
    try:
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return response.status == 200 and (not wanted or text in await response.text())
    except (aiohttp.ClientError, OSError):
        return False
