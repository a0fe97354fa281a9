from __future__ import annotations

import pytest

from node.jobs.pooled_engine import PooledEngine
from node.ports import EngineLoad
from node.testing.memory import ScriptedEngine


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
