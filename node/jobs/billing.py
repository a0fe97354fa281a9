"""Billing of a job that ended: whether it is charged, its final usage, and the cost of unpaid work."""

from __future__ import annotations

from typing import NamedTuple

import structlog

from node.domain.answer_rows import NO_ROWS, CommittedRows
from node.domain.usage_meter import NOTHING
from node.jobs.endings import JobResult
from node.jobs.job import Job
from tallystick.protocol.jobs import CHARGES, Charge
from tallystick.protocol.messages import Outcome
from tallystick.protocol.pricing import Usage, charge
from tallystick.protocol.types import ZERO_HASH, Amount, Hash

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


class FinalResponse(NamedTuple):
    """How a response ends: the chunks that close it, its usage, the commitment to all chunks, and its rows of evidence."""

    last: tuple[bytes, ...] = ()
    usage: Usage = NOTHING
    commitment: Hash = ZERO_HASH
    rows: CommittedRows = NO_ROWS
    rows_sent: bool = False


def close_response(job: Job, outcome: Outcome) -> FinalResponse:
    """Closes the response of a job that ended.

    Only a paid response and the engine's own refusal get a last chunk: a client may take any response with a last chunk for
    complete. Only a paid one has evidence, which comes before that chunk, so that nobody can leave it out.
    """
    if not job.request_opened:
        return FinalResponse()
    delivery, meter = job.delivery, job.delivery.meter
    cancelled = outcome is Outcome.CLIENT_CANCELLED
    is_paid = cancelled or CHARGES[outcome] is Charge.USAGE
    rows = job.commit_rows(truncated=outcome is Outcome.LENGTH) if is_paid else NO_ROWS
    evidence = rows.packed if job.wants_evidence and delivery.has_room_for(rows.packed) else b""
    last: tuple[bytes, ...] = ()
    if cancelled:
        last = delivery.seal_abort(evidence)
    elif is_paid or outcome is Outcome.UPSTREAM_ERROR:
        last = delivery.seal_last(evidence)
    free = outcome is Outcome.UPSTREAM_ERROR or (not job.has_output and not last)
    usage = NOTHING if free else meter.usage(cancelled=cancelled)
    if meter.was_clamped:
        log.warning("the engine reported impossible usage; it was clamped", job=job.admitted.job.hex())
    return FinalResponse(last, usage, meter.commitment, rows, bool(evidence))


def unpaid_work(job: Job) -> Amount:
    """Returns what the work done so far would have cost, in base units."""
    if not job.request_opened:
        return Amount(0)
    usage = job.delivery.meter.work_done(*job.delivery.undelivered)
    return charge(job.admitted.terms, usage, Outcome.COMPLETED)
