from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import httpx

from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.schema import JobState
from tests.client.fake_coordinator import CHAT, STREAM, FakeMarket, event, eventually, until_cancelled
from tests.client.parties import MODEL, signer

GATEWAY = """
import asyncio, sys
from pathlib import Path
from tallystick.client.config import ClientConfig
from tallystick.client.gateway.app import run_gateway
from tests.client.fake_coordinator import signer

config = ClientConfig(coordinator=sys.argv[1], ledger_file=Path(sys.argv[2]), port=0, cancel_seconds=10, shutdown_seconds=0.2)
asyncio.run(run_gateway(config, signer("payer"), ready=lambda port: print(port, flush=True)))
"""


async def start(fake: FakeMarket, state: Path) -> tuple[asyncio.subprocess.Process, str]:
    """A gateway in a process of its own, and its URL."""
    command = (sys.executable, "-c", GATEWAY, fake.url, str(state))
    pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=null)
    assert process.stdout is not None
    while not (line := await process.stdout.readline()).strip().isdigit():
        assert line
    return process, f"http://127.0.0.1:{int(line)}"


async def test_sigterm_ends_in_order(fake: FakeMarket, tmp_path: Path) -> None:
    """On SIGTERM the gateway cancels running jobs, answers their callers, records the receipts, and exits with 0."""
    fake.script = until_cancelled
    state = tmp_path / "state.db"
    process, url = await start(fake, state)
    async with httpx.AsyncClient(base_url=url) as http, http.stream("POST", CHAT, json=STREAM) as answer:
        chunks = answer.aiter_raw()
        assert await anext(chunks) == event("on and on ")
        process.send_signal(signal.SIGTERM)
        rest = b"".join([chunk async for chunk in chunks])
        assert await process.wait() == 0
    assert b'"code":"cancelled"' in rest
    assert fake.cancels == [fake.last.job]
    ledger = await Ledger.open(state, signer("payer").address)
    known = await ledger.find_job(fake.last.job)
    await ledger.close()
    assert known is not None
    assert known.state is JobState.CANCELLED


async def test_kill_loses_nothing(fake: FakeMarket, tmp_path: Path) -> None:
    """After kill -9 in mid-stream the next gateway finds the order, reconciles it, and continues the same tab."""
    fake.script = until_cancelled
    state = tmp_path / "state.db"
    process, url = await start(fake, state)
    async with httpx.AsyncClient(base_url=url) as http, http.stream("POST", CHAT, json=STREAM) as answer:
        await anext(answer.aiter_raw())
        process.kill()
        await process.wait()
    killed = fake.last
    await eventually(lambda: killed.state.value == "failed")
    killed.provider.tab = killed.provider.tab.drop(killed.candidate.terms.max_cost)  # as its node does
    process, url = await start(fake, state)
    async with httpx.AsyncClient(base_url=url) as http:
        path = f"/tally/jobs/{killed.job.hex()}"
        known = (await http.get(path)).json()
        assert (known["state"], known["model"]) == (JobState.OPEN.value, MODEL)
        async with http.stream("POST", CHAT, json=STREAM) as answer:
            await anext(answer.aiter_raw())

        async def settled() -> bool:
            return bool((await http.get(path)).json()["state"] == JobState.FAILED.value)

        await eventually(settled)
    os.kill(process.pid, signal.SIGTERM)
    assert await process.wait() == 0
