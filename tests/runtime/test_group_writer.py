"""Grouped writes: who waits for whom, and what happens to a group that fails."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
from sqlalchemy import Connection

from tallystick.protocol.errors import Code, Unavailable
from tallystick.runtime.group_writer import (
    JOBS_A_WAIT,
    LAZY_SECONDS,
    MAX_QUEUED,
    GroupWriter,
    Patience,
)
from tallystick.runtime.storage import Database

PATIENCE = Patience(a_job=0.003, most=0.1)


class _Timer:
    """A timer that a test runs."""

    def __init__(self, seconds: float, function: Callable[[], None]) -> None:
        self.seconds, self.function, self.cancelled = seconds, function, False

    def cancel(self) -> None:
        self.cancelled = True


class _Database:
    """Runs writes as the tests let it, and counts transactions."""

    def __init__(self) -> None:
        self.groups = 0
        self.synced = list[bool]()
        self.open = asyncio.Event()
        self.open.set()
        self.error: Exception | None = None

    async def write(self, work: Callable[[Connection], Any], *, synced: bool) -> Any:
        await self.open.wait()
        self.groups += 1
        self.synced.append(synced)
        if self.error is not None:
            raise self.error
        return work(cast("Connection", None))


class _Writer:
    """A writer, its database, its timers, and the groups of items that were written."""

    def __init__(self) -> None:
        self.database, self.timers, self.running = _Database(), list[_Timer](), 0
        self.written = list[list[Any]]()
        self.now = 0.0
        self.writer = GroupWriter(
            cast("Database", self.database), lambda: self.running, PATIENCE, later=self._later, tick=lambda: self.now
        )

    def _later(self, seconds: float, function: Callable[[], None]) -> asyncio.TimerHandle:
        self.timers.append(_Timer(seconds, function))
        return cast("asyncio.TimerHandle", self.timers[-1])

    def apply(self, _connection: Connection, items: Sequence[Any]) -> None:
        if "bad" in items:
            raise ValueError("bad")
        self.written.append(list(items))

    def add(self, item: Any, *, waited: bool) -> asyncio.Future[None]:
        return self.writer.add(self.apply, item, waited=waited).done


@pytest.fixture
async def writer() -> _Writer:
    """An idle writer."""
    return _Writer()


async def test_a_lone_write_waits_for_nothing(writer: _Writer) -> None:
    """Whoever waits gets a transaction at once while few jobs run."""
    writer.running = JOBS_A_WAIT
    await writer.add("a", waited=True)
    assert writer.written == [["a"]]
    assert not writer.timers


async def test_what_nobody_waits_for_goes_along(writer: _Writer) -> None:
    """It shares the next transaction; alone, it is committed soon."""
    lazy = writer.add("lazy", waited=False)
    (timer,) = writer.timers
    assert timer.seconds == LAZY_SECONDS
    await writer.add("a", waited=True)
    assert lazy.done()
    assert timer.cancelled
    assert writer.written == [["lazy", "a"]]
    alone = writer.add("alone", waited=False)
    writer.timers[-1].function()
    await alone
    assert writer.written[1:] == [["alone"]]


async def test_many_jobs_end_together(writer: _Writer) -> None:
    """While many run, a write waits until a part of them waits, or for a short time."""
    await writer.add("before", waited=True)
    writer.written.clear()
    writer.running = 3 * JOBS_A_WAIT
    waiting = [writer.add(name, waited=True) for name in "ab"]
    assert [timer.seconds for timer in writer.timers] == [PATIENCE.a_job * writer.running]
    assert not writer.written
    await asyncio.gather(*waiting, writer.add("c", waited=True))
    assert writer.written == [["a", "b", "c"]]
    late = writer.add("d", waited=True)
    writer.timers[-1].function()
    await late
    assert writer.written[1:] == [["d"]]


async def test_jobs_that_end_seldom_do_not_wait(writer: _Writer) -> None:
    """However many run: no other would end meanwhile."""
    writer.running = 1_000
    for name in "abc":
        writer.now += PATIENCE.most + 0.001
        await writer.add(name, waited=True)
    assert writer.written == [["a"], ["b"], ["c"]]
    writer.now += PATIENCE.most
    late = writer.add("d", waited=True)
    assert [timer.seconds for timer in writer.timers] == [PATIENCE.most]
    writer.timers[0].function()
    await late


async def test_writes_during_a_transaction_share_the_next_one(writer: _Writer) -> None:
    """One transaction runs at a time."""
    writer.database.open.clear()
    first = writer.add("a", waited=True)
    await asyncio.sleep(0)
    others = [writer.add(name, waited=True) for name in "bc"]
    writer.database.open.set()
    await asyncio.gather(first, *others)
    assert writer.written == [["a"], ["b", "c"]]


async def test_only_the_bad_write_fails(writer: _Writer) -> None:
    """The others of its group are written."""
    writer.running = 100
    entries = [writer.add(name, waited=False) for name in ("a", "bad", "c")]
    await writer.writer.flush()
    results = await asyncio.gather(*entries, return_exceptions=True)
    assert [type(result) for result in results] == [type(None), ValueError, type(None)]
    assert writer.written == [["a"], ["c"]]


async def test_a_database_that_does_not_answer_is_asked_once(writer: _Writer) -> None:
    """All writes of the group get the error."""
    writer.database.error = Unavailable(Code.DATABASE_UNAVAILABLE, "gone")
    entries = [writer.add(name, waited=False) for name in "ab"]
    await writer.writer.flush()
    results = await asyncio.gather(*entries, return_exceptions=True)
    assert results == [writer.database.error] * 2
    assert writer.database.groups == 1


async def test_the_queue_is_bounded(writer: _Writer) -> None:
    """Beyond it, a write is refused."""
    writer.database.open.clear()
    for number in range(MAX_QUEUED):
        writer.add(number, waited=False)
    with pytest.raises(Unavailable, match="its write queue is full"):
        writer.add("more", waited=True)
    assert writer.writer.queued == MAX_QUEUED
    writer.database.open.set()
    await writer.writer.flush()
    assert writer.writer.queued == 0


async def test_closing_commits_what_is_queued(writer: _Writer) -> None:
    """And refuses what comes later."""
    lazy = writer.add("a", waited=False)
    await writer.writer.close()
    assert lazy.done()
    with pytest.raises(Unavailable, match="closed"):
        writer.add("b", waited=False)


async def test_what_a_write_became_is_told_before_its_waiters_go_on(writer: _Writer) -> None:
    """Notes are called in their order, each with the error; a note with a bug keeps nobody waiting."""
    told = list[tuple[str, Exception | None]]()

    def bug(_error: Exception | None) -> None:
        raise RuntimeError("a bug")

    for item, error in (("a", None), ("bad", ValueError)):
        entry = writer.writer.add(writer.apply, item, waited=False)
        entry.then(lambda error: told.append(("first", error)))
        entry.then(bug)
        entry.then(lambda error: told.append(("second", error)))
        futures = [entry.done for _ in range(3)]
        futures[0].cancel()
        await writer.writer.flush()
        assert [name for name, _ in told] == ["first", "second"]
        for future in (*futures[1:], entry.done):
            assert future.done()
            assert (None if error is None else error) is (None if future.exception() is None else type(future.exception()))
        assert {type(given) for _, given in told} == {type(None) if error is None else error}
        entry.settle(OSError("too late"))
        assert len(told) == 2
        told.clear()


async def test_a_group_is_synced_if_one_of_its_writes_must_be(writer: _Writer) -> None:
    """A write that others can replace is not synced for its own sake; alone, each has what it asked for."""

    async def group(*synced: bool, items: str = "abc") -> list[bool]:
        writer.database.synced.clear()
        for item, wanted in zip(items, synced, strict=False):
            writer.writer.add(writer.apply, "bad" if item == "x" else item, waited=False, synced=wanted)
        await writer.writer.flush()
        return writer.database.synced

    assert await group(False, False, False) == [False]
    assert await group(False, True, False) == [True]
    assert await group(False, True, False, items="xbc") == [True, False, True, False]


async def test_a_committed_write_refers_to_nothing_that_refers_to_it(writer: _Writer) -> None:
    """Whoever wants to know of a write usually holds it: such a cycle would live until the garbage collector runs."""
    entry = writer.writer.add(writer.apply, "a", waited=True)
    entry.then(lambda _: None)
    await entry.done
    assert not [kept for kept in gc.get_referents(entry) if isinstance(kept, list) and kept]
