"""The life of a job as tables: the transitions between its states, and the charge that each outcome allows.

A job waits (`queued`) and is dispatched to one provider of its shortlist (`matched`). The provider admits it (`running`) and
begins to answer (`streaming`). An attempt that fails before the first output byte returns the job to `queued` for the next
candidate; after that byte a failed attempt fails the job. Each job ends in exactly one of four terminal states.

A job without output may be given to a second provider beside the first (`hedge`). The first output of either decides. If one of
the two fails before, the job goes on with the other and keeps its state.
"""

from __future__ import annotations

from enum import Enum

from tallystick.protocol.messages import Outcome


class State(str, Enum):
    """The state of a job."""

    QUEUED = "queued"
    MATCHED = "matched"
    RUNNING = "running"
    STREAMING = "streaming"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"
    EXPIRED = "expired"


class Event(str, Enum):
    """An event in the life of a job."""

    MATCH = "match"
    ACCEPT = "accept"
    OUTPUT = "output"
    HEDGE = "hedge"
    ATTEMPT_FAILED = "attempt_failed"
    FINISH = "finish"
    CANCEL = "cancel"
    FAIL = "fail"
    EXPIRE = "expire"


class Charge(Enum):
    """The charge that an outcome allows."""

    USAGE = "the input, once the engine took it, and all output delivered"
    NOTHING = "nothing"


TERMINAL = frozenset({State.COMPLETED, State.CANCELLED, State.FAILED, State.EXPIRED})

_Q, _M, _R, _S = State.QUEUED, State.MATCHED, State.RUNNING, State.STREAMING

TRANSITIONS: dict[tuple[State, Event], State] = {
    (_Q, Event.MATCH): _M,
    (_M, Event.ACCEPT): _R,
    (_M, Event.OUTPUT): _S,
    (_R, Event.OUTPUT): _S,
    (_M, Event.HEDGE): _M,
    (_R, Event.HEDGE): _R,
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
"""A payer pays for an answer that is complete or that the payer cancelled, and for no other."""

ENDS: dict[Outcome, Event] = {
    Outcome.COMPLETED: Event.FINISH,
    Outcome.LENGTH: Event.FINISH,
    Outcome.CLIENT_CANCELLED: Event.CANCEL,
    Outcome.PROVIDER_ERROR: Event.FAIL,
    Outcome.UPSTREAM_ERROR: Event.FAIL,
    Outcome.TIMED_OUT: Event.EXPIRE,
    Outcome.REFUSED: Event.FAIL,
}
"""The event that a receipt with this outcome stands for."""


class IllegalTransition(Exception):
    """An event that the state does not allow. This is a bug, and never the error of a peer."""


def step(state: State, event: Event) -> State:
    """The state after an event. Raises IllegalTransition for a pair that TRANSITIONS does not have."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(f"{event.value} in state {state.value}") from None
