"""The slot limiter: a number of jobs at once, in order, and a limit that follows the engine's behaviour."""

from __future__ import annotations

import asyncio
import random

import pytest

from node.domain.slot_limiter import COOLDOWN_SECONDS, MAX_PAUSE_SECONDS, MIN_PAUSE_SECONDS, SlotLimiter


async def _enter(limiter: SlotLimiter, inside: list[int], number: int, leave: asyncio.Event) -> None:
    async with limiter.hold():
        inside.append(number)
        await leave.wait()


async def test_slots_are_granted_in_order() -> None:
    """Slots are granted first come, first served; a job that gives up does not delay the next."""
    limiter, inside, leave = SlotLimiter(2), list[int](), [asyncio.Event() for _ in range(6)]
    tasks = [asyncio.create_task(_enter(limiter, inside, number, leave[number])) for number in range(6)]
    await asyncio.sleep(0)
    assert inside == [0, 1]
    tasks[2].cancel()
    await asyncio.sleep(0)
    leave[1].set()
    await asyncio.sleep(0.01)
    assert inside == [0, 1, 3]
    leave[0].set()
    tasks[4].cancel()
    await asyncio.sleep(0.01)
    assert inside == [0, 1, 3, 5]
    for event in leave:
        event.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    async with limiter.hold(), limiter.hold():
        pass


async def test_a_slot_granted_during_a_cancellation_is_passed_on() -> None:
    """No slot is lost if grant and cancellation happen at once."""
    chance = random.Random(5)
    for _ in range(200):
        limiter, inside, leave = SlotLimiter(1), list[int](), asyncio.Event()
        leave.set()
        tasks = [asyncio.create_task(_enter(limiter, inside, number, leave)) for number in range(5)]
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        for task in chance.sample(tasks, 3):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with asyncio.timeout(60), limiter.hold():
            pass


def test_a_fixed_limit_stays() -> None:
    """Without `max_limit`, the limit never changes."""
    limiter = SlotLimiter(4)
    assert not limiter.learn(0, busy=True, first_seconds=None, full=True)
    assert limiter.limit == 4


def test_the_limit_grows_while_slots_are_full() -> None:
    """The limit grows by one for a full round of jobs, not while slots are free, and never above `max_limit`."""
    limiter = SlotLimiter(2, 4)
    for _ in range(10):
        limiter.learn(0, busy=False, first_seconds=0.1, full=False)
    assert limiter.limit == 2
    rounds = 0
    while limiter.limit < 4:
        rounds += 1
        limiter.learn(0, busy=False, first_seconds=0.1, full=True)
    assert rounds == 6, "two jobs fill two slots, three fill three; the last rounding adds one"
    for _ in range(100):
        limiter.learn(0, busy=False, first_seconds=0.1, full=True)
    assert limiter.limit == 4


def test_the_limit_falls_when_the_engine_is_busy_or_slow() -> None:
    """The limit falls by a third, at most once per cooldown, and never below one."""
    limiter = SlotLimiter(10, 20)
    assert limiter.learn(0, busy=True, first_seconds=None, full=True)
    assert limiter.limit == 7
    assert not limiter.learn(COOLDOWN_SECONDS / 2, busy=True, first_seconds=None, full=True), "the same report again"
    assert limiter.learn(COOLDOWN_SECONDS, busy=True, first_seconds=None, full=True)
    for second in range(10, 100, 10):
        limiter.learn(second, busy=True, first_seconds=None, full=True)
    assert limiter.limit == 1
    limiter = SlotLimiter(10, 20)
    for _ in range(5):
        limiter.learn(0, busy=False, first_seconds=0.1, full=False)
    for _ in range(10):
        limiter.learn(100, busy=False, first_seconds=2.0, full=False)
    assert limiter.limit == 7


@pytest.mark.parametrize("capacity", [3, 12, 30])
def test_the_limit_converges_to_the_engines_capacity(capacity: int) -> None:
    """For an engine that slows down beyond a number of requests, the limit settles around that number, from either side."""
    for start in (1, 40):
        limiter, seen = SlotLimiter(start, 64), list[int]()
        for job in range(4_000):
            slow = max(1.0, limiter.limit / capacity) ** 4
            limiter.learn(job * 0.5, busy=limiter.limit > 2 * capacity, first_seconds=0.05 * slow, full=True)
            seen.append(limiter.limit)
        settled = seen[1_000:]
        assert capacity * 0.6 <= sum(settled) / len(settled) <= capacity * 1.8


async def test_an_engine_with_a_queue_gets_that_many_jobs_more() -> None:
    """The depth counts beside the slots; a change of the config applies to the jobs that wait."""
    limiter, inside, leave = SlotLimiter(2, queue_depth=1), list[int](), asyncio.Event()
    tasks = [asyncio.create_task(_enter(limiter, inside, number, leave)) for number in range(5)]
    await asyncio.sleep(0)
    assert (inside, limiter.limit, limiter.queue, limiter.running) == ([0, 1, 2], 2, 1, 3)
    limiter.reset(2, None, 2)
    await asyncio.sleep(0)
    assert (inside, limiter.queue) == ([0, 1, 2, 3], 2)
    leave.set()
    await asyncio.gather(*tasks)
    assert limiter.running == 0


async def test_a_refusal_shows_how_many_jobs_an_engine_takes() -> None:
    """An engine that refuses its third job has two, whatever its config says; then it gets one more after each pause."""
    limiter = SlotLimiter(4, queue_depth=1)
    async with limiter.hold(), limiter.hold():
        async with limiter.hold():
            assert limiter.refused(now=100) == MIN_PAUSE_SECONDS
        assert (limiter.limit, limiter.queue) == (2, 0)
        assert limiter.try_more()
        assert (limiter.limit, limiter.queue) == (3, 0)
        assert limiter.try_more()
        assert (limiter.limit, limiter.queue) == (4, 0)
        assert not limiter.try_more()
        assert (limiter.limit, limiter.queue) == (4, 1)
        assert not limiter.try_more()


async def test_refusals_that_follow_each_other_are_left_longer_and_longer_pauses() -> None:
    """The pause doubles up to a bound, counts once for jobs that began before it, and is short again after a quiet time."""
    limiter, now, pauses = SlotLimiter(4), 0.0, list[float]()
    for _ in range(7):
        async with limiter.hold():
            pauses.append(limiter.refused(now))
            assert limiter.refused(now + pauses[-1] / 2) == pauses[-1], "the same burst"
            now += 1.5 * pauses[-1]
        limiter.try_more()
    assert pauses == [1, 2, 4, 8, 16, MAX_PAUSE_SECONDS, MAX_PAUSE_SECONDS]
    async with limiter.hold():
        assert limiter.refused(now + 1_000) == MIN_PAUSE_SECONDS
        assert limiter.refused(now + 2_000, retry_after=7) == 7
        assert limiter.refused(now + 3_000, retry_after=9_999) == MAX_PAUSE_SECONDS


async def test_an_engine_that_refuses_its_only_job_gets_none_for_a_pause() -> None:
    """Jobs wait for the pause to end instead of running into the same refusal."""
    limiter, inside, leave = SlotLimiter(2), list[int](), asyncio.Event()
    async with limiter.hold():
        limiter.refused(now=0)
    assert limiter.limit == 0
    task = asyncio.create_task(_enter(limiter, inside, 1, leave))
    await asyncio.sleep(0)
    assert inside == []
    limiter.try_more()
    await asyncio.sleep(0)
    assert inside == [1]
    leave.set()
    await task
