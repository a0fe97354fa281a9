"""Answers that outlive a connection: the frames of jobs whose client may come back for them, sealed as they came.

A job that its client posts with a linger is driven apart from its connection, and whoever posts the same bytes again reads the
same frames from the first on. Memory is bounded: an answer that grows beyond its share is passed on without being kept, and
ended ones go when they are old or when room is needed. Only bytes that came take room, so a job that was never admitted takes
none; and the payer whose answers take most gives it, so that nobody loses an answer to a stranger who has more. Beyond the
process answers are kept by a store, for as long, also those that memory had no room for.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from tallystick.protocol.errors import Code, Refusal, TallyError
from tallystick.protocol.types import JobId

FRAME_OVERHEAD_BYTES = 64
"""Bytes that keeping a frame takes beside its content."""
READ_AHEAD_BYTES = 1 << 18
"""Bytes that an answer which is not kept may be ahead of its reader."""


@dataclass(frozen=True, slots=True)
class Retention:
    """`seconds`: how long an ended answer is kept; `answer_bytes`, `total_bytes`, `payer_bytes`: how much of one, of all together
    and of one payer's; `linger_seconds`: the longest that a job goes on after its client's connection is lost; `stored_bytes`:
    how much of all a store keeps beyond the process.
    """

    seconds: float = 600
    response_bytes: int = 4 << 20
    total_bytes: int = 256 << 20
    linger_seconds: float = 60
    payer_bytes: int = 32 << 20
    stored_bytes: int = 1 << 30


def _uncounted(_change: int) -> None:
    """For an answer that is nobody's share."""


class ResponseBuffer:
    """One answer as it grows. One task adds to it, any number read it."""

    def __init__(self, fingerprint: bytes, max_bytes: int, payer: str = "", resized: Callable[[int], None] = _uncounted) -> None:
        """`room`: bytes that it may keep; `resized` is told by how many it grew or shrank."""
        self.fingerprint, self.payer = fingerprint, payer
        self.size, self.readers = 0, 0
        self.linger = 0.0
        """The longest that one of its readers wants the job to go on without any."""
        self.awaited = True
        """The first reader is on its way: nothing is dropped before it came."""
        self.whole, self.ended = True, False
        self.refusal: TallyError | None = None
        self.ended_at = 0.0
        self._frames: list[bytes] = []
        self._max_bytes, self._resized = max_bytes, resized
        self._read = 0
        self._changed = asyncio.Event()

    def of(self, job: JobId, fingerprint: bytes) -> ResponseBuffer:
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
        self._drop_unwanted()
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def add(self, frame: bytes) -> None:
        """One more frame. Waits for a reader where the answer is too long to be kept; `end` it to stop waiting."""
        self._frames.append(frame)
        self._grow(len(frame) + FRAME_OVERHEAD_BYTES)
        self._tell()
        if self.size > self._max_bytes:
            self.whole = False
        while not self.whole and not self.ended and self.size > READ_AHEAD_BYTES and self.wanted:
            await self._changed.wait()
        self._drop_unwanted()

    def _drop_unwanted(self) -> None:
        if not self.whole and not self.wanted:
            self._drop(len(self._frames))

    def _grow(self, change: int) -> None:
        self.size += change
        self._resized(change)

    def give_up(self) -> None:
        """Keeps it no longer: what was not read yet is passed on to its readers, if it has any, and let go."""
        self.whole = False
        self._drop_unwanted()
        self._tell()

    def _drop(self, until: int) -> None:
        """Lets go of what was read, or will be by nobody; numbers stay."""
        freed = 0
        for number in range(self._read, until):
            freed += len(self._frames[number]) + FRAME_OVERHEAD_BYTES
            self._frames[number] = b""
        self._read = max(self._read, until)
        self._grow(-freed)

    def frames(self, last: bytes) -> bytes | None:
        """All of it with this frame as its end; None if it is not kept whole."""
        fits = self.whole and self.size + len(last) <= self._max_bytes
        return b"".join((*self._frames, last)) if fits else None

    def uncount(self) -> None:
        """It is nobody's share any more: its readers alone hold it."""
        self._resized = _uncounted

    def restore(self, frames: bytes) -> None:
        """Takes all frames at once, which were kept elsewhere."""
        self._frames.append(frames)
        self._grow(len(frames) + FRAME_OVERHEAD_BYTES)

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
            self._drop_unwanted()
            self._tell()


class ResponseBuffers:
    """The answers that are kept. `tick` is a clock in seconds."""

    def __init__(self, retention: Retention, tick: Callable[[], float]) -> None:
        self.retention, self._tick = retention, tick
        self._live: dict[JobId, ResponseBuffer] = {}
        self._ended: OrderedDict[JobId, ResponseBuffer] = OrderedDict()
        self._of_payer: dict[str, OrderedDict[JobId, ResponseBuffer]] = {}
        """The ended ones again, by payer."""
        self._held: Counter[str] = Counter()
        self._total = 0
        self._dropped: list[JobId] = []

    @property
    def held(self) -> int:
        """Bytes of all answers."""
        return self._total

    def find(self, job: JobId, fingerprint: bytes) -> ResponseBuffer | None:
        """The answer of a job that was posted before. Raises Refusal if those were other bytes."""
        horizon = self._tick() - self.retention.seconds
        while self._ended and next(iter(self._ended.values())).ended_at < horizon:
            self._forget(next(iter(self._ended)))
        answer = self._live.get(job) or self._ended.get(job)
        return None if answer is None else answer.of(job, fingerprint)

    def begin(self, job: JobId, fingerprint: bytes, payer: str = "") -> ResponseBuffer:
        """A new one, whose reader is about to come. It takes no room before its first frame."""
        answer = self._live[job] = self._make(fingerprint, payer, self.retention.response_bytes)
        return answer

    def _make(self, fingerprint: bytes, payer: str, max_bytes: int) -> ResponseBuffer:
        return ResponseBuffer(fingerprint, max_bytes, payer, lambda change: self._resize(payer, change))

    def _resize(self, payer: str, change: int) -> None:
        self._total += change
        self._held[payer] += change
        if not self._held[payer]:
            del self._held[payer]
        if change > 0:
            self._make_room(payer)

    def _make_room(self, payer: str) -> None:
        """Holds the payer to its share, and all together to theirs: what is too much goes from the payer who has most."""
        retention = self.retention
        self._let_go(self._held[payer] - retention.payer_bytes, lambda: payer)
        if self._total > retention.total_bytes:
            spare = retention.total_bytes // 16  # so that not every frame looks for the largest
            self._let_go(self._total - retention.total_bytes + spare, lambda: max(self._held, key=self._held.__getitem__))

    def _let_go(self, size: int, whose: Callable[[], str]) -> None:
        """So many bytes are no longer kept: a payer's oldest ended answers, or else its largest that grow. What of these is not
        read yet goes when their readers have it.
        """
        while size > 0:
            payer = whose()
            if payer in self._of_payer:
                job, answer = next(iter(self._of_payer[payer].items()))
                self._forget(job)
                self._dropped.append(job)
            else:
                growing = [one for one in self._live.values() if one.payer == payer and one.whole and one.size]
                if not growing:
                    return
                answer = max(growing, key=lambda one: one.size)
                answer.give_up()
            size -= answer.size

    def end(self, job: JobId, refusal: TallyError | None = None) -> None:
        """Nothing more will come. One that cannot be read again is forgotten, and so is a job that was not admitted."""
        answer = self._live.pop(job)
        answer.end(self._tick(), refusal)
        if refusal is None and answer.whole:
            self._keep(job, answer)
        else:
            self._resize(answer.payer, -answer.size)
            answer.uncount()

    def _keep(self, job: JobId, answer: ResponseBuffer) -> None:
        self._ended[job] = answer
        self._of_payer.setdefault(answer.payer, OrderedDict())[job] = answer

    def restore(self, job: JobId, fingerprint: bytes, frames: bytes, payer: str = "") -> ResponseBuffer:
        """An answer of a former process, or one that memory had no room for, read again by somebody."""
        answer = self._make(fingerprint, payer, len(frames) + FRAME_OVERHEAD_BYTES)
        answer.end(self._tick())
        self._keep(job, answer)
        answer.restore(frames)
        return answer

    def dropped(self) -> list[JobId]:
        """The ended ones that had to make room since this was last asked. A store may still have them."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def _forget(self, job: JobId) -> None:
        answer = self._ended.pop(job)
        of_payer = self._of_payer[answer.payer]
        del of_payer[job]
        if not of_payer:
            del self._of_payer[answer.payer]
        self._resize(answer.payer, -answer.size)
        answer.uncount()
