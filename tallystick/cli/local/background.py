"""The market that `tally start` keeps running on this machine: one background process that starts what is missing and holds it.

It holds a lock for as long as it lives, and its number is in the locked file: so nobody else's process is ever stopped.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from urllib.parse import urlsplit

from tallystick.cli.local.processes import Children, free_port
from tallystick.cli.local.services import (
    GAS_MONEY,
    Ports,
    environment,
    get,
    prepare,
    start_chain,
    start_coordinator,
    start_engines,
    start_node,
)
from tallystick.cli.onchain import LOCAL_RPC
from tallystick.cli.output import step
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage, Code, Refusal, TallyError, Unavailable
from tallystick.protocol.types import parse_address
from tallystick.runtime.config import home

if TYPE_CHECKING:
    from tallystick.chain.deployment import Deployment
    from tallystick.chain.endpoint import Rpc

LOCAL_CHAIN = 31337
START_SECONDS = 120
STOP_SECONDS = 60
LOCK_TRIES = 20
GATEWAY_PORT = 8421


@dataclass(frozen=True, slots=True)
class Place:
    """Where a market is, as the user's settings have it."""

    coordinator: str
    deployment: Path

    @property
    def rpc(self) -> str:
        """The chain's address. Raises BadMessage for a damaged deployment file."""
        known = self.known()
        return LOCAL_RPC if known is None else known.rpc

    def known(self) -> Deployment | None:
        """The deployment file, if there is one. Raises BadMessage."""
        from tallystick.chain.deployment import Deployment

        return Deployment.load(self.deployment) if self.deployment.exists() else None

    @property
    def is_local(self) -> bool:
        """Whether all of it is play money on this machine: then it may be started, and money made."""
        known = self.known()
        return is_here(self.coordinator) and (known is None or (known.chain_id == LOCAL_CHAIN and is_here(known.rpc)))


def is_here(url: str) -> bool:
    """Whether an address is this machine's own."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def on_chain(rpc: Rpc, deployment: Deployment | None) -> bool:
    """Whether a deployment's escrow is there. Raises Unavailable."""
    if deployment is None:
        return False
    return await rpc.request("eth_getCode", deployment.escrow, "latest") not in ("0x", None)


async def settle_place(rpc: Rpc, place: Place) -> Deployment:
    """The deployment that this local market works with: the file's, else the coordinator's, else a new one; the file says so
    afterwards. Raises TallyError.
    """
    from tallystick.chain.deploy import LOCAL_RULES, deploy
    from tallystick.chain.deployment import Deployment
    from tallystick.chain.devnet import dev_accounts
    from tallystick.chain.sender import Sender

    if await rpc.chain_id() != LOCAL_CHAIN:
        raise Refusal(Code.CHAIN_REFUSED, f"the chain at {rpc.url} is no local one ({LOCAL_CHAIN}), so nothing is done to it")
    info, known = await get(f"{place.coordinator}/v1/info"), place.known()
    if known is not None and await on_chain(rpc, known) and (info is None or info["contract"] == known.escrow):
        return known
    if info is None:
        # By a new account, so that no two chains of this machine have an escrow at one address: books go by it.
        deployer = Signer(os.urandom(32))
        await Sender(rpc, dev_accounts()[0]).send(deployer.address, b"", value=GAS_MONEY)
        made = await deploy(rpc, Sender(rpc, deployer), rules=LOCAL_RULES)
        step(f"contracts deployed; {place.deployment} says where")
    else:
        contract, token = parse_address(info["contract"]), parse_address(info["token"])
        made = Deployment(LOCAL_CHAIN, contract, token, int(info["tokenDecimals"]), 0, rpc.url)
        if info["chainId"] != LOCAL_CHAIN or not await on_chain(rpc, made):
            raise Refusal(
                Code.CHAIN_REFUSED,
                f"the coordinator at {place.coordinator} settles on {contract}, which is not on the chain at {rpc.url}: stop it, "
                "or name another with --coordinator",
            )
        step(f"{place.deployment} names the contracts that the coordinator settles on")
    made.save(place.deployment)
    return made


# ------------------------------------------------------------------------------------------------------------ its one process


def folder() -> Path:
    """Where it keeps its throw-away wallets, its state and its logs."""
    return home() / "local"


def running() -> int | None:
    """The number of the process that keeps the market running, if there is one."""
    import fcntl  # not on Windows, where all but this command should load

    path = folder() / "lock"
    if not path.exists():
        return None
    with path.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that look must not take each other for the keeper
        except BlockingIOError:
            return int(file.read() or 0) or None
    return None


def stop() -> bool:
    """Stops it, and with it what it started; false if it does not run. Raises Unavailable."""
    number = running()
    if number is None:
        return False
    os.kill(number, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while running() is not None:
        if time.monotonic() > deadline:
            raise Unavailable(Code.PROCESS_FAILED, f"the local market (process {number}) does not stop")
        time.sleep(0.1)
    return True


async def spawn(place: Place) -> None:
    """Starts it in the background and waits until the market is up, telling its steps. Raises Unavailable with its last words."""
    folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    log, ready = folder() / "market.log", folder() / "ready"
    ready.unlink(missing_ok=True)
    arguments = ("start", "--supervise", "--coordinator", place.coordinator, "--deployment", str(place.deployment))
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tallystick.cli",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    deadline, told = time.monotonic() + START_SECONDS, 0
    while True:
        done, ended = ready.exists(), process.returncode is not None
        lines = log.read_text(errors="replace").splitlines()
        for line in lines[told:]:
            if line.startswith("✓"):
                step(line[2:])
        told = len(lines)
        if done:
            return
        if ended or time.monotonic() > deadline:
            tail = "\n".join(lines[-15:])
            raise Unavailable(Code.PROCESS_FAILED, f"the local market did not start; the end of {log}:\n{tail}")
        await asyncio.sleep(0.1)


def _locked(file: TextIO) -> bool:
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def keep(place: Place) -> None:
    """That process: starts what is missing, and holds it until SIGTERM or until a part ends by itself. Raises TallyError."""
    if not place.is_local:
        raise BadMessage("only a market on this machine can be started here")
    folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder() / "lock").open("a+") as lock:
        for left in range(LOCK_TRIES, -1, -1):  # somebody may be looking just now
            if _locked(lock):
                break
            if not left:
                raise Unavailable(Code.ALREADY_RUNNING, "the local market is kept already; to stop it: tally start --stop")
            await asyncio.sleep(0.05)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        stopped = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
        run = folder() / "run"
        shutil.rmtree(run, ignore_errors=True)  # of the last time: its chain is forgotten, too
        run.mkdir(mode=0o700)
        async with Children(run, environment(run)) as children:
            work = asyncio.create_task(_hold(place, run, children))
            stopping = asyncio.create_task(stopped.wait())
            await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
            (folder() / "ready").unlink(missing_ok=True)
            stopping.cancel()
            if work.done():
                work.result()
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


async def _hold(place: Place, run: Path, children: Children) -> None:
    from tallystick.chain.devnet import dev_accounts
    from tallystick.chain.endpoint import Rpc
    from tallystick.chain.sender import Sender

    ports = Ports(_port(place.rpc), _port(place.coordinator), GATEWAY_PORT, {"node": free_port(8431)})
    stage = prepare(run, place.deployment, ports, ())
    rpc = Rpc(place.rpc)
    try:
        if await chain_id(rpc) is None:
            await start_chain(stage, children)
        await settle_place(rpc, place)
        info: Any = await get(f"{place.coordinator}/v1/info")
        engines = asyncio.create_task(start_engines(stage, children))
        if info is None:
            await Sender(rpc, dev_accounts()[0]).send(stage.signers["coordinator"].address, b"", value=GAS_MONEY)
            await start_coordinator(stage, children)
        await start_node(stage, children, "node", await engines)
    finally:
        await rpc.close()
    (folder() / "ready").touch()
    dead = await children.first_death()
    raise Unavailable(Code.PROCESS_FAILED, f"{dead.name} ended by itself; see {dead.log}")


async def chain_id(rpc: Rpc) -> int | None:
    """None where no chain answers."""
    try:
        return await rpc.chain_id()
    except TallyError:
        return None


def _port(url: str) -> int:
    parts = urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)
