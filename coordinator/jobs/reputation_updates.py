"""Reputation updates: how an attempt at a job counts for its provider. Each attempt counts once, with or without a receipt.

A provider is responsible for its engine. It may be busy or refuse an order until its output begins. Once output has begun,
nothing that the provider says excuses an unfinished response, unless the client cancelled. A provider that delivered the whole
response only owes the receipt. Delays by the reader or by this coordinator are not held against it.

An attempt that another one outran does not count: nobody knows how it would have ended.
"""

from __future__ import annotations

from coordinator.domain.reputation import Reputation
from coordinator.jobs.attempt import Attempt
from coordinator.jobs.live_job import LiveJob
from tallystick.protocol.errors import BadReceipt, Code, Fault, TallyError, Unavailable, error_from_json
from tallystick.protocol.jobs import State
from tallystick.protocol.messages import Outcome
from tallystick.protocol.wire import Failure


def count_failure(reputation: Reputation, job: LiveJob, attempt: Attempt, error: TallyError) -> None:
    """Counts an attempt, which ends or ended with this error. Call it before the job changes its state."""
    if attempt.reputation_counted:
        return
    attempt.reputation_counted = True
    busy = error.code is Code.NODE_BUSY and job.state is not State.STREAMING
    provider_failed = error.fault in (Fault.PROVIDER, Fault.ENGINE) and not (busy or attempt.delivered)
    bad = provider_failed or isinstance(error, BadReceipt)
    reputation.record(attempt.provider, Outcome.PROVIDER_ERROR if bad else Outcome.REFUSED)


def count_receipt(reputation: Reputation, job: LiveJob, attempt: Attempt, outcome: Outcome) -> None:
    """Counts an attempt, which ends with a valid receipt of this outcome. Call it before the job changes its state."""
    if attempt.reputation_counted:
        return
    attempt.reputation_counted = True
    unfinished = job.state is State.STREAMING and not (attempt.delivered or job.cancelled)
    reputation.record(attempt.provider, Outcome.PROVIDER_ERROR if unfinished else outcome)


def read_failure(job: LiveJob, attempt: Attempt, payload: bytes) -> TallyError:
    """Returns the error that a node's FAIL reports."""
    raw, _ = Failure.split(payload)
    if not isinstance(raw.get("error"), dict):
        text = f"provider {attempt.provider} failed and gave no reason"
        return Unavailable(Code.PROVIDER_FAILED, text, fault=Fault.PROVIDER)
    error = error_from_json(raw, 502)
    if job.state is State.STREAMING and not job.cancelled:
        error.fault = Fault.PROVIDER
    return error
