"""The life of a job, as two tables: which event leads from which state to which, and what each outcome may charge.

A job waits (`queued`), is handed to one provider of its shortlist (`matched`), which takes it (`running`) and begins to
answer (`streaming`). Until the first output byte a failed attempt puts it back to `queued` for the next candidate; from
then on the attempt is the job. It ends in exactly one of four terminal states.
"""

from __future__ import annotations

from enum import Enum

from tallystick.protocol.messages import Outcome


class State(str, Enum):
    """Where a job is."""

    QUEUED = "queued"
    MATCHED = "matched"
    RUNNING = "running"
    STREAMING = "streaming"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"
    EXPIRED = "expired"


class Event(str, Enum):
    """What can happen to a job."""

    MATCH = "match"
    ACCEPT = "accept"
    OUTPUT = "output"
    ATTEMPT_FAILED = "attempt_failed"
    FINISH = "finish"
    CANCEL = "cancel"
    FAIL = "fail"
    EXPIRE = "expire"


class Charge(Enum):
    """What an outcome may charge."""

    USAGE = "the input, once the engine took it, and all output delivered"
    NOTHING = "nothing"


TERMINAL = frozenset({State.COMPLETED, State.CANCELLED, State.FAILED, State.EXPIRED})

_Q, _M, _R, _S = State.QUEUED, State.MATCHED, State.RUNNING, State.STREAMING

TRANSITIONS: dict[tuple[State, Event], State] = {
    (_Q, Event.MATCH): _M,
    (_M, Event.ACCEPT): _R,
    (_M, Event.OUTPUT): _S,
    (_R, Event.OUTPUT): _S,
    (_M, Event.ATTEMPT_FAILED): _Q,
    (_R, Event.ATTEMPT_FAILED): _Q,
    **{(state, Event.FINISH): State.COMPLETED for state in (_M, _R, _S)},
    **{(state, Event.CANCEL): State.CANCELLED for state in (_Q, _M, _R, _S)},
    **{(state, Event.FAIL): State.FAILED for state in (_Q, _M, _R, _S)},
    **{(state, Event.EXPIRE): State.EXPIRED for state in (_Q, _M, _R, _S)},
}

CHARGES: dict[Outcome, Charge] = {
    Outcome.COMPLETED: Charge.USAGE,
    Outcome.LENGTH: Charge.USAGE,
    Outcome.CLIENT_CANCELLED: Charge.USAGE,
    Outcome.PROVIDER_ERROR: Charge.NOTHING,
    Outcome.UPSTREAM_ERROR: Charge.NOTHING,
    Outcome.TIMED_OUT: Charge.NOTHING,
    Outcome.REFUSED: Charge.NOTHING,
}
"""A payer pays for an answer that ended by itself, or that the payer stopped; never for one that broke or never began."""

ENDS: dict[Outcome, Event] = {
    Outcome.COMPLETED: Event.FINISH,
    Outcome.LENGTH: Event.FINISH,
    Outcome.CLIENT_CANCELLED: Event.CANCEL,
    Outcome.PROVIDER_ERROR: Event.FAIL,
    Outcome.UPSTREAM_ERROR: Event.FAIL,
    Outcome.TIMED_OUT: Event.EXPIRE,
    Outcome.REFUSED: Event.FAIL,
}
"""The event that a receipt with this outcome is."""


class IllegalTransition(Exception):
    """An event that cannot happen in this state: a bug, not an error of a peer."""


def step(state: State, event: Event) -> State:
    """The next state. Raises IllegalTransition for a pair outside the table."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(f"{event.value} in state {state.value}") from None
