"""Answers that outlive a connection: the frames of jobs whose client may come back for them, sealed as they came.

A job that its client posts with a linger is driven apart from its connection, and whoever posts the same bytes again reads the
same frames from the first on. Memory is bounded: an answer that grows beyond its share is passed on without being kept, and
ended ones go when they are old or when their room is needed. Beyond the process they are kept by a store, for as long.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from tallystick.protocol.errors import Code, Refusal, TallyError
from tallystick.protocol.types import JobId

FRAME_COST = 64
"""Bytes that keeping a frame takes beside its content."""
AHEAD = 1 << 18
"""Bytes that an answer which is not kept may be ahead of its reader."""


@dataclass(frozen=True, slots=True)
class Retention:
    """`seconds`: how long an ended answer is kept; `answer_bytes`, `total_bytes`: how much of one, and of all together;
    `linger_seconds`: the longest that a job goes on after its client's connection is lost.
    """

    seconds: float = 600
    answer_bytes: int = 4 << 20
    total_bytes: int = 256 << 20
    linger_seconds: float = 60


class Answer:
    """One answer as it grows. One task adds to it, any number read it."""

    def __init__(self, fingerprint: bytes, room: int) -> None:
        self.fingerprint = fingerprint
        self.size, self.readers = 0, 0
        self.awaited = True
        """The first reader is on its way: nothing is dropped before it came."""
        self.whole, self.ended = True, False
        self.refusal: TallyError | None = None
        self.ended_at = 0.0
        self._frames: list[bytes] = []
        self._room = room
        self._read = 0
        self._changed = asyncio.Event()

    def of(self, job: JobId, fingerprint: bytes) -> Answer:
        """This answer. Raises Refusal if the job was posted with other bytes."""
        if self.fingerprint != fingerprint:
            raise Refusal(Code.ORDER_REPLAYED, f"job {job.hex()} was placed before with another submission")
        return self

    @property
    def wanted(self) -> bool:
        """Whether somebody reads it or will at once."""
        return self.awaited or self.readers > 0

    def leave(self) -> None:
        """The first reader, if it never came, will not come."""
        self.awaited = False
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def add(self, frame: bytes) -> None:
        """One more frame. Waits for a reader where the answer is too long to be kept; `end` it to stop waiting."""
        self._frames.append(frame)
        self.size += len(frame) + FRAME_COST
        self._tell()
        if self.size > self._room:
            self.whole = False
        while not self.whole and not self.ended and self.size > AHEAD and self.wanted:
            await self._changed.wait()
        if not self.whole and not self.wanted:
            self._drop(len(self._frames))

    def _drop(self, until: int) -> None:
        """Lets go of what was read, or will be by nobody; numbers stay."""
        for number in range(self._read, until):
            self.size -= len(self._frames[number]) + FRAME_COST
            self._frames[number] = b""
        self._read = max(self._read, until)

    def frames(self, last: bytes) -> bytes | None:
        """All of it with this frame as its end; None if it is not kept whole."""
        fits = self.whole and self.size + len(last) <= self._room
        return b"".join((*self._frames, last)) if fits else None

    def restore(self, frames: bytes) -> None:
        """Takes all frames at once, which were kept elsewhere."""
        self._frames.append(frames)
        self.size = len(frames) + FRAME_COST

    def end(self, at: float, refusal: TallyError | None = None) -> None:
        """Nothing more will come; `refusal`: the job was never admitted."""
        self.ended, self.ended_at, self.refusal = True, at, refusal
        self._tell()

    async def read(self) -> AsyncGenerator[bytes, None]:
        """All frames from the first on, those that wait together at once. Raises the Refusal of an answer that is not kept
        whole, and the error of a job that was not admitted.
        """
        if self._read:
            raise Refusal(Code.ORDER_REPLAYED, "the answer was too long to be kept; GET /v1/jobs/ID tells the job's end")
        at = 0
        self.readers += 1
        self.awaited = False
        try:
            while True:
                if at < self._read:
                    raise ConnectionAbortedError("another reader of an answer that is not kept was faster")
                if at < len(self._frames):
                    until = len(self._frames)
                    yield b"".join(self._frames[at:until])
                    at = until
                    if not self.whole:
                        self._drop(at)
                        self._tell()
                elif self.refusal is not None:
                    raise self.refusal
                elif self.ended:
                    return
                else:
                    await self._changed.wait()
        finally:
            self.readers -= 1
            self._tell()


class Answers:
    """The answers that are kept. `tick` is a clock in seconds."""

    def __init__(self, retention: Retention, tick: Callable[[], float]) -> None:
        self.retention, self._tick = retention, tick
        self._live: dict[JobId, Answer] = {}
        self._ended: OrderedDict[JobId, Answer] = OrderedDict()
        self._ended_bytes = 0
        self._dropped: list[JobId] = []

    def find(self, job: JobId, fingerprint: bytes) -> Answer | None:
        """The answer of a job that was posted before. Raises Refusal if those were other bytes."""
        horizon = self._tick() - self.retention.seconds
        while self._ended and next(iter(self._ended.values())).ended_at < horizon:
            self._forget_oldest()
        answer = self._live.get(job) or self._ended.get(job)
        return None if answer is None else answer.of(job, fingerprint)

    def begin(self, job: JobId, fingerprint: bytes) -> Answer:
        """A new one, whose reader is about to come. Where there is no room it is passed on, not kept."""
        room = self._make_room()
        answer = self._live[job] = Answer(fingerprint, self.retention.answer_bytes if room >= 0 else 0)
        return answer

    def _make_room(self) -> int:
        """Lets go of the oldest until one more of any length fits; returns what is left for ended ones, below 0 for no room."""
        room = self.retention.total_bytes - (len(self._live) + 1) * self.retention.answer_bytes
        while self._ended and self._ended_bytes > room:
            self._forget_oldest()
        return room

    def end(self, job: JobId, refusal: TallyError | None = None) -> None:
        """Nothing more will come. One that cannot be read again is forgotten, and so is a job that was not admitted."""
        answer = self._live.pop(job)
        answer.end(self._tick(), refusal)
        if refusal is None and answer.whole:
            self._ended[job] = answer
            self._ended_bytes += answer.size

    def restore(self, job: JobId, fingerprint: bytes, frames: bytes) -> Answer:
        """An answer of a former process, read again by somebody."""
        answer = Answer(fingerprint, len(frames) + FRAME_COST)
        answer.restore(frames)
        answer.end(self._tick())
        if self._make_room() >= 0:
            self._ended[job] = answer
            self._ended_bytes += answer.size
        return answer

    def dropped(self) -> list[JobId]:
        """Those that had to go since this was last asked."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def _forget_oldest(self) -> None:
        job, answer = self._ended.popitem(last=False)
        self._ended_bytes -= answer.size
        self._dropped.append(job)
