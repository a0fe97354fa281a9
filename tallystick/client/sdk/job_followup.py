"""What a market learns from a job for those after it: who holds its prompt, what the match log must contain, what to audit."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus

from tallystick.client.coordinator.info import CoordinatorInfo
from tallystick.client.jobs.running_job import RunningJob
from tallystick.client.sdk.audits import JobAudits
from tallystick.client.sdk.running_jobs import RunningJobs
from tallystick.client.selection.affinity import Affinity
from tallystick.client.selection.shortlist import ShortlistCache
from tallystick.runtime.log_watch import LogWatch


class JobFollowUp:
    """See the module's docstring. `log_watch` is None until the coordinator is known."""

    def __init__(
        self,
        running: RunningJobs,
        affinity: Affinity,
        shortlists: ShortlistCache,
        audits: JobAudits,
        open_watch: Callable[[CoordinatorInfo], LogWatch],
    ) -> None:
        """`open_watch`: watches the match log of a coordinator."""
        self._running, self._affinity, self._shortlists, self._audits = running, affinity, shortlists, audits
        self._open_watch = open_watch
        self.log_watch: LogWatch | None = None

    def watch_log(self, info: CoordinatorInfo) -> LogWatch:
        """What watches the coordinator's match log."""
        if self.log_watch is None:
            self.log_watch = self._open_watch(info)
        return self.log_watch

    async def close(self) -> None:
        """Stops watching the match log."""
        if self.log_watch is not None:
            await self.log_watch.close()
            self.log_watch = None

    def answer_began(self, job: RunningJob) -> None:
        """The first part of the answer came."""
        if job.trace is not None:
            job.trace.first_output()
        if not job.reads_whole:  # else it ends in the same moment
            self._note_holder(job)

    def _note_holder(self, job: RunningJob) -> None:
        """Records that the provider of an answer has read the request."""
        if job.provider is not None and job.head is not None and job.head.status == HTTPStatus.OK:
            self._affinity.begin(job.placed.tags, job.provider)

    def job_finished(self, job: RunningJob) -> None:
        """The job has ended, successfully or not."""
        self._running.end(job)
        if job.trace is not None:
            state = "accepted" if job.receipt_accepted else "outstanding" if job.receipt_outstanding else "none"
            job.trace.ended(job.placed.response, "disputed" if job.disputed else state, job.error)
        if self.log_watch is not None:
            for match, order in job.placed.response.logged_matches:
                self.log_watch.add_match(match, order)
            self.log_watch.add_head(b"" if job.head is None else job.head.log_head)
        self._audits.finished(job)
        if job.disputed:
            self._shortlists.forget()
        if job.receipt_accepted and (receipt := job.placed.response.receipt) is not None:
            self._affinity.end(job.placed.tags, receipt.message)
        elif job.receipt_outstanding:
            self._note_holder(job)
        elif job.provider is not None:
            self._affinity.forget(job.placed.tags, job.provider)
