"""Starts the processes under test, pins them to cores and measures their CPU time and memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
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
from tallystick.protocol.types import Amount
from tallystick.runtime.keystore import PASSWORD_FILE_ENV, create_keystore, write_private

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
class Site:
    """A running market: its addresses, the pids of its processes by name, and its payer."""

    gateway: str
    coordinator: str
    pids: Mapping[str, int]
    payer: Signer
    deployment: Deployment


@contextlib.asynccontextmanager
async def upstream() -> AsyncIterator[str]:
    """Runs the mock engine; yields its base URL."""
    port = free_port(0)
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "scripts.relay.mock", str(port))
    try:
        url = f"http://127.0.0.1:{port}"
        await _until_answers(f"{url}/v1/models", process)
        pin(process.pid, LOAD)
        yield url
    finally:
        await _stop(process)


@contextlib.asynccontextmanager
async def market(
    folder: Path, mock: str, *, coordinator_port: int = 0, proxy_port: int = 0, log_level: str = "info", slots: int = 256
) -> AsyncIterator[Site]:
    """Runs chain, coordinator, gateway and a node that serves the mock engine, each as a process of the `tally` command.

    `proxy_port`: the port at which node and gateway reach the coordinator, if a proxy is between them. `slots`: of the node.
    """
    (folder / "keys").mkdir(parents=True)
    write_private(folder / "password", b"bench")
    signers = {n: create_keystore(folder / "keys" / f"{n}.json", "bench", cost=1 << 12) for n in ("coordinator", "node", "payer")}
    ports = {"chain": free_port(0), "coordinator": coordinator_port or free_port(0), "gateway": free_port(0)}
    urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    coordinator_url = f"http://127.0.0.1:{proxy_port or ports['coordinator']}"
    settings = {
        "coordinator": {
            "port": ports["coordinator"],
            "public_urls": [coordinator_url],
            "db": f"sqlite:///{folder}/coordinator.db",
            "log_level": log_level,
        },
        "node": {"coordinator": coordinator_url, "state": str(folder / "node")},
        "gateway": {"coordinator": coordinator_url, "port": ports["gateway"]},
    }
    tables = {"node": f'[[engines]]\nurl = "{mock}/v1"\nslots = {slots}\n'}
    environment = {PASSWORD_FILE_ENV: str(folder / "password"), "TALLYSTICK_HOME": str(folder)}
    async with ProcessGroup(folder, environment) as processes:
        chain = ("chain", "--port", str(ports["chain"]))
        await processes.start("chain", *chain, ready=lambda: _answers(f"{urls['chain']}/health"), port=ports["chain"])
        deployment = await _deploy(urls["chain"], folder, signers)
        pids: dict[str, int] = {}
        for name, path in (("coordinator", "/v1/health"), ("node", ""), ("gateway", "/health")):
            config = folder / f"{name}.toml"
            lines = settings[name] | {"deployment": str(folder / "deployment.json")}
            config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items()) + tables.get(name, ""))
            command = ("gateway",) if name == "gateway" else (name, "run")
            wallet = str(folder / "keys" / f"{'payer' if name == 'gateway' else name}.json")
            check = f"{urls['coordinator']}/v1/asks?model={MODEL}" if name == "node" else urls[name] + path
            child = await processes.start(
                name,
                *command,
                "--config",
                str(config),
                "--wallet",
                wallet,
                ready=lambda url=check: _answers(url, '"ask"', "ask" in url),
                port=ports.get(name),
            )
            pids[name] = child.process.pid
            pin(child.process.pid, TESTED)
        yield Site(urls["gateway"], urls["coordinator"], pids, signers["payer"], deployment)


async def fund(site: Site, payer: Signer) -> None:
    """Opens the purse of another payer."""
    rpc = Rpc(site.deployment.rpc or "")
    try:
        await Sender(rpc, dev_accounts()[0]).send(payer.address, b"", value=10**18)
        await fund_purse(Escrow(rpc, site.deployment), Sender(rpc, payer), payer, PURSE, mint=True)
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
async def litellm(folder: Path, mock: str, command: Path) -> AsyncIterator[tuple[str, int]]:
    """Runs LiteLLM's proxy with one worker on the same mock engine; yields its base URL and its pid."""
    config, port = folder / "litellm.yaml", free_port(0)
    config.write_text(LITELLM_CONFIG.format(mock=mock))
    with (folder / "litellm.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            str(command),
            "--config",
            str(config),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--num_workers",
            "1",
            stdout=log,
            stderr=log,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        await _until_answers(f"{url}/health/liveliness", process)
        pin(process.pid, TESTED)
        yield url, process.pid
    finally:
        await _stop(process)


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    await process.wait()


async def _until_answers(url: str, process: asyncio.subprocess.Process, seconds: float = 90) -> None:
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
