"""Billing of a job that ended: whether it is charged, its final usage, and the cost of unpaid work."""

from __future__ import annotations

import structlog

from node.domain.usage_meter import NOTHING
from node.jobs.endings import JobResult
from node.jobs.job import Job
from tallystick.protocol.jobs import CHARGES, Charge
from tallystick.protocol.messages import Outcome
from tallystick.protocol.pricing import Usage, charge
from tallystick.protocol.types import Amount, Hash

log = structlog.get_logger()


async def confirm_charge(job: Job, result: JobResult) -> JobResult:
    """Returns the result, uncharged if the coordinator has no output of this attempt or does not want it any more.

    Otherwise the coordinator may be giving the job to another provider, and two providers would charge for it.
    """
    if CHARGES[result.outcome] is Charge.NOTHING:
        return result
    cancelled = result.outcome is Outcome.CLIENT_CANCELLED
    if cancelled and job.delivery.meter.usage(cancelled=True) == NOTHING:
        return result
    if not job.has_output:
        job.delivery.send_head()
    if await job.delivery.confirmed() and not job.coordinator_stopped:
        return result
    reason = (
        "the coordinator stopped the job after it had ended"
        if job.coordinator_stopped
        else "the coordinator did not confirm that it has output"
    )
    log.warning("response not charged", job=job.admitted.job.hex(), reason=reason)
    return JobResult(Outcome.REFUSED if job.hedged else Outcome.PROVIDER_ERROR, reason, result.error, unpaid=True)


def final_usage(job: Job, outcome: Outcome) -> tuple[tuple[bytes, ...], Usage, Hash]:
    """Returns the chunks that close the response, its usage, and the commitment to all chunks.

    Only a paid response and the engine's own refusal get a last chunk: a client may take any response with a last chunk for
    complete.
    """
    delivery, meter = job.delivery, job.delivery.meter
    last: tuple[bytes, ...] = ()
    if outcome is Outcome.CLIENT_CANCELLED:
        last = delivery.seal_abort()
    elif CHARGES[outcome] is Charge.USAGE or outcome is Outcome.UPSTREAM_ERROR:
        last = delivery.seal_last()
    free = outcome is Outcome.UPSTREAM_ERROR or (not job.has_output and not last)
    usage = NOTHING if free else meter.usage(cancelled=outcome is Outcome.CLIENT_CANCELLED)
    if meter.was_clamped:
        log.warning("the engine reported impossible usage; it was clamped", job=job.admitted.job.hex())
    return last, usage, meter.commitment


def unpaid_work(job: Job) -> Amount:
    """Returns what the work done so far would have cost, in base units."""
    if not job.request_opened:
        return Amount(0)
    usage = job.delivery.meter.work_done(*job.delivery.undelivered)
    return charge(job.admitted.terms, usage, Outcome.COMPLETED)
