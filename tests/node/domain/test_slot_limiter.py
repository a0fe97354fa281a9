"""The gate in front of an engine: so many at once, in order, and a limit that follows what the engine takes."""

from __future__ import annotations

import asyncio
import random

import pytest

from node.domain.slot_limiter import COOLDOWN_SECONDS, SlotLimiter


async def _enter(gate: SlotLimiter, inside: list[int], number: int, leave: asyncio.Event) -> None:
    async with gate.hold():
        inside.append(number)
        await leave.wait()


async def test_so_many_at_once_in_order() -> None:
    """Who comes first goes first; one that gives up waiting does not keep the next from its turn."""
    gate, inside, leave = SlotLimiter(2), list[int](), [asyncio.Event() for _ in range(6)]
    tasks = [asyncio.create_task(_enter(gate, inside, number, leave[number])) for number in range(6)]
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
    async with gate.hold(), gate.hold():
        pass


async def test_a_turn_that_comes_with_a_cancellation_is_passed_on() -> None:
    """Whatever happens in the same moment, no slot is lost."""
    chance = random.Random(5)
    for _ in range(200):
        gate, inside, leave = SlotLimiter(1), list[int](), asyncio.Event()
        leave.set()
        tasks = [asyncio.create_task(_enter(gate, inside, number, leave)) for number in range(5)]
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        for task in chance.sample(tasks, 3):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with asyncio.timeout(1), gate.hold():
            pass


def test_a_fixed_limit_learns_nothing() -> None:
    """What the config says is what is done."""
    gate = SlotLimiter(4)
    assert not gate.learn(0, busy=True, first_seconds=None, full=True)
    assert gate.limit == 4


def test_it_grows_while_all_is_well_and_slots_are_short() -> None:
    """One slot for a round of jobs; none while there were free ones; never above the most."""
    gate = SlotLimiter(2, 4)
    for _ in range(10):
        gate.learn(0, busy=False, first_seconds=0.1, full=False)
    assert gate.limit == 2
    rounds = 0
    while gate.limit < 4:
        rounds += 1
        gate.learn(0, busy=False, first_seconds=0.1, full=True)
    assert rounds == 6, "two jobs fill two slots, three fill three; the last rounding adds one"
    for _ in range(100):
        gate.learn(0, busy=False, first_seconds=0.1, full=True)
    assert gate.limit == 4


def test_it_falls_when_the_engine_is_busy_or_slow() -> None:
    """By a third, once in a while, and never below one."""
    gate = SlotLimiter(10, 20)
    assert gate.learn(0, busy=True, first_seconds=None, full=True)
    assert gate.limit == 7
    assert not gate.learn(COOLDOWN_SECONDS / 2, busy=True, first_seconds=None, full=True), "the same news once more"
    assert gate.learn(COOLDOWN_SECONDS, busy=True, first_seconds=None, full=True)
    for second in range(10, 100, 10):
        gate.learn(second, busy=True, first_seconds=None, full=True)
    assert gate.limit == 1
    gate = SlotLimiter(10, 20)
    for _ in range(5):
        gate.learn(0, busy=False, first_seconds=0.1, full=False)
    for _ in range(10):
        gate.learn(100, busy=False, first_seconds=2.0, full=False)
    assert gate.limit == 7


@pytest.mark.parametrize("capacity", [3, 12, 30])
def test_it_finds_what_an_engine_takes(capacity: int) -> None:
    """An engine that is quick up to a number of requests and slower beyond: the limit settles around it, from either side."""
    for start in (1, 40):
        gate, seen = SlotLimiter(start, 64), list[int]()
        for job in range(4_000):
            slow = max(1.0, gate.limit / capacity) ** 4
            gate.learn(job * 0.5, busy=gate.limit > 2 * capacity, first_seconds=0.05 * slow, full=True)
            seen.append(gate.limit)
        settled = seen[1_000:]
        assert capacity * 0.6 <= sum(settled) / len(settled) <= capacity * 1.8
