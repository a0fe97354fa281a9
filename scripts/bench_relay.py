"""Measures the relay on this machine: direct, through the whole market, the coordinator alone, LiteLLM's proxy and SGLang's
router. All cases use one mock upstream in one run, except the added time of a short answer, which needs a real llama.cpp server.
The measured processes are pinned to one core, load and upstreams to another, if there are two. Only the ratios are meaningful.
Peers and engine are installed into build/ on the first run. Figures are null with --no-peers, and where one cannot be installed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sqlite3
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import uvloop
from rich.console import Console
from rich.table import Table

from scripts.peers import LITELLM, SGLANG_ROUTER, install
from scripts.relay import llama_cpp, load, processes
from scripts.relay.load import Latencies, percentile
from tallystick.cli.progress import activity
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.token_evidence import TOP
from tallystick.protocol.types import Address, Amount

STREAMS, CHUNKS = 64, 200
SHORT_TOKENS, SHORT_ROUNDS = 16, 10
ROOMS = ("coordinator", "node", "gateway")

Figures = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class RunSize:
    """How much to run: requests per case, requests of the slow peer, signed jobs, probes of the first token."""

    requests: int
    slow: int
    jobs: int
    probes: int
    streams: int


FULL, QUICK = RunSize(4_000, 400, 8_000, 300, STREAMS), RunSize(60, 0, 200, 20, 4)


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="scripts/bench relay", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--quick", action="store_true", help="a few requests of each kind: shows that it runs, measures little")
    parser.add_argument("--no-peers", action="store_true", help="leave LiteLLM, SGLang's router and llama.cpp out")
    parser.add_argument(
        "--soak", type=int, default=0, metavar="JOBS", help="run so many jobs more, then measure memory and files"
    )
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    peers = Peers() if options.no_peers or options.quick else Peers.installed()
    os.environ.setdefault("PYTHONHASHSEED", "0")
    processes.pin(os.getpid(), processes.LOAD)
    with tempfile.TemporaryDirectory(prefix="tallystick-bench-") as folder, activity("measuring the relay"):
        figures = uvloop.run(_measure(Path(folder), size, peers, options.soak))
    if options.json:
        print(json.dumps({name: None if value is None else round(value, 3) for name, value in figures.items()}, indent=2))
    else:
        _show(figures)
    return 0


@dataclass(frozen=True, slots=True)
class Peers:
    """Folders of the programs that the market is compared with; None for one that is left out."""

    litellm: Path | None = None
    sglang_router: Path | None = None
    llama_cpp: Path | None = None

    @classmethod
    def installed(cls) -> Peers:
        """Installs those that can be installed here."""
        return cls(install(*LITELLM), install(*SGLANG_ROUTER), llama_cpp.install_engine())


async def _measure(folder: Path, size: RunSize, peers: Peers, soak: int) -> Figures:
    figures: Figures = {}
    async with processes.upstream(processes.LOAD) as mock:
        async with processes.market(folder / "market", mock, core=processes.TESTED) as site:
            figures |= {f"rss_mib_start_{room}": processes.rss_mib(site.pids[room]) for room in ROOMS}
            await _whole_path(figures, site, mock, size)
            await _coordinator_alone(figures, site, size)
            if soak:
                await processes.reserve(site, "node", Amount(processes.PURSE // 2))
                await load.ask(site.gateway, requests=soak, concurrency=64)
                figures |= {f"disk_mib_{room}": _database_bytes(site, room) / 2**20 for room in ROOMS}
            figures["rss_mib"] = processes.rss_mib(site.pids["coordinator"])
            figures |= {f"rss_mib_{room}": processes.rss_mib(site.pids[room]) for room in ROOMS}
        await _peer(figures, "litellm", processes.litellm(folder, mock, peers.litellm) if peers.litellm else None, mock, size)
        router = processes.sglang_router(folder, mock, peers.sglang_router) if peers.sglang_router else None
        await _peer(figures, "sglang", router, mock, size)
    await _short_answers(figures, folder, peers.llama_cpp)
    _ratios(figures)
    return figures


def _ratios(figures: Figures) -> None:
    """Adds what is compared with a peer of the same run."""

    def ratio(name: str, above: str, below: str) -> None:
        over, under = figures[above], figures[below]
        figures[name] = over / under if over and under else None

    figures["path_cpu_us_per_job"] = sum(figures[f"path_cpu_us_per_job_64_{room}"] or 0 for room in ROOMS)
    ratio("path_cpu_ratio", "litellm_cpu_us_per_request", "path_cpu_us_per_job")
    ratio("cpu_ratio", "litellm_cpu_us_per_request", "coordinator_cpu_us_per_job")
    ratio("path_rate_ratio", "path_requests_per_s_64", "litellm_requests_per_s_64")
    ratio("ttft_ratio", "added_ttft_ms_p50", "litellm_added_ttft_ms_p50")
    ratio("sglang_cpu_ratio", "coordinator_cpu_us_per_job", "sglang_cpu_us_per_request")


# ------------------------------------------------------------------------------------------------------------------ cases


async def _whole_path(figures: Figures, site: processes.Site, mock: str, size: RunSize) -> None:
    """Measures direct requests and requests through gateway, coordinator and node in turns, so that noise affects both."""
    for url in (mock, site.gateway):
        await load.ask(url, requests=20, concurrency=4)
        await load.ask(url, requests=8, concurrency=4, chunks=4)
    direct, ours = Latencies(), Latencies()
    for _ in range(size.probes // 20):
        direct.first += (await load.ask(mock, requests=20, concurrency=1, chunks=4)).first
        ours.first += (await load.ask(site.gateway, requests=20, concurrency=1, chunks=4)).first
    _added_latency(figures, "", direct, ours)
    for at_once in (1, 16, 64):
        requests = size.requests // 4 if at_once == 1 else size.requests
        figures[f"direct_requests_per_s_{at_once}"] = _rate(await load.ask(mock, requests=requests, concurrency=at_once))
        before = {room: (processes.written(site.pids[room]), _database_bytes(site, room)) for room in ROOMS}
        async with _cpu(figures, site.pids, f"path_cpu_us_per_job_{at_once}", requests):
            measured = await load.ask(site.gateway, requests=requests, concurrency=at_once)
        for room, (written, size_before) in before.items():  # the last round, of 64 at once, remains
            now = processes.written(site.pids[room])
            figures[f"written_bytes_per_job_{room}"] = (now.bytes - written.bytes) / requests
            figures[f"write_calls_per_job_{room}"] = (now.calls - written.calls) / requests
            figures[f"disk_bytes_per_job_{room}"] = (_database_bytes(site, room) - size_before) / requests
        figures[f"path_requests_per_s_{at_once}"] = _rate(measured)
        figures[f"path_ms_p50_{at_once}"] = percentile(measured.whole, 0.5) * 1_000
    for name, gap in (("flat_out", 0.0), ("paced", 0.02)):
        streams = size.streams * (2 if gap == 0 else 1)
        async with _cpu(figures, site.pids, f"path_stream_cpu_us_per_chunk_{name}", streams * CHUNKS):
            measured = await load.ask(site.gateway, requests=streams, concurrency=size.streams, chunks=CHUNKS, gap=gap)
        figures[f"path_chunks_per_s_{name}"] = measured.chunks / measured.seconds
        figures[f"path_stream_seconds_{name}"] = percentile(measured.whole, 0.5)


async def _coordinator_alone(figures: Figures, site: processes.Site, size: RunSize) -> None:
    """Posts signed jobs to the job route, with a bare node behind it; every process but the coordinator is load."""
    provider, domain = Signer(os.urandom(32)), site.deployment.domain
    node = await load.EnginelessNode.join(site.coordinator, provider, domain)
    serving = asyncio.create_task(node.run())
    info = await _get(f"{site.coordinator}/v1/info")
    total = size.jobs // 4 + size.jobs * 2 + size.streams * 3
    jobs = load.sign_jobs(total, payer=site.payer, coordinator=Address(info["coordinator"]), domain=domain, ask=node.ask)
    pids = {"coordinator": site.pids["coordinator"]}
    try:
        for at_once in (1, 16, 64):
            count = size.jobs // 4 if at_once == 1 else size.jobs
            part, jobs = jobs[:count], jobs[count:]
            async with _cpu(figures, pids, f"alone_cpu_us_per_job_{at_once}", count):
                measured = await load.post(site.coordinator, part, concurrency=at_once)
            figures[f"alone_jobs_per_s_{at_once}"] = _rate(measured)
            figures[f"alone_ms_p50_{at_once}"] = percentile(measured.whole, 0.5) * 1_000
        figures["coordinator_cpu_us_per_job"] = figures["alone_cpu_us_per_job_64_coordinator"]
        node.chunks = CHUNKS
        async with _cpu(figures, pids, "alone_cpu_us_per_chunk", len(jobs) * CHUNKS):
            measured = await load.post(site.coordinator, jobs, concurrency=size.streams)
        figures["chunks_per_s"] = 1e6 / max(figures["alone_cpu_us_per_chunk_coordinator"] or 0, 0.1)
        figures["alone_chunks_per_s"] = measured.chunks / measured.seconds
    finally:
        serving.cancel()


async def _peer(
    figures: Figures, name: str, peer: contextlib.AbstractAsyncContextManager[tuple[str, int]] | None, mock: str, size: RunSize
) -> None:
    names = (f"{name}_cpu_us_per_request", f"{name}_requests_per_s_64", f"{name}_rss_mib", f"{name}_added_ttft_ms_p50")
    figures |= dict.fromkeys(names)
    if peer is None:
        return
    async with peer as (url, pid):
        await load.ask(url, requests=20, concurrency=4)
        direct = await load.ask(mock, requests=60, concurrency=1, chunks=4)
        theirs = await load.ask(url, requests=60, concurrency=1, chunks=4)
        _added_latency(figures, f"{name}_", direct, theirs)
        async with _cpu(figures, {"x": pid}, name, size.slow):
            measured = await load.ask(url, requests=size.slow, concurrency=64)
        figures[f"{name}_cpu_us_per_request"] = figures.pop(f"{name}_x")
        figures[f"{name}_requests_per_s_64"] = _rate(measured)
        figures[f"{name}_rss_mib"] = processes.rss_mib(pid)


async def _short_answers(figures: Figures, folder: Path, engine: Path | None) -> None:
    """Measures the time that the market adds to a whole short answer of a real engine, one request in flight.

    A node asks for log-probabilities, so that answers can be audited: `evidence_ms_whole` is the time that the engine itself
    takes longer for that, and is a part of `added_ms_whole`.
    """
    figures["added_ms_whole"] = figures["evidence_ms_whole"] = None
    if engine is None:
        return
    async with (
        llama_cpp.server(engine, folder / "llama.log", processes.LOAD) as url,
        processes.market(folder / "short", url, model=llama_cpp.MODEL, slots=llama_cpp.SLOTS, core=processes.TESTED) as site,
    ):
        options = {"model": llama_cpp.MODEL, "max_tokens": SHORT_TOKENS, "temperature": 0}
        evidence = options | {"logprobs": True, "top_logprobs": TOP}
        cases = {"direct": (url, options), "evidence": (url, evidence), "ours": (site.gateway, options)}
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for number in range(SHORT_ROUNDS + 1):
            for name, (base, asked) in cases.items():
                measured = await load.ask(base, requests=10, concurrency=1, options=asked)
                if number:  # the first round warms up
                    seconds[name] += measured.whole
        middle = {name: percentile(values, 0.5) * 1_000 for name, values in seconds.items()}
        figures["added_ms_whole"] = middle["ours"] - middle["direct"]
        figures["evidence_ms_whole"] = middle["evidence"] - middle["direct"]


_DATABASES = {"coordinator": "coordinator.db", "node": "node/*.db", "gateway": "client/*.db"}


def _database_bytes(site: processes.Site, room: str) -> int:
    """Bytes of the pages in use of a process's databases, with those that are still in the write-ahead log."""
    total = 0
    for file in site.folder.glob(_DATABASES[room]):
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
            pages, free, size = (
                database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
            )
        total += (pages - free) * size
    return total


def _added_latency(figures: Figures, prefix: str, direct: Latencies, ours: Latencies) -> None:
    """The time that a path adds to the first text, in milliseconds."""
    for share in (0.5, 0.99):
        added = percentile(ours.first, share) - percentile(direct.first, share)
        figures[f"{prefix}added_ttft_ms_p{share * 100:g}"] = added * 1_000


@contextlib.asynccontextmanager
async def _cpu(figures: Figures, pids: Mapping[str, int], name: str, units: int) -> AsyncIterator[None]:
    """Records the CPU time per unit of each process while the block runs, in microseconds."""
    before = {room: processes.cpu_seconds(pid) for room, pid in pids.items()}
    yield
    for room, pid in pids.items():
        figures[f"{name}_{room}"] = (processes.cpu_seconds(pid) - before[room]) * 1e6 / units


def _rate(times: Latencies) -> float:
    return len(times.whole) / times.seconds


async def _get(url: str) -> dict[str, str]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        found: dict[str, str] = await response.json()
        return found


# ----------------------------------------------------------------------------------------------------------------- output

GOALS = {
    "path_cpu_ratio": "goal ≥ 6",
    "cpu_ratio": "goal ≥ 40",
    "path_rate_ratio": "goal ≥ 5",
    "ttft_ratio": "goal ≤ 0.25",
    "added_ms_whole": "goal ≤ 4",
    "chunks_per_s": "goal ≥ 200,000 a core",
    "sglang_cpu_ratio": "goal ≤ 2",
    **{f"written_bytes_per_job_{room}": "goal ≤ 6,000" for room in ROOMS},
    **{f"write_calls_per_job_{room}": "goal ≤ 10" for room in ROOMS},
    **{f"disk_bytes_per_job_{room}": "goal ≤ 1,000" for room in ROOMS},
    **{f"path_stream_cpu_us_per_chunk_flat_out_{room}": "goal ≤ 6" for room in ("node", "gateway")},
    **{f"rss_mib_{room}": "goal ≤ 110" for room in ROOMS},
}


def _show(figures: Figures) -> None:
    first = [*GOALS, "added_ttft_ms_p50", "added_ttft_ms_p99"]
    table = Table(title="relay", title_justify="left", title_style="bold")
    for column in ("figure", "value", "goal"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for name in [*first, *sorted(figures.keys() - set(first))]:
        value = figures[name]
        table.add_row(name, "not measured" if value is None else f"{value:,.2f}", GOALS.get(name, ""))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
