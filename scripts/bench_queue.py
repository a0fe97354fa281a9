"""Measures what the queue does for clients when requests outnumber slots, on a mock engine whose answers take a fixed time.

Keys: `burst_answered_share`: of a burst of the official SDK without retries. `sdk_default_answered_share`: of 50 streams of the
SDK as it comes, on 2 slots. `flood_other_wait_ratio`: the time of one request while another payer has a burst waiting, over its
time on idle slots; a fair queue makes it about 2. `closed_loop_ratio_N`: answers per second of N clients that always have one
request under way, through the market, over N such clients that take turns at 2 slots of the engine itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import uvloop

from scripts.relay import processes
from scripts.relay.mock import MODEL
from scripts.relay.processes import Site
from tallystick.client.config import ClientConfig
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer

SLOTS = 2
ANSWER = "10 0.05"
"""The mock's answers: ten chunks, half a second in all."""
GOALS: dict[str, Callable[[float], bool]] = {
    "burst_answered_share": lambda share: share == 1,
    "sdk_default_answered_share": lambda share: share == 1,
    "flood_other_wait_ratio": lambda ratio: ratio <= 2.5,
    "closed_loop_ratio": lambda ratio: ratio >= 0.95,
}
Ask = Callable[[], Awaitable[object]]


def _asker(client: openai.AsyncOpenAI) -> Ask:
    async def ask() -> str:
        messages: Any = [{"role": "user", "content": "Count."}]
        stream = await client.chat.completions.create(model=MODEL, messages=messages, stream=True, user=ANSWER, max_tokens=16)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    return ask


def _client(url: str, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", timeout=600, **options)


async def _answered_share(ask: Ask, number: int) -> float:
    """Returns the share of `number` requests at once that are answered."""
    results = await asyncio.gather(*(ask() for _ in range(number)), return_exceptions=True)
    return sum(not isinstance(result, BaseException) for result in results) / number


async def _answers_per_second(ask: Ask, clients: int, seconds: float) -> float:
    """Returns the rate of `clients` clients, each of which asks again as soon as it is answered."""
    answers, end = 0, time.monotonic() + seconds

    async def repeat() -> None:
        nonlocal answers
        while time.monotonic() < end:
            await ask()
            answers += 1

    began = time.monotonic()
    await asyncio.gather(*(repeat() for _ in range(clients)))
    return answers / (time.monotonic() - began)


def _taking_turns(ask: Ask) -> Ask:
    """Lets at most SLOTS requests at the engine, as its own queue would."""
    slots = asyncio.Semaphore(SLOTS)

    async def in_turn() -> object:
        async with slots:
            return await ask()

    return in_turn


async def _flood_ratio(site: Site, folder: Path, flood: Ask, number: int) -> float:
    """Returns the time of one request of a second payer during a flood, over its time alone."""
    other = Signer(bytes(31) + b"\x07")
    await processes.fund(site, other)
    config = ClientConfig(
        coordinator=site.coordinator, ledger_file=folder / "other.db", deployment=folder / "m" / "deployment.json"
    )
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Count."}], "stream": True, "user": ANSWER, "max_tokens": 16}
    async with Market.of(config, other) as market:

        async def seconds() -> float:
            began = time.monotonic()
            async with await market.submit("/v1/chat/completions", body) as job:
                await job.result()
            return time.monotonic() - began

        await seconds()
        alone = min([await seconds() for _ in range(3)])
        flooding = asyncio.gather(*(flood() for _ in range(number)), return_exceptions=True)
        await asyncio.sleep(1)
        during = await seconds()
        await flooding
    return during / alone


async def _measure(folder: Path, burst: int, loop_seconds: float) -> dict[str, float]:
    figures: dict[str, float] = {}
    async with contextlib.AsyncExitStack() as stack:
        mock = await stack.enter_async_context(processes.upstream())
        site = await stack.enter_async_context(processes.market(folder / "m", mock, slots=SLOTS))
        single = await stack.enter_async_context(_client(site.gateway, max_retries=0))
        usual = await stack.enter_async_context(_client(site.gateway))
        direct = await stack.enter_async_context(_client(mock, max_retries=0))
        await _asker(single)()
        figures["burst_answered_share"] = await _answered_share(_asker(single), burst)
        figures["sdk_default_answered_share"] = await _answered_share(_asker(usual), min(burst, 50))
        figures["flood_other_wait_ratio"] = await _flood_ratio(site, folder, _asker(single), min(burst, 50))
        for clients in (1, 2, 4, 8):
            through = await _answers_per_second(_asker(single), clients, loop_seconds)
            engine = await _answers_per_second(_taking_turns(_asker(direct)), clients, loop_seconds)
            figures[f"closed_loop_ratio_{clients}"] = through / engine
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="scripts/bench queue", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--burst", type=int, default=200, metavar="N", help="requests at once")
    parser.add_argument("--loop-seconds", type=float, default=10, metavar="S", help="time of each closed loop")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tallystick-bench-") as folder:
        figures = uvloop.run(_measure(Path(folder), options.burst, options.loop_seconds))
    if options.json:
        print(json.dumps(figures, indent=2))
        return 0
    for name, value in figures.items():
        met = next(met for prefix, met in GOALS.items() if name.startswith(prefix))
        print(f"{name:<30}{value:>8.3f}  goal {'met' if met(value) else 'missed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
