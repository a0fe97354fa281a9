"""Grouped writes: rows of many jobs share one transaction, and one statement a table. Coordinator and node store jobs with it.

A transaction writes whole pages, so a page costs a job the less, the more jobs share it. A write that nobody waits for goes with
the next group, at the latest LAZY_SECONDS later. A write that somebody waits for begins a group at once if few jobs run, or if
they end seldom. Otherwise it waits until a part of them ends together, at most a time that grows with their number (`Patience`).
So a lone job waits for nothing. Writes are made in the order in which they came.

If a group fails though the database works, each write runs alone: only the bad one gets its error.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import structlog
from sqlalchemy import Connection

from tallystick.protocol.errors import Code, Unavailable
from tallystick.runtime.storage import Database

LAZY_SECONDS = 0.02
JOBS_A_WAIT = 8
"""A write waits for others if this many jobs run for each write that waits already."""
MAX_QUEUED = 8_192
"""Writes that wait for a transaction."""
FEW_JOBS = 4
"""While no more jobs run, and no more of their writes wait, brief ones are committed without a thread (group_commit.py)."""
Note = Callable[[Exception | None], None]
"""Takes the error of a write; None if it is committed."""
Apply = Callable[[Connection, Sequence[Any]], None]
"""Applies the items of a group in one transaction; it may run twice, and has no effects except on the connection."""
CallLater = Callable[[float, Callable[[], None]], asyncio.TimerHandle]
log = structlog.get_logger()


class Patience(NamedTuple):
    """How long a write that somebody waits for may wait for others, in seconds: for each job that runs, and at most."""

    a_job: float = 0.0005
    most: float = 0.05


PATIENCE = Patience()


class Entry:
    """One write. `taken`: its group has begun, so its item must not change any more. `synced`: on disk when it is committed.
    `brief`: it takes a fraction of a millisecond.
    """

    __slots__ = ("_error", "_futures", "_notes", "_settled", "apply", "brief", "item", "synced", "taken")

    def __init__(self, apply: Apply, item: Any, *, synced: bool = False, brief: bool = False) -> None:
        self.apply, self.item, self.synced, self.brief, self.taken = apply, item, synced, brief, False
        self._settled = False
        self._error: Exception | None = None
        self._notes: list[Note] = []
        self._futures: list[asyncio.Future[None]] = []

    def then(self, note: Note) -> None:
        """Lets a function be called when the write is committed or failed, before those that wait for it go on."""
        self._notes.append(note)

    @property
    def done(self) -> asyncio.Future[None]:
        """A future of the caller's own, for when the write is committed. It may be cancelled, which cancels no write."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._futures.append(future)
        if self._settled:
            self._settle_futures()
        return future

    def settle(self, error: Exception | None = None) -> None:
        """Tells all who want to know that the write is committed, or why it failed. Does nothing the second time."""
        if self._settled:
            return
        self._settled, self._error = True, error
        notes, self._notes = self._notes, []  # most refer to the entry: no cycle is left for the collector
        for note in notes:
            try:
                note(error)
            except Exception:  # a bug in one must not keep the others waiting
                log.exception("bug in the note of a write")
        self._settle_futures()

    def _settle_futures(self) -> None:
        futures, self._futures = self._futures, []
        for future in futures:
            if future.done():  # its caller was cancelled
                continue
            if self._error is None:
                future.set_result(None)
            else:
                future.set_exception(self._error)


def _call_later(seconds: float, function: Callable[[], None]) -> asyncio.TimerHandle:
    return asyncio.get_running_loop().call_later(seconds, function)


class GroupWriter:
    """See the module's docstring. `running` returns the number of jobs that run; `later` calls a function after some seconds, and
    `tick` is a monotonic clock.
    """

    def __init__(
        self,
        database: Database,
        running: Callable[[], int],
        patience: Patience = PATIENCE,
        *,
        later: CallLater = _call_later,
        tick: Callable[[], float] = time.monotonic,
    ) -> None:
        self._db, self._running, self._patience, self._later, self._tick = database, running, patience, later, tick
        self._last_waited = float("-inf")
        """When somebody last began to wait."""
        self._entries: list[Entry] = []
        self._waiting = 0
        """Entries that somebody waits for."""
        self._group: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def queued(self) -> int:
        """Writes that wait for a transaction."""
        return len(self._entries)

    def add(self, apply: Apply, item: Any, *, waited: bool, synced: bool = False, brief: bool = False) -> Entry:
        """Queues a write; the entry tells when it is committed. `brief`: see Entry. Raises Unavailable if the queue is full or
        closed.
        """
        if self._closed:
            raise Unavailable(Code.DATABASE_UNAVAILABLE, "the database is closed")
        if len(self._entries) >= MAX_QUEUED:
            raise Unavailable(Code.DATABASE_UNAVAILABLE, "the database is too slow: its write queue is full")
        entry = Entry(apply, item, synced=synced, brief=brief)
        self._entries.append(entry)
        if waited:
            self.hurry()
        elif self._timer is None and self._group is None:
            self._start_timer(LAZY_SECONDS)
        return entry

    def hurry(self) -> None:
        """Notes that somebody waits for one of the queued writes."""
        self._waiting += 1
        last, self._last_waited = self._last_waited, self._tick()
        if self._group is None:
            if self._last_waited - last > self._wait_seconds():  # no other would come meanwhile
                self._begin()
            else:
                self._begin_or_wait(timed=self._waiting > 1)

    def _wait_seconds(self) -> float:
        return min(self._patience.a_job * self._running(), self._patience.most)

    async def flush(self) -> None:
        """Waits until all writes queued so far are committed or failed."""
        while self._group is not None or self._entries:
            if self._group is None:
                self._begin()
            if self._group is not None:
                await asyncio.shield(self._group)

    async def close(self) -> None:
        """Commits the queued writes. Later ones raise Unavailable."""
        self._closed = True
        await self.flush()
        self._stop_timer()

    def _begin_or_wait(self, *, timed: bool = False) -> None:
        if self._waiting * JOBS_A_WAIT >= self._running():
            self._begin()
        elif not timed:
            self._start_timer(self._wait_seconds())

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self._later(seconds, self._begin)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begin(self) -> None:
        self._stop_timer()
        if self._group is None and self._entries:
            self._group = asyncio.get_running_loop().create_task(self._run_group(), name="job-rows")

    async def _run_group(self) -> None:
        try:
            await self._commit_group()
        finally:
            self._group = None
            if self._waiting:
                self._begin_or_wait()
            elif self._entries:
                self._start_timer(LAZY_SECONDS)

    async def _commit_group(self) -> None:
        entries, self._entries, self._waiting = self._entries, [], 0
        for entry in entries:
            entry.taken = True
        work = functools.partial(_apply, entries=entries)
        try:
            if not (self._are_brief(entries) and self._db.commit_now(work)):
                await self._db.write(work, synced=any(entry.synced for entry in entries))
        except Unavailable as error:
            for entry in entries:
                entry.settle(error)
        except Exception:  # noqa: BLE001 - each write then runs alone, and the one that failed gets its error
            await self._commit_alone(entries)
        else:
            for entry in entries:
                entry.settle()

    def _are_brief(self, entries: Sequence[Entry]) -> bool:
        few = len(entries) <= FEW_JOBS and self._running() <= FEW_JOBS
        return few and all(entry.brief and not entry.synced for entry in entries)

    async def _commit_alone(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            try:
                await self._db.write(functools.partial(_apply, entries=[entry]), synced=entry.synced)
            except Exception as error:  # whoever waits gets it
                log.exception("write failed")
                entry.settle(error)
            else:
                entry.settle()


def _apply(connection: Connection, entries: Sequence[Entry]) -> None:
    by_function: dict[Apply, list[Any]] = {}
    for entry in entries:
        by_function.setdefault(entry.apply, []).append(entry.item)
    for apply, items in by_function.items():
        apply(connection, items)
