from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from tallystick.client.sdk.admission_turns import AdmissionTurns
from tallystick.protocol.errors import Code, Fault, Refusal, Unavailable

PATIENT = 600
"""Seconds that nobody waits for."""


class Coordinator:
    """Takes a number of jobs at a time."""

    def __init__(self, room: int, retry_after: int | None = PATIENT) -> None:
        self.room, self.retry_after = room, retry_after
        self.attempts = list[int]()
        self.taken = list[int]()
        self.left = list[int]()

    def submit(self, number: int) -> Callable[[int], Awaitable[int]]:
        async def submit(left: int) -> int:
            self.attempts.append(number)
            self.left.append(left)
            await asyncio.sleep(0)
            if len(self.taken) >= self.room:
                error = Unavailable(Code.RATE_LIMITED, "the most", fault=Fault.CLIENT)
                error.retry_after = self.retry_after
                raise error
            self.taken.append(number)
            return number

        return submit


def _turns(most: int = 100) -> AdmissionTurns:
    return AdmissionTurns(time.monotonic, most)


async def _quiet() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def test_all_get_their_turn_in_order() -> None:
    """Each ended job lets the next one in, and nobody else tries."""
    coordinator, turns = Coordinator(2), _turns()
    tasks = [asyncio.create_task(turns.take(coordinator.submit(number), PATIENT)) for number in range(8)]
    await _quiet()
    assert (coordinator.taken, turns.waiting) == ([0, 1], 6)
    late = asyncio.create_task(turns.take(coordinator.submit(8), PATIENT))
    await _quiet()
    assert 8 not in coordinator.attempts, "who comes while others wait does not overtake them"
    tried = len(coordinator.attempts)
    for number in range(2, 9):
        coordinator.room += 1
        turns.job_ended()
        await _quiet()
        assert coordinator.taken == list(range(number + 1))
    assert len(coordinator.attempts) - tried <= 8, "one attempt for each place, and at most one in vain"
    assert await asyncio.gather(*tasks, late) == list(range(9))
    assert turns.waiting == 0
    assert all(0 < left <= PATIENT for left in coordinator.left)


async def test_jobs_that_end_together_let_as_many_in() -> None:
    """No place is left free until the next job ends."""
    coordinator, turns = Coordinator(3), _turns()
    tasks = [asyncio.create_task(turns.take(coordinator.submit(number), PATIENT)) for number in range(6)]
    await _quiet()
    coordinator.room = 6
    for _ in range(3):
        turns.job_ended()
    assert await asyncio.gather(*tasks) == list(range(6))


async def test_places_that_others_free_are_found() -> None:
    """Another process of the wallet ends a job: the coordinator said when to come again."""
    coordinator, turns = Coordinator(0, retry_after=None), _turns()
    waits = asyncio.create_task(turns.take(coordinator.submit(1), PATIENT))
    await _quiet()
    coordinator.room = 1
    assert await waits == 1


async def test_the_time_is_over() -> None:
    """The coordinator's own error says why. One that never had its turn is told how long it waited. Without a wait, at once."""
    coordinator, turns = Coordinator(0, retry_after=None), _turns()
    for wait in (0, 1):
        with pytest.raises(Unavailable, match="the most"):
            await turns.take(coordinator.submit(1), wait)
    first = asyncio.create_task(turns.take(coordinator.submit(1), PATIENT))
    await _quiet()
    with pytest.raises(Unavailable, match=r"within 1 s \(wait_seconds\)") as caught:
        await turns.take(coordinator.submit(2), 1)
    assert (caught.value.code, 2 in coordinator.attempts) == (Code.CLIENT_BUSY, False)
    first.cancel()
    await asyncio.wait({first})
    assert turns.waiting == 0


async def test_other_errors_wait_for_nothing() -> None:
    """A refusal, and a coordinator that is full itself. In the queue too, where the next one then has its turn."""
    coordinator, turns = Coordinator(0), _turns()

    async def refused(_left: int) -> int:
        raise Refusal(Code.INSUFFICIENT_FUNDS, "no funds")

    async def crowded(_left: int) -> int:
        raise Unavailable(Code.RATE_LIMITED, "the queue is full", fault=Fault.COORDINATOR)

    with pytest.raises(Refusal, match="no funds"):
        await turns.take(refused, PATIENT)
    with pytest.raises(Unavailable, match="the queue is full"):
        await turns.take(crowded, PATIENT)
    tasks = [
        asyncio.create_task(turns.take(submit, PATIENT)) for submit in (coordinator.submit(1), refused, coordinator.submit(2))
    ]
    await _quiet()
    coordinator.room = 2
    turns.job_ended()
    turns.job_ended()
    turns.job_ended()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert (results[0], results[2], type(results[1])) == (1, 2, Refusal)


async def test_only_so_many_wait() -> None:
    """One more is refused, with the setting that bounds them."""
    coordinator, turns = Coordinator(0), _turns(most=2)
    tasks = [asyncio.create_task(turns.take(coordinator.submit(number), PATIENT)) for number in range(2)]
    await _quiet()
    with pytest.raises(Unavailable, match=r"2 requests wait.*\(max_jobs\)") as caught:
        await turns.take(coordinator.submit(2), PATIENT)
    assert caught.value.code is Code.CLIENT_BUSY
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert turns.waiting == 0


async def test_a_client_that_stops_lets_nobody_wait() -> None:
    """All try, and get their answers."""
    coordinator, turns = Coordinator(0), _turns()
    tasks = [asyncio.create_task(turns.take(coordinator.submit(number), PATIENT)) for number in range(3)]
    await _quiet()
    coordinator.room = 3
    turns.close()
    assert await asyncio.gather(*tasks) == [0, 1, 2]
