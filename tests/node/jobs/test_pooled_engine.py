from __future__ import annotations

from collections.abc import Callable

import pytest

from node.domain.slot_limiter import SlotLimiter
from node.jobs.pooled_engine import LOOK_SECONDS, PooledEngine
from node.ports import EngineLoad
from node.testing.memory import ScriptedEngine
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.protocol.link import Capacity


def _pool(assigned: int, slots: int = 4) -> PooledEngine:
    pool = PooledEngine(ScriptedEngine(), slots, later=lambda *_: None)
    pool.assigned = assigned
    return pool


@pytest.mark.parametrize(
    ("assigned", "load", "free"),
    [
        (0, None, 4),
        (0, EngineLoad(0), 4),
        (0, EngineLoad(1), 0),
        (0, EngineLoad(0, 0.99), 0),
        (2, EngineLoad(2), 2),
        (2, EngineLoad(3), 0),
        (2, EngineLoad(0, 0.99), 2),
        (4, EngineLoad(4), 0),
    ],
)
def test_only_the_requests_of_others_close_an_engine(assigned: int, load: EngineLoad | None, free: int) -> None:
    """An engine takes no further job while others' requests wait there. The node's own jobs may be those that wait."""
    pool = _pool(assigned)
    pool.observe(load)
    assert pool.free == free


def test_a_finished_job_opens_the_engine_at_once() -> None:
    """What the engine said at the last look does not keep it closed after one of its jobs ended."""
    pool = _pool(2)
    pool.observe(EngineLoad(3))
    assert pool.free == 0
    pool.job_ended()
    assert (pool.assigned, pool.free) == (1, 3)


def test_the_load_follows_the_slots_that_are_taken() -> None:
    """The load is a moving average of the share of taken slots, up to all of them."""
    pool = _pool(8)
    for _ in range(50):
        pool.observe(None)
    assert pool.load == pytest.approx(1.0, abs=0.01)
    pool.assigned = 0
    pool.observe(None)
    assert pool.load == pytest.approx(0.8, abs=0.01)


class Timers:
    """Timers that the test ends, and the number of reported changes."""

    def __init__(self) -> None:
        self.due: list[tuple[float, Callable[[], None]]] = []
        self.reports = 0

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        self.due.append((seconds, act))

    def report(self) -> None:
        self.reports += 1

    def run(self) -> list[float]:
        """Ends the timers that run now; returns their seconds."""
        due, self.due = self.due, []
        for _, act in due:
            act()
        return [seconds for seconds, _ in due]


def _watched(limiter: SlotLimiter) -> tuple[PooledEngine, Timers]:
    timers = Timers()
    return PooledEngine(ScriptedEngine(), limiter, later=timers.later, on_change=timers.report, now=lambda: 100.0), timers


def test_a_look_at_the_load_is_soon_forgotten() -> None:
    """What an engine said of its load closes it for a moment only; both are reported at once. A newer look is not cut short."""
    pool, timers = _watched(SlotLimiter(4))
    pool.observe(EngineLoad(1))
    assert (pool.free, timers.reports) == (0, 1)
    pool.observe(EngineLoad(2))
    (first, second), timers.due = timers.due, []
    first[1]()
    assert (pool.free, first[0]) == (0, LOOK_SECONDS)
    second[1]()
    assert (pool.free, timers.reports) == (4, 3)
    pool.observe(EngineLoad(0))
    assert (timers.due, timers.reports) == ([], 3)


def test_requests_of_others_take_places_in_a_queue() -> None:
    """An engine that queues up to a depth still takes jobs while fewer requests than that wait there."""
    pool, timers = _watched(SlotLimiter(4, queue_depth=3))
    assert pool.capacity() == Capacity(7, 4, queue=3)
    pool.observe(EngineLoad(2))
    assert pool.capacity() == Capacity(1, 4, queue=3)
    pool.observe(EngineLoad(9))
    assert pool.capacity() == Capacity(0, 4, queue=3)
    timers.run()
    assert pool.capacity() == Capacity(7, 4, queue=3)
    assert pool.capacity(draining=True) == Capacity(0, 4, queue=3)
    pool.up = False
    assert pool.capacity() == Capacity(0, 0)


async def test_a_busy_refusal_corrects_the_capacity_at_once() -> None:
    """The engine is taken at its word before the job is settled, and gets one job more after each pause."""
    pool, timers = _watched(SlotLimiter(4))
    busy = Unavailable(Code.NODE_BUSY, "busy", fault=Fault.ENGINE)
    pool.assigned = 2
    async with pool.slot(60):
        with pytest.raises(Unavailable, match="busy"):
            async with pool.slot(60):
                raise busy
    pool.job_ended()
    assert (pool.capacity(), timers.reports) == (Capacity(0, 1), 1)
    pool.job_ended()
    assert pool.capacity() == Capacity(1, 1)
    for expected in (2, 3, 4):
        assert timers.run() == [1.0]
        assert pool.capacity() == Capacity(expected, expected)
    assert (timers.due, timers.reports) == ([], 4)


@pytest.mark.parametrize(
    "error",
    [Unavailable(Code.ENGINE_UNAVAILABLE, "down", fault=Fault.ENGINE), Unavailable(Code.NODE_BUSY, "", fault=Fault.PROVIDER)],
)
async def test_other_failures_leave_the_capacity_alone(error: Unavailable) -> None:
    """Only an engine's own word that it is busy counts."""
    pool, timers = _watched(SlotLimiter(4))
    with pytest.raises(Unavailable):
        async with pool.slot(60):
            raise error
    assert (pool.free, timers.reports, timers.due) == (4, 0, [])


async def test_an_engine_that_refuses_everything_keeps_a_slot_for_later() -> None:
    """It takes no job for the pause that it asked for, but jobs may wait for it: it has a slot."""
    pool, timers = _watched(SlotLimiter(2, queue_depth=1))
    busy = Unavailable(Code.NODE_BUSY, "busy", fault=Fault.ENGINE)
    busy.retry_after = 5
    async with pool.slot(60):
        with pytest.raises(Unavailable):
            async with pool.slot(60):
                raise busy
        pool.refused(5)
    assert pool.capacity() == Capacity(0, 1)
    assert timers.run() == [5.0, 5.0]
    assert pool.capacity() == Capacity(1, 1), "the pause of a burst of refusals counts once"


def test_an_engine_has_a_bounded_number_of_jobs() -> None:
    """Beyond it the node refuses jobs for this engine as busy, at once."""
    pool, _ = _watched(SlotLimiter(1))
    pool.assigned = pool.most_jobs - 1
    pool.check_room("m")
    pool.assigned += 1
    with pytest.raises(Unavailable, match="the engine of 'm' is full: it has 1 slots and 68 jobs"):
        pool.check_room("m")
