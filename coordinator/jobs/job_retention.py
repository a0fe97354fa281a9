"""Retention: deletes jobs that ended long ago, with their receipts, a part at a time.

The last receipts of each tab stay, so parties that lost their state still recover from them, and so do the totals of all tabs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from coordinator.ports import JobStore
from tallystick.protocol.errors import Unavailable

log = structlog.get_logger()
INTERVAL_SECONDS = 1.0
STEPS_AT_ONCE = 16
"""Writes of one interval, between which other writes have their turn."""


class JobRetention:
    """See the module's docstring. `keep_seconds`: after the end of a job. `now`: Unix time in seconds."""

    def __init__(self, store: JobStore, keep_seconds: int, now: Callable[[], float]) -> None:
        self._store, self._keep_seconds, self._now = store, keep_seconds, now

    async def run(self) -> None:
        """Deletes old jobs until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_SECONDS)
            try:
                await self.forget()
            except Unavailable as error:
                log.warning("old jobs not deleted", error=str(error))

    async def forget(self) -> None:
        """Deletes some of the jobs that are old enough. Raises Unavailable."""
        before = int(self._now()) - self._keep_seconds
        for _ in range(STEPS_AT_ONCE):
            if not await self._store.forget_jobs(before):
                return
