from __future__ import annotations

import contextlib
import errno
import os
import random
import stat
import struct
from pathlib import Path

import pytest

from tallystick.client.audit_settings import PromptConsent
from tallystick.client.audits import kept_jobs
from tallystick.client.audits.kept_jobs import KeptJobs
from tallystick.protocol.errors import BadMessage
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


async def test_all_jobs_of_a_file_come_back(tmp_path: Path) -> None:
    """Those after the first one take less room, as what they have in common is there once; the hour begins another file."""
    clock = Clock()
    kept = [sold(ALICE, HONEST, seed=number) for number in range(1, 25)]
    jobs = keeper(tmp_path, clock)
    for number, job in enumerate(kept):
        jobs.add(job)
        if number % 5 == 0:
            await jobs.flush()
        if number == 12:
            clock.now += HOUR
    await jobs.flush()
    files = sorted((tmp_path / "kept").iterdir())
    assert len(files) == 2
    assert sum(path.stat().st_size for path in files) < 0.7 * sum(len(job.pack()) for job in kept)
    again = keeper(tmp_path, clock)
    assert [await again.find(job.job) for job in kept] == kept
    assert await again.latest(100) == kept[::-1]
    assert await again.latest(3) == kept[:-4:-1]


async def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """Their records are not compressed."""
    kept, clock = [sold(ALICE, HONEST) for _ in range(3)], Clock()
    (tmp_path / "kept").mkdir()
    path = tmp_path / "kept" / f"{clock.now // HOUR}-00000000.jobs"
    path.write_bytes(b"".join(struct.pack(">16sI", job.job, len(job.pack())) + job.pack() for job in kept))
    jobs = keeper(tmp_path, clock)
    assert [await jobs.find(job.job) for job in kept] == kept
    assert await jobs.latest(9) == kept[::-1]


async def test_a_damaged_record_costs_itself_alone(tmp_path: Path) -> None:
    """Whichever of its bytes differs; the first one of a file is the dictionary of the others."""
    kept, clock = [sold(ALICE, HONEST) for _ in range(3)], Clock()
    jobs = keeper(tmp_path, clock)
    for job in kept:
        jobs.add(job)
    await jobs.flush()
    path = next((tmp_path / "kept").iterdir())
    whole = path.read_bytes()
    second = 20 + int.from_bytes(whole[16:20], "big")
    third = second + 20 + int.from_bytes(whole[second + 16 : second + 20], "big")
    for at in random.Random(1).sample(range(second + 21, third), 40):
        path.write_bytes(whole[:at] + bytes((whole[at] ^ 1,)) + whole[at + 1 :])
        assert await keeper(tmp_path, clock).latest(9) in ([kept[2], kept[0]], kept[::-1]), "a bit that means nothing"
        with contextlib.suppress(BadMessage):
            assert await keeper(tmp_path, clock).find(kept[1].job) == kept[1]
    path.write_bytes(whole[:200] + bytes((whole[200] ^ 1,)) + whole[201:])
    with pytest.raises(BadMessage, match="kept job"):
        await keeper(tmp_path, clock).find(kept[1].job)


async def test_a_job_that_would_fill_the_memory_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However well it was compressed."""
    jobs, kept = keeper(tmp_path, Clock()), [sold(ALICE, HONEST) for _ in range(2)]
    for job in kept:
        jobs.add(job)
    await jobs.flush()
    monkeypatch.setattr(kept_jobs, "MAX_JOB_BYTES", len(kept[1].pack()) - 1)
    with pytest.raises(BadMessage, match="at most"):
        await jobs.find(kept[1].job)
    monkeypatch.setattr(kept_jobs, "MAX_JOB_BYTES", len(kept[1].pack()))
    assert await jobs.find(kept[1].job) == kept[1]


async def test_after_a_write_that_failed_another_file_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk was full in the middle of a record: those that come later can be read all the same."""
    jobs, kept = keeper(tmp_path, Clock()), [sold(ALICE, HONEST) for _ in range(3)]
    write = kept_jobs._write_all

    def full(descriptor: int, data: bytes) -> None:
        os.write(descriptor, data[:100])
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(kept_jobs, "_write_all", full)
    jobs.add(kept[0])
    await jobs.flush()
    monkeypatch.setattr(kept_jobs, "_write_all", write)
    for job in kept[1:]:
        jobs.add(job)
        await jobs.flush()
    assert [await keeper(tmp_path, Clock()).find(job.job) for job in kept] == [None, *kept[1:]]
    assert jobs.dropped == 1


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
