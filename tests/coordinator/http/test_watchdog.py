from __future__ import annotations

import asyncio
from contextlib import closing
from typing import Any

import pytest

from coordinator.http.watchdog import Watchdog
from tests.virtual_time import on_virtual_time


async def test_a_result_in_time_is_returned() -> None:
    """An await that is fast enough returns its result or raises its error, any number of times."""

    async def fail() -> None:
        raise KeyError

    with closing(Watchdog(60)) as watchdog:
        for number in range(3):
            assert await watchdog.wait(asyncio.sleep(0, number)) == number
        with pytest.raises(KeyError):
            await watchdog.wait(fail())


@on_virtual_time
async def test_a_slow_operation_is_stopped() -> None:
    """An await that takes too long is interrupted; the task continues and can wait again."""
    with closing(Watchdog(0.01)) as watchdog:
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await watchdog.wait(asyncio.Event().wait())
        assert await watchdog.wait(asyncio.sleep(0, "done")) == "done"


@on_virtual_time
async def test_time_between_awaits_does_not_count() -> None:
    """Only waiting is bounded, not the task's other work."""
    with closing(Watchdog(0.01)) as watchdog:
        await watchdog.wait(asyncio.sleep(0))
        await asyncio.sleep(0.05)
        assert await watchdog.wait(asyncio.sleep(0, "done")) == "done"


async def test_it_can_be_cut_from_outside() -> None:
    """`trip` interrupts the wait under way; without a wait it does nothing."""
    with closing(Watchdog(60)) as watchdog:
        watchdog.trip()
        loop = asyncio.get_running_loop()
        for _ in range(2):
            loop.call_soon(watchdog.trip)
            loop.call_soon(watchdog.trip)
            with pytest.raises(TimeoutError):
                await watchdog.wait(asyncio.Event().wait())


async def test_a_cancelled_task_stays_cancelled() -> None:
    """Cancelling the task is not mistaken for a timeout, even if both happen at once."""
    caught: list[type[BaseException]] = []
    watchdogs: list[Watchdog] = []

    async def work() -> None:
        with closing(Watchdog(60)) as watchdog:
            watchdogs.append(watchdog)
            try:
                await watchdog.wait(asyncio.Event().wait())
            except BaseException as error:
                caught.append(type(error))
                raise

    for together in (False, True):
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        if together:
            watchdogs[-1].trip()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert caught == [asyncio.CancelledError] * 2


async def test_watchdogs_share_a_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many wait, the event loop has one timer for those of the same time, and none once they are closed.

    It looks often enough: whenever a wait begins, its end is at most a quarter late.
    """
    loop, timers = asyncio.get_running_loop(), list[asyncio.TimerHandle]()
    call_later = loop.call_later

    def counted(seconds: float, *call: Any) -> asyncio.TimerHandle:
        assert seconds <= 61 / 4
        timers.append(call_later(seconds, *call))
        return timers[-1]

    monkeypatch.setattr(loop, "call_later", counted)
    watchdogs = [Watchdog(61) for _ in range(5)]
    assert len(timers) == 1
    for watchdog in watchdogs:
        assert not timers[0].cancelled()
        watchdog.close()
    assert timers[0].cancelled()


async def test_it_belongs_to_a_task() -> None:
    """A watchdog must be created inside a task."""
    made: list[str] = []

    def outside() -> None:
        try:
            Watchdog(1)
        except RuntimeError as error:
            made.append(str(error))

    asyncio.get_running_loop().call_soon(outside)
    await asyncio.sleep(0)
    assert made == ["a Watchdog must be created inside a task"]
