"""How a provider's attempt at a job counts for its reputation: each once, whether it ended with a good receipt or without one.

A provider answers for its engine. It may be busy or refuse an order, as long as it has not begun to answer. Once it has begun,
nothing that it says makes a cut answer somebody else's doing, unless the client cancelled. Who brought a whole answer lacks
nothing but the receipt. What a reader or this coordinator held up is nobody's blame.
"""

from __future__ import annotations

from coordinator.domain.reputation import Reputation
from coordinator.jobs.live_job import LiveJob
from tallystick.protocol.errors import BadMessage, BadReceipt, Code, Fault, TallyError, Unavailable, error_from_json
from tallystick.protocol.jobs import State
from tallystick.protocol.messages import Outcome
from tallystick.protocol.wire import loads


def count_failure(reputation: Reputation, job: LiveJob, error: TallyError) -> None:
    """Counts the current attempt, which ends or ended with this error, before the job moves on."""
    if job.reputation_counted:
        return
    job.reputation_counted = True
    busy = error.code is Code.NODE_BUSY and job.state is not State.STREAMING
    its_own = error.fault in (Fault.PROVIDER, Fault.ENGINE) and not (busy or job.delivered)
    bad = its_own or isinstance(error, BadReceipt)
    reputation.record(job.provider, Outcome.PROVIDER_ERROR if bad else Outcome.REFUSED)


def count_receipt(reputation: Reputation, job: LiveJob, outcome: Outcome) -> None:
    """Counts the current attempt, which ends with a good receipt of this outcome, before the job moves on."""
    if job.reputation_counted:
        return
    job.reputation_counted = True
    cut = job.state is State.STREAMING and not (job.delivered or job.cancelled)
    reputation.record(job.provider, Outcome.PROVIDER_ERROR if cut else outcome)


def read_failure(job: LiveJob, payload: bytes) -> TallyError:
    """Why a node failed, in its own words."""
    try:
        raw = loads(payload, "failure")
    except BadMessage:
        raw = None
    if not isinstance(raw, dict) or not isinstance(raw.get("error"), dict):
        text = f"provider {job.provider} failed without a reason"
        return Unavailable(Code.PROVIDER_FAILED, text, fault=Fault.PROVIDER)
    error = error_from_json(raw, 502)
    if job.state is State.STREAMING and not job.cancelled:
        error.fault = Fault.PROVIDER
    return error
