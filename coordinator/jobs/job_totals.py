"""What came of the jobs that this process ended, in plain numbers for metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from coordinator.jobs.live_job import LiveJob
from tallystick.protocol.jobs import State
from tallystick.runtime.server_metrics import Times

WAIT_BUCKETS = (0.001, 0.01, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass(slots=True)
class JobTotals:
    """See the module's docstring. `waits`: seconds from a job's order to its first dispatch.
    `failovers`: attempts that began after another provider had failed; those beside another one are hedges. `failures`: jobs
    by whose fault they failed.
    """

    waits: Times = field(default_factory=lambda: Times(WAIT_BUCKETS))
    failovers: int = 0
    chunks: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, job: LiveJob) -> None:
        """Counts a job that has ended."""
        attempts = job.attempts
        if attempts:
            self.waits.add(max(0.0, attempts[0].sent_at - job.started))
        if len(attempts) > 1:
            self.failovers += sum(not attempt.hedged for attempt in attempts[1:])
        for attempt in attempts:
            self.chunks += attempt.chunks
        if job.state in (State.FAILED, State.EXPIRED) and job.last_error is not None:
            self.failures[job.last_error.fault.value] += 1
