"""Retention: jobs go when they are old enough, a part at a time, and a database that does not answer changes nothing."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.jobs import job_retention
from coordinator.jobs.job_retention import STEPS_AT_ONCE, JobRetention
from coordinator.storage.memory import MemoryStore
from tallystick.protocol.errors import Code, Unavailable


class _Store(MemoryStore):
    """Has some old jobs, and answers with an error first."""

    def __init__(self, steps: int, failures: int = 0) -> None:
        super().__init__()
        self.steps, self.failures, self.asked = steps, failures, list[int]()
        self.empty = asyncio.Event()

    async def forget_jobs(self, before: int) -> bool:
        if self.failures:
            self.failures -= 1
            raise Unavailable(Code.DATABASE_UNAVAILABLE, "no")
        self.asked.append(before)
        self.steps -= 1
        if self.steps <= 0:
            self.empty.set()
        return self.steps > 0


async def test_what_is_older_than_the_limit_goes() -> None:
    """The limit counts from the end of a job."""
    store = _Store(3)
    await JobRetention(store, 100, lambda: 1_000.5).forget()
    assert store.asked == [900, 900, 900]


async def test_other_writes_have_their_turn() -> None:
    """One interval deletes a bounded part."""
    store = _Store(1_000)
    await JobRetention(store, 100, lambda: 1_000).forget()
    assert len(store.asked) == STEPS_AT_ONCE


async def test_an_error_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again after the interval."""
    monkeypatch.setattr(job_retention, "INTERVAL_SECONDS", 0.001)
    store = _Store(2, failures=3)
    running = asyncio.create_task(JobRetention(store, 100, lambda: 1_000).run())
    async with asyncio.timeout(60):
        await store.empty.wait()
    running.cancel()
    assert store.failures == 0
