"""The ids of placed jobs: kept for as long as a replay is possible, and not much longer."""

from __future__ import annotations

import pytest

from coordinator.domain.seen_jobs import SeenJobs
from tallystick.protocol.types import JobId


def _job(number: int) -> JobId:
    return JobId(number.to_bytes(16, "big"))


@pytest.mark.parametrize("seconds", [1, 7, 8, 60, 3_600])
@pytest.mark.parametrize("placed", [0, 1, 449, 450, 1_700_000_123])
def test_ids_are_kept_for_their_time(seconds: int, placed: int) -> None:
    """Whenever a job was placed, it is known for all of the time, and forgotten an eighth of it later at the latest."""
    seen = SeenJobs(seconds)
    seen.add(_job(1), placed)
    seen.sweep(placed + seconds - 1)
    assert _job(1) in seen
    seen.sweep(placed + seconds + max(1, seconds // 8) - 1)
    assert _job(1) not in seen
    assert len(seen) == 0
    assert seen._ids == {}


def test_ids_are_told_apart() -> None:
    """Every byte of an id counts, and ids of several periods are known at the same time."""
    seen = SeenJobs(80)
    jobs = [_job(1 << bit) for bit in range(128)]
    for number, job in enumerate(jobs[:-1]):
        seen.add(job, number)
    assert all(job in seen for job in jobs[:-1])
    assert jobs[-1] not in seen
    assert len(seen) == 127


def test_a_job_that_was_not_placed_after_all() -> None:
    """It is forgotten at once, whenever it was noted; others are not."""
    seen = SeenJobs(80)
    seen.add(_job(1), 0)
    seen.restore([_job(2), _job(3)], 50)
    for job in (_job(1), _job(2), _job(9)):
        seen.discard(job)
    assert [_job(number) in seen for number in (1, 2, 3)] == [False, False, True]


def test_a_clock_that_goes_back() -> None:
    """What was noted before stays known for its time."""
    seen = SeenJobs(80)
    seen.add(_job(1), 1_000)
    seen.add(_job(2), 900)
    seen.sweep(990)
    assert _job(1) in seen
    assert _job(2) not in seen
