"""Ends the open jobs of replicas that are gone: all of them by the role `recovery`, and a single one that a party asks about.

A replica is gone if its connection for roles has ended, which PostgreSQL notices at once when a process dies, and its last beat
is old. One that stops beats no more while its last jobs end, and has its connection. After an outage of the database all
connections have ended and all beats are old: so a replica counts as gone only once its connection was missed for MISSED_SECONDS,
in which those that live come back.

A payer who cancels a job need not wait for that. Its job is to end anyway, and if the replica lives after all, it cannot give the
job to a further provider, and what its provider's receipt says replaces this end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

import structlog

from coordinator.ports import JobRecord
from coordinator.storage.job_store import ended
from coordinator.storage.shared_rows import SharedJobRows
from tallystick.protocol.errors import Unavailable
from tallystick.protocol.types import JobId
from tallystick.runtime.storage import Database

log = structlog.get_logger()
LOOK_SECONDS = 0.5
MAX_GAP_SECONDS = 2.0
"""Between two questions about a replica; after a longer one it counts as missed since the later one."""
MAX_MISSED = 256
"""Replicas that are remembered as missed."""
MISSED_SECONDS = 2.0
"""Longer than the time between two beats. A replica that dies is missed for so long before its last beat is old."""
REASON = "the replica of the coordinator that ran the job is gone"


class Recovery:
    """See the module's docstring. `now`: Unix time, `tick`: a monotonic clock, both in seconds."""

    def __init__(
        self,
        database: Database,
        rows: SharedJobRows,
        now: Callable[[], float] = time.time,
        tick: Callable[[], float] = time.monotonic,
    ) -> None:
        self._db, self._rows, self._now, self._tick = database, rows, now, tick
        self._missed: dict[str, float] = {}
        """When replicas were missed first, of those that were missed at each look since."""
        self._asked: dict[str, tuple[float, float]] = {}
        """The same for those that parties asked about: when each was missed first and last, the oldest question first."""

    async def run(self) -> None:
        """Looks until cancelled."""
        self._missed = {}
        while True:
            try:
                await self.look()
            except Unavailable as error:
                self._missed = {}
                log.warning("jobs of lost replicas not ended", error=str(error))
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Ends the open jobs of the replicas that are gone. Raises Unavailable."""
        missed = await self._db.read(self._rows.missed_owners)
        tick = self._tick()
        self._missed = {replica: self._missed.get(replica, tick) for replica in missed}
        for replica, is_silent in sorted(missed.items()):
            if is_silent and tick - self._missed[replica] >= MISSED_SECONDS:
                await self._end_jobs(replica)

    async def _end_jobs(self, replica: str) -> None:
        rows = 0
        while count := await self._db.write(partial(self._rows.end_abandoned, owner=replica, end=self._end)):
            rows += count
        log.info("jobs of a lost replica ended", replica=replica, rows=rows)

    async def end_job(self, job: JobId, owner: str, *, cancelled: bool) -> bool:
        """Ends an open job if the replica that runs it is gone. Returns whether it did. Raises Unavailable.

        `cancelled`: its payer cancels it, so that it is enough that the replica's connection has ended.
        """
        is_silent = await self._db.read(partial(self._rows.missed_owner, owner=owner))
        if is_silent is None:
            self._asked.pop(owner, None)
            return False
        tick = self._tick()
        first, last = self._asked.pop(owner, (tick, tick))
        first = first if tick - last <= MAX_GAP_SECONDS else tick
        self._asked[owner] = first, tick
        if len(self._asked) > MAX_MISSED:
            del self._asked[next(iter(self._asked))]
        if not cancelled and not (is_silent and tick - first >= MISSED_SECONDS):
            return False
        rows = await self._db.write(partial(self._rows.end_abandoned, owner=owner, end=self._end, only=job))
        if rows:
            log.info("a job of a lost replica ended", replica=owner, job=job.hex(), cancelled=cancelled)
        return bool(rows)

    def _end(self, record: JobRecord) -> JobRecord:
        return ended(record, int(self._now()), REASON)
