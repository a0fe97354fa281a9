"""PostgreSQL, or NATS, is away for a minute while clients ask without a break.

TALLYSTICK_AWAY_SECONDS sets for how long.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from scripts.faults.clients import Clients
from scripts.faults.invariants import check
from scripts.faults.site import Site, open_site
from tests.contracts.freshness import check_freshness

AWAY_SECONDS = float(os.environ.get("TALLYSTICK_AWAY_SECONDS", "60"))
DEADLINE_SECONDS = 300.0

pytestmark = [
    pytest.mark.timeout(1_800),
    pytest.mark.skipif(
        not os.environ.get("TALLYSTICK_TEST_POSTGRES"),
        reason="PostgreSQL tests need TALLYSTICK_TEST_POSTGRES; run them with scripts/with-postgres",
    ),
]


@asynccontextmanager
async def _market(folder: Path, *, replicas: bool) -> AsyncIterator[tuple[Site, Clients]]:
    """A market on PostgreSQL whose clients have their first answers."""
    check_freshness()
    site = await open_site(folder, on_postgres=True, replicas=replicas)
    clients = Clients(site, "away", random.Random(1))
    try:
        clients.start()
        await clients.outage(time.monotonic(), DEADLINE_SECONDS)
        yield site, clients
    finally:
        await clients.cancel()
        await site.stop()


async def _comes_back(site: Site, clients: Clients, service: str) -> None:
    """Starts the service again. Every client gets an answer, every job has one end, and all books agree."""
    site.processes[service].let_up()
    await clients.outage(time.monotonic(), DEADLINE_SECONDS)
    await clients.stop()
    findings = await check(site, clients)
    assert findings.violations == []


@pytest.mark.parametrize("replicas", [False, True], ids=["lone", "replicas"])
async def test_postgresql(tmp_path: Path, *, replicas: bool) -> None:
    """What was answered before stays, and requests meanwhile are told to try again. Only streams that broke are lost."""
    async with _market(tmp_path / "market", replicas=replicas) as (site, clients):
        site.processes["postgres"].hold_down()
        await asyncio.sleep(AWAY_SECONDS)
        await _comes_back(site, clients, "postgres")
        refusals = [request.refusal for request in clients.requests if request.refusal]
        assert all(refusal.startswith("200 ") for refusal in refusals), refusals


async def test_nats(tmp_path: Path) -> None:
    """Replicas serve without it, and refuse nothing."""
    async with _market(tmp_path / "market", replicas=True) as (site, clients):
        site.processes["nats"].hold_down()
        began = time.monotonic()
        await asyncio.sleep(AWAY_SECONDS)
        assert min(clients.last_answers) > began, "every client was answered meanwhile"
        await _comes_back(site, clients, "nats")
        assert [request.refusal for request in clients.requests if request.refusal] == []
