"""Kept answers: read by many, bounded in memory, gone in time."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.http.response_buffer import FRAME_OVERHEAD_BYTES, READ_AHEAD_BYTES, ResponseBuffer, ResponseBuffers, Retention
from tallystick.protocol.errors import Code, Refusal, Unavailable
from tallystick.protocol.types import JobId

ONE, TWO, THREE = (JobId(bytes([n]) * 16) for n in (1, 2, 3))
SHARE = 1_000


async def _all(answer: ResponseBuffer) -> bytes:
    return b"".join([part async for part in answer.read()])


def _job(number: int) -> JobId:
    return JobId(number.to_bytes(16, "big"))


async def _ended(answers: ResponseBuffers, job: JobId, size: int, payer: str = "") -> None:
    answer = answers.begin(job, b"", payer)
    await answer.add(bytes(size - FRAME_OVERHEAD_BYTES))
    answers.end(job)


async def test_the_oldest_ended_goes_for_room_and_all_go_in_time() -> None:
    """Where there is no more room the oldest that ended goes, then what grows is passed on only; all go when they are old."""
    seconds = 0.0
    answers = ResponseBuffers(Retention(10, SHARE, 3 * SHARE, 1), lambda: seconds)
    for job in (ONE, TWO):
        await _ended(answers, job, SHARE)
    third = answers.begin(THREE, b"")
    await third.add(bytes(SHARE - FRAME_OVERHEAD_BYTES))
    assert [answers.find(job, b"") is not None for job in (ONE, TWO, THREE)] == [True, True, True]
    await _ended(answers, _job(4), SHARE)
    assert [answers.find(job, b"") is not None for job in (ONE, TWO, THREE)] == [False, False, True]
    fifth, sixth = answers.begin(_job(5), b""), answers.begin(_job(6), b"")
    for answer in (fifth, sixth):
        await answer.add(bytes(SHARE - FRAME_OVERHEAD_BYTES))
    assert (answers.find(_job(4), b""), sixth.whole) == (None, True)
    assert not (third.whole and fifth.whole)
    answers.end(THREE)
    seconds = 11
    assert answers.find(THREE, b"") is None
    for number in (5, 6):
        answers.end(_job(number))
    seconds = 30
    answers.find(ONE, b"")
    assert answers.held == 0


async def test_strangers_that_were_never_admitted_push_no_paid_answer_out() -> None:
    """A job that is refused takes no room, however many there are, whatever payer they name."""
    answers = ResponseBuffers(Retention(10, SHARE, 4 * SHARE, 1), lambda: 0.0)
    for number in range(4):
        await _ended(answers, _job(number), SHARE, "payer")
    for number in range(100, 1_000):
        answers.begin(_job(number), b"junk", f"stranger {number}")
    for number in range(100, 1_000):
        answers.end(_job(number), Unavailable(Code.RATE_LIMITED, "refused"))
    assert all(answers.find(_job(number), b"") is not None for number in range(4))
    assert (answers.dropped(), answers.held) == ([], 4 * SHARE)


@pytest.mark.parametrize("ended", [True, False])
async def test_a_payers_flood_pushes_no_other_payers_answer_out(ended: bool) -> None:
    """One payer's answers, ended or growing, take its share and then each other's room; those of a payer with less all stay."""
    answers = ResponseBuffers(Retention(10, SHARE, 20 * SHARE, 1, payer_bytes=5 * SHARE), lambda: 0.0)
    for number in range(4):
        await _ended(answers, _job(number), SHARE, "honest")
    for number in range(100, 200):
        flood = answers.begin(_job(number), b"", "flood")
        await flood.add(bytes(SHARE - FRAME_OVERHEAD_BYTES))
        if ended:
            answers.end(_job(number))
        else:
            flood.leave()
    assert all(answers.find(_job(number), b"") is not None for number in range(4))
    assert answers.held <= 9 * SHARE + SHARE


async def test_many_payers_floods_push_no_smaller_payers_answer_out() -> None:
    """Where many keys fill all there is, each within its share, room is made by those who have most."""
    answers = ResponseBuffers(Retention(10, SHARE, 32 * SHARE, 1, payer_bytes=8 * SHARE), lambda: 0.0)
    await _ended(answers, ONE, SHARE, "honest")
    for number in range(100, 400):
        await _ended(answers, _job(number), SHARE, f"sybil {number % 10}")
        assert answers.held <= 32 * SHARE
    assert answers.find(ONE, b"") is not None


async def test_an_answer_that_is_given_up_goes_on_to_its_reader() -> None:
    """One that lost its room while it grew is still passed on whole to who reads it, and cannot be had again."""
    answers = ResponseBuffers(Retention(10, 10 * SHARE, 2 * SHARE, 1), lambda: 0.0)
    first = answers.begin(ONE, b"", "one")
    reader = first.read()
    await first.add(bytes(SHARE))
    got = len(await anext(reader))
    await first.add(bytes(SHARE // 2))
    await _ended(answers, TWO, SHARE, "two")
    assert not first.whole
    answers.end(ONE)
    assert got + len(await anext(reader)) == SHARE + SHARE // 2
    await reader.aclose()
    assert answers.find(ONE, b"") is None
    assert answers.held == SHARE


async def test_too_long_to_be_kept() -> None:
    """An answer beyond its share goes on to its reader and waits for it, holds no more than it may be ahead, and is not given
    again.
    """
    answer = ResponseBuffer(b"", SHARE)
    reader = answer.read()
    got = 0

    async def add() -> None:
        for _ in range(20):
            await answer.add(bytes(READ_AHEAD_BYTES // 4))
        answer.end(0)

    await answer.add(b"1")
    got += len(await anext(reader))
    writer = asyncio.create_task(add())
    async for part in reader:
        assert answer.size <= READ_AHEAD_BYTES + READ_AHEAD_BYTES // 4 + 10 * FRAME_OVERHEAD_BYTES
        got += len(part)
    await writer
    assert got == 1 + 20 * (READ_AHEAD_BYTES // 4)
    with pytest.raises(Refusal, match="too long to be kept"):
        await _all(answer)


async def test_a_reader_that_leaves_holds_nobody_up() -> None:
    """The writer of an answer that is too long does not wait for a reader that is gone."""
    answer = ResponseBuffer(b"", 0)
    await answer.add(b"waits for its first reader")
    assert answer.size > 0
    answer.leave()
    await answer.add(bytes(2 * READ_AHEAD_BYTES))
    assert answer.size == 0
    with pytest.raises(Refusal) as caught:
        await _all(answer)
    assert caught.value.code is Code.ORDER_REPLAYED


async def test_an_answer_of_a_former_process() -> None:
    """What a store gives back is read like any other, under the same bounds; what had to go is told once."""
    answers = ResponseBuffers(Retention(10, SHARE, 2 * SHARE, 1), lambda: 0.0)
    first = answers.begin(ONE, b"")
    await first.add(b"some ")
    assert first.frames(b"more") == b"some more"
    assert first.frames(bytes(SHARE)) is None, "longer than its share"
    answers.end(ONE)
    assert await _all(answers.restore(TWO, b"two", b"frames", "payer")) == b"frames"
    assert answers.find(TWO, b"two") is not None
    with pytest.raises(Refusal, match="another submission"):
        answers.find(TWO, b"other")
    assert answers.dropped() == []
    third = answers.restore(THREE, b"", bytes(2 * SHARE), "payer")
    assert await _all(third) == bytes(2 * SHARE), "what is being read is read, whether it is kept or not"
    assert answers.dropped() == [TWO, THREE]
    assert answers.dropped() == []
    assert answers.find(ONE, b"") is not None
