"""Reports from a node's store, for pages and commands."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from node.storage.earnings import read_paid_jobs
from node.storage.store import SqlStore
from tallystick.protocol.pricing import Usage
from tests.node.harness import NOW, Client
from tests.node.storage.test_store import finish, open_store


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqlStore]:
    """An empty store."""
    opened = open_store(tmp_path)
    await opened.start()
    yield opened
    await opened.close()


async def test_usage_and_cost_of_paid_jobs(store: SqlStore) -> None:
    """Receipts of one model since a time, the newest ones first and at most so many."""
    client = Client()
    for seq, at in enumerate((NOW - 10, NOW, NOW + 5)):
        await finish(store, client, seq, at=at)
    jobs = await store.read(lambda c: read_paid_jobs(c, "model", NOW, 10))
    assert jobs == [(Usage(0, 0, 100), 40)] * 2
    assert len(await store.read(lambda c: read_paid_jobs(c, "model", 0, 10))) == 3
    assert len(await store.read(lambda c: read_paid_jobs(c, "model", 0, 1))) == 1
    assert await store.read(lambda c: read_paid_jobs(c, "another", 0, 10)) == []
