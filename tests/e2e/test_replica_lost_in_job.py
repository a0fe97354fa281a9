"""A replica of a real coordinator is killed while jobs run whose answers have not begun."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.local_cluster import Cluster, cluster, postgres_binary
from tallystick.cli.local.services import get_json
from tests.contracts.freshness import check_freshness

DEADLINE = 240
JOBS = 4


def _installed() -> bool:
    with contextlib.suppress(RuntimeError):
        return bool(postgres_binary("initdb"))
    return False


pytestmark = pytest.mark.skipif(not _installed(), reason="needs PostgreSQL's programs (apt-get install postgresql)")


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not await condition():  # noqa: ASYNC110 - other processes, which report nothing
            await asyncio.sleep(0.1)


async def _ask(running: Cluster, http: httpx.AsyncClient, number: int) -> httpx.Response:
    """Sends a request. Each second one is streamed, and those from the third on have idempotency keys."""
    body = {"model": running.model, "messages": [{"role": "user", "content": f"Hello {number}"}], "stream": number % 2 == 1}
    headers = {"idempotency-key": f"key-{number}"} if number >= 2 else {}
    return await http.post(f"{running.gateway}/chat/completions", json=body, headers=headers)


async def _behave(running: Cluster, http: httpx.AsyncClient, **simulation: Any) -> int:
    """Sets how slow the engines are. Returns how many requests they have seen."""
    seen = 0
    for engine in ("engine-a", "engine-b"):
        answer = await http.post(f"{running[engine].url}/demo/behaviour", json=simulation)
        seen += answer.json()["seen"]
    return seen


async def _have_seen(running: Cluster, http: httpx.AsyncClient, count: int) -> bool:
    answers = [await http.get(f"{running[engine].url}/demo/behaviour") for engine in ("engine-a", "engine-b")]
    return bool(sum(answer.json()["seen"] for answer in answers) >= count)


async def _whole(running: Cluster) -> bool:
    """Whether each replica lists all of them, and both nodes are connected to it."""
    for name in running.replicas:
        health = await get_json(f"{running[name].url}/healthz") or {}
        if len(await running.listed(name)) != len(running.replicas) or health.get("nodes") != 2:
            return False
    return True


async def _busy(running: Cluster, http: httpx.AsyncClient) -> str:
    """The replica with the payer's jobs."""
    counts = {}
    for name in running.replicas:
        lines = (await http.get(f"{running[name].url}/metrics")).text.splitlines()
        jobs = (float(line.split()[1]) for line in lines if line.startswith("tallystick_coordinator_jobs_total{"))
        counts[name] = sum(jobs)
    return max(counts, key=lambda name: counts[name])


async def test_jobs_whose_answers_had_not_begun(tmp_path: Path) -> None:
    """They are answered by the other replica, streamed or not, without an error that a caller would see. Each is paid once, also
    if its request is sent again with its key.
    """
    check_freshness()
    async with (
        cluster(tmp_path, replicas=2) as running,
        httpx.AsyncClient(timeout=DEADLINE, trust_env=False) as http,
        asyncio.timeout(2 * DEADLINE),
    ):
        await _until(lambda: _whole(running))
        assert (await _ask(running, http, 0)).status_code == 200
        before = await _behave(running, http, first_token_seconds=600.0)
        asking = [asyncio.create_task(_ask(running, http, number)) for number in range(JOBS)]
        await _until(lambda: _have_seen(running, http, before + JOBS))
        await _behave(running, http)
        running[await _busy(running, http)].kill()
        for number, answer in enumerate(await asyncio.gather(*asking)):
            assert answer.status_code == 200, answer.text
            assert "error" not in answer.json() if number % 2 == 0 else answer.text.rstrip().endswith("[DONE]")
        await _until(lambda: _whole(running))  # the one that was killed is back
        for number in range(JOBS):
            assert (await _ask(running, http, number)).status_code == 200
        jobs = _charges(running)
        assert len(jobs) == len(set(jobs)) == 1 + JOBS + 2  # the last two requests without a key were new ones


def _charges(running: Cluster) -> list[bytes]:
    """The jobs that the nodes charge for, one entry for each receipt."""
    jobs: list[bytes] = []
    for node in ("node-a", "node-b"):
        (file,) = (running.folder / node).glob("*.db")
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=60)) as database:
            query = "SELECT o.job FROM receipts r JOIN orders o ON o.id = r.order_id WHERE r.cost > 0"
            jobs += [job for (job,) in database.execute(query)]
    return jobs


async def test_a_replica_that_was_paused_while_others_ended_its_jobs(tmp_path: Path) -> None:
    """It comes back and relays the answers to their ends. Each caller gets one answer, and pays for it once."""
    check_freshness()
    async with (
        cluster(tmp_path, replicas=2) as running,
        httpx.AsyncClient(timeout=DEADLINE, trust_env=False) as http,
        asyncio.timeout(2 * DEADLINE),
    ):
        await _until(lambda: _whole(running))
        assert (await _ask(running, http, 0)).status_code == 200
        before = await _behave(running, http, token_seconds=1.5)
        asking = [asyncio.create_task(_ask(running, http, number)) for number in range(JOBS)]
        await _until(lambda: _have_seen(running, http, before + JOBS))
        busy = await _busy(running, http)
        others = [running[name].log for name in running.replicas if name != busy]
        running[busy].kill(signal.SIGSTOP)

        async def has_ended_jobs() -> bool:
            return any("jobs of a lost replica ended" in log.read_text() for log in others)

        await _until(has_ended_jobs)
        await _behave(running, http)
        running[busy].kill(signal.SIGCONT)
        for number, answer in enumerate(await asyncio.gather(*asking)):
            assert answer.status_code == 200, answer.text
            assert "error" not in answer.json() if number % 2 == 0 else answer.text.rstrip().endswith("[DONE]")
        await _until(lambda: _whole(running))
        assert (await _ask(running, http, 0)).status_code == 200
        jobs = _charges(running)
        assert len(jobs) == len(set(jobs)) == JOBS + 2
