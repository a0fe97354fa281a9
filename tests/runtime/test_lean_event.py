"""LeanEvent behaves as asyncio.Event does."""

from __future__ import annotations

import asyncio

import pytest

from tallystick.runtime.lean_event import LeanEvent


@pytest.fixture(params=[LeanEvent, asyncio.Event])
def event(request: pytest.FixtureRequest) -> LeanEvent:
    """Both kinds."""
    made: LeanEvent = request.param()
    return made


async def _turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_set_before_and_during_a_wait(event: LeanEvent) -> None:
    """A set event is waited for at once; a later set wakes all that wait, each once, even if it is cleared before they run."""
    event.set()
    event.set()
    assert event.is_set()
    assert await event.wait()
    event.clear()
    assert not event.is_set()
    waits = [asyncio.create_task(event.wait()) for _ in range(3)]
    await _turns()
    assert not any(wait.done() for wait in waits)
    event.set()
    event.clear()
    assert await asyncio.gather(*waits) == [True] * 3
    later = asyncio.create_task(event.wait())
    await _turns()
    assert not later.done()
    event.set()
    assert await later


async def test_a_wait_that_is_cancelled_concerns_no_other(event: LeanEvent) -> None:
    """Neither before the event is set nor in the same turn of the loop."""
    first, second, third = (asyncio.create_task(event.wait()) for _ in range(3))
    await _turns()
    first.cancel()
    await asyncio.wait({first})
    assert first.cancelled()
    event.set()
    second.cancel()
    assert await third
    await asyncio.wait({second})
    assert event.is_set()


async def test_nothing_is_kept_after_a_wait() -> None:
    """Neither of one that was woken nor of one that was cancelled."""
    event = LeanEvent()
    for end in (asyncio.Task.cancel, lambda _: event.set()):
        wait = asyncio.create_task(event.wait())
        await _turns()
        end(wait)
        await asyncio.wait({wait})
        assert event._futures == ()
        event.clear()
