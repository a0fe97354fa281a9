"""Brief writes that need no sync: committed in the event loop if nothing has to wait there, else by the thread."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from tallystick.protocol.errors import Unavailable
from tallystick.runtime import group_commit
from tallystick.runtime.group_commit import MAX_AT_ONCE, MAX_AT_ONCE_IN_A_ROW, SLOW_PAUSE_SECONDS, SLOW_SECONDS, ThreadCommit
from tallystick.runtime.sqlite_backend import CHECKPOINT_PAGES
from tallystick.runtime.storage import Database
from tests.runtime.test_storage import durability, ids, insert, opened, sqlite, stuck, url

__all__ = ["sqlite", "url"]  # fixtures


class Threads:
    """Notes whether each write ran in the event loop."""

    def __init__(self) -> None:
        self.in_loop: list[bool] = []
        self._loop_thread = threading.get_ident()

    def noting(self, work: Callable[[Connection], object]) -> Callable[[Connection], object]:
        """The same work, which notes its thread."""

        def noted(connection: Connection) -> object:
            result = work(connection)
            self.in_loop.append(threading.get_ident() == self._loop_thread)
            return result

        return noted


@contextlib.contextmanager
def locked(database: Database) -> Iterator[None]:
    """Holds the file's write lock inside the context, as another process would."""
    other = sqlite3.connect(str(database.url.database), isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.rollback()
        other.close()


@contextlib.asynccontextmanager
async def opened_timeless(url: str) -> AsyncIterator[Database]:
    """An open database to which no write seems slow, however busy the machine is."""
    async with opened(url) as database:
        database._backend.commits._tick = lambda: 0.0  # type: ignore[attr-defined]  # of ThreadCommit
        yield database


class Clock:
    """A clock that each reading moves on."""

    def __init__(self) -> None:
        self.now, self.step = 100.0, 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


async def test_a_brief_write_runs_in_the_event_loop(sqlite: str) -> None:
    """It is committed, not synced, when its caller goes on; any other write takes the thread."""
    async with opened_timeless(sqlite) as database:
        threads = Threads()
        assert await database.write(threads.noting(insert(1)), synced=False, brief=True) == 1
        assert await database.write(durability, synced=False, brief=True) == "1", "NORMAL"
        await database.write(threads.noting(insert(2)), synced=False)
        await database.write(threads.noting(insert(3)), brief=True)
        assert await database.write(durability) == "2", "FULL"
        assert threads.in_loop == [True, False, False]
        with contextlib.closing(sqlite3.connect(str(database.url.database))) as other:
            assert other.execute("SELECT id FROM facts ORDER BY id").fetchall() == [(0,), (1,), (2,), (3,)]


@pytest.mark.parametrize("count", [MAX_AT_ONCE, MAX_AT_ONCE + 1])
async def test_brief_writes_of_one_turn_share_a_transaction(sqlite: str, count: int) -> None:
    """A few of them run in the event loop, more of them in the thread."""
    async with opened_timeless(sqlite) as database:
        threads, commits = Threads(), list[float]()
        database.on_commit = commits.append
        works = [threads.noting(insert(number)) for number in range(1, count + 1)]
        await asyncio.gather(*(database.write(work, synced=False, brief=True) for work in works))
        assert threads.in_loop == [count <= MAX_AT_ONCE] * count
        assert len(commits) == 1
        assert await database.read(ids) == list(range(count + 1))


async def test_a_brief_write_that_comes_with_others_keeps_its_place(sqlite: str) -> None:
    """Beside a write that is synced or long, it goes to the thread in the order of the calls."""
    for synced, brief in ((True, True), (False, False)):
        async with opened_timeless(sqlite) as database:
            before = await database.read(ids)
            threads, number = Threads(), len(before)
            first = database.write(threads.noting(insert(number)), synced=False, brief=True)
            second = database.write(threads.noting(ids), synced=synced, brief=brief)
            assert (await asyncio.gather(first, second))[1] == [*before, number]
            assert threads.in_loop == [False, False]


async def test_a_locked_file_keeps_the_event_loop_free(sqlite: str) -> None:
    """If another process holds the lock, the thread waits for it, and the write is done when the lock is free."""
    async with opened_timeless(sqlite) as database:
        threads = Threads()
        await database.write(insert(1), synced=False, brief=True)
        with locked(database):
            assert not database.commit_now(threads.noting(insert(2)))
            waiting = asyncio.create_task(database.write(threads.noting(insert(2)), synced=False, brief=True))
            for _ in range(5):  # would take BUSY_SECONDS each if the event loop waited
                await asyncio.sleep(0)
            assert not waiting.done()
        assert await waiting == 2
        assert threads.in_loop == [False]
        assert await database.write(threads.noting(insert(3)), synced=False, brief=True) == 3
        assert threads.in_loop == [False, True], "the next one is back in the event loop"


async def test_a_brief_write_that_fails_fails_as_any_other(sqlite: str) -> None:
    """Its caller gets the error, the good writes of its transaction are stored, and so are later ones."""
    async with opened(sqlite) as database:
        works = (insert(1), insert(0), insert(2))
        results = await asyncio.gather(
            *(database.write(work, synced=False, brief=True) for work in works), return_exceptions=True
        )
        assert (results[0], type(results[1]), results[2]) == (1, IntegrityError, 2)
        assert await database.write(insert(3), synced=False, brief=True) == 3
        assert await database.read(ids) == [0, 1, 2, 3]


async def test_commit_now_is_done_when_it_returns(sqlite: str) -> None:
    """It stores all of a write or, if it fails, nothing; it never overtakes writes that wait."""
    async with opened(sqlite) as database:
        commits = list[float]()
        database.on_commit = commits.append
        assert database.commit_now(insert(1))
        assert len(commits) == 1
        assert not database.commit_now(lambda c: (insert(2)(c), insert(1)(c)))
        assert await database.read(ids) == [0, 1]
        async with stuck(database):
            assert not database.commit_now(insert(2))
        waiting = asyncio.create_task(database.write(ids, synced=False, brief=True))
        await asyncio.sleep(0)
        assert not database.commit_now(insert(2))
        assert await waiting == [0, 1]
    assert not database.commit_now(insert(2)), "closed"


async def test_postgresql_has_no_short_way(url: str) -> None:
    """There, a brief write is an ordinary one."""
    async with opened(url) as database:
        assert database.commit_now(insert(1)) is database.url.drivername.startswith("sqlite")
        assert await database.write(insert(2), synced=False, brief=True) == 2


async def test_the_thread_commits_now_and_then(sqlite: str) -> None:
    """After some transactions in the event loop the thread commits one, which copies a long log into the database."""
    async with opened_timeless(sqlite) as database:
        threads = Threads()
        for number in range(1, MAX_AT_ONCE_IN_A_ROW + 3):
            await database.write(threads.noting(insert(number)), synced=False, brief=True)
        expected = [True] * MAX_AT_ONCE_IN_A_ROW + [False, True]
        assert threads.in_loop == expected


async def test_the_log_does_not_grow_without_end(sqlite: str) -> None:
    """However much is committed in the event loop, the thread copies the log into the database, and it is used again."""
    rounds, pages = 6, 40
    async with opened_timeless(sqlite) as database:
        for number in range(1, rounds * MAX_AT_ONCE_IN_A_ROW):
            await database.write(insert(number, f"{number} " + "x" * pages * 4_096), synced=False, brief=True)
        size = await asyncio.to_thread(lambda: Path(f"{database.url.database}-wal").stat().st_size)
        written = rounds * MAX_AT_ONCE_IN_A_ROW * pages * 4_096
        assert MAX_AT_ONCE_IN_A_ROW * pages > CHECKPOINT_PAGES
        assert size < written / 2


async def test_a_slow_disk_gets_the_thread_for_a_while() -> None:
    """After a transaction that took long, later ones leave the event loop alone for some time, then it is tried again."""
    clock, used = Clock(), list[str]()

    def transact(work: Callable[[Connection], object], _synced: bool) -> None:
        used.append("thread")
        work(None)  # type: ignore[arg-type]  # the work needs no connection

    def transact_at_once(work: Callable[[Connection], object]) -> None:
        used.append("loop")
        work(None)  # type: ignore[arg-type]  # see above

    commits = ThreadCommit(transact, transact_at_once, lambda error: error, tick=clock)
    commits.start()

    async def write() -> None:
        future = asyncio.get_running_loop().create_future()
        commits.put(group_commit.Write(lambda _c: None, future, synced=False, brief=True))
        await future

    clock.step = SLOW_SECONDS  # as much as is allowed
    await write()
    clock.step = SLOW_SECONDS * 1.5
    await write()
    clock.step = 0.0
    await write()
    clock.now += SLOW_PAUSE_SECONDS
    await write()
    await commits.close()
    assert used == ["loop", "loop", "thread", "loop"]


async def test_a_database_that_is_closed_takes_no_brief_write(sqlite: str) -> None:
    """After `close`, it raises as any other write does."""
    async with opened(sqlite) as database:
        await database.write(insert(1), synced=False, brief=True)
    with pytest.raises(Unavailable, match="closed"):
        await database.write(insert(2), synced=False, brief=True)
