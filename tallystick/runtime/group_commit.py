"""Group commit: writes that wait at the same time share one transaction. SQLite's writer thread and PostgreSQL's are here.

Writes that arrive during a transaction wait for the next one and share it: a transaction writes whole pages, and a row in it
costs microseconds. It begins when the event loop has run what was ready, which may write too. It waits for nothing else: a job's
writes follow each other, so each would wait.
If a write of a group fails, the group is rolled back and each write runs alone, so only the bad one fails. If the transaction
cannot begin at all, every write of the group fails.

The way to SQLite's thread and back takes longer than a small transaction. So a few brief writes that need no sync are committed
in the event loop, unless they would have to wait: for another process that holds the file's lock, for a checkpoint, or for a
disk that was slow a moment ago. Then the thread commits them.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import structlog
from sqlalchemy import Connection

from tallystick.runtime.prepared import Prepared, Row

MAX_GROUP = 256
"""Writes that share one transaction."""
MAX_QUEUED = 4_096
"""Writes that wait for a transaction."""
MAX_AT_ONCE = 4
"""Writes that may be committed together in the event loop."""
MAX_AT_ONCE_IN_A_ROW = 64
"""Transactions in the event loop before the thread, which also makes checkpoints, must commit one."""
SLOW_SECONDS, SLOW_PAUSE_SECONDS = 0.05, 1.0
"""After a transaction in the event loop that took so long, the thread commits all for a while."""
log = structlog.get_logger()
R = TypeVar("R")
Work = Callable[[Connection], R]
Rows = Sequence[tuple[Prepared, Row]]


def run_work(work: Work[R], connection: Connection) -> R:
    """Runs `work`. An error that no future can hold becomes a RuntimeError."""
    try:
        return work(connection)
    except StopIteration as error:  # a future cannot hold it, and its awaiter would never wake
        raise RuntimeError("StopIteration out of a transaction") from error


class Write(NamedTuple):
    """One write: what it does, its result, whether it must be synced, and whether somebody waits for the result.

    `brief`: it takes a fraction of a millisecond, and few others come meanwhile.
    """

    work: Work[Any] | Rows
    future: asyncio.Future[Any]
    synced: bool = True
    awaited: bool = True
    brief: bool = False


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
    """A bounded queue of writes, which are committed in groups, one group at a time. Used from one event loop."""

    def __init__(self, translate: Callable[[Exception], Exception]) -> None:
        """`translate` makes the error that writes raise from that of their transaction."""
        self._translate = translate
        self.on_commit: Callable[[float], None] = lambda _: None
        """Called with the seconds of each transaction."""
        self._waiting: deque[Write] = deque()
        self._turn = asyncio.Lock()
        """Held by the write that waits for room; later ones wait in order."""
        self._room, self._idle = asyncio.Event(), asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._busy = False
        """Whether a group is committed, or will be in this turn of the event loop."""

    @property
    def queued(self) -> int:
        """Writes that wait for a transaction."""
        return len(self._waiting)

    def start(self) -> None:
        """Starts to commit. Runs in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._schedule()

    def put(self, write: Write) -> bool:
        """Queues a write, and returns False if there is no room."""
        if len(self._waiting) >= MAX_QUEUED or self._turn.locked():
            return False
        self._waiting.append(write)
        if not self._busy:
            self._schedule()
        return True

    async def put_in_turn(self, write: Write) -> None:
        """Queues a write when there is room, in the order of the calls."""
        async with self._turn:
            while len(self._waiting) >= MAX_QUEUED:
                self._room.clear()
                await self._room.wait()
            self._waiting.append(write)
            self._schedule()

    async def close(self) -> None:
        """Commits the writes that wait, also for room, and ends."""
        if self._loop is None:
            return
        async with self._turn:
            pass
        while self._busy:
            self._idle.clear()
            await self._idle.wait()
        self._loop = None
        self._end()

    def _schedule(self) -> None:
        if self._loop is not None and self._waiting and not self._busy:
            self._busy = True
            self._loop.call_soon(self._next)

    def _next(self) -> None:
        self._begin([self._waiting.popleft() for _ in range(min(MAX_GROUP, len(self._waiting)))])
        self._room.set()

    def commit_now(self, _work: Work[Any]) -> bool:
        """See ThreadCommit."""
        return False

    @abstractmethod
    def _begin(self, writes: Sequence[Write]) -> None:
        """Begins to commit these writes; `_report` gets them when it is done."""

    @abstractmethod
    def _end(self) -> None:
        """Frees what commits."""

    def _report(self, groups: Sequence[Group]) -> None:
        """Settles the groups that the writes became. Runs in the event loop."""
        for group in groups:
            if group.error is None and group.writes:
                self.on_commit(group.seconds)
            group.settle(self._translate)
        self._busy = False
        self._schedule()  # behind the writers that were settled just now, whose next writes join
        if not self._busy:
            self._idle.set()


class ThreadCommit(GroupCommit):
    """Commits in a thread of its own, or at once. `transact` runs a function in a transaction; its second argument: whether it is
    synced. `transact_at_once` does so without a sync, and raises an error rather than wait. `tick`: a monotonic clock.
    """

    def __init__(
        self,
        transact: Callable[[Work[Any], bool], Any],
        transact_at_once: Callable[[Work[Any]], Any],
        translate: Callable[[Exception], Exception],
        *,
        tick: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(translate)
        self._transact, self._transact_at_once, self._tick = transact, transact_at_once, tick
        self._at_once_in_a_row, self._thread_until = 0, float("-inf")
        self._queue: queue.SimpleQueue[Sequence[Write]] = queue.SimpleQueue()

    def start(self) -> None:
        """See GroupCommit."""
        super().start()
        # A daemon: a process ends although it never closed its database, as if it were killed.
        threading.Thread(target=self._work, args=(self._loop,), name="database-writer", daemon=True).start()

    def _begin(self, writes: Sequence[Write]) -> None:
        if len(writes) <= MAX_AT_ONCE and all(write.brief and not write.synced for write in writes):
            group = self._commit_at_once(writes)
            if group is not None:
                self._report([group])
                return
        self._at_once_in_a_row = 0
        self._queue.put(writes)

    def _commit_at_once(self, writes: Sequence[Write]) -> Group | None:
        """Commits in the event loop. Returns None if nothing is written, because the thread must or something failed."""
        began = self._tick()
        if self._at_once_in_a_row >= MAX_AT_ONCE_IN_A_ROW or began < self._thread_until:
            return None
        group = Group(writes)
        try:
            self._transact_at_once(group.run)
        except Exception:  # noqa: BLE001 - the thread does the same again, and reports what fails
            return None
        ended = self._tick()
        group.seconds = ended - began
        self._at_once_in_a_row += 1
        if group.seconds > SLOW_SECONDS:
            self._thread_until = ended + SLOW_PAUSE_SECONDS
        return group

    def commit_now(self, work: Work[Any]) -> bool:
        """Does a brief write before it returns, without a sync. Returns False if nothing is written; queue it then.

        Nobody shares its transaction.
        """
        if self._busy or self._waiting or self._loop is None:
            return False
        group = self._commit_at_once([Write(work, self._loop.create_future(), synced=False)])
        if group is not None:
            self.on_commit(group.seconds)
        return group is not None

    def _end(self) -> None:
        self._queue.put(())

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        while writes := self._queue.get():
            groups = self._commit(writes)
            with contextlib.suppress(RuntimeError):  # the loop has been closed, and nobody waits
                loop.call_soon_threadsafe(self._report, groups)

    def _commit(self, writes: Sequence[Write]) -> list[Group]:
        waiting, ended = deque([Group(writes)]), list[Group]()
        while waiting:
            group, since = waiting.popleft(), time.monotonic()
            try:
                self._transact(group.run, group.synced)
            except Exception as error:  # noqa: BLE001 - the error of a write, which gets it
                waiting.extend(group.fail(error))
            group.seconds = time.monotonic() - since
            ended.append(group)
        return ended


class LoopCommit(GroupCommit):
    """Commits in the event loop. `transact` runs a function in a transaction; its second argument: whether it is synced."""

    def __init__(
        self, transact: Callable[[Work[Any], bool], Awaitable[Any]], translate: Callable[[Exception], Exception]
    ) -> None:
        super().__init__(translate)
        self._transact = transact
        self._task: asyncio.Task[None] | None = None

    def _begin(self, writes: Sequence[Write]) -> None:
        self._task = asyncio.create_task(self._commit(writes), name="group-commit")

    def _end(self) -> None:
        self._task = None

    async def _commit(self, writes: Sequence[Write]) -> None:
        waiting, ended = deque([Group(writes)]), list[Group]()
        while waiting:
            group, since = waiting.popleft(), time.monotonic()
            try:
                await self._transact(group.run, group.synced)
            except Exception as error:  # noqa: BLE001 - the error of a write, which gets it
                waiting.extend(group.fail(error))
            group.seconds = time.monotonic() - since
            ended.append(group)
        self._report(ended)
