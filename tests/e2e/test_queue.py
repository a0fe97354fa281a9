"""A burst of more requests than there are slots, through the whole market: the requests wait instead of failing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai

from scripts.relay import processes
from scripts.relay.mock import MODEL

BURST = 40


async def test_a_burst_of_the_official_sdk_is_answered(market: dict[str, Any]) -> None:
    """Every stream of a burst is answered at its first attempt; none is refused because all slots are busy."""
    async with openai.AsyncOpenAI(base_url=market["gateway"] + "/v1", api_key="-", max_retries=0, timeout=600) as client:

        async def ask(number: int) -> str:
            messages: Any = [{"role": "user", "content": f"Count to {number}."}]
            stream = await client.chat.completions.create(model=market["model"], messages=messages, max_tokens=8, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

        answers = await asyncio.gather(*(ask(number) for number in range(BURST)))
    assert all(answers)


async def _ask(site: processes.Site, key: str = "", **members: object) -> httpx.Response:
    """Sends one request."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Count."}], "max_tokens": 16} | members
    headers = {"x-tally-options": json.dumps({"wait": 600})} | ({"idempotency-key": key} if key else {})
    async with httpx.AsyncClient(base_url=site.gateway, trust_env=False, timeout=600) as http:
        return await http.post("/v1/chat/completions", json=body, headers=headers)


@contextlib.asynccontextmanager
async def _occupied(site: processes.Site, slots: int) -> AsyncIterator[None]:
    """Keeps the slots of the market's only node busy."""
    occupying = [asyncio.create_task(_ask(site, stream=True, user="500 1")) for _ in range(slots)]
    try:
        await _until(site, "tallystick_jobs_live", slots)
        yield
    finally:
        for task in occupying:
            task.cancel()
        await asyncio.gather(*occupying, return_exceptions=True)


async def _until(site: processes.Site, metric: str, number: int) -> None:
    """Waits until a metric of the coordinator has this value."""
    async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
        for _ in range(3_000):
            if f"\n{metric} {number:.1f}\n" in (await http.get(f"{site.coordinator}/metrics")).text:
                return
            await asyncio.sleep(0.1)
    raise AssertionError(f"{metric}: never {number}")


async def test_a_new_node_serves_the_jobs_that_wait(tmp_path: Path) -> None:
    """Jobs wait for a node that is busy for long; one that is started meanwhile answers them all."""
    async with processes.upstream() as mock, processes.market(tmp_path / "m", mock, slots=1) as site:
        async with _occupied(site, 1):
            waiting = [asyncio.create_task(_ask(site)) for _ in range(3)]
            await _until(site, "tallystick_jobs_waiting", 3)
            late = await processes.add_node(site, "late", mock, slots=1)
            answers = await asyncio.gather(*waiting)
        assert [(answer.status_code, answer.headers["x-tally-provider"]) for answer in answers] == [(200, late)] * 3
        assert len({answer.headers["x-tally-receipt"] for answer in answers}) == 3


async def test_a_killed_coordinator_keeps_nobody_hanging(tmp_path: Path) -> None:
    """Twenty requests wait while the coordinator is killed: each fails at once with an error that may be retried, and is answered
    when it is sent again with its key.
    """
    async with processes.upstream() as mock, processes.market(tmp_path / "m", mock, slots=2) as site:
        async with _occupied(site, 2):
            waiting = [asyncio.create_task(_ask(site, f"key {number}")) for number in range(20)]
            await _until(site, "tallystick_jobs_waiting", 20)
            os.kill(site.pids["coordinator"], signal.SIGKILL)
            async with asyncio.timeout(300):
                refused = await asyncio.gather(*waiting)
        assert {(answer.status_code, answer.json()["error"]["retry"]) for answer in refused} == {(503, True)}
        await processes.restart(site, "coordinator", "run", ready=f"{site.coordinator}/healthz")

        async def again(number: int) -> int:
            async with asyncio.timeout(300):
                while (answer := await _ask(site, f"key {number}")).status_code in (502, 503):
                    assert answer.json()["error"]["retry"] is True
                    await asyncio.sleep(0.5)
            return answer.status_code

        assert await asyncio.gather(*map(again, range(20))) == [200] * 20
