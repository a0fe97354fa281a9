"""Response buffers: the sealed frames of a job's response, between the job that adds them and the clients that read them.

Every job has one. The buffer of an ordinary job holds a few frames, and its job waits for the reader. The buffer of a job that
lingers is kept: a client that posts the same bytes again reads the same frames from the first on.

Memory is bounded. A response that grows beyond its share is passed on without being kept. Ended responses are dropped when they
are old or when room is needed. Only bytes that arrived take room, so a job that was never admitted takes none. The payer whose
responses take most makes room, so nobody loses a response to a stranger who holds more. A store keeps responses beyond the
process for the same time, including those that memory has no room for.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from tallystick.protocol.errors import Code, Refusal, TallyError
from tallystick.protocol.job_link import FRAME_HEAD
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import Kind, pack_frame

FRAME_OVERHEAD_BYTES = 64
"""Bytes that a buffered frame takes beside its content."""
READ_AHEAD_BYTES = 1 << 18
"""Bytes that a response which outgrew its share may be ahead of its reader."""
BURST_FRAMES = 16
"""Frames that a job may add before it waits for its reader, if the next frame is there already."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How long and how much of responses is kept. Times are seconds."""

    seconds: float = 600
    """After the end of the response."""
    response_bytes: int = 4 << 20
    """One response."""
    total_bytes: int = 256 << 20
    """All responses."""
    linger_seconds: float = 60
    """The longest that a job continues after its client's connection was lost."""
    payer_bytes: int = 32 << 20
    """All responses of one payer."""
    stored_bytes: int = 1 << 30
    """All responses in the store."""


def _uncounted(_change: int) -> None:
    """Counts the bytes of a response against nobody."""


class _Reader:
    """A reader of a response: the number of its next frame, what takes frames at once, and what wakes it while it waits."""

    __slots__ = ("position", "take", "woken")

    def __init__(self, take: Callable[[bytes], bool] | None) -> None:
        self.position, self.take = 0, take
        self.woken: asyncio.Future[None] | None = None

    def takes(self, number: int, frame: bytes) -> bool:
        """Gives a waiting reader this frame if it is its next one. Returns False if the reader must be woken for it."""
        if self.take is None or self.position != number or self.woken is None or self.woken.done() or not self.take(frame):
            return False
        self.position += 1
        return True


class ResponseBuffer:
    """One response as it grows. One task adds frames, any number of tasks read them."""

    def __init__(
        self,
        fingerprint: bytes = b"",
        max_bytes: int = 0,
        payer: str = "",
        resized: Callable[[int], None] = _uncounted,
        *,
        read_ahead: int = 0,
    ) -> None:
        """`fingerprint`: of the submission. `max_bytes`: what the buffer may keep; `read_ahead`: how far it may be ahead of its
        reader beyond that. `resized` is called with each change of the size.
        """
        self.fingerprint, self.payer = fingerprint, payer
        self.size, self.readers = 0, 0
        self.linger = 0.0
        """The longest that one of the readers wants the job to continue without any."""
        self.awaited = True
        """Whether the first reader is still to come. Nothing is dropped before it came."""
        self.whole, self.ended = True, False
        self.abandoned = False
        """Whether the job is to be cancelled, since nobody reads it any more."""
        self.refusal: TallyError | None = None
        self.ended_at = 0.0
        self._frames: list[bytes] = []
        self._first = 0
        """The number of the first frame that is still held."""
        self._max_bytes, self._read_ahead, self._resized = max_bytes, read_ahead, resized
        self._waiting: list[asyncio.Future[None]] = []
        self._waiting_readers: list[_Reader] = []

    def check_fingerprint(self, job: JobId, fingerprint: bytes) -> ResponseBuffer:
        """Returns this buffer. Raises Refusal if the job was posted with other bytes."""
        if self.fingerprint != fingerprint:
            raise Refusal(Code.ORDER_REPLAYED, f"job {job.hex()} was placed before with another submission")
        return self

    @property
    def wanted(self) -> bool:
        """Whether somebody reads the response, or is about to."""
        return self.awaited or self.readers > 0

    def first_reader_left(self) -> None:
        """Notes that the first reader, if it never came, will not come."""
        self.awaited = False
        self._drop_unwanted()
        self._notify()

    def _notify(self) -> None:
        waiting, self._waiting = self._waiting, []
        readers, self._waiting_readers = self._waiting_readers, []
        for future in (*waiting, *(reader.woken for reader in readers)):
            if future is not None and not future.done():
                future.set_result(None)

    def _pass_on(self, frame: bytes) -> None:
        """Gives a frame that was added to all readers that wait for it, or wakes everybody.

        What is not kept is dropped by its reader in its own turn, so nothing of it is passed on here.
        """
        number = self._first + len(self._frames) - 1
        if not self.whole or not all(reader.takes(number, frame) for reader in self._waiting_readers) or self._waiting:
            self._notify()

    async def _change(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future

    def take_chunk(self, payload: bytes) -> bool:
        """See FrameSink. Once the response is not kept, its reader is waited for."""
        if not self.whole or self.size + len(payload) + FRAME_HEAD + FRAME_OVERHEAD_BYTES > self._max_bytes:
            return False
        self.put(Kind.CHUNK, payload)
        return True

    def put(self, kind: Kind, payload: bytes, *, more: bool = False) -> bool:
        """See FrameSink."""
        return self.put_frame(pack_frame(kind, payload), more=more)

    def put_last(self, kind: Kind, payload: bytes) -> bool:  # noqa: ARG002 - an HTTP response ends with its job
        """See FrameSink. A client that read the last frame before the end would close its connection."""
        return False

    def put_frame(self, frame: bytes, *, more: bool = False) -> bool:
        """Adds a packed frame. Returns whether the job must `wait` for the reader, since the response is too long to be kept.

        `more`: the next frame is there already, so the two may be sent together.
        """
        self._frames.append(frame)
        self._grow(len(frame) + FRAME_OVERHEAD_BYTES)
        if self.size > self._max_bytes:
            self.whole = False
        self._pass_on(frame)
        if self._is_full and not (more and len(self._frames) < BURST_FRAMES):
            return True
        self._drop_unwanted()
        return False

    async def wait(self) -> None:
        """Waits until the reader took what it must take before the next frame; `end` stops the wait."""
        while self._is_full:
            await self._change()
        self._drop_unwanted()

    @property
    def _is_full(self) -> bool:
        return not self.whole and not self.ended and self.size > self._read_ahead and self.wanted

    def _drop_unwanted(self) -> None:
        if not self.whole and not self.wanted:
            self._drop(self._first + len(self._frames))

    def _grow(self, change: int) -> None:
        self.size += change
        self._resized(change)

    def stop_keeping(self) -> None:
        """Keeps the response no longer: its readers get the rest, and what they read is dropped."""
        self.whole = False
        self._drop_unwanted()
        self._notify()

    def _drop(self, until: int) -> None:
        """Drops the frames before number `until`."""
        dropped = self._frames[: max(0, until - self._first)]
        del self._frames[: len(dropped)]
        self._first += len(dropped)
        self._grow(-sum(len(frame) + FRAME_OVERHEAD_BYTES for frame in dropped))

    def joined(self, last: bytes) -> bytes | None:
        """Returns all frames with this one at the end, or None if the response is not kept whole."""
        fits = self.whole and self.size + len(last) <= self._max_bytes
        return b"".join((*self._frames, last)) if fits else None

    @property
    def frames(self) -> bytes | None:
        """All frames so far; None if the response is not kept whole."""
        return b"".join(self._frames) if self.whole else None

    def uncount(self) -> None:
        """Stops counting the bytes, which only the readers hold from now on."""
        self._resized = _uncounted

    def fill(self, frames: bytes) -> None:
        """Adds all frames at once, as a store kept them."""
        self._frames.append(frames)
        self._grow(len(frames) + FRAME_OVERHEAD_BYTES)

    def end(self, at: float, refusal: TallyError | None = None) -> None:
        """Notes that nothing more will come. `refusal`: why the job was not admitted."""
        self.ended, self.ended_at, self.refusal = True, at, refusal
        self._notify()

    async def read(self, take: Callable[[bytes], bool] | None = None) -> AsyncGenerator[bytes, None]:
        """Yields all frames from the first on; frames that wait together are joined.

        `take` gets each frame that is added while the reader waits for it. It returns whether it took the frame, which is then
        not yielded; it must not raise.

        Raises Refusal if the first frames were dropped, and the error of a job that was not admitted.
        """
        if self._first:
            raise Refusal(Code.ORDER_REPLAYED, "the response was too long to be kept; GET /v1/jobs/ID tells how the job ended")
        reader = _Reader(take)
        self.readers += 1
        self.awaited = False
        try:
            while True:
                position = reader.position
                if position < self._first:
                    raise ConnectionAbortedError("the response is not kept, and another reader took it first")
                end = self._first + len(self._frames)
                if position < end:
                    waiting = self._frames[position - self._first :]
                    yield waiting[0] if len(waiting) == 1 else b"".join(waiting)
                    del waiting  # what was read is not held until the next frame comes
                    reader.position = end
                    if not self.whole:
                        self._drop(end)
                        self._notify()
                elif self.refusal is not None:
                    raise self.refusal
                elif self.ended:
                    return
                else:
                    reader.woken = asyncio.get_running_loop().create_future()
                    self._waiting_readers.append(reader)
                    await reader.woken
        finally:
            self.readers -= 1
            self._drop_unwanted()
            self._notify()


class ResponseBuffers:
    """The buffers of jobs that linger. `tick` is a clock in seconds."""

    def __init__(self, retention: Retention, tick: Callable[[], float]) -> None:
        self.retention, self._tick = retention, tick
        self._growing: dict[JobId, ResponseBuffer] = {}
        self._ended: OrderedDict[JobId, ResponseBuffer] = OrderedDict()
        self._ended_by_payer: dict[str, OrderedDict[JobId, ResponseBuffer]] = {}
        self._bytes_by_payer: Counter[str] = Counter()
        self._total = 0
        self._evicted: list[JobId] = []

    @property
    def held(self) -> int:
        """Bytes of all buffers."""
        return self._total

    def find(self, job: JobId, fingerprint: bytes) -> ResponseBuffer | None:
        """Returns the buffer of a job that was posted before. Raises Refusal if it was posted with other bytes."""
        horizon = self._tick() - self.retention.seconds
        while self._ended and next(iter(self._ended.values())).ended_at < horizon:
            self._forget(next(iter(self._ended)))
        buffer = self._growing.get(job) or self._ended.get(job)
        return None if buffer is None else buffer.check_fingerprint(job, fingerprint)

    def begin(self, job: JobId, fingerprint: bytes, payer: str = "") -> ResponseBuffer:
        """Returns a new buffer, whose first reader is about to come. It takes no room before its first frame."""
        buffer = self._growing[job] = self._create(fingerprint, payer, self.retention.response_bytes)
        return buffer

    def _create(self, fingerprint: bytes, payer: str, max_bytes: int) -> ResponseBuffer:
        def resized(change: int) -> None:
            self._resize(payer, change)

        return ResponseBuffer(fingerprint, max_bytes, payer, resized, read_ahead=READ_AHEAD_BYTES)

    def _resize(self, payer: str, change: int) -> None:
        self._total += change
        self._bytes_by_payer[payer] += change
        if not self._bytes_by_payer[payer]:
            del self._bytes_by_payer[payer]
        if change > 0:
            self._make_room(payer)

    def _make_room(self, payer: str) -> None:
        """Keeps the payer within its share and all payers within theirs; the payer that holds most makes room."""
        retention, held = self.retention, self._bytes_by_payer
        self._evict(held[payer] - retention.payer_bytes, lambda: payer)
        if self._total > retention.total_bytes:
            spare = retention.total_bytes // 16  # room for some more frames before the largest payer is looked for again
            self._evict(self._total - retention.total_bytes + spare, lambda: max(held, key=held.__getitem__))

    def _evict(self, size: int, choose_payer: Callable[[], str]) -> None:
        """Stops keeping this many bytes: a payer's oldest ended responses, otherwise its largest growing ones.

        Readers still get the rest of a growing response.
        """
        while size > 0:
            payer = choose_payer()
            if payer in self._ended_by_payer:
                job, buffer = next(iter(self._ended_by_payer[payer].items()))
                self._forget(job)
                self._evicted.append(job)
            else:
                growing = [entry for entry in self._growing.values() if entry.payer == payer and entry.whole and entry.size]
                if not growing:
                    return
                buffer = max(growing, key=lambda entry: entry.size)
                buffer.stop_keeping()
            size -= buffer.size

    def end(self, job: JobId, refusal: TallyError | None = None) -> None:
        """Ends a growing response. One that is not kept whole, or whose job was not admitted, is forgotten."""
        buffer = self._growing.pop(job)
        buffer.end(self._tick(), refusal)
        if refusal is None and buffer.whole:
            self._keep(job, buffer)
        else:
            self._resize(buffer.payer, -buffer.size)
            buffer.uncount()

    def _keep(self, job: JobId, buffer: ResponseBuffer) -> None:
        self._ended[job] = buffer
        self._ended_by_payer.setdefault(buffer.payer, OrderedDict())[job] = buffer

    def ended(self, job: JobId) -> ResponseBuffer | None:
        """Returns the response of a job that ended; None if it is not kept."""
        return self._ended.get(job)

    def is_growing(self, job: JobId) -> bool:
        """Whether the response of a job has not ended."""
        return job in self._growing

    def restore(self, job: JobId, fingerprint: bytes, frames: bytes, payer: str = "") -> ResponseBuffer:
        """Returns the buffer of a response out of the store: of a former process, or one that memory had no room for."""
        buffer = self._create(fingerprint, payer, len(frames) + FRAME_OVERHEAD_BYTES)
        buffer.end(self._tick())
        self._keep(job, buffer)
        buffer.fill(frames)
        return buffer

    def take_evicted(self) -> list[JobId]:
        """Returns the ended responses that made room since the last call. A store may still have them."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def _forget(self, job: JobId) -> None:
        buffer = self._ended.pop(job)
        of_payer = self._ended_by_payer[buffer.payer]
        del of_payer[job]
        if not of_payer:
            del self._ended_by_payer[buffer.payer]
        self._resize(buffer.payer, -buffer.size)
        buffer.uncount()
