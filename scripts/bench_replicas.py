"""Measures what a job costs each of three replicas of a coordinator, PostgreSQL and NATS, beside what it costs one replica that
has all the work, and a lone coordinator.

All CPU time is that of the processes, from /proc, so the figures hold for a machine with fewer cores than processes. A lone
coordinator on SQLite, one replica, and all three of them take turns with signed jobs, 64 in flight at each, and bare nodes behind
them. What the processes spend while nobody asks is subtracted. It needs PostgreSQL's programs and nats-server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scripts.local_cluster import Cluster, Service, cluster
from scripts.relay import load, processes
from tallystick.chain.deployment import Deployment
from tallystick.cli.local.processes import free_port
from tallystick.cli.local.services import get_json, is_healthy, to_toml
from tallystick.cli.progress import activity
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.replicas import replica_order
from tallystick.protocol.types import Address

REPLICAS, IN_FLIGHT = 3, 64
IDLE_SECONDS = 5.0
Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class RunSize:
    """Jobs of a round at each coordinator, and rounds, of which the first warms up."""

    jobs: int
    rounds: int


FULL, QUICK = RunSize(1_000, 4), RunSize(40, 2)


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="scripts/bench replicas", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="a few jobs: shows that it runs, measures little")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tallystick-bench-") as folder, activity("measuring replicas"):
        figures = asyncio.run(_measure(Path(folder), QUICK if options.quick else FULL))
    if options.json:
        print(json.dumps({name: round(value, 3) for name, value in figures.items()}, indent=2))
    else:
        _show(figures)
    return 0


# ---------------------------------------------------------------------------------------------------------- measuring CPU


def cpu_of_group(pid: int) -> float:
    """CPU seconds of a process and all its children, which is what PostgreSQL's server is. The master counts ended children."""
    return processes.cpu_seconds(pid) + sum(map(processes.cpu_seconds, _children(pid)))


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


class CpuMeter:
    """The CPU time that services spend above what they spend while nobody asks, in seconds."""

    def __init__(self, services: Iterable[Service]) -> None:
        self._services = list(services)
        self._idle = dict[str, float]()

    def _read(self) -> dict[str, float]:
        return {service.name: cpu_of_group(service.pid) for service in self._services}

    async def measure_idle(self) -> None:
        """Measures what they spend in a second of rest."""
        before = self._read()
        await asyncio.sleep(IDLE_SECONDS)
        self._idle = {name: (now - before[name]) / IDLE_SECONDS for name, now in self._read().items()}

    @property
    def idle(self) -> Mapping[str, float]:
        """CPU seconds for each second of rest."""
        return self._idle

    @contextlib.asynccontextmanager
    async def counting(self, spent: dict[str, float]) -> AsyncIterator[None]:
        """Adds what they spend in the block."""
        clock, before = asyncio.get_running_loop().time, self._read()
        began = clock()
        yield
        seconds = clock() - began
        for name, now in self._read().items():
            spent[name] = spent.get(name, 0.0) + now - before[name] - seconds * self._idle[name]


# ------------------------------------------------------------------------------------------------------------------- load


@dataclass(slots=True)
class Lane:
    """One coordinator with a bare node, and a payer who uses it."""

    url: str
    payer: Signer
    node: load.EnginelessNode
    deployment: Deployment
    coordinator: Address
    signed: int = 0

    @classmethod
    async def open(cls, url: str, urls: list[str], deployment: Deployment) -> Lane:
        """Connects a node, and funds a payer whose first replica this one is."""
        while replica_order((payer := Signer(os.urandom(32))).address, urls)[0] != url:
            pass
        await processes.fund(deployment, payer)
        info = await get_json(f"{url}/v1/info")
        node = await load.EnginelessNode.join(url, Signer(os.urandom(32)), deployment.domain)
        return cls(url, payer, node, deployment, info["coordinator"])

    def sign(self, count: int) -> list[bytes]:
        """Signs the next jobs."""
        domain, first = self.deployment.domain, self.signed
        self.signed += count
        return load.sign_jobs(
            count, payer=self.payer, coordinator=self.coordinator, domain=domain, ask=self.node.ask, first=first
        )


async def _measure(folder: Path, size: RunSize) -> Figures:
    async with cluster(folder, replicas=REPLICAS) as running, _lone(folder) as alone, contextlib.AsyncExitStack() as stack:
        deployment = Deployment.load(folder / "deployment.json")
        urls = [running[name].url for name in running.replicas]
        lone = await Lane.open(alone.url, [alone.url], deployment)
        lanes = [await Lane.open(url, urls, deployment) for url in urls]
        for lane in (lone, *lanes):
            serving = asyncio.create_task(lane.node.run())
            stack.callback(serving.cancel)
        return await _take_turns(running, alone, lone, lanes, size)


async def _take_turns(running: Cluster, alone: Service, lone: Lane, lanes: list[Lane], size: RunSize) -> Figures:
    meter = CpuMeter([alone, running["postgres"], running["nats"], *(running[name] for name in running.replicas)])
    turns: list[tuple[list[Lane], dict[str, float]]] = [([lone], {}), (lanes[:1], {}), (lanes, {})]
    for number in range(size.rounds):
        if number == 1:
            await meter.measure_idle()
        for turn, spent in turns:
            posted = [(lane, await asyncio.to_thread(lane.sign, size.jobs)) for lane in turn]  # the nodes' beats go on
            counting = meter.counting(spent) if number else contextlib.nullcontext()
            async with counting:
                await asyncio.gather(
                    *(load.post(lane.url, jobs, concurrency=IN_FLIGHT, account=lane.payer.address) for lane, jobs in posted)
                )
    of_lone, of_one, of_all = (
        {name: seconds * 1e6 / (size.jobs * (size.rounds - 1) * len(turn)) for name, seconds in spent.items()}
        for turn, spent in turns
    )
    return derive(
        lone=of_lone[alone.name],
        one=sum(of_one[name] for name in running.replicas),
        replica=sum(of_all[name] for name in running.replicas),
        postgres=of_all["postgres"],
        nats=of_all["nats"],
    ) | {f"idle_cpu_ms_per_s_{name}": 1_000 * value for name, value in meter.idle.items()}


def derive(*, lone: float, one: float, replica: float, postgres: float, nats: float) -> Figures:
    """The figures, given the CPU of a job in microseconds: at a lone coordinator, at one replica that has all the work, and at
    each of the replicas, PostgreSQL and NATS while all have work.
    """
    return {
        "lone_cpu_us_per_job": lone,
        "one_replica_cpu_us_per_job": one,
        "replica_cpu_us_per_job": replica,
        "postgres_cpu_us_per_job": postgres,
        "nats_cpu_us_per_job": nats,
        "lone_jobs_per_s_core": 1e6 / lone,
        "one_replica_jobs_per_s_core": 1e6 / one,
        "replica_jobs_per_s_core": 1e6 / replica,
        "three_replicas_rate_ratio": REPLICAS * one / replica,
        "three_replicas_to_lone_ratio": REPLICAS * lone / replica,
        "postgres_core_at_jobs_per_s": 1e6 / max(postgres, 1.0),
        "nats_core_at_jobs_per_s": 1e6 / max(nats, 1.0),
    }


@contextlib.asynccontextmanager
async def _lone(folder: Path) -> AsyncIterator[Service]:
    """A coordinator of the same account on a database of its own."""
    port, config = free_port(0), folder / "lone.toml"
    settings = {"deployment": str(folder / "deployment.json"), "port": port, "db": f"sqlite:///{folder}/lone.db"}
    config.write_text(to_toml({**settings, "settle_interval": 0.5, "name": "lone"}))
    arguments = ("--config", str(config), "--wallet", str(folder / "keys" / "coordinator.json"))
    url = f"http://127.0.0.1:{port}"
    command = (sys.executable, "-m", "tallystick.cli", "coordinator", "run", *arguments)
    service = Service("lone", command, folder, url, ready=lambda: is_healthy(f"{url}/healthz"))
    try:
        await service.start()
        yield service
    finally:
        await service.stop()


def _show(figures: Mapping[str, float]) -> None:
    table = Table(title="replicas", title_justify="left", title_style="bold")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.2f}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
