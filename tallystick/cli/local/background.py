"""The local market of `tally start`: a background process that starts the missing services and supervises them.

The supervisor holds a lock for its lifetime, and the locked file contains its process id, so that `--stop` never signals another
process.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from urllib.parse import urlsplit

from tallystick.cli.local.processes import ProcessGroup, free_port, log_tail, spawn_tally
from tallystick.cli.local.services import (
    GAS_MONEY,
    Ports,
    environment,
    get_json,
    prepare,
    start_chain,
    start_coordinator,
    start_engines,
    start_node,
)
from tallystick.cli.onchain import LOCAL_CHAIN_ID, LOCAL_RPC
from tallystick.cli.output import step
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage, Code, Refusal, TallyError, Unavailable
from tallystick.protocol.types import parse_address
from tallystick.runtime.config import home

if TYPE_CHECKING:
    from tallystick.chain.deployment import Deployment
    from tallystick.chain.endpoint import Rpc

START_SECONDS = 120
STOP_SECONDS = 60
LOCK_ATTEMPTS = 20
GATEWAY_PORT = 8421
ENGINE_PORT = 8431


@dataclass(frozen=True, slots=True)
class MarketLocation:
    """Where a market is, by the user's settings: the coordinator's URL and the deployment file."""

    coordinator: str
    deployment: Path

    @property
    def rpc(self) -> str:
        """The chain's URL. Raises BadMessage for a damaged deployment file."""
        loaded = self.load_deployment()
        return LOCAL_RPC if loaded is None else loaded.rpc

    def load_deployment(self) -> Deployment | None:
        """The deployment file's content; None if the file does not exist. Raises BadMessage if it is damaged."""
        from tallystick.chain.deployment import Deployment

        return Deployment.load(self.deployment) if self.deployment.exists() else None

    @property
    def is_local(self) -> bool:
        """Whether the whole market is on this machine with play money, so that it may be started and funded."""
        loaded = self.load_deployment()
        return is_loopback(self.coordinator) and (
            loaded is None or (loaded.chain_id == LOCAL_CHAIN_ID and is_loopback(loaded.rpc))
        )


def is_loopback(url: str) -> bool:
    """Whether a URL names this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def is_deployed(rpc: Rpc, deployment: Deployment | None) -> bool:
    """Whether a deployment's escrow exists on the chain. Raises Unavailable."""
    if deployment is None:
        return False
    return await rpc.request("eth_getCode", deployment.escrow, "latest") not in ("0x", None)


async def ensure_deployment(rpc: Rpc, location: MarketLocation) -> Deployment:
    """The deployment of a local market: the file's if it is valid, else the coordinator's, else a new one, which is then written
    to the file. Raises TallyError.
    """
    from tallystick.chain.deploy import LOCAL_RULES, deploy
    from tallystick.chain.deployment import Deployment
    from tallystick.chain.devnet import dev_accounts
    from tallystick.chain.sender import Sender

    if await rpc.chain_id() != LOCAL_CHAIN_ID:
        raise Refusal(
            Code.CHAIN_REFUSED,
            f"the chain at {rpc.shown_url} is not a local test chain (id {LOCAL_CHAIN_ID}), so nothing is deployed",
        )
    info, loaded = await get_json(f"{location.coordinator}/v1/info"), location.load_deployment()
    if loaded is not None and await is_deployed(rpc, loaded) and (info is None or info["contract"] == loaded.escrow):
        return loaded
    if info is None:
        # A new account gives each chain's escrow another address: the client's ledgers are kept by that address.
        deployer = Signer(os.urandom(32))
        await Sender(rpc, dev_accounts()[0]).send(deployer.address, b"", value=GAS_MONEY)
        deployment = await deploy(rpc, Sender(rpc, deployer), rules=LOCAL_RULES)
        step(f"contracts deployed; wrote {location.deployment}")
    else:
        contract, token = parse_address(info["contract"]), parse_address(info["token"])
        deployment = Deployment(LOCAL_CHAIN_ID, contract, token, int(info["tokenDecimals"]), 0, rpc.url)
        if info["chainId"] != LOCAL_CHAIN_ID or not await is_deployed(rpc, deployment):
            raise Refusal(
                Code.CHAIN_REFUSED,
                f"the coordinator at {location.coordinator} settles on {contract}, which is not on the chain at {rpc.shown_url}: "
                "stop that coordinator, or name another with --coordinator",
            )
        step(f"wrote {location.deployment} with the contracts that the coordinator settles on")
    deployment.save(location.deployment)
    return deployment


# ----------------------------------------------------------------------------------------------------------- supervisor process


def folder() -> Path:
    """The folder of the local market: throw-away wallets, state, logs, lock."""
    return home() / "local"


def running() -> int | None:
    """The process id of the supervisor; None if none runs."""
    import fcntl  # unavailable on Windows, where the other commands should still load

    path = folder() / "lock"
    if not path.exists():
        return None
    with path.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, so that two readers do not block each other
        except BlockingIOError:
            return int(file.read() or 0) or None
    return None


def stop() -> bool:
    """Stops the supervisor and with it its services. Returns false if none runs. Raises Unavailable."""
    pid = running()
    if pid is None:
        return False
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while running() is not None:
        if time.monotonic() > deadline:
            raise Unavailable(
                Code.PROCESS_FAILED, f"the local market (process {pid}) did not stop within {STOP_SECONDS} s; kill it: kill {pid}"
            )
        time.sleep(0.1)
    return True


async def spawn(location: MarketLocation, embedded: Path | None) -> None:
    """Starts the supervisor, shows its progress and returns when the market is up. Raises Unavailable with the end of its log."""
    folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    log, ready = folder() / "market.log", folder() / "ready"
    ready.unlink(missing_ok=True)
    arguments = ["start", "--supervise", "--coordinator", location.coordinator, "--deployment", str(location.deployment)]
    arguments += [] if embedded is None else ["--embedded-engine", str(embedded)]
    with log.open("wb") as file:
        process = await spawn_tally(*arguments, log=file)
    deadline, shown = time.monotonic() + START_SECONDS, 0
    while True:
        done, exited = ready.exists(), process.returncode is not None
        lines = log.read_text(errors="replace").splitlines()
        for line in lines[shown:]:
            if line.startswith("✓"):
                step(line[2:])
        shown = len(lines)
        if done:
            return
        if exited or time.monotonic() > deadline:
            text = f"the local market did not start; the end of its log {log}:\n{log_tail(log)}"
            raise Unavailable(Code.PROCESS_FAILED, text)
        await asyncio.sleep(0.1)


def _try_lock(file: TextIO) -> bool:
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def supervise(location: MarketLocation, embedded: Path | None) -> None:
    """Starts the missing services and runs until SIGTERM or until one of them exits. Raises TallyError.

    `embedded`: the folder of the embedded engine, which is started if no engine runs here; without it a stand-in is.
    """
    if not location.is_local:
        raise BadMessage("`tally start` starts only a market on this machine: coordinator and chain must be local")
    folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder() / "lock").open("a+") as lock:
        for left in range(LOCK_ATTEMPTS, -1, -1):  # `running` may hold the lock for a moment
            if _try_lock(lock):
                break
            if not left:
                raise Unavailable(Code.ALREADY_RUNNING, "the local market is running already; stop it with: tally start --stop")
            await asyncio.sleep(0.05)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        stopped = asyncio.Event()
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(signal_number, stopped.set)
        run_folder = folder() / "run"
        shutil.rmtree(run_folder, ignore_errors=True)  # the previous run's chain is gone, so its state is worthless
        run_folder.mkdir(mode=0o700)
        async with ProcessGroup(run_folder, environment(run_folder)) as processes:
            work = asyncio.create_task(_run_services(location, run_folder, processes, embedded))
            stopping = asyncio.create_task(stopped.wait())
            await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
            (folder() / "ready").unlink(missing_ok=True)
            stopping.cancel()
            if work.done():
                work.result()
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


async def _run_services(location: MarketLocation, run_folder: Path, processes: ProcessGroup, embedded: Path | None) -> None:
    from tallystick.chain.devnet import dev_accounts
    from tallystick.chain.endpoint import Rpc
    from tallystick.chain.sender import Sender

    ports = Ports(_port(location.rpc), _port(location.coordinator), GATEWAY_PORT, {"node": free_port(ENGINE_PORT)})
    market = prepare(run_folder, location.deployment, ports, ())
    rpc = Rpc(location.rpc)
    try:
        if await chain_id(rpc) is None:
            await start_chain(market, processes)
        await ensure_deployment(rpc, location)
        info: Any = await get_json(f"{location.coordinator}/v1/info")
        engines = asyncio.create_task(start_engines(market, processes, embedded))
        if info is None:
            await Sender(rpc, dev_accounts()[0]).send(market.signers["coordinator"].address, b"", value=GAS_MONEY)
            await start_coordinator(market, processes)
        await start_node(market, processes, "node", await engines)
    finally:
        await rpc.close()
    (folder() / "ready").touch()
    raise (await processes.first_exit()).exited()


async def chain_id(rpc: Rpc) -> int | None:
    """The chain's id; None if the chain does not answer."""
    try:
        return await rpc.chain_id()
    except TallyError:
        return None


def _port(url: str) -> int:
    parts = urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)
