"""Rows that did not go out with their answers are kept for a day, in bounded memory, for their payer alone."""

from __future__ import annotations

import pytest

from node.jobs.kept_evidence import KEEP_SECONDS, KeptEvidence
from node.ports import EngineEvent, ResponseEnd, ResponseStart
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import dumps

PAYER, OTHER = Address("0x" + "11" * 20), Address("0x" + "22" * 20)
JOB, LATER = JobId(b"j" * 16), JobId(b"k" * 16)


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rows_are_kept_for_a_day_for_their_payer() -> None:
    """Not for another payer, not for another job, and not a moment longer."""
    clock = Clock()
    kept = KeptEvidence(clock)
    kept.keep(JOB, PAYER, b"rows")
    assert (kept.find(JOB, PAYER), kept.find(JOB, OTHER), kept.find(LATER, PAYER)) == (b"rows", None, None)
    clock.now = KEEP_SECONDS - 1
    assert kept.find(JOB, PAYER) == b"rows"
    clock.now = KEEP_SECONDS
    assert kept.find(JOB, PAYER) is None


def test_memory_is_bounded() -> None:
    """The oldest rows are forgotten first; rows that alone are too many are not kept."""
    clock = Clock()
    kept = KeptEvidence(clock, max_bytes=100)
    for number in range(10):
        kept.keep(JobId(bytes([number]) * 16), PAYER, b"x" * 30)
    assert [kept.find(JobId(bytes([number]) * 16), PAYER) is not None for number in range(10)] == [False] * 7 + [True] * 3
    kept.keep(JOB, PAYER, b"x" * 101)
    assert kept.find(JOB, PAYER) is None
    kept.keep(JOB, PAYER, b"x" * 100)
    assert kept.find(JOB, PAYER) is not None
    clock.now = KEEP_SECONDS
    kept.keep(LATER, PAYER, b"y" * 100)
    assert kept.find(LATER, PAYER) is not None


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (dumps({"model": "m", "job": JOB.hex()}), 200),
        (dumps({"model": "m", "job": LATER.hex()}), 404),
        (dumps({"model": "m"}), 404),
        (dumps({"job": 7}), 404),
        (dumps({"job": "zz"}), 404),
        (dumps({"job": JOB.hex() * 9}), 404),
    ],
)
async def test_answers(body: bytes, status: int) -> None:
    """The rows as they are packed, at no cost; a job that nothing is kept of is an error of the request, at no cost either."""
    kept = KeptEvidence(Clock())
    kept.keep(JOB, PAYER, b"rows")
    events: list[EngineEvent] = [event async for event in kept.answer(body, PAYER)]
    start, end = events
    assert isinstance(start, ResponseStart)
    assert isinstance(end, ResponseEnd)
    assert (start.status, end.tail == b"rows") == (status, status == 200)
    assert end.usage is not None
    assert end.usage.is_empty
    assert [type(event) for event in [event async for event in kept.answer(body, OTHER)]] == [ResponseStart, ResponseEnd]
    assert (await anext(kept.answer(body, OTHER))) == ResponseStart(404, "application/json")
