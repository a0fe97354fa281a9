"""The local market of `tally start`: a background process that starts the missing services and supervises them.

The supervisor holds a lock for its lifetime, and the locked file contains its process id, so that `--stop` never signals another
process.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tallystick.cli.local.market_location import MarketLocation, MarketState, inspect_market, port_of, refuse_foreign
from tallystick.cli.local.processes import ProcessGroup, free_port, log_tail, spawn_tally
from tallystick.cli.local.services import (
    GAS_MONEY,
    LocalMarket,
    Ports,
    environment,
    prepare,
    start_chain,
    start_coordinator,
    start_engines,
    start_node,
)
from tallystick.cli.output import step
from tallystick.cli.progress import activity
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage, Code, Unavailable
from tallystick.runtime.config import home
from tallystick.runtime.ports import describe_holder

if TYPE_CHECKING:
    from tallystick.chain.deployment import Deployment
    from tallystick.chain.endpoint import Rpc

START_SECONDS = 600
"""For all services together, each of which has READY_SECONDS."""
STOP_SECONDS = 60
LOCK_ATTEMPTS = 20
GATEWAY_PORT = 8421
ENGINE_PORT = 8431


async def deploy_contracts(rpc: Rpc, location: MarketLocation) -> Deployment:
    """Deploys the contracts of a local market and writes the deployment file. Raises TallyError."""
    from tallystick.chain.deploy import LOCAL_RULES, deploy
    from tallystick.chain.devnet import dev_accounts
    from tallystick.cli.transactions import ShownSender

    # A new account gives each chain's escrow another address: the client's ledgers are kept by that address.
    deployer = Signer(os.urandom(32))
    await ShownSender(rpc, dev_accounts()[0]).send(deployer.address, b"", value=GAS_MONEY)
    deployment = await deploy(rpc, ShownSender(rpc, deployer), rules=LOCAL_RULES)
    write_deployment(deployment, location.deployment)
    return deployment


def write_deployment(deployment: Deployment, path: Path) -> None:
    """Writes the deployment file, unless it has this content, and keeps the one that it replaces."""
    backup = deployment.save_keeping(path)
    step(f"wrote {path}" + (f"; the earlier file is kept as {backup}" if backup else ""))


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


@dataclass(frozen=True, slots=True)
class StartedServices:
    """Which services the local market runs itself; it uses those of others besides."""

    chain: bool = True
    coordinator: bool = True


def started_services() -> StartedServices:
    """The services that the running local market started."""
    try:
        return StartedServices(**json.loads((folder() / "started.json").read_text()))
    except (OSError, ValueError, TypeError):  # it is starting
        return StartedServices()


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
    with activity("starting the local market"):
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
                late = "" if exited else f" within {START_SECONDS} s, and goes on starting (tally start --stop ends it)"
                text = f"the local market did not start{late}; the end of its log {log}:\n{log_tail(log)}"
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
        (folder() / "started.json").unlink(missing_ok=True)
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
    from tallystick.chain.endpoint import Rpc

    rpc = Rpc(location.rpc)
    try:
        state = await inspect_market(rpc, location)
    finally:
        await rpc.close()
    if state.foreign is not None:
        raise refuse_foreign(location, state.foreign)
    own_chain = state.deployment is None
    wanted = port_of(location.rpc)
    chain_port = free_port(wanted) if own_chain else wanted
    if chain_port != wanted:
        step(f"port {wanted} is taken ({describe_holder(wanted) or 'another program'}), so the chain gets port {chain_port}")
    ports = Ports(chain_port, port_of(location.coordinator), GATEWAY_PORT, {"node": free_port(ENGINE_PORT)})
    market = prepare(run_folder, location.deployment, ports, ())
    if own_chain:
        await start_chain(market, processes)
    await _start_rest(location, state, market, processes, embedded)
    started = StartedServices(chain=own_chain, coordinator=state.coordinator is None)
    (folder() / "started.json").write_text(json.dumps(asdict(started)))
    (folder() / "ready").touch()
    raise (await processes.first_exit()).exited()


async def _start_rest(
    location: MarketLocation, state: MarketState, market: LocalMarket, processes: ProcessGroup, embedded: Path | None
) -> None:
    """Deploys the contracts unless they exist, and starts engine, coordinator and node."""
    from tallystick.chain.devnet import dev_accounts
    from tallystick.chain.endpoint import Rpc
    from tallystick.cli.transactions import ShownSender

    rpc = Rpc(location.rpc if state.deployment is not None else market.url(market.ports.chain))
    try:
        if state.deployment is None:
            await deploy_contracts(rpc, location)
        engines = asyncio.create_task(start_engines(market, processes, embedded))
        if state.coordinator is None:
            await ShownSender(rpc, dev_accounts()[0]).send(market.signers["coordinator"].address, b"", value=GAS_MONEY)
            await start_coordinator(market, processes)
        await start_node(market, processes, "node", await engines)
    finally:
        await rpc.close()
