"""Runs the market with cheaters: real engines, real nodes, and one client's jobs at each provider, whose answers are scored."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts import peers
from scripts.relay import llama_cpp, processes
from scripts.trust import cheaters
from scripts.trust.cheaters import Cheat
from scripts.trust.engine import ServedEngine
from scripts.trust.observations import Observation
from tallystick.cli.output import note
from tallystick.cli.progress import activity
from tallystick.client.config import ClientConfig
from tallystick.client.sdk.market import Market
from tallystick.protocol.routes import CHAT
from tallystick.protocol.types import Address

GGUF = ("gguf", ("gguf==0.19.0", "numpy==2.4.6"))
MODEL = llama_cpp.MODEL
PRECISION = "f16"
TEMPERATURE = 0.7
OUTPUT_TOKENS = 64
SUBJECTS = (
    *("how rain forms", "why the sky is blue", "how a bicycle stays upright", "how bread is made", "what makes a good leader"),
    *("how to sleep better", "how to learn the guitar", "what a virus is", "how tides work", "why leaves turn red in autumn"),
    *("the history of paper", "how a lock works", "how bees make honey", "what an echo is", "how to pack for a week of camping"),
)
REQUESTS = ("Explain {}.", "Write a short text about {}.", "Give three facts about {}.", "Tell a child {}.", "Summarise {}.")


@dataclass(frozen=True, slots=True)
class Plan:
    """Which providers there are, and how many jobs each gets."""

    providers: tuple[str, ...]
    jobs: int


SMALL = Plan(("honest_a", "honest_b", "q4_0", "hidden_prompt", "prefill"), 4)
FULL = Plan(
    (
        *("honest_a", "honest_b", "q8_0", "q4_0", "other_model", "hidden_prompt", "temperature", "prefill", "replay", "cut"),
        "padded",
    ),
    16,
)
_OWN_SERVERS = {"honest_b": "f16", "q8_0": "q8_0", "q4_0": "q4_0", "other_model": "pruned"}
"""Providers that have a server of their own, and the variant that it serves."""
SECOND_SERVER = frozenset({"honest_b", "temperature", "cut", "padded"})
"""Providers before the second of the two servers in 16 bits. A referee is the other one, so that it is a process of its own."""


def make_variants(engine: Path) -> Path | None:
    """Makes the variants of the model once. Returns their folder; None, with the reason on stderr, if that fails."""
    folder = peers.BUILD / "trust-models"
    if (folder / "pruned.gguf").exists():
        return folder
    commands = peers.install(*GGUF)
    if commands is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    note(f"making variants of {MODEL} in {folder} (once) …")
    script = Path(__file__).with_name("gguf_variants.py")
    source = engine / llama_cpp.MODEL_FILE
    with activity("making variants of the model"):
        done = subprocess.run([commands / "python", script, source, folder], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"the variants cannot be made: {done.stderr[-500:]}", file=sys.stderr)
        return None
    return folder


async def observe(engine: Path, models: Path, folder: Path, plan: Plan) -> dict[str, list[Observation]]:
    """Runs the market, and returns what was observed of each provider."""
    async with contextlib.AsyncExitStack() as stack:
        wanted = {"f16": "f16", **{name: file for name, file in _OWN_SERVERS.items() if name in plan.providers}}
        if "prefill" in plan.providers:
            wanted.setdefault("other_model", "pruned")
        urls = {}
        for number, (name, file) in enumerate(wanted.items()):
            core = processes.CORES[number % len(processes.CORES)]
            server = llama_cpp.server(engine, folder / f"engine-{name}.log", core, models / f"{file}.gguf")
            urls[name] = await stack.enter_async_context(server)
        engines = {name: await stack.enter_async_context(ServedEngine.at(url, MODEL)) for name, url in urls.items()}
        addresses = {"honest_a": urls["f16"]} | {name: urls[name] for name in _OWN_SERVERS if name in plan.providers}
        for name, cheat in _cheats(engines).items():
            if name in plan.providers:
                addresses[name] = await stack.enter_async_context(cheaters.served(cheat, MODEL))
        spec = f'[engines.spec]\nprecision = "{PRECISION}"\n'
        market = processes.market(folder / "market", addresses["honest_a"], model=MODEL, slots=llama_cpp.SLOTS, engine_table=spec)
        site = await stack.enter_async_context(market)
        providers = {"honest_a": processes.provider_of(site, "node")}
        for name in plan.providers[1:]:
            providers[name] = await processes.add_node(
                site, name, addresses[name], model=MODEL, slots=llama_cpp.SLOTS, engine_table=spec
            )
        client = await stack.enter_async_context(_client(site))
        second = engines.get("honest_b", engines["f16"])
        referees = {name: engines["f16"] if name in SECOND_SERVER else second for name in plan.providers}
        return await _ask_all(client, providers, referees, plan)


def _cheats(engines: Mapping[str, ServedEngine]) -> dict[str, Cheat]:
    right, second = engines["f16"], engines.get("honest_b", engines["f16"])
    cheats = {
        "hidden_prompt": cheaters.hidden_prompt(right),
        "temperature": cheaters.colder(second),
        "replay": cheaters.replay(right),
        "cut": cheaters.cut(second),
        "padded": cheaters.padded(second),
    }
    if "other_model" in engines:
        cheats["prefill"] = cheaters.prefill(right, engines["other_model"])
    return cheats


@contextlib.asynccontextmanager
async def _client(site: processes.Site) -> AsyncIterator[Market]:
    config = ClientConfig(
        coordinator=site.coordinator,
        deployment=site.folder / "deployment.json",
        use_deployment_rpc=True,
        ledger_file=site.folder / "client.db",
    )
    async with Market.of(config, site.payer) as market:
        yield market


async def _ask_all(
    client: Market, providers: Mapping[str, Address], referees: Mapping[str, ServedEngine], plan: Plan
) -> dict[str, list[Observation]]:
    observed: dict[str, list[Observation]] = {name: [] for name in plan.providers}
    bodies = make_requests(plan.jobs)
    with activity("asking each provider", len(bodies)) as shown:
        for body in bodies:
            asked = [_observe(client, name, providers[name], body, referees[name]) for name in plan.providers]
            for observation in await asyncio.gather(*asked):
                if observation is not None:
                    observed[observation.provider].append(observation)
            shown.advance()
    return observed


def make_requests(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Chats, of which no two are alike as long as there are subjects."""
    draws = random.Random(seed)
    pairs = [(request, subject) for request in REQUESTS for subject in SUBJECTS]
    chosen = draws.sample(pairs, count) if count <= len(pairs) else draws.choices(pairs, k=count)
    sampling = {"temperature": TEMPERATURE, "top_p": 1, "top_k": 0, "min_p": 0, "max_tokens": OUTPUT_TOKENS}
    return [
        {"model": MODEL, "messages": [{"role": "user", "content": request.format(subject)}], **sampling}
        for request, subject in chosen
    ]


async def _observe(
    client: Market, name: str, provider: Address, body: Mapping[str, Any], referee: ServedEngine
) -> Observation | None:
    """One job at one provider, and the scores of all positions of its answer; None if it came without evidence."""
    job = await client.submit(CHAT, body, pin=(provider,))
    result = await job.result()
    if result.receipt is None or not job.evidence:
        print(f"{name}: an answer came without evidence", file=sys.stderr)
        return None
    receipt = result.receipt.message
    document = json.loads(result.body)
    tokens = [row.token for row in job.evidence]
    scores = await referee.score(body, tokens, range(len(tokens) + 1))
    ended = document["choices"][0]["finish_reason"] == "stop"
    return Observation(name, body, job.evidence, scores, receipt.input_tokens + receipt.output_tokens, ended)


def by_provider(observations: Sequence[Observation]) -> dict[str, list[Observation]]:
    """Observations by their provider."""
    observed: dict[str, list[Observation]] = {}
    for observation in observations:
        observed.setdefault(observation.provider, []).append(observation)
    return observed
