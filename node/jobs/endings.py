"""How a job ends, which is also what its receipt says (`node.jobs.runner`).

    event                             before any output left           after
    the response ended                completed or length; upstream_error if the engine refused with a deterministic 4xx
    the request breaks a rule         refused                          -
    no free slot; the engine is       refused                          -
    busy; the coordinator was
    suspended meanwhile
    the engine failed                 provider_error                   provider_error
    a phase exceeded its deadline     timed_out                        timed_out
    the client cancelled              client_cancelled                 client_cancelled
    the coordinator's deadline        timed_out *                      timed_out *
    passed
    the coordinator gave the job up,  provider_error *                 provider_error *
    or the link was lost
    another provider that had the     refused *                        refused *
    job too was faster (hedging)
    no first credit came              -                                provider_error *
    the reader's time was used up,    -                                timed_out *
    and the coordinator did not
    cancel
    the node shut down                provider_error                   provider_error

Until the engine was asked, every end except a cancellation is `refused`. The receipt's charge follows from its outcome
(`jobs.CHARGES`). Charged are responses that ended by themselves, and responses that the client cancelled, including the input
alone once the engine has the request. The coordinator caused the ends marked with *: what they would have cost counts as unpaid
work (`node.jobs.coordinator_credit`). If the coordinator stops a finished response before its last chunk left, the response loses
that chunk and its charge.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from node.jobs.delivery import FirstCreditTimeout, ReaderTimeout
from node.ports import LinkLost
from tallystick.protocol.errors import Code, Fault, TallyError, Unavailable
from tallystick.protocol.messages import Outcome


class StopReason(Enum):
    """Why a running job is stopped from outside."""

    CANCELLED = "the job was cancelled"
    TIMED_OUT = "the coordinator's deadline for the job passed"
    COORDINATOR = "the coordinator gave the job up"
    HEDGED = "another provider that had the job too answered first"
    LINK_LOST = "the link to the coordinator was lost"
    SHUTDOWN = "the node is shutting down"
    COORDINATOR_SUSPENDED = "the coordinator left too much of this provider's work unpaid"


BY_COORDINATOR = frozenset({StopReason.TIMED_OUT, StopReason.COORDINATOR, StopReason.HEDGED, StopReason.LINK_LOST})


class JobResult(NamedTuple):
    """How a job ended: the outcome for its receipt, the reason for people, and the error if there was one.

    `unpaid`: the coordinator caused that the work is not paid.
    """

    outcome: Outcome
    reason: str
    error: TallyError | None = None
    unpaid: bool = False


def classify(stop: StopReason | None, error: Exception | None, *, phase: str, request_opened: bool) -> JobResult:
    """How a job ended that was stopped, or else failed with `error`. `phase`: what it was doing, for people."""
    if stop is None and isinstance(error, LinkLost):
        stop = StopReason.LINK_LOST
    if stop is not None:
        return _stopped(stop, phase, request_opened=request_opened)
    if isinstance(error, ReaderTimeout | FirstCreditTimeout):
        outcome = Outcome.TIMED_OUT if isinstance(error, ReaderTimeout) else Outcome.PROVIDER_ERROR
        cause: TallyError = Unavailable(Code.TIMED_OUT, str(error), fault=Fault.COORDINATOR)
        return JobResult(outcome, str(cause), cause, unpaid=True)
    if isinstance(error, TimeoutError):
        cause = Unavailable(Code.TIMED_OUT, f"deadline exceeded while {phase}", fault=Fault.ENGINE)
        return JobResult(Outcome.TIMED_OUT, str(cause), cause)
    if isinstance(error, TallyError):
        if error.code is Code.DATABASE_UNAVAILABLE:  # a fault of this node: its peers learn that the provider failed
            error = Unavailable(Code.PROVIDER_FAILED, f"the node cannot store the order: {error}", fault=Fault.PROVIDER)
        return JobResult(Outcome.PROVIDER_ERROR, str(error), error)
    cause = Unavailable(Code.PROVIDER_FAILED, "the node failed with an internal error", fault=Fault.PROVIDER)
    return JobResult(Outcome.PROVIDER_ERROR, str(cause), cause)


def is_expected(error: Exception) -> bool:
    """Whether a job may fail with this error. Any other one is a bug of the node."""
    return isinstance(error, LinkLost | ReaderTimeout | FirstCreditTimeout | TimeoutError | TallyError)


def _stopped(stop: StopReason, phase: str, *, request_opened: bool) -> JobResult:
    if stop is StopReason.CANCELLED:
        cause = Unavailable(Code.CANCELLED, stop.value)
        return JobResult(Outcome.CLIENT_CANCELLED if request_opened else Outcome.REFUSED, stop.value, cause)
    if stop is StopReason.TIMED_OUT:
        cause = Unavailable(Code.TIMED_OUT, f"{stop.value} while {phase}", fault=Fault.COORDINATOR)
        return JobResult(Outcome.TIMED_OUT, str(cause), cause, unpaid=True)
    if stop is StopReason.HEDGED:
        cause = Unavailable(Code.CANCELLED, stop.value, fault=Fault.NOBODY)
        return JobResult(Outcome.REFUSED, stop.value, cause, unpaid=True)
    fault = Fault.COORDINATOR if stop is StopReason.COORDINATOR_SUSPENDED else Fault.PROVIDER
    cause = Unavailable(Code.NODE_BUSY, stop.value, fault=fault)
    return JobResult(Outcome.PROVIDER_ERROR, stop.value, cause, unpaid=stop in BY_COORDINATOR)
