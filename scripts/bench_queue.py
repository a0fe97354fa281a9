"""Measures what the queue does for clients when requests outnumber slots, on a real engine: llama.cpp's server with 2 slots.

Keys: `burst_answered_share`: of a burst of the official SDK without retries. `sdk_default_answered_share`: of 50 streams of the
SDK as it comes. `flood_other_wait_ratio`: the time of one request while another payer has a burst waiting, over its time beside
one other request; a fair queue makes it about 2. `closed_loop_ratio_N`: answers per second of N clients that always have one
request under way, through the market, over those of N such clients at the engine itself; the median of rounds that alternate, so
that what else the machine does falls on both. `closed_loop_refused`: requests of these loops that failed.
`closed_loop_answers_per_s_N`: at the engine itself. `waiting_bytes_per_job`: what the coordinator's resident memory grows by for
each of 10,000 jobs that wait (`--waiting`), in a market of its own. Of fewer jobs, each has a larger share of what is there once.

The node declares that its engine queues, as `tally node init` does for llama.cpp. Engine and market have a core each, if there
are two. `--engine stand-in` takes a mock engine whose answers take a fixed time, where llama.cpp cannot be installed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import openai
import uvloop

from node.engines.kinds import QUEUE_DEPTH
from scripts.relay import llama_cpp, mock, processes, waiting
from scripts.relay.processes import Site
from tallystick.cli.output import note
from tallystick.cli.progress import activity
from tallystick.client.config import ClientConfig
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.routes import CHAT

SLOTS = 2
CLIENTS = (1, 2, 4, 8)
GOALS: dict[str, Callable[[float], bool]] = {
    "burst_answered_share": lambda share: share == 1,
    "sdk_default_answered_share": lambda share: share == 1,
    "flood_other_wait_ratio": lambda ratio: ratio <= 2.5,
    "waiting_bytes_per_job": lambda size: size <= 10_485,
    "closed_loop_ratio": lambda ratio: ratio >= 0.95,
    "closed_loop_refused": lambda number: number == 0,
    "closed_loop_answers_per_s": lambda _rate: True,
}
Ask = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Load:
    """The requests of all cases. `burst_tokens`, `loop_tokens`: the length of an answer, short where many come at once.

    `extra`: members of the body that the SDK has no argument for. `queues`: whether the engine has a queue of its own; else
    clients that ask it directly take turns.
    """

    model: str
    burst_tokens: int
    loop_tokens: int
    extra: dict[str, Any] = field(default_factory=dict)
    queues: bool = True

    def body(self, tokens: int) -> dict[str, Any]:
        """The body of a request for an answer of so many tokens."""
        messages = [{"role": "user", "content": "Count from one to a thousand, in words."}]
        return {"model": self.model, "messages": messages, "stream": True, "max_tokens": tokens, **self.extra}


STAND_IN = Load(mock.MODEL, 16, 16, {"user": "10 0.05"}, queues=False)
"""Ten chunks, half a second in all."""
LLAMA_CPP = Load(llama_cpp.MODEL, 16, 100, {"temperature": 0, "ignore_eos": True})


def _asker(client: openai.AsyncOpenAI, load: Load, tokens: int) -> Ask:
    given = {name: value for name, value in load.body(tokens).items() if name not in load.extra}

    async def ask() -> str:
        stream = await client.chat.completions.create(**given, extra_body=load.extra)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
        if not text:
            raise RuntimeError("an empty answer")
        return text

    return ask


def _client(url: str, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", timeout=600, **options)


async def _answered_share(ask: Ask, number: int) -> float:
    """Returns the share of `number` requests at once that are answered."""
    results = await asyncio.gather(*(ask() for _ in range(number)), return_exceptions=True)
    return sum(not isinstance(result, BaseException) for result in results) / number


async def run_clients(ask: Ask, clients: int, answers: int) -> tuple[float, int]:
    """Has `clients` clients ask until `answers` answers came, each again as soon as it is answered.

    Returns the answers per second and the requests that failed. A client that has nothing left to ask does not count as idle: the
    time ends when there are fewer requests left than clients.
    """
    left, failed, finished = answers + clients - 1, 0, list[float]()

    async def repeat() -> None:
        nonlocal left, failed
        while left > 0:
            left -= 1
            try:
                await ask()
                finished.append(time.monotonic())
            except openai.APIError:
                failed += 1

    began = time.monotonic()
    await asyncio.gather(*(repeat() for _ in range(clients)))
    counted = sorted(finished)[:answers]
    return len(counted) / (counted[-1] - began) if counted else 0.0, failed


def _taking_turns(ask: Ask) -> Ask:
    """Lets at most SLOTS requests at the engine, as its own queue would."""
    slots = asyncio.Semaphore(SLOTS)

    async def in_turn() -> object:
        async with slots:
            return await ask()

    return in_turn


async def _closed_loops(direct: Ask, market: Ask, answers: int, rounds: int) -> dict[str, float]:
    """Compares both in rounds that alternate: direct first, then the market first."""
    figures: dict[str, float] = {"closed_loop_refused": 0}
    for clients in CLIENTS:
        ratios: list[float] = []
        rates: list[float] = []
        for number in range(rounds):
            rate: dict[Ask, float] = {}
            for ask in (direct, market) if number % 2 == 0 else (market, direct):
                rate[ask], failed = await run_clients(ask, clients, answers * min(clients, SLOTS))
                figures["closed_loop_refused"] += failed
            ratios.append(rate[market] / rate[direct])
            rates.append(rate[direct])
        note(f"closed loop, clients {clients}: {[round(ratio, 3) for ratio in ratios]}")
        figures[f"closed_loop_ratio_{clients}"] = median(ratios)
        figures[f"closed_loop_answers_per_s_{clients}"] = median(rates)
    return figures


async def _flood_ratio(site: Site, load: Load, flood: Ask, number: int) -> float:
    """Returns the time of one request of a second payer during a flood, over its time beside one other request of this payer: an
    engine answers faster if it has nothing else to do.
    """
    other = Signer(bytes(31) + b"\x07")
    await processes.fund(site.deployment, other)
    deployment, ledger = site.folder / "deployment.json", site.folder / "other.db"
    config = ClientConfig(coordinator=site.coordinator, ledger_file=ledger, deployment=deployment)
    async with Market.of(config, other) as market:

        async def seconds() -> float:
            began = time.monotonic()
            async with await market.submit(CHAT, load.body(load.burst_tokens)) as job:
                await job.result()
            return time.monotonic() - began

        await seconds()
        alone = min([max(await asyncio.gather(seconds(), seconds())) for _ in range(3)])
        flooding = asyncio.gather(*(flood() for _ in range(number)), return_exceptions=True)
        await asyncio.sleep(1)
        during = await seconds()
        await flooding
    return during / alone


@contextlib.asynccontextmanager
async def _engine(folder: Path, installed: Path | None) -> AsyncIterator[str]:
    if installed is None:
        async with processes.upstream(processes.LOAD) as url:
            yield url
    else:
        async with llama_cpp.server(installed, folder / "engine.log", processes.LOAD) as url:
            yield url


async def _measure(folder: Path, installed: Path | None, options: argparse.Namespace) -> dict[str, float]:
    figures: dict[str, float] = {}
    if options.waiting:
        async with processes.upstream(processes.LOAD) as url:
            figures["waiting_bytes_per_job"] = await waiting.waiting_bytes(folder / "w", url, options.waiting)
    load = STAND_IN if installed is None else LLAMA_CPP
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(_engine(folder, installed))
        depth = QUEUE_DEPTH if load.queues else 0
        market = processes.market(folder / "m", url, model=load.model, slots=SLOTS, queue_depth=depth, core=processes.TESTED)
        site = await stack.enter_async_context(market)
        once = await stack.enter_async_context(_client(site.gateway, max_retries=0))
        usual = await stack.enter_async_context(_client(site.gateway))
        direct = await stack.enter_async_context(_client(url, max_retries=0))
        single = _asker(once, load, load.burst_tokens)
        await single()
        if options.burst:
            figures["burst_answered_share"] = await _answered_share(single, options.burst)
            many = _asker(usual, load, load.burst_tokens)
            figures["sdk_default_answered_share"] = await _answered_share(many, min(options.burst, 50))
            figures["flood_other_wait_ratio"] = await _flood_ratio(site, load, single, min(options.burst, 50))
        alone = _asker(direct, load, load.loop_tokens)
        alone = alone if load.queues else _taking_turns(alone)
        figures |= await _closed_loops(alone, _asker(once, load, load.loop_tokens), options.answers, options.rounds)
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="scripts/bench queue", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--engine", choices=("llama.cpp", "stand-in"), default="llama.cpp", help="the engine behind the node")
    parser.add_argument("--burst", type=int, default=200, metavar="N", help="requests at once; 0 leaves the bursts out")
    parser.add_argument("--waiting", type=int, default=10_000, metavar="N", help="jobs that wait at once; 0 leaves this out")
    parser.add_argument("--answers", type=int, default=8, metavar="N", help="answers a slot in each closed loop")
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="closed loops of each kind, which alternate")
    options = parser.parse_args()
    installed = llama_cpp.install_engine() if options.engine == "llama.cpp" else None
    if options.engine == "llama.cpp" and installed is None:
        print("without llama.cpp: scripts/bench queue --engine stand-in", file=sys.stderr)
        return 1
    processes.pin(os.getpid(), processes.TESTED)
    with tempfile.TemporaryDirectory(prefix="tallystick-bench-") as folder, activity("measuring the queue"):
        figures = uvloop.run(_measure(Path(folder), installed, options))
    if options.json:
        print(json.dumps(figures, indent=2))
        return 0
    for name, value in figures.items():
        met = next(met for prefix, met in GOALS.items() if name.startswith(prefix))
        print(f"{name:<30}{value:>8.3f}  goal {'met' if met(value) else 'missed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
