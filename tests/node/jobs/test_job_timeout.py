from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from node.jobs.job_timeout import JobTimeout


async def hang(total: float, act: Callable[[JobTimeout], None]) -> None:
    """Waits for ever, within a timeout that `act` changes first."""
    async with JobTimeout(total) as timeout:
        act(timeout)
        await asyncio.Event().wait()


async def hang_later(total: float, first: Callable[[JobTimeout], None], then: Callable[[JobTimeout], None]) -> None:
    """Waits for a moment after `first`, then for ever after `then`."""
    async with JobTimeout(total) as timeout:
        first(timeout)
        await asyncio.sleep(0.03)
        then(timeout)
        await asyncio.Event().wait()


def after(seconds: float) -> Callable[[JobTimeout], None]:
    """Lets the wait end."""
    return lambda timeout: timeout.renew(seconds)


async def test_a_wait_that_is_not_renewed_ends() -> None:
    """The block is cancelled, and TimeoutError follows; the task is not cancelled."""
    with pytest.raises(TimeoutError):
        await hang(600, after(0.01))
    current = asyncio.current_task()
    assert current is not None
    assert not current.cancelling()


async def test_a_renewed_wait_goes_on() -> None:
    """A timer that comes early does not end a wait that was renewed; a shorter time counts at once."""

    def renew_twice(timeout: JobTimeout) -> None:
        timeout.renew(0.01)
        timeout.renew(300)

    with pytest.raises(TimeoutError):
        await hang_later(600, renew_twice, after(0.01))


async def test_a_paused_wait_does_not_end() -> None:
    """Until it is renewed again."""

    def pause(timeout: JobTimeout) -> None:
        timeout.renew(0.01)
        timeout.pause()

    passed: list[float] = []

    def renew(timeout: JobTimeout) -> None:
        passed.append(asyncio.get_running_loop().time())
        timeout.renew(0.01)

    with pytest.raises(TimeoutError):
        await hang_later(600, pause, renew)
    assert passed


async def test_the_total_ends_however_the_wait_goes_on() -> None:
    """Neither `renew` nor `pause` extends the total."""
    with pytest.raises(TimeoutError):
        await hang(0.05, after(600))
    with pytest.raises(TimeoutError):
        await hang(0.05, JobTimeout.pause)
    with pytest.raises(TimeoutError):
        await hang_later(0.05, after(600), after(600))


async def test_a_suspended_total_does_not_end() -> None:
    """Until it is set again; the wait goes on meanwhile."""
    ends: list[float] = []

    def suspend(timeout: JobTimeout) -> None:
        end = timeout.when()
        assert end is not None
        ends.append(end)
        timeout.reschedule(None)
        assert timeout.when() is None

    with pytest.raises(TimeoutError):
        await hang_later(0.01, suspend, lambda timeout: timeout.reschedule(ends[0]))
    assert len(ends) == 1

    def suspend_and_wait(timeout: JobTimeout) -> None:
        timeout.reschedule(None)
        timeout.renew(0.02)

    with pytest.raises(TimeoutError):
        await hang(0.01, suspend_and_wait)


async def test_a_cancellation_from_outside_stays_one() -> None:
    """A job that is stopped is cancelled, not timed out."""
    begun = asyncio.Event()

    async def wait() -> None:
        async with JobTimeout(600):
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
        async with JobTimeout(600):
            raise ValueError("broken")
