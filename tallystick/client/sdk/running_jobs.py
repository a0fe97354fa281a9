"""The jobs of a market that are being submitted or run now: how many there may be, and how they end when it closes."""

from __future__ import annotations

import asyncio
import contextlib
import time

from tallystick.client.jobs.running_job import RunningJob
from tallystick.client.sdk.admission_turns import AdmissionTurns
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.protocol.types import JobId


class RunningJobs:
    """At most `most` jobs run at a time. `turns`: the order in which submissions try if the coordinator takes no more jobs.

    `submitting`: jobs that are being posted, which nothing else may settle meanwhile. `draining`: no more jobs are accepted.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._jobs: set[RunningJob] = set()
        self._idle = asyncio.Event()
        self.turns = AdmissionTurns(time.monotonic, most)
        self.submitting: set[JobId] = set()
        self.draining = False

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def ids(self) -> set[JobId]:
        """The jobs that are being submitted or run."""
        return self.submitting | {job.id for job in self._jobs}

    @property
    def open_count(self) -> int:
        """The number of jobs that are being submitted or run."""
        return len(self.submitting) + len(self._jobs)

    def check_room(self) -> None:
        """Raises Unavailable if no further job may run."""
        if self.draining:
            raise Unavailable(Code.SHUTTING_DOWN, "this client is stopping", fault=Fault.CLIENT)
        if len(self._jobs) >= self._most:
            text = f"this client already runs {len(self._jobs)} jobs (max_jobs); send the request again later"
            raise Unavailable(Code.CLIENT_BUSY, text, fault=Fault.CLIENT)

    def add(self, job: RunningJob) -> None:
        """Counts a job until it ends."""
        self._jobs.add(job)

    def forget(self, job: RunningJob) -> None:
        """No longer counts a job whose place another one has taken."""
        self._jobs.discard(job)

    def end(self, job: RunningJob) -> None:
        """Notes that a job has ended, and lets others take its place."""
        self._jobs.discard(job)
        self.turns.job_ended()
        if not self._jobs:
            self._idle.set()

    def read_elsewhere(self, job: RunningJob) -> bool:
        """Whether another one reads the same job now."""
        return any(other is not job and other.id == job.id for other in self._jobs)

    async def drain(self, seconds: float) -> None:
        """See `Market.drain`."""
        self.draining = True
        self.turns.close()
        if self._jobs:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._idle.wait()
        await asyncio.gather(*(job.cancel() for job in list(self._jobs)), return_exceptions=True)
