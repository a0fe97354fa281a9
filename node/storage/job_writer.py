"""The writer of jobs: jobs that run at the same time share transactions, and each write fails for itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from sqlalchemy import Connection

from node.storage.job_rows import JobWrite, write_jobs
from tallystick.protocol.errors import Unavailable
from tallystick.runtime.group_writer import GroupWriter, Patience
from tallystick.runtime.storage import Database

PATIENCE = Patience(a_job=0.0002, most=0.01)
"""A sync takes milliseconds, whatever the number of its rows; a receipt waits no longer for others than for that."""


class _Item:
    """A write, and why its rows were refused while the others of its transaction were written."""

    __slots__ = ("conflict", "write")

    def __init__(self, write: JobWrite) -> None:
        self.write = write
        self.conflict: Exception | None = None


class JobWriter:
    """Writes jobs in the order in which they come; see group_writer.py. `running` returns the number of jobs that run."""

    def __init__(self, database: Database, running: Callable[[], int], writer: GroupWriter | None = None) -> None:
        self._writer = writer or GroupWriter(database, running, PATIENCE)

    def add(self, write: JobWrite) -> asyncio.Future[None]:
        """Queues a write, whose end is synced. Cancelling the future cancels no write.

        The future fails with Unavailable if the queue is full, after `close`, and if the database fails.
        """
        item = _Item(write)
        try:
            entry = self._writer.add(_write_all, item, waited=True, synced=write.ending is not None, brief=True)
        except Unavailable as error:
            return failed(error)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def settle(error: Exception | None) -> None:
            error = error or item.conflict
            if future.done():  # its caller was cancelled
                return
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

        entry.then(settle)
        return future

    async def close(self) -> None:
        """Completes the queued writes."""
        await self._writer.close()


def _write_all(connection: Connection, items: Sequence[_Item]) -> None:
    for item, conflict in zip(items, write_jobs(connection, [item.write for item in items]), strict=True):
        item.conflict = conflict


def failed(error: Exception) -> asyncio.Future[None]:
    """Returns a future that failed."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    return future
