"""Many processes with one wallet: two gateways and command lines at the same time, killed with SIGKILL during jobs.
TALLYSTICK_PROOF=deep kills some hundred times; TALLYSTICK_KILLS and TALLYSTICK_SEED set the number of rounds and the first seed.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import sqlite3
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from node.engines.demo_answer import MODEL
from node.engines.discover import inspect_engine
from tallystick.chain.deployment import Deployment
from tallystick.chain.escrow import Escrow
from tallystick.chain.rpc import Rpc
from tallystick.cli.local import demo, services
from tallystick.cli.local.processes import ManagedProcess, ProcessGroup, free_port
from tallystick.protocol.messages import Order
from tallystick.protocol.stored import load_signed
from tallystick.runtime.keystore import PASSWORD_FILE_ENV
from tests.e2e.test_sigkill import DEEP, SEED, STREAM_SECONDS, Cluster, _check_job, _check_tabs, _settled, _until

ROUNDS = int(os.environ.get("TALLYSTICK_KILLS", "60" if DEEP else "3"))
GATEWAYS = ("gateway-a", "gateway-b")
TIGHT = 400
"""Base units a day for the workload of that name: a few worst cases."""
PLENTY = 5_000_000
WORDS = " ".join(f"word{number}" for number in range(40))


@dataclass
class SharedWalletCluster(Cluster):
    """A market whose payer runs several processes. `ports`: of the gateways. `turns`: which gateway is asked next. `apart`: the
    second gateway has its own ledger file, as on another machine.
    """

    ports: dict[str, int] = field(default_factory=dict)
    apart: bool = False
    turns: Iterator[str] = field(default_factory=lambda: itertools.cycle(GATEWAYS))

    @property
    def ledger_file(self) -> Path:
        """The payer's ledger file."""
        return self.market.folder / "client" / f"{self.market.signers['payer'].address}.db"

    @property
    def other_ledger_file(self) -> Path:
        """The second gateway's own ledger file."""
        return self.market.folder / "other.db"

    def url(self, gateway: str) -> str:
        """The URL of a gateway."""
        return self.market.url(self.ports[gateway])

    async def start(self, name: str) -> None:
        """Starts a process; the gateways share one config except for the port."""
        if name not in GATEWAYS:
            await super().start(name)
            return
        arguments = ("gateway", "--config", str(self.config), "--wallet", self.market.keystore("payer"))
        url = f"{self.url(name)}/healthz"
        listen, port = ("--port", str(self.ports[name])), self.ports[name]
        if self.apart and name == GATEWAYS[1]:
            other = self.market.folder / "other.toml"
            other.write_text(f'ledger_file = "{self.other_ledger_file}"\n{self.config.read_text()}')
            arguments = ("gateway", "--config", str(other), *arguments[3:])
        self.running[name] = await self.processes.start(
            name, *arguments, *listen, ready=lambda: services.is_healthy(url), port=port
        )

    @property
    def config(self) -> Path:
        """The config of every client; written on first use."""
        file = self.market.folder / "client.toml"
        if not file.exists():
            settings = {
                "coordinator": self.market.url(self.market.ports.coordinator),
                "deployment": str(self.market.folder / "deployment.json"),
                "start_seconds": 10,
            }
            budgets = f'[[budgets]]\nper_day = "{PLENTY / 10**6}"\n[[budgets]]\nlabel = "tight"\nper_day = "{TIGHT / 10**6}"\n'
            file.write_text(services.to_toml(settings) + budgets)
        return file

    async def command_line(self) -> asyncio.subprocess.Process:
        """Runs one `tally chat` with the wallet."""
        arguments = ("chat", WORDS, "--model", MODEL, "--json", "--config", str(self.config))
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tallystick.cli", *arguments, "--wallet", self.market.keystore("payer")),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.processes._environment,
        )

    async def ask(self, gateway: str, key: str, label: str = "", tokens: int = 200) -> tuple[int, bytes]:
        """Sends one streamed chat. Raises httpx.HTTPError if the connection is lost."""
        messages = [{"role": "user", "content": WORDS}]
        body = {"model": MODEL, "messages": messages, "stream": True, "max_tokens": tokens}
        headers = {"idempotency-key": key} | ({"x-tally-options": json.dumps({"label": label})} if label else {})
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            response = await client.post(f"{self.url(gateway)}/v1/chat/completions", json=body, headers=headers)
            return response.status_code, response.content

    async def ask_until_answered(self, key: str, tokens: int = 200) -> None:
        """Asks the gateways in turn with one idempotency key until the whole answer has arrived."""

        async def again() -> bool:
            status, body = await self.ask(next(self.turns), key, tokens=tokens)
            assert status == 200 or b'"retry":true' in body, body
            return b"[DONE]" in body

        await _until(again, f"an answer for {key}")


@asynccontextmanager
async def shared_wallet(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, apart: bool = False
) -> AsyncIterator[SharedWalletCluster]:
    """A market with slow engines and two gateways of one wallet. `apart`: each has its own ledger file."""
    for name in [name for name in os.environ if name.startswith("OPENAI_")]:
        monkeypatch.delenv(name)
    chain_port, coordinator_port, *engines = (free_port(0) for _ in range(4))
    ports = services.Ports(chain_port, coordinator_port, 0, dict(zip(("node-a", "node-b"), engines, strict=True)))
    market = replace(demo.prepare_market(folder), ports=ports)
    environment = {PASSWORD_FILE_ENV: str(folder / "password"), "TALLYSTICK_HOME": str(folder)}
    async with ProcessGroup(folder, environment) as processes:
        await services.start_chain(market, processes)
        await demo.deploy_and_fund(market)
        for port in market.ports.engines.values():
            await services.start_stand_in(market, processes, port)
            slow = {"token_seconds": STREAM_SECONDS / 40}
            async with httpx.AsyncClient(trust_env=False) as client:
                (await client.post(f"{market.url(port)}/demo/behaviour", json=slow)).raise_for_status()
        engine = await inspect_engine(market.url(market.ports.engines["node-a"]))
        running: dict[str, ManagedProcess] = {}
        cluster = SharedWalletCluster(
            market, processes, engine, running, {}, ports=dict(zip(GATEWAYS, (free_port(0), free_port(0)), strict=True))
        )
        cluster.apart = apart
        for name in ("coordinator", "node-a", "node-b", *GATEWAYS):
            await cluster.start(name)
        yield cluster


async def _round(cluster: SharedWalletCluster, seed: int) -> str:
    """Jobs from four processes at once, of which one or two are killed at moments that the seed determines."""
    chance = random.Random(seed)
    keys = [f"seed-{seed}-{number}" for number in range(4)]
    requests = [asyncio.create_task(cluster.ask(GATEWAYS[n % 2], key)) for n, key in enumerate(keys)]
    lines = [await cluster.command_line() for _ in range(2)]
    rows: list[str] = []
    for _ in range(chance.choice((1, 2))):
        victim = chance.choice((*GATEWAYS, 0, 1))
        delay = chance.uniform(0, 1.5 * STREAM_SECONDS) if isinstance(victim, str) else chance.uniform(0.5, 3.5)
        await asyncio.sleep(delay)
        rows.append(f"{victim} after {delay:.2f} s")
        if isinstance(victim, str):
            await cluster.kill(victim)
            await cluster.start(victim)
        else:
            with suppress(ProcessLookupError):
                lines[victim].kill()
    for line in lines:
        out, err = await line.communicate()
        whole = line.returncode == 0 and b'"text"' in out
        assert whole or line.returncode == -9, f"seed {seed}: {(out + err).decode()[-500:]}"
    await asyncio.gather(*requests, return_exceptions=True)
    await asyncio.gather(*map(cluster.ask_until_answered, keys))
    return f"killed {', '.join(rows)}"


async def _all_settled(cluster: SharedWalletCluster) -> bool:
    """Whether the wallet knows the end of all its jobs, and the nodes have delivered all receipts."""
    query = "SELECT 1 FROM open_orders WHERE receipt_id > 0"
    undelivered = [row for name in cluster.market.providers for row in cluster.rows(name, query)]
    return not undelivered and not cluster.rows("payer", "SELECT job FROM orders WHERE job_state IN ('open', 'lost')")


def _check_records(cluster: SharedWalletCluster) -> dict[str, int]:
    """Checks the records of payer and nodes after any kills. Returns the totals by provider."""
    totals = _check_tabs(cluster)
    cost = {job: _check_job(cluster, job.hex()) for (job,) in cluster.rows("payer", "SELECT DISTINCT job FROM orders")}
    assert sum(cost.values()) == sum(totals.values())
    for name, provider in cluster.market.providers.items():
        on_tab = f"tab = (SELECT id FROM tabs WHERE provider = '{provider}')"
        seqs = cluster.rows("payer", f"SELECT seq FROM orders WHERE {on_tab}")
        assert len(set(seqs)) == len(seqs)
        query = f"SELECT order_doc FROM order_docs JOIN orders USING (id) WHERE {on_tab}"
        orders = [load_signed(Order, doc) for (doc,) in cluster.rows("payer", query)]
        ceiling = max((order.message.ceiling for order in orders), default=0)
        highest = cluster.rows(name, "SELECT max(CAST(cumulative AS INTEGER)) FROM tabs")[0][0] or 0
        assert highest <= ceiling
    labels: dict[str, int] = dict(cluster.rows("payer", "SELECT label, sum(cost) FROM spent GROUP BY label"))
    assert sum(labels.values()) == sum(totals.values()) <= PLENTY
    assert labels.get("tight", 0) <= TIGHT
    assert not cluster.rows("payer", "SELECT id FROM evidence")
    return totals


async def _check_chain(cluster: SharedWalletCluster, totals: dict[str, int]) -> None:
    """Checks that the chain pays the sum of the receipts."""
    deployment = Deployment.load(cluster.market.folder / "deployment.json")
    rpc = Rpc(deployment.rpc)
    try:
        await _until(lambda: _settled(cluster, Escrow(rpc, deployment), totals), "settlement on chain")
    finally:
        await rpc.close()


async def _exceed_budget(cluster: SharedWalletCluster) -> None:
    """Sends more jobs at once than their workload's budget allows, to two gateways, of which one is killed."""
    requests = [asyncio.create_task(cluster.ask(GATEWAYS[n % 2], f"tight-{n}", "tight")) for n in range(10)]
    await asyncio.sleep(STREAM_SECONDS / 2)
    await cluster.kill("gateway-a")
    await cluster.start("gateway-a")
    answers = [
        answer for answer in await asyncio.gather(*requests, return_exceptions=True) if not isinstance(answer, BaseException)
    ]
    assert any(status == 402 and b"over_budget" in body for status, body in answers)


@pytest.mark.timeout(1_200 + 60 * ROUNDS)
async def test_many_processes_one_wallet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of one wallet never sign conflicting orders, whichever is killed: nothing is charged twice, tabs are equal on
    both sides, no provider is blocked, budgets hold across processes, and the chain pays the sum.
    """
    async with shared_wallet(tmp_path, monkeypatch) as cluster:
        for seed in range(SEED, SEED + ROUNDS):
            print(seed, await _round(cluster, seed), flush=True)  # noqa: T201 - shown where a test fails, and by the deep run
        await _exceed_budget(cluster)
        await _until(lambda: _all_settled(cluster), "the end of every job")
        await _check_chain(cluster, _check_records(cluster))


def _lose(state: Path) -> None:
    for file in state.parent.glob(f"{state.name}*"):
        file.unlink()


def _totals(cluster: SharedWalletCluster) -> dict[str, int]:
    """The totals of the nodes' tabs."""
    cumulative = "SELECT CAST(cumulative AS INTEGER) FROM tabs"
    return {provider: (cluster.rows(name, cumulative) or [(0,)])[0][0] for name, provider in cluster.market.providers.items()}


def _blocked(state: Path) -> list[Any]:
    with sqlite3.connect(f"file:{state}?mode=ro", uri=True, timeout=60) as database:
        return database.execute("SELECT blocked_reason FROM tabs WHERE blocked_reason != ''").fetchall()


async def test_lost_ledger_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger file deleted after SIGKILL, or while a gateway uses it, blocks no provider and loses no money: the wallet learns
    what it owes from its own signed orders and pays it; from the chain, if the coordinator lost its database too.
    """
    async with shared_wallet(tmp_path, monkeypatch) as cluster:
        for turn in range(2):
            requests = [asyncio.create_task(cluster.ask(GATEWAYS[n % 2], f"before-{turn}-{n}")) for n in range(6)]
            await asyncio.sleep(STREAM_SECONDS)
            for name in GATEWAYS[turn:]:  # in the second turn a gateway continues with the deleted file
                await cluster.kill(name)
            _lose(cluster.ledger_file)
            for name in GATEWAYS[turn:]:
                await cluster.start(name)
            await asyncio.gather(*requests, return_exceptions=True)
            for number in range(4):
                await cluster.ask_until_answered(f"after-{turn}-{number}")
            line = await cluster.command_line()
            out, err = await line.communicate()
            assert b'"text"' in out, (out + err).decode()[-800:]
        await cluster.kill("gateway-a")
        await cluster.start("gateway-a")
        for number in range(4):
            await cluster.ask_until_answered(f"end-{number}")
        await _until(lambda: _all_settled(cluster), "the end of every job")
        assert not _blocked(cluster.ledger_file)
        assert not cluster.rows("payer", "SELECT id FROM evidence")
        totals = _totals(cluster)
        assert sum(totals.values()) > 0
        await _check_chain(cluster, totals)
        for name in (*GATEWAYS, "coordinator"):
            await cluster.kill(name)
        _lose(cluster.ledger_file)
        _lose(cluster.market.folder / "coordinator.db")
        # Nodes know the match log that was in the database.
        await services.start_coordinator(cluster.market, cluster.processes, match_log_lost=True)
        for provider in cluster.market.providers.values():
            await _until(partial(services.has_ask, cluster.market, MODEL, provider), "a node that came back")
        for name in GATEWAYS:
            await cluster.start(name)
        for number in range(4):
            await cluster.ask_until_answered(
                f"from-the-chain-{number}", tokens=4_000 if number % 2 else 200
            )  # more than the old ceilings allow
        assert not _blocked(cluster.ledger_file)
        await _check_chain(cluster, _totals(cluster))


async def test_two_machines_by_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two gateways with one key and a ledger file each: a job that one refuses because of the other's jobs works a little later;
    no provider is blocked, and the chain pays what was done.
    """
    messages: set[str] = set()

    async def persist(cluster: SharedWalletCluster, gateway: str, key: str) -> None:
        async def again() -> bool:
            status, body = await cluster.ask(gateway, key)
            if status != 200:
                assert b'"retry":true' in body, body
                messages.add(json.loads(body)["error"]["message"])
            return b"[DONE]" in body

        await _until(again, f"an answer for {key}")

    async with shared_wallet(tmp_path, monkeypatch, apart=True) as cluster:
        for turn in range(4):
            for name in GATEWAYS:
                await persist(cluster, name, f"alone-{turn}")
        await asyncio.gather(*(persist(cluster, name, f"both-{n}") for n in range(4) for name in GATEWAYS))
        assert all("one ledger file" in text for text in messages)  # the number of refusals is random
        for file in (cluster.ledger_file, cluster.other_ledger_file):
            assert not _blocked(file)
        await _check_chain(cluster, _totals(cluster))
        print(*messages, sep="\n")  # noqa: T201 - shown where the test fails
