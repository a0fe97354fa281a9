"""Delivery of one response: holds bytes back until there is output, splits, counts, seals and posts them, within the granted
credit.

Until the coordinator grants its first credit, it gets the head and FIRST_BYTES of the response. The last chunk leaves only when
it is certain that the response is paid (`seal_last`). Waiting for credit counts as the reader's time, not the engine's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from node.domain.usage_meter import UsageMeter
from node.jobs.job_timeout import JobTimeout
from node.jobs.resumable_answers import SentChunks
from node.ports import Link, ResponseStart
from tallystick.protocol.plaintext_heads import ResponseHead, dump_response_head
from tallystick.protocol.sealing import Sealer
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import INITIAL_CREDIT, Kind

CHUNK_BYTES = 64 * 1024
FIRST_BYTES = 4 * 1024
"""Bytes of the response body that may leave before the coordinator grants its first credit."""
RESERVED_CREDIT = 1
"""Credit that is kept for the last chunk: a response can always be closed."""
MAX_EVIDENCE_CHUNKS = 16
"""Chunks of evidence that come with a response: a megabyte, for some 35,000 tokens."""
CANCELLED_HEAD = ResponseStart(499, "application/json")


class ReaderTimeout(Exception):
    """The reader took no data in time: no credit came, and no cancellation."""


class FirstCreditTimeout(Exception):
    """The coordinator did not confirm in time that it has the beginning of the response."""


class ReaderTimer:
    """The total time that a job may wait for its reader, in seconds. The job's `engine_deadline` is suspended meanwhile."""

    def __init__(self, allowed_seconds: float) -> None:
        self._allowed = allowed_seconds
        self.spent = 0.0
        self.engine_deadline: JobTimeout | None = None

    @asynccontextmanager
    async def wait(self) -> AsyncIterator[None]:
        """Wraps a wait for the reader. Raises ReaderTimeout when the job's whole allowance is used up."""
        clock, engine = asyncio.get_running_loop().time, self.engine_deadline
        began = clock()
        deadline = engine.when() if engine is not None else None
        if engine is not None:
            engine.reschedule(None)
        try:
            async with asyncio.timeout(self._allowed - self.spent):
                yield
        except TimeoutError:
            raise ReaderTimeout(
                f"the reader took no data for {self._allowed:g} s in total, and the coordinator did not cancel the job"
            ) from None
        finally:
            waited = clock() - began
            self.spent += waited
            if engine is not None and deadline is not None:
                engine.reschedule(deadline + waited)


class Delivery:
    """Sends one job's chunks.

    A chunk is sealed, counted and posted without a pause in between, so a job can stop anywhere without a gap in its stream.
    `first_credit_seconds`: how long the coordinator's first credit may take.
    """

    def __init__(
        self,
        link: Link,
        job: JobId,
        sealer: Sealer,
        meter: UsageMeter,
        *,
        reader_timer: ReaderTimer | None = None,
        first_credit_seconds: float = 15.0,
    ) -> None:
        self._link, self._job, self._sealer = link, job, sealer
        self._reader_timer, self._first_credit_seconds = reader_timer or ReaderTimer(900.0), first_credit_seconds
        self.meter = meter
        self._credit = INITIAL_CREDIT
        self._granted = asyncio.Event()
        self._confirmation: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._head = CANCELLED_HEAD
        self._held = bytearray()
        self._tail: tuple[bytes, int] | None = None
        self.started = False
        self.sent = SentChunks()
        """The chunks that the coordinator may not have."""

    def grant_credit(self, chunks: int) -> None:
        """Adds credit for `chunks` chunks. It also confirms that the coordinator has output, so that it cannot start another
        attempt.
        """
        self._credit += chunks
        self.sent.confirm(chunks)
        self._granted.set()
        self._resolve(taken=True)

    def link_lost(self) -> None:
        """Ends the wait for a confirmation, after the link was lost."""
        self._resolve(taken=False)

    def _resolve(self, *, taken: bool) -> None:
        if not self._confirmation.done():
            self._confirmation.set_result(taken)

    async def confirmed(self) -> bool:
        """Waits for the first credit, within its time limit; returns whether the coordinator has output of this attempt."""
        if self._confirmation.done():
            return self._confirmation.result()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._first_credit_seconds):
                return await asyncio.shield(self._confirmation)
        return False

    def set_head(self, head: ResponseStart) -> None:
        """Sets the response's head, which leaves with the first output. A later head begins the response anew."""
        self._head = head
        self._held.clear()

    def hold_back(self, data: bytes) -> int:
        """Holds back bytes that precede any output; they leave with it. Returns the number of bytes held back."""
        self._held += data
        return len(self._held)

    async def send(self, data: bytes, text: int = 0) -> None:
        """Sends output, preceded by the head and the bytes held back. Raises ReaderTimeout, FirstCreditTimeout or LinkLost."""
        is_first = not self.started
        if is_first:
            await self._wait_for_room()
            self._post_head(self._head)
        if self._held:
            data, self._held = bytes(self._held) + data, bytearray()
        start = 0
        while start < len(data):
            if not is_first:
                await self._wait_for_first_credit()
            await self._wait_for_room()
            end = start + (FIRST_BYTES if is_first and not self._confirmation.done() else CHUNK_BYTES)
            part = data[start:end]
            self.meter.add_output(len(part), text if end >= len(data) else 0)
            self._post(self._seal(part, last=False))
            start, is_first = end, False

    def send_now(self, data: bytes, text: int = 0) -> bool:
        """Sends output of a response that has begun, if it is one chunk and nothing has to wait. Returns whether it was sent."""
        is_one_chunk = self.started and not self._held and 0 < len(data) <= CHUNK_BYTES
        if not (is_one_chunk and self._confirmation.done() and self._credit > RESERVED_CREDIT and self._link.has_room):
            return False
        self.meter.add_output(len(data), text)
        self._post(self._seal(data, last=False))
        return True

    async def close(self, tail: bytes, text: int = 0) -> None:
        """Sends all but the last chunk of a response that ended with `tail`; `seal_last` makes that one. Raises as `send`."""
        tail, self._held = bytes(self._held) + tail, bytearray()
        cut = max(0, len(tail) - 1) // CHUNK_BYTES * CHUNK_BYTES
        if cut or not self.started:
            await self.send(tail[:cut])
        self._tail = tail[cut:], text

    @property
    def undelivered(self) -> tuple[int, int]:
        """Bytes of the last chunk while it is held back, and bytes of text in it."""
        data, text = self._tail or (b"", 0)
        return len(data), text

    def send_head(self) -> None:
        """Sends the head of a response that was cancelled before any output, for the coordinator to confirm."""
        self._post_head(CANCELLED_HEAD)

    def seal_last(self, evidence: bytes = b"") -> tuple[bytes, ...]:
        """Seals and counts the last chunk, after those with the rows of `evidence`, without sending them.

        Call it for a response that is paid or costs nothing.
        """
        (tail, text), self._tail = self._tail or (b"", 0), None
        self.meter.add_output(len(tail), text)
        return (*self._seal_evidence(evidence), self._seal(tail, last=True))

    def seal_abort(self, evidence: bytes = b"") -> tuple[bytes, ...]:
        """Seals the chunks that close a cancelled response, without sending them. Bytes held back are not part of them."""
        head = () if self.started else (self._seal(_head_chunk(CANCELLED_HEAD, b""), last=False),)
        return (*head, *self._seal_evidence(evidence), self._seal(b"", last=True))

    def has_room_for(self, evidence: bytes) -> bool:
        """Whether rows of evidence can be sent now. Nothing waits for them: the client can ask for them later."""
        chunks = -(-len(evidence) // CHUNK_BYTES)
        return chunks <= min(MAX_EVIDENCE_CHUNKS, self._credit - RESERVED_CREDIT - (not self.started)) and self._link.has_room

    def _seal_evidence(self, rows: bytes) -> Iterator[bytes]:
        return (self._sealer.seal_evidence(rows[at : at + CHUNK_BYTES]) for at in range(0, len(rows), CHUNK_BYTES))

    def post(self, *chunks: bytes) -> None:
        """Sends chunks that `seal_last` or `seal_abort` returned."""
        self.started = self.started or bool(chunks)
        for sealed in chunks:
            self._post(sealed)

    def _post_head(self, head: ResponseStart) -> None:
        self.started = True
        self._post(self._seal(_head_chunk(head, self._link.log_head), last=False))

    def _post(self, sealed: bytes) -> None:
        self._credit -= 1
        self.sent.add(sealed)
        self._link.post(Kind.CHUNK, self._job, sealed)

    async def _wait_for_first_credit(self) -> None:
        if not self._confirmation.done():
            async with self._reader_timer.wait():
                confirmed = await self.confirmed()
            if not confirmed:
                raise FirstCreditTimeout(
                    f"expected the coordinator's first credit within {self._first_credit_seconds:g} s of the first output, "
                    "got none"
                )

    async def _wait_for_room(self) -> None:
        if self._credit <= RESERVED_CREDIT or not self._link.has_room:
            async with self._reader_timer.wait():
                while self._credit <= RESERVED_CREDIT:
                    self._granted.clear()
                    await self._granted.wait()
                await self._link.drain()
        await self._link.drain()

    def _seal(self, part: bytes, *, last: bool) -> bytes:
        self.meter.add_chunk(part)
        return self._sealer.seal(part, last=last)


def _head_chunk(head: ResponseStart, log_head: bytes) -> bytes:
    return dump_response_head(ResponseHead(head.status, head.content_type, log_head))
