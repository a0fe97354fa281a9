"""Cancels of jobs by their payers, at whichever replica they arrive."""

from __future__ import annotations

from coordinator.http.replica_view import ReplicaView
from coordinator.jobs.market import Market
from coordinator.ports import JobStore
from tallystick.protocol.errors import Code, Refusal, Unavailable
from tallystick.protocol.jobs import TERMINAL
from tallystick.protocol.types import Address, JobId


async def cancel_job(market: Market, jobs: JobStore, replicas: ReplicaView, job: JobId, caller: Address) -> bool:
    """Cancels a job of `caller`. Returns whether such a job runs, as far as this replica knows.

    The replica that runs the job checks the payer again: a job that waits for a slot is in no database. If that replica is gone,
    the job has ended on return. It is told all the same, since it may have lost only its connection to the database.

    Raises Refusal (unauthenticated) for the job of another payer, Unavailable.
    """
    payer, runs_elsewhere, replica = market.payer_of(job), False, ""
    if payer is None and (market.shared is not None or not replicas.alone):
        try:
            known = await jobs.job(job)
        except Unavailable:
            replicas.cancel(job, caller)  # the replica that runs it needs no database for that
            raise
        if known is not None:
            payer, runs_elsewhere, replica = known.record.payer, known.record.state not in TERMINAL, known.replica
    if payer not in {None, caller}:
        raise Refusal(Code.UNAUTHENTICATED, f"{caller} is not the payer of job {job.hex()}; only its payer cancels a job")
    if market.cancel(job):
        return True
    replicas.cancel(job, caller)
    if replica and market.shared is not None and await market.shared.end_lost(job, replica, cancelled=True):
        return False
    return runs_elsewhere
