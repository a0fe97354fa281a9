"""Kept answers: read by many, bounded in memory, gone in time."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.answers import AHEAD, FRAME_COST, Answer, Answers, Retention
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.types import JobId

ONE, TWO, THREE = (JobId(bytes([n]) * 16) for n in (1, 2, 3))
SHARE = 1_000


async def _all(answer: Answer) -> bytes:
    return b"".join([part async for part in answer.read()])


async def test_the_oldest_ended_goes_for_room_and_all_go_in_time() -> None:
    """Where the next would not fit the oldest that ended goes; one that runs never does, the newest is then passed on only."""
    seconds = 0.0
    answers = Answers(Retention(10, SHARE, 2 * SHARE, 1), lambda: seconds)
    first, second = answers.begin(ONE, b""), answers.begin(TWO, b"")
    await first.add(bytes(SHARE - FRAME_COST))
    answers.end(ONE)
    third = answers.begin(THREE, b"")
    await third.add(b"kept")
    assert (answers.find(ONE, b""), answers.find(TWO, b"")) == (None, second)
    fourth = answers.begin(ONE, b"")
    await fourth.add(b"passed")
    assert (third.whole, fourth.whole) == (True, False)
    answers.end(THREE)
    seconds = 11
    assert (answers.find(THREE, b""), answers.find(TWO, b"")) == (None, second)


async def test_too_long_to_be_kept() -> None:
    """An answer beyond its share goes on to its reader and waits for it, holds no more than it may be ahead, and is not given
    again.
    """
    answer = Answer(b"", SHARE)
    reader = answer.read()
    got = 0

    async def add() -> None:
        for _ in range(20):
            await answer.add(bytes(AHEAD // 4))
        answer.end(0)

    await answer.add(b"1")
    got += len(await anext(reader))
    writer = asyncio.create_task(add())
    async for part in reader:
        assert answer.size <= AHEAD + AHEAD // 4 + 10 * FRAME_COST
        got += len(part)
    await writer
    assert got == 1 + 20 * (AHEAD // 4)
    with pytest.raises(Refusal, match="too long to be kept"):
        await _all(answer)


async def test_a_reader_that_leaves_holds_nobody_up() -> None:
    """The writer of an answer that is too long does not wait for a reader that is gone."""
    answer = Answer(b"", 0)
    await answer.add(b"waits for its first reader")
    assert answer.size > 0
    answer.leave()
    await answer.add(bytes(2 * AHEAD))
    assert answer.size == 0
    with pytest.raises(Refusal) as caught:
        await _all(answer)
    assert caught.value.code is Code.ORDER_REPLAYED


async def test_an_answer_of_a_former_process() -> None:
    """What a store gives back is read like any other, under the same bounds; who keeps the store tidy is told what had to go."""
    answers = Answers(Retention(10, SHARE, 2 * SHARE, 1), lambda: 0.0)
    first = answers.begin(ONE, b"")
    await first.add(b"some ")
    assert first.frames(b"more") == b"some more"
    assert first.frames(bytes(SHARE)) is None, "longer than its share"
    answers.end(ONE)
    assert await _all(answers.restore(TWO, b"two", b"frames")) == b"frames"
    assert answers.find(TWO, b"two") is not None
    with pytest.raises(Refusal, match="another submission"):
        answers.find(TWO, b"other")
    assert answers.dropped() == []
    answers.restore(THREE, b"", bytes(SHARE))
    answers.begin(JobId(bytes(16)), b"")
    assert answers.dropped() == [ONE, TWO, THREE]
    assert answers.dropped() == []
