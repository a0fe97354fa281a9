"""SIGKILL of the gateway while a batch runs, in a real market: every line has one result, and none is paid for twice."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from node.engines.demo_answer import MODEL
from node.engines.discover import inspect_engine
from tallystick.cli.local import demo, services
from tallystick.cli.local.processes import ProcessGroup
from tests.e2e.test_sigkill import Cluster

LINES = 60
KILLS = 3
ENDED = {"completed", "failed", "expired", "cancelled"}


def _input() -> bytes:
    lines = []
    for number in range(LINES):
        body = {"model": MODEL, "messages": [{"role": "user", "content": f"line {number}"}], "max_tokens": 100}
        lines.append(json.dumps({"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}))
    return "\n".join(lines).encode()


async def _batch(http: httpx.AsyncClient, batch_id: str) -> dict[str, Any]:
    """The batch, as soon as the gateway answers."""
    async with asyncio.timeout(300):
        while True:
            with suppress(httpx.HTTPError):
                answer = await http.get(f"/v1/batches/{batch_id}")
                if answer.status_code == 200:
                    batch: dict[str, Any] = answer.json()
                    return batch
            await asyncio.sleep(0.1)


async def _until_completed(http: httpx.AsyncClient, batch_id: str, count: int) -> dict[str, Any]:
    """The batch once this many lines are answered, or it has ended."""
    async with asyncio.timeout(600):
        while True:
            batch = await _batch(http, batch_id)
            if batch["request_counts"]["completed"] >= count or batch["status"] in ENDED:
                return batch
            await asyncio.sleep(0.05)


async def _lines(http: httpx.AsyncClient, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(line) for line in (await http.get(f"/v1/files/{file_id}/content")).text.splitlines()]


@pytest.mark.timeout(1_800)
async def test_a_batch_outlasts_kills_of_the_gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each kill the batch goes on by itself. In the end each line was answered, and each was charged by one receipt."""
    for name in [name for name in os.environ if name.startswith("OPENAI_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TALLY_GATEWAY_BATCH_CONCURRENCY", "4")
    market = demo.prepare_market(tmp_path)
    async with ProcessGroup(tmp_path, services.environment(tmp_path)) as processes:
        await services.start_chain(market, processes)
        await demo.deploy_and_fund(market)
        for port in market.ports.engines.values():
            await services.start_stand_in(market, processes, port)
            async with httpx.AsyncClient(trust_env=False) as client:
                slow = {"token_seconds": 0.01, "first_token_seconds": 0}
                (await client.post(f"{market.url(port)}/demo/behaviour", json=slow)).raise_for_status()
        cluster = Cluster(market, processes, await inspect_engine(market.url(market.ports.engines["node-a"])), {}, {})
        for name in ("coordinator", "node-a", "node-b", "gateway"):
            await cluster.start(name)
        url = market.url(market.ports.gateway)
        async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as http:
            file = (await http.post("/v1/files", files={"file": _input()}, data={"purpose": "batch"})).json()
            created = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
            batch_id = (await http.post("/v1/batches", json=created)).json()["id"]
            for kill in range(1, KILLS + 1):
                before = await _until_completed(http, batch_id, kill * LINES // (KILLS + 2))
                assert before["status"] not in ENDED
                await cluster.kill("gateway")
                await cluster.start("gateway")
                after = await _batch(http, batch_id)
                assert after["request_counts"]["completed"] >= before["request_counts"]["completed"]
            batch = await _until_completed(http, batch_id, LINES + 1)
            answered, failed = await _lines(http, batch["output_file_id"]), await _lines(http, batch["error_file_id"])
        assert batch["status"] == "completed"
        assert failed == []
        assert sorted(int(line["custom_id"]) for line in answered) == list(range(LINES))
        jobs = [line["response"]["request_id"] for line in answered]
        assert len(set(jobs)) == LINES
        _check_money(cluster, jobs, batch["tally"]["cost"])


def _check_money(cluster: Cluster, jobs: list[str], cost: str) -> None:
    """The providers charged for the jobs of the output file alone, each once, and as much as the batch says."""
    charged: dict[str, int] = {}
    for name in cluster.market.providers:
        rows = cluster.rows(name, "SELECT hex(o.job), r.cost FROM receipts r JOIN orders o ON o.id = r.order_id WHERE r.cost > 0")
        for job, amount in rows:
            assert job.lower() not in charged, f"job {job} was charged twice"
            charged[job.lower()] = amount
    assert charged.keys() == set(jobs)
    assert sum(charged.values()) == round(float(cost) * 1_000_000)
