"""Group commit: writes that wait at the same time share one transaction. SQLite's writer thread and PostgreSQL's are here.

Writes that arrive during a transaction wait for the next one and share it: a transaction writes whole pages, and a row in it
costs microseconds. No transaction waits for writes that may come: a job's writes follow each other, so each would wait.
If a write of a group fails, the group is rolled back and each write runs alone, so only the bad one fails. If the transaction
cannot begin at all, every write of the group fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import structlog
from sqlalchemy import Connection

from tallystick.runtime.prepared import Prepared, Row

MAX_GROUP = 256
"""Writes that share one transaction."""
MAX_QUEUED = 4_096
"""Writes that wait for a transaction."""
log = structlog.get_logger()
Work = Callable[[Connection], Any]
Rows = Sequence[tuple[Prepared, Row]]


class Write(NamedTuple):
    """One write: what it does, its result, whether it must be synced, and whether somebody waits for the result."""

    work: Work | Rows
    future: asyncio.Future[Any]
    synced: bool = True
    awaited: bool = True


class Group:
    """Writes of one transaction, and how it went."""

    def __init__(self, writes: Sequence[Write]) -> None:
        self.writes = writes
        self.synced = any(write.synced for write in writes)
        self.error: Exception | None = None
        self.results: list[Any] = []
        self.seconds = 0.0
        self._begun = False

    def run(self, connection: Connection) -> None:
        """Does the writes, in their order. Rows that follow each other are one call of the driver for each statement."""
        self._begun = True
        self.results, rows = [], dict[Prepared, list[Row]]()
        for work, *_ in self.writes:
            if callable(work):
                _flush(connection, rows)
                self.results.append(work(connection))
                continue
            for statement, row in work:
                rows.setdefault(statement, []).append(row)
            self.results.append(None)
        _flush(connection, rows)

    def fail(self, error: Exception) -> list[Group]:
        """Keeps the error of the transaction. If one write of many is at fault, returns the groups that are to run instead."""
        if self._begun and len(self.writes) > 1:
            groups, self.writes = [Group([write]) for write in self.writes], ()
            return groups
        self.error = error
        return []

    def settle(self, translate: Callable[[Exception], Exception]) -> None:
        """Tells the writes how it went. Runs in the event loop."""
        for number, write in enumerate(self.writes):
            if write.future.done():  # its caller has been cancelled
                continue
            if self.error is None:
                write.future.set_result(self.results[number])
                continue
            error = translate(self.error)
            write.future.set_exception(error)
            if not write.awaited:
                write.future.exception()  # marks it as seen
                log.error("queued write lost", error=str(error))


def _flush(connection: Connection, rows: dict[Prepared, list[Row]]) -> None:
    for statement, group in rows.items():
        statement.run(connection, *group)
    rows.clear()


class GroupCommit(ABC):
    """A bounded queue of writes, and what commits them in groups. Used from one event loop."""

    def __init__(self, translate: Callable[[Exception], Exception]) -> None:
        """`translate` makes the error that writes raise from that of their transaction."""
        self._translate = translate
        self.on_commit: Callable[[float], None] = lambda _: None
        """Called with the seconds of each transaction."""
        self._turn = asyncio.Lock()
        """Held by the write that waits for room; later ones wait in order."""
        self._room = asyncio.Event()
        self._started = False

    @property
    @abstractmethod
    def queued(self) -> int:
        """Writes that wait for a transaction."""

    @abstractmethod
    def _put(self, write: Write | None) -> None:
        """Queues a write; None is the end."""

    @abstractmethod
    def start(self) -> None:
        """Starts to commit. Runs in the event loop."""

    @abstractmethod
    async def _ended(self) -> None:
        """Waits until the end is reached."""

    def put(self, write: Write) -> bool:
        """Queues a write, and returns False if there is no room."""
        if self.queued >= MAX_QUEUED or self._turn.locked():
            return False
        self._put(write)
        return True

    async def put_in_turn(self, write: Write | None) -> None:
        """Queues a write when there is room, in the order of the calls."""
        async with self._turn:
            while self.queued >= MAX_QUEUED and write is not None:
                self._room.clear()
                await self._room.wait()
            self._put(write)

    async def close(self) -> None:
        """Commits the writes that wait, also for room, and ends."""
        if self._started:
            self._started = False
            await self.put_in_turn(None)
            await self._ended()

    def _report(self, groups: Sequence[Group]) -> None:
        """Settles groups of writes. Runs in the event loop."""
        self._room.set()
        for group in groups:
            if group.error is None and group.writes:
                self.on_commit(group.seconds)
            group.settle(self._translate)


class ThreadCommit(GroupCommit):
    """Commits in a thread of its own. `transact` runs a function in a transaction; its second argument: whether it is synced.

    The thread takes whatever is queued, and reports a group with one wake-up of the event loop. It does not wait for the loop.
    """

    def __init__(self, transact: Callable[[Work, bool], Any], translate: Callable[[Exception], Exception]) -> None:
        super().__init__(translate)
        self._transact = transact
        self._queue: queue.SimpleQueue[Write | None] = queue.SimpleQueue()
        self._finished = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def queued(self) -> int:
        """See GroupCommit."""
        return self._queue.qsize()

    def start(self) -> None:
        """See GroupCommit."""
        self._started, self._loop = True, asyncio.get_running_loop()
        # A daemon: a process ends although it never closed its database, as if it were killed.
        threading.Thread(target=self._work, name="database-writer", daemon=True).start()

    def _put(self, write: Write | None) -> None:
        self._queue.put(write)

    async def _ended(self) -> None:
        await self._finished.wait()

    def _work(self) -> None:
        closing = False
        while not closing:
            writes = [self._queue.get()]
            while len(writes) < MAX_GROUP and not self._queue.empty():  # nobody else takes from it
                writes.append(self._queue.get())
            closing = writes[-1] is None
            groups = self._commit([write for write in writes if write is not None])
            self._call_loop(functools.partial(self._report, groups))
        self._call_loop(self._finished.set)

    def _commit(self, writes: Sequence[Write]) -> list[Group]:
        waiting, ended = deque([Group(writes)] if writes else []), list[Group]()
        while waiting:
            group, since = waiting.popleft(), time.monotonic()
            try:
                self._transact(group.run, group.synced)
            except Exception as error:  # noqa: BLE001 - the error of a write, which gets it
                waiting.extend(group.fail(error))
            group.seconds = time.monotonic() - since
            ended.append(group)
        return ended

    def _call_loop(self, call: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed, and nobody waits
            if self._loop is not None:
                self._loop.call_soon_threadsafe(call)


class LoopCommit(GroupCommit):
    """Commits in the event loop. `transact` runs a function in a transaction; its second argument: whether it is synced."""

    def __init__(self, transact: Callable[[Work, bool], Awaitable[Any]], translate: Callable[[Exception], Exception]) -> None:
        super().__init__(translate)
        self._transact = transact
        self._queue: asyncio.Queue[Write | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    @property
    def queued(self) -> int:
        """See GroupCommit."""
        return self._queue.qsize()

    def start(self) -> None:
        """See GroupCommit."""
        self._started, self._task = True, asyncio.create_task(self._work(), name="group-commit")

    def _put(self, write: Write | None) -> None:
        self._queue.put_nowait(write)

    async def _ended(self) -> None:
        if self._task is not None:
            await self._task

    async def _work(self) -> None:
        closing = False
        while not closing:
            writes = [await self._queue.get()]
            while len(writes) < MAX_GROUP and not self._queue.empty():
                writes.append(self._queue.get_nowait())
            closing = writes[-1] is None
            await self._commit([write for write in writes if write is not None])

    async def _commit(self, writes: Sequence[Write]) -> None:
        waiting = deque([Group(writes)] if writes else [])
        while waiting:
            group, since = waiting.popleft(), time.monotonic()
            try:
                await self._transact(group.run, group.synced)
            except Exception as error:  # noqa: BLE001 - the error of a write, which gets it
                waiting.extend(group.fail(error))
            group.seconds = time.monotonic() - since
            self._report([group])
