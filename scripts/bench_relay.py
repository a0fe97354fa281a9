"""Measures the relay on this machine: direct, through the whole market, the coordinator alone, and LiteLLM's proxy. All cases use
one mock upstream in one run. The measured processes are pinned to one core, load and mock to another, if there are two. Only the
ratios are meaningful. LiteLLM is installed into build/litellm on the first run; with --no-litellm its figures are null.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import uvloop
from rich.console import Console
from rich.table import Table

from scripts.peers import LITELLM, install
from scripts.relay import load, processes
from scripts.relay.load import Latencies, percentile
from tallystick.protocol.eip712 import Signer

STREAMS, CHUNKS = 64, 200

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
    parser.add_argument("--no-litellm", action="store_true", help="leave LiteLLM out")
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    peer = None if options.no_litellm or options.quick else install(*LITELLM)
    os.environ.setdefault("PYTHONHASHSEED", "0")
    processes.pin(os.getpid(), processes.LOAD)
    with tempfile.TemporaryDirectory(prefix="tallystick-bench-") as folder:
        figures = uvloop.run(_measure(Path(folder), size, peer))
    if options.json:
        print(json.dumps({name: None if value is None else round(value, 3) for name, value in figures.items()}, indent=2))
    else:
        _show(figures)
    return 0


async def _measure(folder: Path, size: RunSize, peer: Path | None) -> Figures:
    figures: Figures = {}
    async with processes.upstream() as mock:
        async with processes.market(folder / "market", mock) as site:
            await _whole_path(figures, site, mock, size)
            await _coordinator_alone(figures, site, size)
            figures["rss_mib"] = processes.rss_mib(site.pids["coordinator"])
            figures |= {f"{name}_rss_mib": processes.rss_mib(pid) for name, pid in site.pids.items()}
        await _litellm(figures, folder, mock, peer, size)
    ours, theirs = figures["coordinator_cpu_us_per_job"], figures["litellm_cpu_us_per_request"]
    figures["cpu_ratio"] = theirs / ours if ours and theirs else None
    return figures


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
        async with _cpu(figures, site.pids, f"path_cpu_us_per_job_{at_once}", requests):
            measured = await load.ask(site.gateway, requests=requests, concurrency=at_once)
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
    jobs = load.sign_jobs(total, payer=site.payer, coordinator=info["coordinator"], domain=domain, ask=node.ask)
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


async def _litellm(figures: Figures, folder: Path, mock: str, peer: Path | None, size: RunSize) -> None:
    names = ("litellm_cpu_us_per_request", "litellm_requests_per_s_64", "litellm_rss_mib", "litellm_added_ttft_ms_p50")
    figures |= dict.fromkeys(names)
    if peer is None:
        return
    async with processes.litellm(folder, mock, peer / "litellm") as (url, pid):
        await load.ask(url, requests=20, concurrency=4)
        direct = await load.ask(mock, requests=60, concurrency=1, chunks=4)
        theirs = await load.ask(url, requests=60, concurrency=1, chunks=4)
        _added_latency(figures, "litellm_", direct, theirs)
        async with _cpu(figures, {"x": pid}, "litellm", size.slow):
            measured = await load.ask(url, requests=size.slow, concurrency=64)
        figures["litellm_cpu_us_per_request"] = figures.pop("litellm_x")
        figures["litellm_requests_per_s_64"] = _rate(measured)
        figures["litellm_rss_mib"] = processes.rss_mib(pid)


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
    "coordinator_cpu_us_per_job": "goal ≤ 250, then 120",
    "cpu_ratio": "goal ≥ 40",
    "added_ttft_ms_p50": "goal ≤ 3",
    "chunks_per_s": "goal ≥ 100,000 a core",
}


def _show(figures: Figures) -> None:
    first = [*GOALS, "added_ttft_ms_p99", "rss_mib"]
    table = Table(title="relay", title_justify="left", title_style="bold")
    for column in ("figure", "value", "goal"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for name in [*first, *sorted(figures.keys() - set(first))]:
        value = figures[name]
        table.add_row(name, "not measured" if value is None else f"{value:,.2f}", GOALS.get(name, ""))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
