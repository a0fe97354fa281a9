"""Deadlines of a live job at its node: ends an overdue attempt, and sends signs of life to the client of a silent one."""

from __future__ import annotations

from collections.abc import Callable

from coordinator.domain.limits import JobLimits
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
    stop: Callable[[LiveJob, CancelReason], object],
) -> None:
    """Checks a job at a node. `tick` is a monotonic clock; `cancel` cancels the job for its client, `stop` tells its node.

    The node is not late while the reader has a frame or frames wait in the inbox, unless the node was told to stop or the job's
    total time is up.
    """
    if job.reader_seconds(tick) > limits.reader:
        cancel(job.id)
    over = job.spent(tick) > limits.total
    late = tick > job.due(tick) and (job.cancelled or job.inbox.empty())
    if (over or late) and not job.overdue:
        error = Unavailable(Code.TIMED_OUT, "the provider did not meet the deadline of this phase", fault=Fault.PROVIDER)
        job.overdue = True
        stop(job, CancelReason.TIMED_OUT)
        job.interrupt(pack_link(Kind.FAIL, job.id, dumps(error.as_json())))
    elif tick > job.last_frame_at + limits.beat and job.inbox.empty():
        job.last_frame_at = tick
        job.inbox.put_nowait(pack_link(Kind.BEAT, job.id))
