"""Measures one coordinator under a crowd: connected nodes with many asks, open streams, and floods of strangers.

`rss_mib`: its resident memory with all nodes connected, all their asks listed and all streams open. `honest_p99_ratio_FLOOD`: the
p99 of an honest client's jobs during a flood, over that without it, in rounds that alternate within this run.

`coordinator_core_share_of_FLOOD`: CPU seconds that the flood cost the coordinator, per second; unlike the latencies, it does not
depend on what else the machine does.

All limits are those of the default settings: nodes, streams and strangers have addresses of their own out of 127.0.0.0/8.
Coordinator and load have a core each, if there are two. A flood is a process of low priority on the core of the load, so the
ratio includes some of what the flood takes from the clients. The floods' rates are in scripts/crowd/floods.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
import uvloop

from scripts.crowd.floods import Purse, write_submissions
from scripts.relay import processes
from scripts.relay.load import EnginelessNode, percentile, sign_jobs
from scripts.relay.processes import Site
from tallystick.cli.progress import activity
from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.http_client import CoordinatorClient
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import TallyError
from tallystick.protocol.wire import Candidate, FrameReader, Kind, Submission

FLOODS = ("connections", "bad_signatures", "unfunded_orders", "slow_readers", "slow_senders")
NODES_PER_ADDRESS, STREAMS_PER_ADDRESS, STREAMS_PER_PAYER = 60, 200, 200
JOIN_AT_ONCE, ASKS_PER_SECOND = 20, 90
READY_SECONDS = 600.0
RSS_GOAL_MIB, RATIO_GOAL = 150, 2


@dataclass(frozen=True, slots=True)
class Size:
    """How much to run. `rounds`: of each flood. `jobs`: honest ones of a round, `rate` a second.

    `opened`: streams that are opened at once.
    """

    nodes: int
    models: int
    streams: int
    rounds: int
    jobs: int
    rate: float
    opened: int = 1_000

    @property
    def seconds(self) -> float:
        """How long a round takes at least."""
        return self.jobs / self.rate


FULL, QUICK = Size(1_000, 10, 1_000, 3, 200, 25.0), Size(20, 3, 10, 1, 10, 25.0)


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="scripts/bench load", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="a small crowd: shows that it runs, measures little")
    parser.add_argument("--flood", action="append", choices=FLOODS, help="only this flood; may be repeated")
    parser.add_argument("--no-floods", action="store_true", help="measure the memory only")
    parser.add_argument("--opened", type=int, default=FULL.opened, help="streams that are opened at once (all by default)")
    options = parser.parse_args()
    size = replace(QUICK if options.quick else FULL, opened=options.opened)
    floods = () if options.no_floods else options.flood or FLOODS
    processes.pin(os.getpid(), processes.LOAD)
    with tempfile.TemporaryDirectory(prefix="tallystick-bench-") as folder:
        figures = uvloop.run(_measure(Path(folder), size, floods))
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        for name, value in figures.items():
            print(f"{name:36} {value}")
    return 0


Figures = dict[str, object]


@dataclass(slots=True)
class Crowd:
    """The nodes and streams, and who is measured."""

    site: Site
    size: Size
    nodes: list[EnginelessNode] = field(default_factory=list)
    honest: EnginelessNode | None = None
    signed: int = 0
    """Jobs that were signed for the honest node."""
    failed: int = 0
    """Honest jobs that had no answer."""
    _serving: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def port(self) -> int:
        """The coordinator's."""
        return int(self.site.coordinator.rpartition(":")[2])

    async def join(self, source: str, *models: str) -> EnginelessNode:
        """Connects a node from an address and lets it serve."""
        domain = self.site.deployment.domain
        node = await EnginelessNode.join(
            self.site.coordinator, Signer(secrets.token_bytes(32)), domain, models=models, source=source
        )
        self._serving.append(asyncio.create_task(node.run()))
        return node

    async def close(self) -> None:
        """Disconnects all nodes."""
        for serving in self._serving:
            serving.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def sign(self, count: int, payer: Signer, node: EnginelessNode, first: int = 0) -> list[bytes]:
        """Signs jobs of a payer for a node."""
        coordinator = processes.provider_of(self.site, "coordinator")
        return sign_jobs(
            count, payer=payer, coordinator=coordinator, domain=self.site.deployment.domain, ask=node.ask, first=first
        )


async def _measure(folder: Path, size: Size, floods: Sequence[str]) -> Figures:
    async with (
        processes.upstream(processes.LOAD) as mock,
        processes.market(folder / "market", mock, core=processes.TESTED) as site,
        _crowd(site, size) as crowd,
    ):
        pid = site.pids["coordinator"]
        figures: Figures = {"rss_mib_start": round(processes.rss_mib(pid), 1)}
        with activity(f"connecting {size.nodes} nodes"):
            await _join_nodes(crowd)
            asks = await _count_asks(crowd)
        figures |= {"nodes": len(crowd.nodes), "asks": asks, "rss_mib_asks": round(processes.rss_mib(pid), 1)}
        async with _open_streams(crowd) as streams:
            figures |= {"streams": streams, "rss_mib": round(processes.rss_mib(pid), 1), "rss_mib_goal": RSS_GOAL_MIB}
            await _honest(crowd, 20)  # warms up
            for number, flood in enumerate(floods, 1):
                with activity(f"flood {number} of {len(floods)}: {flood}"):
                    figures |= await _flood(crowd, flood, folder)
            figures["honest_failed"] = crowd.failed
            figures["rss_mib_after_floods"] = round(processes.rss_mib(pid), 1)
    return figures


@contextlib.asynccontextmanager
async def _crowd(site: Site, size: Size) -> AsyncIterator[Crowd]:
    crowd = Crowd(site, size)
    try:
        crowd.honest = await crowd.join("127.0.0.1", "honest")
        yield crowd
    finally:
        await crowd.close()


async def _join_nodes(crowd: Crowd) -> None:
    """Connects the nodes, a few at once, each address at the rate at which a coordinator checks its asks."""
    models = [f"model-{number}" for number in range(crowd.size.models)]
    gate = asyncio.Semaphore(JOIN_AT_ONCE)

    async def join(number: int) -> EnginelessNode:
        async with gate:
            return await crowd.join(f"127.0.1.{1 + number // NODES_PER_ADDRESS}", *models)

    crowd.nodes = await asyncio.gather(*(join(number) for number in range(crowd.size.nodes)))


async def _count_asks(crowd: Crowd) -> int:
    """The asks of the crowd that the coordinator lists."""
    url = crowd.site.coordinator
    async with CoordinatorClient(url, ClientConfig(coordinator=url, request_seconds=READY_SECONDS)) as client:
        return sum([len(await client.asks(f"model-{number}")) for number in range(crowd.size.models)])


@contextlib.asynccontextmanager
async def _open_streams(crowd: Crowd) -> AsyncIterator[int]:
    """Opens streams, one at each node, by HTTP; yields their number once each has its first chunk."""
    size, released = crowd.size, asyncio.Event()
    payers = [Signer(secrets.token_bytes(32)) for _ in range(-(-size.streams // STREAMS_PER_PAYER))]
    for payer in payers:
        await processes.fund(crowd.site.deployment, payer)
    begun, gate = list[asyncio.Future[None]](), asyncio.Semaphore(size.opened)
    reading = list[asyncio.Task[None]]()
    async with contextlib.AsyncExitStack() as stack:
        sessions = [
            await stack.enter_async_context(
                aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(limit=0, local_addr=(f"127.0.2.{1 + number}", 0)),
                    timeout=aiohttp.ClientTimeout(total=None),
                )
            )
            for number in range(-(-size.streams // STREAMS_PER_ADDRESS))
        ]
        for number in range(size.streams):
            node = crowd.nodes[number % len(crowd.nodes)]
            node.holding = released
            payer = payers[number // STREAMS_PER_PAYER]
            [body] = await crowd.sign(1, payer, node, number // len(crowd.nodes))
            begun.append(asyncio.get_running_loop().create_future())
            session = sessions[number // STREAMS_PER_ADDRESS]
            reading.append(asyncio.create_task(_read_stream(session, crowd.site.coordinator, body, begun[-1], gate)))
        async with asyncio.timeout(READY_SECONDS):
            await asyncio.gather(*begun)
        yield len(begun)
        released.set()
        async with asyncio.timeout(READY_SECONDS):
            await asyncio.gather(*reading)


async def _read_stream(
    session: aiohttp.ClientSession, url: str, body: bytes, begun: asyncio.Future[None], gate: asyncio.Semaphore
) -> None:
    await gate.acquire()
    begun.add_done_callback(lambda _: gate.release())
    frames, last, status = FrameReader(), Kind.BEAT, 503
    while status == 503:  # the chain is slow if all ask for their purses at once
        async with session.post(f"{url}/v1/jobs", data=body) as response:
            status = response.status
            if status != 200:
                text = await response.text()
                await asyncio.sleep(1)
                continue
            async for piece in response.content.iter_any():
                for kind, _ in frames.feed(piece):
                    last = kind
                    if kind is Kind.CHUNK and not begun.done():
                        begun.set_result(None)
    if status != 200:
        begun.set_exception(RuntimeError(f"a stream was refused: {status} {text}"))
    elif last is not Kind.RECEIPT:
        raise RuntimeError(f"a stream ended with {last.name}")


async def _honest(crowd: Crowd, count: int) -> list[float]:
    """The seconds of honest jobs, which begin at a steady rate however long they take."""
    node, seconds = crowd.honest, list[float]()
    if node is None:
        raise RuntimeError("the honest node is not connected")
    jobs = await crowd.sign(count, crowd.site.payer, node, crowd.signed)
    crowd.signed += count
    url = crowd.site.coordinator
    async with CoordinatorClient(url, ClientConfig(coordinator=url)) as client:

        async def run(job: bytes, at: float) -> None:
            await asyncio.sleep(at - time.perf_counter())
            last = Kind.BEAT
            try:
                stream = await client.submit(job)
                while last not in {Kind.RECEIPT, Kind.FAIL}:
                    last = (await stream.read())[-1][0]
                stream.close()
            except TallyError:
                last = Kind.FAIL
            if last is not Kind.RECEIPT:
                crowd.failed += 1
                return
            seconds.append(time.perf_counter() - at)

        begin = time.perf_counter() + 0.1
        await asyncio.gather(*(run(job, begin + number / crowd.size.rate) for number, job in enumerate(jobs)))
    return seconds


async def _flood(crowd: Crowd, name: str, folder: Path) -> Figures:
    """The p99 of honest jobs in rounds without and with a flood, and what became of the flood."""
    calm, flooded, seen, size = list[float](), list[float](), dict[str, int](), crowd.size
    pid = crowd.site.pids["coordinator"]
    calm_cpu = flooded_cpu = 0.0
    for number in range(size.rounds):
        before = processes.cpu_seconds(pid)
        calm += await _honest(crowd, size.jobs)
        calm_cpu += processes.cpu_seconds(pid) - before
        file = folder / f"{name}-{number}"
        await _prepare(crowd, name, file)
        command = (sys.executable, "-m", "scripts.crowd.floods", name, str(crowd.port), str(size.seconds + 2), str(file))
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        processes.pin(process.pid, processes.LOAD)
        async with asyncio.timeout(READY_SECONDS):
            await process.stdout.readline()  # type: ignore[union-attr]  # it is a pipe
        before = processes.cpu_seconds(pid)
        flooded += await _honest(crowd, size.jobs)
        flooded_cpu += processes.cpu_seconds(pid) - before
        output, _ = await process.communicate()
        for key, count in json.loads(output).items():
            seen[key] = seen.get(key, 0) + count
    p99 = percentile(calm, 0.99), percentile(flooded, 0.99)
    return {
        f"honest_p99_ms_without_{name}": round(p99[0] * 1_000, 2),
        f"honest_p99_ms_{name}": round(p99[1] * 1_000, 2),
        f"honest_p99_ratio_{name}": round(p99[1] / p99[0], 2),
        f"honest_p50_ratio_{name}": round(percentile(flooded, 0.5) / percentile(calm, 0.5), 2),
        f"flood_{name}": seen,
        f"coordinator_cpu_ms_per_honest_job_without_{name}": round(1_000 * calm_cpu / (size.rounds * size.jobs), 2),
        f"coordinator_core_share_of_{name}": round((flooded_cpu - calm_cpu) / (size.rounds * size.seconds), 3),
    }


async def _prepare(crowd: Crowd, flood: str, file: Path) -> None:
    """Writes what a flood needs for one round: forged orders, orders of empty purses, or the purse of one who will not read."""
    if flood in {"bad_signatures", "unfunded_orders"}:
        node, count = crowd.nodes[0], int(100 * crowd.size.seconds) + 100
        if flood == "unfunded_orders":
            write_submissions(file, [(await crowd.sign(1, Signer(secrets.token_bytes(32)), node))[0] for _ in range(count)])
        else:
            write_submissions(file, [_forged(body) for body in await crowd.sign(count, crowd.site.payer, node)])
    elif flood == "slow_readers":
        secret = secrets.token_bytes(32)
        await processes.fund(crowd.site.deployment, Signer(secret))
        site = crowd.site
        purse = Purse(
            site.coordinator, processes.provider_of(site, "coordinator"), str(site.folder / "deployment.json"), secret.hex()
        )
        purse.save(file)
    else:
        write_submissions(file, [])


def _forged(body: bytes) -> bytes:
    """The submission with one bit of its signature changed."""
    submission = Submission.loads(body)
    candidate = submission.candidates[0]
    signature = bytearray(candidate.order.signature)
    signature[10] ^= 1
    order = replace(candidate.order, signature=bytes(signature))
    return replace(submission, candidates=(Candidate(order, candidate.terms, candidate.wrapped_key),)).dumps()


if __name__ == "__main__":
    sys.exit(main())
