"""Deadlines of a live job at its node: ends an overdue attempt, and sends signs of life to the client of a silent one."""

from __future__ import annotations

from collections.abc import Callable

from coordinator.domain.limits import JobLimits
from coordinator.jobs.attempt import Attempt
from coordinator.jobs.live_job import LiveJob
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import CancelReason, Kind, dumps, pack_link


def enforce_deadlines(
    job: LiveJob,
    tick: float,
    limits: JobLimits,
    *,
    cancel: Callable[[JobId], object],
    stop: Callable[[Attempt, CancelReason], object],
) -> None:
    """Checks a job at its nodes. `tick` is a monotonic clock; `cancel` cancels the job for its client, `stop` tells a node.

    A node is not late while the reader has a frame or frames of it wait in the inbox, unless it was told to stop or the job's
    total time is up.
    """
    if job.reader_seconds(tick) > limits.reader:
        cancel(job.id)
    over = job.spent(tick) > limits.total
    for attempt in job.open_attempts:
        late = tick > job.due(attempt, tick) and (job.cancelled or attempt.outrun or not attempt.unread)
        if (over or late) and not attempt.overdue:
            error = Unavailable(Code.TIMED_OUT, "the provider did not meet the deadline of this phase", fault=Fault.PROVIDER)
            attempt.overdue = True
            if not attempt.outrun:
                stop(attempt, CancelReason.TIMED_OUT)
            job.interrupt(attempt, pack_link(Kind.FAIL, job.id, dumps(error.as_json())))
    if tick > job.last_frame_at + limits.beat and not len(job.inbox):
        job.last_frame_at = tick
        job.post(job.current, pack_link(Kind.BEAT, job.id))
