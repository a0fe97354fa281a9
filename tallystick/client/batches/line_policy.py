"""What follows from how a line was answered: its end, or another try. Pure."""

from __future__ import annotations

from enum import Enum
from http import HTTPStatus
from typing import Final

from tallystick.client.batches.ports import KeyState, LineAnswer
from tallystick.protocol.errors import Code

MAX_ATTEMPTS: Final = 10
"""Jobs of one line that providers took and did not answer, at no cost. After them the line fails."""
MAX_UNKNOWN: Final = 5
"""Tries of a model that nobody has sold since the batch began. After them all its lines fail."""
FIRST_WAIT_SECONDS: Final = 1.0
LONGEST_WAIT_SECONDS: Final = 60.0

_WAITS_FOR: Final = frozenset(
    {
        Code.OVER_BUDGET.value,
        Code.INSUFFICIENT_FUNDS.value,
        Code.UNSECURED.value,
        Code.UNAUTHORISED_TAB.value,
        Code.PRICE_ABOVE_CAP.value,
    }
)
"""Refusals that a batch outlasts: money may come, budgets begin anew each day, and cheaper asks appear."""
_UNCLEAR: Final = frozenset({Code.ORDER_REPLAYED.value, Code.CANCELLED.value})
"""Ends of a job whose answer can no longer be had. What it cost decides whether there may be another."""

_PASSING: Final = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)


_SOLD: Final = frozenset(
    {Code.NO_PROVIDER.value, Code.NODE_BUSY.value, Code.NODE_GONE.value, Code.PROVIDER_FAILED.value, Code.PRICE_ABOVE_CAP.value}
)


class Decision(Enum):
    """COMPLETE, FAIL: the line ends. WAIT: no job was placed; others of its model would fare no better now. RESUME: the same job
    is asked for again. RESTART: its job cost nothing, so that another may follow.
    """

    COMPLETE = "complete"
    FAIL = "fail"
    WAIT = "wait"
    RESUME = "resume"
    RESTART = "restart"


def may_retry(answer: LineAnswer) -> bool:
    """Whether the same request may succeed later. Its key says whether another job may follow, or only the same one again."""
    passing = answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR or answer.status in _PASSING
    return answer.retry or passing or answer.code in _WAITS_FOR or answer.code in _UNCLEAR


def shows_sale(answer: LineAnswer) -> bool:
    """Whether an answer shows that its model is sold, by somebody, at some time."""
    return answer.status < HTTPStatus.BAD_REQUEST or answer.code in _SOLD


def decide(answer: LineAnswer, state: KeyState, attempt: int, unsold: int) -> Decision:
    """What follows. `attempt`: jobs of the line before this one; `unsold`: how often nobody sold its model, 0 if it was sold
    since the batch began.

    A billed line has no other job.
    """
    if answer.status < HTTPStatus.BAD_REQUEST:
        return Decision.COMPLETE
    if answer.code == Code.UNKNOWN_MODEL.value:
        return Decision.WAIT if unsold < MAX_UNKNOWN and state is KeyState.UNUSED else Decision.FAIL
    if not may_retry(answer) or state is KeyState.BILLED:
        return Decision.FAIL
    if state is KeyState.UNUSED:
        return Decision.WAIT
    if state is KeyState.OPEN:
        return Decision.RESUME
    return Decision.RESTART if attempt + 1 < MAX_ATTEMPTS else Decision.FAIL


def wait_seconds(tries: int) -> float:
    """The wait before the next try, which doubles with each."""
    return min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** min(tries, 16))
