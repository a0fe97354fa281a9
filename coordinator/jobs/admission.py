"""Admission of jobs: each id once, orders that are meant for this coordinator now, and no more jobs than a payer may have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from coordinator.domain.limits import JobLimits, check_order
from coordinator.domain.seen_jobs import SeenJobs
from coordinator.jobs.live_job import LiveJob
from coordinator.jobs.matchmaker import Matchmaker
from coordinator.jobs.shared_store import SharedStore
from tallystick.protocol.errors import Code, Fault, Refusal, Unavailable
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import Submission


def replayed(job_id: JobId) -> Refusal:
    """Returns the refusal of a job that was placed before."""
    return Refusal(Code.ORDER_REPLAYED, f"job {job_id.hex()} was placed before; GET /v1/jobs/ID shows its state")


class Admission:
    """See the module's docstring. `now` is Unix time, `tick` a monotonic clock, both in seconds."""

    def __init__(
        self,
        matchmaker: Matchmaker,
        limits: JobLimits,
        *,
        coordinator: Address,
        shared: SharedStore | None,
        blocked: Callable[[], str | None],
        now: Callable[[], float],
        tick: Callable[[], float],
    ) -> None:
        """`blocked` says why this coordinator admits no job now, such as "is stopping"; None if it does."""
        self._matchmaker, self._limits, self._coordinator, self.shared = matchmaker, limits, coordinator, shared
        self._blocked, self._now, self._tick = blocked, now, tick
        self._seen = SeenJobs(limits.max_order_seconds)
        self.jobs_by_payer: Counter[Address] = Counter()
        """The jobs of each payer that has any, those that wait included."""

    def restore(self, jobs: Iterable[JobId]) -> None:
        """Takes the jobs that a former process placed for known."""
        self._seen.restore(jobs, int(self._now()))

    def note_placed(self, job_id: JobId) -> None:
        """Takes a job that came to light later for known."""
        self._seen.add(job_id, int(self._now()))

    def sweep(self) -> None:
        """Forgets ids that no order can be replayed with any more."""
        self._seen.sweep(int(self._now()))

    @property
    def known(self) -> int:
        """The number of ids that are known."""
        return len(self._seen)

    async def was_placed(self, job_id: JobId) -> bool:
        """Whether a job with this id was placed recently: here, by a former process, or at a replica. Raises Unavailable."""
        if job_id not in self._seen and self.shared is not None and await self.shared.is_placed(job_id):
            self.note_placed(job_id)
        return job_id in self._seen

    async def check_placed_elsewhere(self, job_id: JobId) -> None:
        """Raises Refusal (order_replayed) for a job that another replica has, or had; Unavailable.

        Jobs that are matched at once are checked by the transaction that stores the match.
        """
        if self.shared is not None and await self.shared.is_placed(job_id):
            raise replayed(job_id)

    async def check_new(self, submission: Submission) -> None:
        """Raises TallyError for a submission that no payer can mean now: a replay, or orders that are expired or misdirected.

        What counts against a payer is counted after this check, since others may keep its orders and post them again.
        """
        self._check(submission, int(self._now()))
        if await self.was_placed(submission.job):
            raise replayed(submission.job)

    def _check(self, submission: Submission, now: int) -> None:
        why = self._blocked()
        if why is not None:
            raise Unavailable(Code.COORDINATOR_UNAVAILABLE, f"this coordinator {why}", fault=Fault.COORDINATOR)
        if submission.job in self._seen:
            raise replayed(submission.job)
        for candidate in submission.candidates:
            order, terms = candidate.order.message, candidate.terms
            order.decode()
            terms.decode()
            check_order(order, terms, coordinator=self._coordinator, limits=self._limits, now=now)

    def admit(self, submission: Submission) -> LiveJob:
        """Returns a new job, which is counted. Raises TallyError."""
        now, tick = int(self._now()), self._tick()
        self._check(submission, now)
        if self.jobs_by_payer[submission.candidates[0].order.message.payer] >= self._limits.jobs_per_payer:
            raise self._too_many(submission)
        job = LiveJob(submission, created_at=now, started=tick, last_frame_at=tick)
        self._seen.add(job.id, now)
        self.jobs_by_payer[job.payer] += 1
        job.counted = True
        return job

    def _too_many(self, submission: Submission) -> Unavailable:
        text = f"this payer has {self._limits.jobs_per_payer} jobs here, those that wait included, the maximum per payer"
        error = Unavailable(Code.RATE_LIMITED, f"{text} (max_jobs_per_payer); wait for one to end", fault=Fault.CLIENT)
        model = submission.candidates[0].terms.model
        error.retry_after = self._matchmaker.queue.retry_after(model, self._tick(), batch=submission.batch)
        return error

    def withdraw(self, job: LiveJob) -> None:
        """Forgets a job that was not placed after all."""
        self._seen.discard(job.id)
        self.count_out(job)

    def count_out(self, job: LiveJob) -> None:
        """Counts a job out, once, when it has ended."""
        if job.counted:
            job.counted = False
            self.jobs_by_payer[job.payer] -= 1
            if not self.jobs_by_payer[job.payer]:
                del self.jobs_by_payer[job.payer]
