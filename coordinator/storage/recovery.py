"""Ends the open jobs of replicas that are gone: the work of the role `recovery`.

A replica is gone if it has not beaten for GONE_SECONDS and its connection for roles has ended, at two looks in a row. One that
stops beats no more while its last jobs end. After an outage of the database all beats are old and all connections have ended; by
the second look, those that live are back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial

import structlog

from coordinator.ports import JobRecord
from coordinator.storage.job_store import ended
from coordinator.storage.shared_rows import SharedJobRows
from tallystick.protocol.errors import Unavailable
from tallystick.runtime.storage import Database

log = structlog.get_logger()
LOOK_SECONDS = 1.2
"""Longer than the time between two beats of a replica."""
REASON = "the replica of the coordinator that ran the job is gone"


class Recovery:
    """See the module's docstring. `now`: Unix time in seconds; `sleep` waits for some seconds."""

    def __init__(
        self,
        database: Database,
        rows: SharedJobRows,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._db, self._rows, self._now, self._sleep = database, rows, now, sleep
        self._gone = set[str]()
        """The replicas that were gone at the last look."""

    async def run(self) -> None:
        """Looks until cancelled."""
        self._gone = set()
        while True:
            try:
                await self.look()
            except Unavailable as error:
                self._gone = set()
                log.warning("jobs of lost replicas not ended", error=str(error))
            await self._sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Ends the open jobs of the replicas that were gone at the last look, and are now. Raises Unavailable."""
        gone = await self._db.read(self._rows.abandoned)
        for replica in sorted(gone & self._gone):
            rows = 0
            while count := await self._db.write(partial(self._rows.end_abandoned, owner=replica, end=self._end)):
                rows += count
            log.info("jobs of a lost replica ended", replica=replica, rows=rows)
        self._gone = gone

    def _end(self, record: JobRecord) -> JobRecord:
        return ended(record, int(self._now()), REASON)
