from __future__ import annotations

import asyncio

import pytest

from node.jobs.idle_timeout import IdleTimeout


async def test_a_wait_that_is_not_renewed_ends() -> None:
    """The block is cancelled, and TimeoutError follows; the task is not cancelled."""
    with pytest.raises(TimeoutError):
        async with IdleTimeout(0.01):
            await asyncio.Event().wait()
    current = asyncio.current_task()
    assert current is not None
    assert not current.cancelling()


async def test_a_renewed_wait_goes_on() -> None:
    """A timer that comes early does not end a wait that was renewed; a shorter time counts at once."""
    passed = asyncio.Event()
    async with IdleTimeout(0.01) as idle:
        idle.renew(600)
        asyncio.get_running_loop().call_later(0.03, passed.set)
        await passed.wait()

    async def wait() -> None:
        async with IdleTimeout(600) as idle:
            idle.renew(0.01)
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await wait()


async def test_a_paused_wait_does_not_end() -> None:
    """Until it is renewed again."""
    passed = asyncio.Event()

    async def wait() -> None:
        async with IdleTimeout(0.01) as idle:
            idle.pause()
            asyncio.get_running_loop().call_later(0.03, passed.set)
            await passed.wait()
            idle.renew(0.01)
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await wait()
    assert passed.is_set()


async def test_a_cancellation_from_outside_stays_one() -> None:
    """A job that is stopped is cancelled, not timed out."""
    begun = asyncio.Event()

    async def wait() -> None:
        async with IdleTimeout(600):
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await begun.wait()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


async def test_an_error_of_the_block_is_passed_on() -> None:
    """The timeout hides no error, and leaves no timer behind."""
    with pytest.raises(ValueError, match="broken"):
        async with IdleTimeout(600):
            raise ValueError("broken")
