"""The writer of jobs: collects what jobs write, so that jobs which run at the same time share transactions.

A transaction writes whole pages, and its sync takes milliseconds, whatever the number of its rows. So while many jobs run, a
write waits a moment for others: at most MAX_WAIT_SECONDS, and not at all while few jobs run. Writes are made in the order in
which they came, and cancelling a future cancels no write.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NamedTuple

from node.storage.job_rows import JobWrite, write_jobs
from tallystick.protocol.errors import Code, TallyError, Unavailable
from tallystick.runtime.storage import Database

MAX_WRITES = 256
"""Writes that share one transaction."""
MAX_QUEUED = 4_096
"""Writes that wait for a transaction."""
MAX_WAIT_SECONDS = 0.01
_WAIT_SECONDS_PER_JOB = 0.0002
_FEW_JOBS = 4


class _Queued(NamedTuple):
    write: JobWrite
    future: asyncio.Future[None]


class JobWriter:
    """See the module's docstring. `running` returns the number of jobs that run; `pause` waits for some seconds."""

    def __init__(
        self, database: Database, running: Callable[[], int], pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._database, self._running, self._pause = database, running, pause
        self._queue: list[_Queued] = []
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    def add(self, write: JobWrite) -> asyncio.Future[None]:
        """Queues a write. The future fails with Unavailable if the queue is full, after `close`, and if the database fails."""
        if self._closing:
            return failed(Unavailable(Code.DATABASE_UNAVAILABLE, "the database is closed"))
        if len(self._queue) >= MAX_QUEUED:
            return failed(Unavailable(Code.DATABASE_UNAVAILABLE, "the database is too slow: its queue of jobs is full"))
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(_Queued(write, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._write_all(), name="job-writer")
        return future

    async def close(self) -> None:
        """Completes the queued writes."""
        self._closing = True
        if self._task is not None:
            await self._task

    async def _write_all(self) -> None:
        while self._queue:
            running = self._running()
            if running > _FEW_JOBS and len(self._queue) < MAX_WRITES and not self._closing:
                await self._pause(min(MAX_WAIT_SECONDS, _WAIT_SECONDS_PER_JOB * running))
            group, self._queue = self._queue[:MAX_WRITES], self._queue[MAX_WRITES:]
            await self._write(group)

    async def _write(self, group: Sequence[_Queued]) -> None:
        writes = [queued.write for queued in group]
        synced = any(write.ending is not None for write in writes)
        conflicts: Sequence[Exception | None]
        try:
            conflicts = await self._database.write(partial(write_jobs, writes=writes), synced=synced)
        except Exception as error:  # noqa: BLE001 - goes to those who wait
            if len(group) > 1 and not isinstance(error, TallyError):  # a bug in one write must not fail the others
                for queued in group:
                    await self._write([queued])
                return
            conflicts = [error] * len(group)
        for queued, conflict in zip(group, conflicts, strict=True):
            if queued.future.done():
                continue
            if conflict is None:
                queued.future.set_result(None)
            else:
                queued.future.set_exception(conflict)


def failed(error: Exception) -> asyncio.Future[None]:
    """Returns a future that failed."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    return future
