"""Measures how much of the prompts comes from the engines' caches, on a replayed load of conversations against real llama.cpp.

Several nodes at the same price stand before a llama.cpp server each, with SmolLM2-135M-Instruct. Conversations of several turns,
whose answers were written before, are replayed through two gateways of one wallet that take turns, several conversations at a
time. Keys: `cached_share_affinity`: cached tokens over prompt tokens, as the engines count them, if client and coordinator choose
the provider. `cached_share_round_robin`, `cached_share_least_loaded`: if the load names the next provider in turn, or one of
those with the fewest requests under way. `cached_share_possible`: if each prompt found all that its conversation sent before,
by length of text. `seconds_POLICY`: the time of the whole load. Each policy has conversations of its own, so that none finds what
another left in a cache.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvloop

from scripts.relay import llama_cpp, processes
from tallystick.cli.output import note
from tallystick.cli.progress import activity
from tallystick.protocol.routes import CHAT
from tallystick.protocol.types import Address

WORDS = "the a tally stick is split notched and kept by both sides so that each half proves what was owed paid or lent in silver"
SYSTEM_WORDS, QUESTION_WORDS, ANSWER_WORDS = 120, 40, 40
OUTPUT_TOKENS = 8
POLICIES = ("affinity", "round_robin", "least_loaded")

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Size:
    """How much is replayed: conversations of so many turns, so many at a time, on so many nodes."""

    conversations: int
    turns: int
    at_once: int
    nodes: int


@dataclass
class Usage:
    """What the engines counted."""

    prompt: int = 0
    cached: int = 0
    requests_by_provider: Counter[str] = field(default_factory=Counter)


def write_conversation(seed: str, turns: int) -> list[list[Message]]:
    """The messages of each turn: those of the turn before, a recorded answer, and a question. Equal seeds give equal texts."""
    draw = random.Random(seed)
    words = WORDS.split()

    def text(number: int) -> str:
        return " ".join(draw.choices(words, k=number))

    messages = [{"role": "system", "content": f"{seed}: {text(SYSTEM_WORDS)}"}]
    sent: list[list[Message]] = []
    for _ in range(turns):
        messages = [*messages, {"role": "user", "content": text(QUESTION_WORDS)}]
        sent.append(messages)
        messages = [*messages, {"role": "assistant", "content": text(ANSWER_WORDS)}]
    return sent


class Policy:
    """Chooses the provider of each request; None leaves the choice to the market."""

    def __init__(self, name: str, providers: list[Address]) -> None:
        self._name, self._providers, self._sent = name, providers, 0
        self._draw = random.Random(1)
        self.under_way: Counter[Address] = Counter()

    def choose(self) -> Address | None:
        """The provider of the next request."""
        if self._name == "affinity":
            return None
        if self._name == "round_robin":
            self._sent += 1
            return self._providers[self._sent % len(self._providers)]
        fewest = min(self.under_way[provider] for provider in self._providers)
        return self._draw.choice([provider for provider in self._providers if self.under_way[provider] == fewest])


async def _replay(name: str, size: Size, providers: list[Address], gateways: list[httpx.AsyncClient]) -> Usage:
    policy, usage, slots = Policy(name, providers), Usage(), asyncio.Semaphore(size.at_once)

    async def converse(number: int) -> None:
        for turn, messages in enumerate(write_conversation(f"{name} {number}", size.turns)):
            async with slots:
                await _ask(gateways[(number + turn) % len(gateways)], messages, policy, usage)

    await asyncio.gather(*map(converse, range(size.conversations)))
    return usage


async def _ask(gateway: httpx.AsyncClient, messages: list[Message], policy: Policy, usage: Usage) -> None:
    provider = policy.choose()
    headers = {} if provider is None else {"x-tally-options": json.dumps({"pin": [provider]})}
    body: dict[str, Any] = {"model": llama_cpp.MODEL, "messages": messages, "max_tokens": OUTPUT_TOKENS, "temperature": 0}
    if provider is not None:
        policy.under_way[provider] += 1
    try:
        answer = await gateway.post(CHAT, json=body, headers=headers)
        answer.raise_for_status()
    finally:
        if provider is not None:
            policy.under_way[provider] -= 1
    counted = answer.json()["usage"]
    usage.prompt += counted["prompt_tokens"]
    usage.cached += counted["prompt_tokens_details"]["cached_tokens"]
    usage.requests_by_provider[answer.headers["x-tally-provider"]] += 1


def possible_share(size: Size) -> float:
    """The share of all prompts that their conversations sent before, by length of text."""
    whole = before = 0
    for number in range(size.conversations):
        turns = write_conversation(f"possible {number}", size.turns)
        lengths = [sum(len(message["content"]) for message in messages) for messages in turns]
        whole += sum(lengths)
        before += sum(lengths[:-1])
    return before / whole


async def _measure(engine: Path, folder: Path, size: Size) -> dict[str, float]:
    figures: dict[str, float] = {}
    async with contextlib.AsyncExitStack() as stack:
        cores = [processes.CORES[number % len(processes.CORES)] for number in range(size.nodes)]
        servers = [llama_cpp.server(engine, folder / f"engine{number}.log", core) for number, core in enumerate(cores)]
        engines = [await stack.enter_async_context(server) for server in servers]
        slots = llama_cpp.SLOTS
        market = processes.market(folder / "m", engines[0], model=llama_cpp.MODEL, slots=slots)
        site = await stack.enter_async_context(market)
        added = [
            await processes.add_node(site, f"node{n}", engines[n], model=llama_cpp.MODEL, slots=slots)
            for n in range(1, size.nodes)
        ]
        providers = [processes.provider_of(site, "node"), *added]
        urls = (site.gateway, await processes.add_gateway(site, "gateway2"))
        gateways = [
            await stack.enter_async_context(httpx.AsyncClient(base_url=url, trust_env=False, timeout=600)) for url in urls
        ]
        for policy in POLICIES:
            began = time.monotonic()
            with activity(f"replaying conversations, policy {policy}"):
                usage = await _replay(policy, size, providers, gateways)
            figures[f"cached_share_{policy}"] = usage.cached / usage.prompt
            figures[f"seconds_{policy}"] = time.monotonic() - began
            note(f"{policy} {dict(usage.requests_by_provider)} {usage.prompt} {usage.cached}")
    return figures | {"cached_share_possible": possible_share(size)}


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="scripts/bench affinity", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--conversations", type=int, default=12, metavar="N", help="conversations of each policy")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="requests of a conversation")
    parser.add_argument("--at-once", type=int, default=4, metavar="N", help="requests under way at a time")
    parser.add_argument("--nodes", type=int, default=3, metavar="N", help="nodes, each with an engine of 2 slots")
    options = parser.parse_args()
    engine = llama_cpp.install_engine()
    if engine is None:
        return 1
    size = Size(options.conversations, options.turns, options.at_once, options.nodes)
    with tempfile.TemporaryDirectory(prefix="tallystick-bench-") as folder:
        figures = uvloop.run(_measure(engine, Path(folder), size))
    figures = {name: round(value, 3) for name, value in figures.items()}
    if options.json:
        print(json.dumps(figures, indent=2))
        return 0
    for name, value in figures.items():
        print(f"{name:<28}{value:>8.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
