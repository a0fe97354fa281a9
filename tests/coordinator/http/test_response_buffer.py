"""Response buffers: read by many, bounded in memory, dropped when they are old."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.http.response_buffer import (
    BURST_FRAMES,
    FRAME_OVERHEAD_BYTES,
    READ_AHEAD_BYTES,
    ResponseBuffer,
    ResponseBuffers,
    Retention,
)
from tallystick.protocol.errors import Code, Refusal, Unavailable
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import Kind

ONE, TWO, THREE = (JobId(bytes([n]) * 16) for n in (1, 2, 3))
SHARE = 1_000


async def _read_all(buffer: ResponseBuffer) -> bytes:
    return b"".join([part async for part in buffer.read()])


async def _add(buffer: ResponseBuffer, frame: bytes, *, more: bool = False) -> None:
    """Adds a frame as a job does."""
    if buffer.put_frame(frame, more=more):
        await buffer.wait()


def _job(number: int) -> JobId:
    return JobId(number.to_bytes(16, "big"))


async def _ended(buffers: ResponseBuffers, job: JobId, size: int, payer: str = "") -> None:
    buffer = buffers.begin(job, b"", payer)
    await _add(buffer, bytes(size - FRAME_OVERHEAD_BYTES))
    buffers.end(job)


async def test_the_oldest_ended_makes_room_and_old_ones_are_dropped() -> None:
    """Room is made by the oldest ended response, then by growing ones that are no longer kept. Old responses are dropped."""
    seconds = 0.0
    buffers = ResponseBuffers(Retention(10, SHARE, 3 * SHARE, 1), lambda: seconds)
    for job in (ONE, TWO):
        await _ended(buffers, job, SHARE)
    third = buffers.begin(THREE, b"")
    await _add(third, bytes(SHARE - FRAME_OVERHEAD_BYTES))
    assert [buffers.find(job, b"") is not None for job in (ONE, TWO, THREE)] == [True, True, True]
    await _ended(buffers, _job(4), SHARE)
    assert [buffers.find(job, b"") is not None for job in (ONE, TWO, THREE)] == [False, False, True]
    fifth, sixth = buffers.begin(_job(5), b""), buffers.begin(_job(6), b"")
    for buffer in (fifth, sixth):
        await _add(buffer, bytes(SHARE - FRAME_OVERHEAD_BYTES))
    assert (buffers.find(_job(4), b""), sixth.whole) == (None, True)
    assert not (third.whole and fifth.whole)
    buffers.end(THREE)
    seconds = 11
    assert buffers.find(THREE, b"") is None
    for number in (5, 6):
        buffers.end(_job(number))
    seconds = 30
    buffers.find(ONE, b"")
    assert buffers.held == 0


async def test_jobs_that_were_never_admitted_evict_no_paid_response() -> None:
    """Refused jobs take no room, however many there are and whichever payers they name."""
    buffers = ResponseBuffers(Retention(10, SHARE, 4 * SHARE, 1), lambda: 0.0)
    for number in range(4):
        await _ended(buffers, _job(number), SHARE, "payer")
    for number in range(100, 1_000):
        buffers.begin(_job(number), b"junk", f"stranger {number}")
    for number in range(100, 1_000):
        buffers.end(_job(number), Unavailable(Code.RATE_LIMITED, "refused"))
    assert all(buffers.find(_job(number), b"") is not None for number in range(4))
    assert (buffers.take_evicted(), buffers.held) == ([], 4 * SHARE)


@pytest.mark.parametrize("ended", [True, False])
async def test_a_payers_flood_evicts_no_other_payers_response(ended: bool) -> None:
    """A payer's responses, ended or growing, stay within its share; all responses of a payer that holds less are kept."""
    buffers = ResponseBuffers(Retention(10, SHARE, 20 * SHARE, 1, payer_bytes=5 * SHARE), lambda: 0.0)
    for number in range(4):
        await _ended(buffers, _job(number), SHARE, "honest")
    for number in range(100, 200):
        flood = buffers.begin(_job(number), b"", "flood")
        await _add(flood, bytes(SHARE - FRAME_OVERHEAD_BYTES))
        if ended:
            buffers.end(_job(number))
        else:
            flood.first_reader_left()
    assert all(buffers.find(_job(number), b"") is not None for number in range(4))
    assert buffers.held <= 9 * SHARE + SHARE


async def test_floods_of_many_payers_evict_no_smaller_payers_response() -> None:
    """If many payers fill the total, each within its share, the payers that hold most make room."""
    buffers = ResponseBuffers(Retention(10, SHARE, 32 * SHARE, 1, payer_bytes=8 * SHARE), lambda: 0.0)
    await _ended(buffers, ONE, SHARE, "honest")
    for number in range(100, 400):
        await _ended(buffers, _job(number), SHARE, f"sybil {number % 10}")
        assert buffers.held <= 32 * SHARE
    assert buffers.find(ONE, b"") is not None


async def test_a_response_that_is_no_longer_kept_reaches_its_reader() -> None:
    """A response that lost its room while it grew still reaches its reader whole, and cannot be read again."""
    buffers = ResponseBuffers(Retention(10, 10 * SHARE, 2 * SHARE, 1), lambda: 0.0)
    first = buffers.begin(ONE, b"", "one")
    reader = first.read()
    await _add(first, bytes(SHARE))
    got = len(await anext(reader))
    await _add(first, bytes(SHARE // 2))
    await _ended(buffers, TWO, SHARE, "two")
    assert not first.whole
    buffers.end(ONE)
    assert got + len(await anext(reader)) == SHARE + SHARE // 2
    await reader.aclose()
    assert buffers.find(ONE, b"") is None
    assert buffers.held == SHARE


async def test_too_long_to_be_kept() -> None:
    """A response beyond its share waits for its reader, holds no more than it may be ahead, and cannot be read again."""
    buffer = ResponseBuffer(b"", SHARE, read_ahead=READ_AHEAD_BYTES)
    reader = buffer.read()
    got = 0

    async def add() -> None:
        for _ in range(20):
            await _add(buffer, bytes(READ_AHEAD_BYTES // 4))
        buffer.end(0)

    await _add(buffer, b"1")
    got += len(await anext(reader))
    writer = asyncio.create_task(add())
    async for part in reader:
        assert buffer.size <= READ_AHEAD_BYTES + READ_AHEAD_BYTES // 4 + 10 * FRAME_OVERHEAD_BYTES
        got += len(part)
    await writer
    assert got == 1 + 20 * (READ_AHEAD_BYTES // 4)
    with pytest.raises(Refusal, match="too long to be kept"):
        await _read_all(buffer)


async def test_a_reader_that_leaves_does_not_delay_the_writer() -> None:
    """The writer of a response that is too long does not wait for a reader that is gone."""
    buffer = ResponseBuffer(b"", 0, read_ahead=READ_AHEAD_BYTES)
    await _add(buffer, b"waits for its first reader")
    assert buffer.size > 0
    buffer.first_reader_left()
    await _add(buffer, bytes(2 * READ_AHEAD_BYTES))
    assert buffer.size == 0
    with pytest.raises(Refusal) as caught:
        await _read_all(buffer)
    assert caught.value.code is Code.ORDER_REPLAYED


async def test_a_response_of_a_former_process() -> None:
    """A stored response is read like any other, under the same bounds. An evicted response is reported once."""
    buffers = ResponseBuffers(Retention(10, SHARE, 2 * SHARE, 1), lambda: 0.0)
    first = buffers.begin(ONE, b"")
    await _add(first, b"some ")
    assert first.joined(b"more") == b"some more"
    assert first.joined(bytes(SHARE)) is None, "longer than its share"
    buffers.end(ONE)
    assert await _read_all(buffers.restore(TWO, b"two", b"frames", "payer")) == b"frames"
    assert buffers.find(TWO, b"two") is not None
    with pytest.raises(Refusal, match="another submission"):
        buffers.find(TWO, b"other")
    assert buffers.take_evicted() == []
    third = buffers.restore(THREE, b"", bytes(2 * SHARE), "payer")
    assert await _read_all(third) == bytes(2 * SHARE), "what is being read is read, whether it is kept or not"
    assert buffers.take_evicted() == [TWO, THREE]
    assert buffers.take_evicted() == []
    assert buffers.find(ONE, b"") is not None


async def test_an_ordinary_job_waits_for_its_reader_after_each_burst() -> None:
    """A buffer that keeps nothing holds one burst of frames at most, and is empty once they were taken."""
    buffer = ResponseBuffer()
    for _ in range(BURST_FRAMES - 1):
        await _add(buffer, b"frame", more=True)
    last = asyncio.create_task(_add(buffer, b"last", more=True))
    await asyncio.sleep(0)
    assert not last.done()
    reader = buffer.read()
    assert await anext(reader) == b"frame" * (BURST_FRAMES - 1) + b"last"
    await asyncio.sleep(0)
    assert not last.done(), "taken, and not sent yet"
    buffer.end(0)
    assert [part async for part in reader] == []
    await last
    assert buffer.size == 0


async def test_an_ordinary_job_waits_until_each_frame_was_sent() -> None:
    """A frame that its reader took still holds the job up; a reader that leaves does not."""
    buffer = ResponseBuffer()
    added = asyncio.create_task(_add(buffer, b"frame"))
    reader = buffer.read()
    assert await anext(reader) == b"frame"
    await asyncio.sleep(0)
    assert not added.done()
    await reader.aclose()
    await added
    assert buffer.size == 0


class _Taker:
    """A reader that takes frames at once while `ready`, and the others in its turn."""

    def __init__(self, buffer: ResponseBuffer) -> None:
        self.ready, self.at_once, self.got = True, list[bytes](), list[bytes]()
        self.task = asyncio.create_task(self._read(buffer))

    def _take(self, frame: bytes) -> bool:
        if self.ready:
            self.at_once.append(frame)
            self.got.append(frame)
        return self.ready

    async def _read(self, buffer: ResponseBuffer) -> None:
        async for part in buffer.read(self._take):
            self.got.append(part)


async def test_a_waiting_reader_takes_frames_at_once() -> None:
    """Every reader gets all frames once, in their order, whether it takes them at once or in its turn."""
    buffer = ResponseBuffer(max_bytes=1 << 20)
    buffer.put_frame(b"0")
    first, second = _Taker(buffer), _Taker(buffer)
    plain = asyncio.create_task(_read_all(buffer))
    await asyncio.sleep(0)
    buffer.put_frame(b"1")
    buffer.put_frame(b"2")  # the readers have been woken for the plain one, and have not had their turn
    assert first.at_once == [b"1"]
    await asyncio.sleep(0)
    second.ready = False
    buffer.put_frame(b"3")
    assert (first.at_once, second.at_once) == ([b"1", b"3"], [b"1"])
    await asyncio.sleep(0)
    second.ready = True
    buffer.put_frame(b"4")
    buffer.end(0.0)
    await asyncio.gather(first.task, second.task)
    assert [b"".join(first.got), b"".join(second.got), await plain] == [b"01234"] * 3
    assert b"4" in second.at_once


async def test_a_response_that_is_not_kept_waits_for_a_reader_that_takes_at_once() -> None:
    """Once a response outgrew its share, each frame is dropped in the reader's turn, and its job never waits in vain."""
    buffer = ResponseBuffer(max_bytes=SHARE)
    taker = _Taker(buffer)
    await asyncio.sleep(0)
    frames = [bytes([number]) * 400 for number in range(12)]
    async with asyncio.timeout(60):
        for frame in frames:
            await _add(buffer, frame)
        buffer.end(0.0)
        await taker.task
    assert b"".join(taker.got) == b"".join(frames)
    assert taker.at_once == frames[:2]
    assert buffer.size == 0


async def test_a_reader_that_left_takes_nothing() -> None:
    """Frames that are added after it left, or while it leaves, are kept for others."""
    buffer = ResponseBuffer(max_bytes=1 << 20)
    taker = _Taker(buffer)
    await asyncio.sleep(0)
    taker.task.cancel()
    buffer.put_frame(b"0")
    await asyncio.gather(taker.task, return_exceptions=True)
    buffer.put_frame(b"1")
    buffer.end(0.0)
    assert taker.at_once == []
    assert await _read_all(buffer) == b"01"


async def test_an_http_response_ends_with_its_job() -> None:
    """It takes no last frame while the job goes on: its client would read that and close the connection."""
    buffer = ResponseBuffers(Retention(10, SHARE, 3 * SHARE, 1), lambda: 0.0).begin(ONE, b"")
    size = buffer.size
    assert not buffer.put_last(Kind.RECEIPT, b"signed")
    assert buffer.size == size
