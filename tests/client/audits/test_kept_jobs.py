from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tallystick.client.audit_settings import PromptConsent
from tallystick.client.audits import kept_jobs
from tallystick.client.audits.kept_jobs import KeptJobs
from tallystick.protocol.types import JobId
from tests.client.audits.parties import ALICE, HONEST, sold

HOUR = 3_600


class Clock:
    """A clock that the test sets, in Unix seconds."""

    def __init__(self) -> None:
        self.now = 500_000 * HOUR

    def __call__(self) -> int:
        return self.now


def keeper(folder: Path, clock: Clock, limit: int = 1 << 24) -> KeptJobs:
    """A folder of kept jobs."""
    return KeptJobs(folder / "kept", limit=limit, hours=24, now=clock)


async def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    """Another process of the wallet finds the job as it was, in a file that only its user can read."""
    kept = sold(ALICE, HONEST, consent=PromptConsent(may_share=True, private=True))
    jobs = keeper(tmp_path, Clock())
    jobs.add(kept)
    assert await jobs.find(kept.job) == kept
    await jobs.flush()
    assert await keeper(tmp_path, Clock()).find(kept.job) == kept
    assert (await keeper(tmp_path, Clock()).latest(5)) == [kept]
    files = list((tmp_path / "kept").iterdir())
    assert [stat.S_IMODE(path.stat().st_mode) for path in (*files, tmp_path / "kept")] == [0o600, 0o700]
    assert await jobs.find(JobId(bytes(16))) is None
    assert kept.rows == kept.rows
    assert kept.precision == "bf16"


async def test_jobs_are_written_without_being_asked(tmp_path: Path) -> None:
    """A crash loses what came within a fraction of a second."""
    jobs = keeper(tmp_path, Clock())
    kept = sold(ALICE, HONEST)
    jobs.add(kept)
    writing = jobs._flushing
    assert writing is not None
    await writing
    assert await keeper(tmp_path, Clock()).find(kept.job) == kept


async def test_the_folder_is_bounded(tmp_path: Path) -> None:
    """Old files go by their age, and the oldest beyond the limit."""
    clock = Clock()
    kept = [sold(ALICE, HONEST) for _ in range(4)]
    jobs = keeper(tmp_path, clock, limit=3 * len(kept[0].pack()))
    for job in kept:
        jobs.add(job)
        await jobs.flush()
        clock.now += HOUR
    await jobs.prune()
    assert [await jobs.find(job.job) is not None for job in kept] == [False, False, True, True]
    clock.now += 30 * HOUR
    await jobs.prune()
    assert not list((tmp_path / "kept").iterdir())


async def test_a_cut_record_is_left_out(tmp_path: Path) -> None:
    """A crash in the middle of a write costs that record alone."""
    jobs, first, second = keeper(tmp_path, Clock()), sold(ALICE, HONEST), sold(ALICE, HONEST)
    jobs.add(first)
    jobs.add(second)
    await jobs.flush()
    path = next((tmp_path / "kept").iterdir())
    path.write_bytes(path.read_bytes()[:-10])
    again = keeper(tmp_path, Clock())
    assert await again.find(first.job) == first
    assert await again.find(second.job) is None
    assert await again.latest(9) == [first]


async def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the disk cannot follow, jobs are not kept; they are counted."""
    monkeypatch.setattr(kept_jobs, "MAX_PENDING_BYTES", 10)
    jobs = keeper(tmp_path, Clock())
    jobs.add(sold(ALICE, HONEST))
    await jobs.flush()
    assert (jobs.dropped, (tmp_path / "kept").exists()) == (1, False)


async def test_a_full_disk_is_not_the_jobs_problem(tmp_path: Path) -> None:
    """Nothing is raised."""
    (tmp_path / "kept").write_text("a file in the way")
    jobs = keeper(tmp_path, Clock())
    jobs.add(sold(ALICE, HONEST))
    await jobs.flush()
    assert jobs.dropped == 1
