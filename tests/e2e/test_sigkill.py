"""SIGKILL of every process of the market during paid jobs, by seed: nothing is lost, and nothing is paid twice.
TALLYSTICK_PROOF=deep kills some hundred times; TALLYSTICK_KILLS and TALLYSTICK_SEED set the number of kills and the first seed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.domain.log_check import LogReplay
from coordinator.storage.job_codec import load_job
from node.engines.demo_answer import MODEL
from node.engines.discover import inspect_engine
from tallystick.chain.deployment import Deployment
from tallystick.chain.escrow import Escrow
from tallystick.chain.rpc import Rpc
from tallystick.cli.local import demo, services
from tallystick.cli.local.processes import ManagedProcess, ProcessGroup
from tallystick.protocol.access import dump_access
from tallystick.protocol.messages import Access, Receipt
from tallystick.protocol.stored import load_signed
from tallystick.protocol.types import Hash

DEEP = os.environ.get("TALLYSTICK_PROOF") == "deep"
KILLS = int(os.environ.get("TALLYSTICK_KILLS", "200" if DEEP else "6"))
SEED = int(os.environ.get("TALLYSTICK_SEED", "1"))
TIMEOUT_SECONDS = 180
TERMINAL = {"completed", "cancelled", "failed", "expired", "disputed"}
VICTIMS = ("gateway", "coordinator", "node-a", "node-b")
STREAM_SECONDS = 0.8
"""How long an answer takes at least; kills come from before its order to after its end."""


@dataclass
class Cluster:
    """The market's processes, and how to restart each."""

    market: services.LocalMarket
    processes: ProcessGroup
    engine: Any
    running: dict[str, ManagedProcess]
    options: dict[str, Any]
    """Options of all requests."""

    async def start(self, name: str) -> None:
        """Starts a process, as its operator would."""
        before = len(self.processes._running)
        if name == "gateway":
            await demo.start_gateway(self.market, self.processes)
        elif name == "coordinator":
            await services.start_coordinator(self.market, self.processes)
        else:
            await services.start_node(self.market, self.processes, name, self.engine)
        self.running[name] = self.processes._running[before]

    async def kill(self, name: str) -> None:
        """Sends SIGKILL to a process."""
        process = self.running[name].process
        process.kill()
        await process.wait()

    def rows(self, name: str, query: str) -> list[tuple[Any, ...]]:
        """Rows of a party's database."""
        folder = self.market.folder
        payer = self.market.signers["payer"].address
        files = {"payer": folder / "client" / f"{payer}.db", "coordinator": folder / "coordinator.db"}
        file = files.get(name) or next((folder / name).glob("*.db"))
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=60)) as database:
            return database.execute(query).fetchall()


async def _until(ready: Callable[[], Any], condition: str) -> Any:
    """Repeats a request until it succeeds; a process may be down meanwhile."""
    value: object = None
    for _ in range(TIMEOUT_SECONDS * 10):
        with suppress(httpx.HTTPError, sqlite3.OperationalError):
            value = await ready()
            if value:
                return value
        await asyncio.sleep(0.1)
    pytest.fail(f"{condition}: not within {TIMEOUT_SECONDS} s; last seen {value}")


async def _ask(cluster: Cluster, key: str) -> tuple[int, bytes]:
    """Sends one streamed chat. Raises httpx.HTTPError if the connection is lost."""
    words = " ".join(f"word{number}" for number in range(40))
    body = {"model": MODEL, "messages": [{"role": "user", "content": words}], "stream": True, "max_tokens": 200}
    url = f"{cluster.market.url(cluster.market.ports.gateway)}/v1/chat/completions"
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        headers = {"idempotency-key": key, "x-tally-options": json.dumps(cluster.options)}
        response = await client.post(url, json=body, headers=headers)
        return response.status_code, response.content


async def _repeat(cluster: Cluster, key: str) -> tuple[int, bytes] | None:
    """Repeats a request with its idempotency key. Returns None if the answer says to retry."""
    status, body = await _ask(cluster, key)
    return None if status in (502, 503, 504) and b'"retry":true' in body else (status, body)


def _access_token(cluster: Cluster) -> str:
    """The header value that proves to the coordinator that the payer asks."""
    deployment, payer = Deployment.load(cluster.market.deployment), cluster.market.signers["payer"]
    coordinator = cluster.market.signers["coordinator"].address
    access = Access(account=payer.address, coordinator=coordinator, issued_at=int(time.time()))
    return dump_access(payer.sign(access, deployment.domain))


async def _ended(cluster: Cluster, job: str) -> str | None:
    """Waits until payer and coordinator know the job's end, and returns it."""
    market = cluster.market
    async with httpx.AsyncClient(timeout=120, trust_env=False) as client:
        payer_record = (await client.get(f"{market.url(market.ports.gateway)}/tally/jobs/{job}")).json()
        response = await client.get(
            f"{market.url(market.ports.coordinator)}/v1/jobs/{job}", headers={"authorization": _access_token(cluster)}
        )
    coordinator_record = response.json()
    rows = [row for name in market.providers for row in cluster.rows(name, "SELECT 1 FROM open_orders WHERE receipt_id > 0")]
    if payer_record.get("state") not in TERMINAL or rows:
        return None
    if response.status_code == 404:
        return str(payer_record["state"])
    return str(coordinator_record["state"]) if coordinator_record["state"] in TERMINAL else None


def _check_job(cluster: Cluster, job: str) -> int:
    """Checks that providers' and payer's records charge the same for a job. Returns base units."""
    charged = [
        cost
        for name in cluster.market.providers
        for (cost,) in cluster.rows(
            name, f"SELECT r.cost FROM receipts r JOIN orders o ON o.id = r.order_id WHERE o.job = x'{job}'"
        )
    ]
    paid = cluster.rows("payer", f"SELECT r.receipt_doc FROM receipts r JOIN orders o ON o.receipt = r.id WHERE o.job = x'{job}'")
    assert sum(cost > 0 for cost in charged) <= 1, f"job {job} is charged twice: {charged}"
    costs = [load_signed(Receipt, doc).message.cost for (doc,) in paid]
    assert sum(cost > 0 for cost in costs) <= 1, f"job {job} is recorded twice: {costs}"
    return sum(charged)


def _check_tabs(cluster: Cluster) -> dict[str, int]:
    """Checks that the running totals of both sides are equal. Returns them by provider."""
    totals: dict[str, int] = {}
    for name, provider in cluster.market.providers.items():
        provider_totals = cluster.rows(name, "SELECT CAST(cumulative AS INTEGER) FROM tabs")
        payer_total = cluster.rows("payer", f"SELECT total FROM tabs WHERE provider = '{provider}'")
        totals[provider] = provider_totals[0][0] if provider_totals else 0
        assert (payer_total[0][0] if payer_total else 0) == totals[provider], f"the tab with {name} differs"
        assert not cluster.rows("payer", "SELECT blocked_reason FROM tabs WHERE blocked_reason != ''")
    return totals


def _check_match_log(cluster: Cluster) -> None:
    """Checks that the match log replays without a fault, and that neither payer nor node has evidence against it."""
    replay = LogReplay()
    rows = cluster.rows("coordinator", "SELECT number, hashes, leaf FROM match_log ORDER BY number")
    assert [number for number, _, _ in rows] == list(range(len(rows)))
    assert [fault for _, hashes, leaf in rows for fault in replay.add(Hash(hashes[:32]), leaf)] == []
    assert replay.matches
    assert not list(cluster.market.folder.rglob("evidence-*.json"))


async def _kill_during_a_job(cluster: Cluster, seed: int) -> str:
    """One job, one kill at a moment that the seed determines, one restart, and the same request again with its key."""
    chance = random.Random(seed)
    victim, delay, key = chance.choice(VICTIMS), chance.uniform(0, 2.2 * STREAM_SECONDS), f"seed-{seed}"
    first = asyncio.create_task(_ask(cluster, key))
    await asyncio.sleep(delay)
    await cluster.kill(victim)
    await cluster.start(victim)
    arrived = b""
    with suppress(httpx.HTTPError):
        _, arrived = await asyncio.wait_for(first, TIMEOUT_SECONDS)
    status, body = await _until(lambda: _repeat(cluster, key), f"seed {seed}: an answer after {victim} was killed")
    jobs = cluster.rows("payer", f"SELECT job FROM keys WHERE key = '{key}'")
    if not jobs:
        assert status >= 400, f"seed {seed}: an answer without a job"
        return f"{victim} at {delay:.2f} s: never admitted"
    job = jobs[0][0]
    state = await _until(lambda: _ended(cluster, job), f"seed {seed}: the end of {job} after {victim} was killed")
    cost = _check_job(cluster, job)
    whole = status == 200 and b"[DONE]" in body
    assert not whole or cost > 0
    if b"[DONE]" in arrived:
        assert whole, f"seed {seed}: an answer that had arrived could not be had again after {victim} was killed: {body[-300:]!r}"
    if victim == "gateway":
        assert whole, f"seed {seed}: the answer was lost with the gateway: {status} {body[-300:]!r}"
    return f"{victim} at {delay:.2f} s: {state}, {'whole' if whole else status}, {cost}"


async def _settled(cluster: Cluster, escrow: Escrow, totals: dict[str, int]) -> bool:
    payer = cluster.market.signers["payer"].address
    tabs = [await escrow.tab(payer, provider) for provider in cluster.market.providers.values()]
    return sum(int(tab.settled) for tab in tabs) == sum(totals.values())


HEDGED = {"hedge_after": 0.1}


@pytest.mark.timeout(1_200 + 60 * KILLS)
@pytest.mark.parametrize("options", [{}, HEDGED], ids=["one provider", "hedged"])
async def test_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """After any kill the job ends on all sides and is charged at most once and as its receipt says; tabs are equal, the next job
    works, and the chain pays the sum of the receipts.
    """
    for name in [name for name in os.environ if name.startswith("OPENAI_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TALLY_COORDINATOR_HEDGE_SHARE", "1")
    market = demo.prepare_market(tmp_path)
    async with ProcessGroup(tmp_path, services.environment(tmp_path)) as processes:
        await services.start_chain(market, processes)
        deployment = await demo.deploy_and_fund(market)
        for port in market.ports.engines.values():
            await services.start_stand_in(market, processes, port)
            slow = {"token_seconds": STREAM_SECONDS / 40, "first_token_seconds": 0.5 if options else 0}
            async with httpx.AsyncClient(trust_env=False) as client:
                (await client.post(f"{market.url(port)}/demo/behaviour", json=slow)).raise_for_status()
        cluster = Cluster(market, processes, await inspect_engine(market.url(market.ports.engines["node-a"])), {}, options)
        for name in ("coordinator", "node-a", "node-b", "gateway"):
            await cluster.start(name)
        for seed in range(SEED, SEED + KILLS):
            print(seed, await _kill_during_a_job(cluster, seed), flush=True)  # noqa: T201 - shown where a test fails, and by the deep run
        status, body = await _until(lambda: _repeat(cluster, "the next job"), "the next job")
        assert (status, b"[DONE]" in body) == (200, True)
        if options:
            stored = [load_job(doc).record for (doc,) in cluster.rows("coordinator", "SELECT doc FROM jobs")]
            hedged = [attempt for record in stored for attempt in record.attempts if attempt.hedged]
            assert hedged, "no job ran at two providers"
        rpc = Rpc(deployment.rpc)
        try:
            totals = _check_tabs(cluster)
            _check_match_log(cluster)
            await _until(lambda: _settled(cluster, Escrow(rpc, deployment), totals), "settlement on chain")
        finally:
            await rpc.close()
