"""A coordinator of two replicas with real PostgreSQL, NATS, chain, nodes and gateway, of which each part is lost in turn."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from scripts.local_cluster import Cluster, cluster, postgres_binary
from tallystick.cli.local.services import get_json
from tests.contracts.freshness import check_freshness

DEADLINE = 240
REQUEST_SECONDS = 120


def _installed() -> bool:
    with contextlib.suppress(RuntimeError):
        return bool(postgres_binary("initdb"))
    return False


pytestmark = pytest.mark.skipif(not _installed(), reason="needs PostgreSQL's programs (apt-get install postgresql)")


class Shopper:
    """A client of the gateway that asks one question after another, and keeps the errors."""

    def __init__(self, running: Cluster) -> None:
        self._running = running
        self.answers, self.errors = 0, list[str]()
        self.served = asyncio.Event()

    async def ask(self) -> httpx.Response:
        """Asks one question."""
        body = {"model": self._running.model, "messages": [{"role": "user", "content": "Hello"}]}
        async with httpx.AsyncClient(timeout=REQUEST_SECONDS, trust_env=False) as client:
            return await client.post(f"{self._running.gateway}/chat/completions", json=body)

    async def run(self) -> None:
        """Asks until cancelled."""
        while True:
            answer = await self.ask()
            if answer.status_code == 200:
                self.answers += 1
            else:
                self.errors.append(answer.text)
            self.served.set()
            await asyncio.sleep(0.05)

    async def more(self, count: int) -> None:
        """Waits for so many further answers."""
        wanted = self.answers + count
        async with asyncio.timeout(DEADLINE):
            while self.answers < wanted:
                self.served.clear()
                await self.served.wait()


@contextlib.asynccontextmanager
async def _shopping(running: Cluster) -> AsyncIterator[Shopper]:
    shopper = Shopper(running)
    shopping = asyncio.create_task(shopper.run())
    try:
        yield shopper
    finally:
        shopping.cancel()
        await asyncio.gather(shopping, return_exceptions=True)


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def _jobs_of(running: Cluster, name: str) -> int:
    async with httpx.AsyncClient(timeout=REQUEST_SECONDS, trust_env=False) as client:
        metrics = (await client.get(f"{running[name].url}/metrics")).text
    counts = [line.split()[1] for line in metrics.splitlines() if line.startswith("tallystick_coordinator_jobs_total{")]
    return int(sum(map(float, counts)))


async def _whole(running: Cluster) -> bool:
    """Whether each replica lists all of them, and all nodes are connected to it."""
    for name in running.replicas:
        health = await get_json(f"{running[name].url}/healthz") or {}
        if len(await running.listed(name)) != len(running.replicas) or health.get("nodes") != 2:
            return False
    return True


async def _busy(running: Cluster) -> str:
    """The replica that gets the payer's jobs."""
    counts = [(await _jobs_of(running, name), name) for name in running.replicas]
    assert min(count for count, _ in counts) == 0, "all jobs of a payer go to one replica"
    return max(counts)[1]


async def test_each_part_is_lost_in_turn(tmp_path: Path) -> None:
    """A restarted replica costs no client a request, nor does NATS; a killed one costs at most the answer that it was relaying.
    PostgreSQL costs requests only while it is away, and no process but its own. Each comes back by itself.
    """
    check_freshness()
    async with cluster(tmp_path, replicas=2) as running:
        await _until(lambda: _whole(running))
        async with _shopping(running) as shopper:
            await shopper.more(3)
            busy = await _busy(running)
            await _lose(running, busy, signal.SIGKILL, shopper)
            assert len(shopper.errors) <= 1
            assert all("the stream from the coordinator broke" in error for error in shopper.errors)
            shopper.errors.clear()
            await _lose(running, busy, signal.SIGTERM, shopper)
            assert shopper.errors == []
            await running["nats"].stop()
            await shopper.more(5)
            await running["nats"].start()
            await shopper.more(1)
            assert shopper.errors == []
            await running["postgres"].stop()
            await running["postgres"].start()
            await shopper.more(3)
        await _until(lambda: _whole(running))
        assert [running[name].starts for name in running.replicas] == [3 if name == busy else 1 for name in running.replicas]


async def _lose(running: Cluster, name: str, number: signal.Signals, shopper: Shopper) -> None:
    """Ends a replica, which is started again, and waits until all is as before. Jobs go on meanwhile."""
    before = running[name].starts
    running[name].kill(number)
    await shopper.more(5)
    await _until(lambda: _started_since(running, name, before))
    await _until(lambda: _whole(running))
    await shopper.more(3)


async def _started_since(running: Cluster, name: str, before: int) -> bool:
    return running[name].starts > before and await running[name].ready()
