"""Waiting with a deadline behaves as asyncio.timeout does, and sets no timer for what need not wait."""

from __future__ import annotations

import asyncio

import pytest

from tallystick.runtime.deadlines import wait_within
from tests.virtual_time import on_virtual_time


async def test_what_need_not_wait_sets_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result of an awaitable that ends at once comes without a timer, and so does its error."""

    async def at_once() -> str:
        return "done"

    monkeypatch.delattr(asyncio, "timeout")
    assert await wait_within(1, at_once()) == "done"

    async def fails() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await wait_within(1, fails())


@on_virtual_time
async def test_what_waits_within_its_deadline() -> None:
    """The result comes after any number of waits, bare yields among them, and of futures too."""

    async def slow() -> str:
        await asyncio.sleep(0)
        await asyncio.sleep(1)
        await asyncio.sleep(1)
        return "slow"

    assert await wait_within(3, slow()) == "slow"
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(1, future.set_result, 7)
    assert await wait_within(3, future) == 7


@on_virtual_time
async def test_a_missed_deadline_cancels() -> None:
    """After the deadline the awaitable is cancelled, and what it does on that is waited for."""
    seen: list[str] = []

    async def stuck() -> None:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            seen.append("cancelled")
            await asyncio.sleep(0)
            seen.append("cleaned up")
            raise

    with pytest.raises(TimeoutError):
        await wait_within(2, stuck())
    assert seen == ["cancelled", "cleaned up"]


@on_virtual_time
async def test_a_cancellation_from_outside_is_no_timeout() -> None:
    """Cancelling the task that waits cancels the awaitable, whose result counts if it has one all the same."""

    async def stuck() -> str:
        await asyncio.sleep(100)
        return "never"

    async def stubborn() -> str:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            return "kept"
        return "never"

    waiting = asyncio.create_task(wait_within(50, stuck()))
    await asyncio.sleep(1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    waiting = asyncio.create_task(wait_within(50, stubborn()))
    await asyncio.sleep(1)
    waiting.cancel()
    assert await waiting == "kept"
