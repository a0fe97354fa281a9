"""One response on its way out: held back until there is output, cut, counted, sealed, and posted under credit.

Until the coordinator has granted its first credit it gets the head and FIRST_BYTES of the answer, no more; and the end of an
answer leaves only when it is known whether the answer is paid (`finish`). A wait for credit is the reader's time, not the
engine's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from node.domain.meter import Meter
from node.ports import Head, Link
from tallystick.protocol.sealing import Sealer
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import INITIAL_CREDIT, Kind, ResponseHead, dump_response_head

CHUNK_BYTES = 64 * 1024
FIRST_BYTES = 4 * 1024
"""Of an answer's body, before the coordinator has said that it has the head."""
KEPT_FOR_LAST = 1
"""Credit that is never used up before the end, so that a response can always be closed."""
CANCELLED_HEAD = Head(499, "application/json")


class Stalled(Exception):
    """Nobody reads at the other end: no credit came in time, and nobody cancelled."""


class Unconfirmed(Exception):
    """The coordinator did not say in time that it has the beginning of the answer."""


class ReaderTime:
    """What a job may wait for its reader, in seconds and in all. `engine`, the deadline of the job, stands still meanwhile."""

    def __init__(self, seconds: float) -> None:
        self._allowed = seconds
        self.spent = 0.0
        self.engine: asyncio.Timeout | None = None

    @asynccontextmanager
    async def waiting(self) -> AsyncIterator[None]:
        """Around a wait for the reader. Raises Stalled when all of its time is used up."""
        clock, engine = asyncio.get_running_loop().time, self.engine
        began = clock()
        deadline = engine.when() if engine is not None else None
        if engine is not None:
            engine.reschedule(None)
        try:
            async with asyncio.timeout(self._allowed - self.spent):
                yield
        except TimeoutError:
            raise Stalled(f"the reader took nothing for {self._allowed:g} s in all, and nobody cancelled") from None
        finally:
            waited = clock() - began
            self.spent += waited
            if engine is not None and deadline is not None:
                engine.reschedule(deadline + waited)


class Delivery:
    """Sends one job's chunks. Sealing, counting and posting a chunk happen without a pause between them, so that stopping a job
    anywhere leaves a stream without a gap. `confirm`: seconds that the coordinator's first credit may take.
    """

    def __init__(
        self, link: Link, job: JobId, sealer: Sealer, meter: Meter, *, reader: ReaderTime | None = None, confirm: float = 15.0
    ) -> None:
        self._link, self._job, self._sealer = link, job, sealer
        self._reader, self._confirm = reader or ReaderTime(900.0), confirm
        self.meter = meter
        self._credit = INITIAL_CREDIT
        self._granted = asyncio.Event()
        self._taken: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._head = CANCELLED_HEAD
        self._held = bytearray()
        self._tail: tuple[bytes, int] | None = None
        self.started = False

    def grant(self, chunks: int) -> None:
        """The coordinator has output of this response, so that no other attempt can begin, and will take so many more chunks."""
        self._credit += chunks
        self._granted.set()
        self._settle(taken=True)

    def lose(self) -> None:
        """The link was lost: no word of the coordinator comes any more."""
        self._settle(taken=False)

    def _settle(self, *, taken: bool) -> None:
        if not self._taken.done():
            self._taken.set_result(taken)

    async def taken(self) -> bool:
        """Whether the coordinator said that it has output of this attempt; waits for its word for a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._confirm):
                return await asyncio.shield(self._taken)
        return False

    def head(self, head: Head) -> None:
        """The response's head; it leaves with the first output."""
        self._head = head

    def hold(self, data: bytes) -> int:
        """Bytes that come before any output; they leave with it. Returns how many are held."""
        self._held += data
        return len(self._held)

    async def send(self, data: bytes, text: int = 0) -> None:
        """Sends output, after the head and what was held. Raises Stalled, Unconfirmed or LinkLost."""
        fresh = not self.started
        if fresh:
            await self._room()
            self._begin(self._head)
        if self._held:
            data, self._held = bytes(self._held) + data, bytearray()
        start = 0
        while start < len(data):
            if not fresh:
                await self._first_credit()
            await self._room()
            end = start + (FIRST_BYTES if fresh and not self._taken.done() else CHUNK_BYTES)
            part = data[start:end]
            self.meter.output(len(part), text if end >= len(data) else 0)
            self._post(self._seal(part, last=False))
            start, fresh = end, False

    async def close(self, tail: bytes, text: int = 0) -> None:
        """Sends all but the last chunk of an answer that ended with `tail`; `finish` makes that one. Raises as `send`."""
        tail, self._held = bytes(self._held) + tail, bytearray()
        cut = max(0, len(tail) - 1) // CHUNK_BYTES * CHUNK_BYTES
        if cut or not self.started:
            await self.send(tail[:cut])
        self._tail = tail[cut:], text

    @property
    def undelivered(self) -> tuple[int, int]:
        """Bytes of the last chunk, and of text in it, while it is held back."""
        data, text = self._tail or (b"", 0)
        return len(data), text

    def begin(self) -> None:
        """Sends the head of a response that was cancelled before any output, so that the coordinator can confirm it."""
        self._begin(CANCELLED_HEAD)

    def finish(self) -> tuple[bytes, ...]:
        """The last sealed chunk of an answer that ended, counted but not sent: for an answer that is paid, or costs nothing."""
        (tail, text), self._tail = self._tail or (b"", 0), None
        self.meter.output(len(tail), text)
        return (self._seal(tail, last=True),)

    def abort(self) -> tuple[bytes, ...]:
        """What closes a response that its client cancelled, sealed but not sent; what was held back is not in it."""
        head = () if self.started else (self._seal(_head_chunk(CANCELLED_HEAD), last=False),)
        return (*head, self._seal(b"", last=True))

    def post(self, *chunks: bytes) -> None:
        """Sends chunks that `finish` or `abort` returned."""
        self.started = self.started or bool(chunks)
        for sealed in chunks:
            self._post(sealed)

    def _begin(self, head: Head) -> None:
        self.started = True
        self._post(self._seal(_head_chunk(head), last=False))

    def _post(self, sealed: bytes) -> None:
        self._credit -= 1
        self._link.post(Kind.CHUNK, self._job, sealed)

    async def _first_credit(self) -> None:
        if not self._taken.done():
            async with self._reader.waiting():
                taken = await self.taken()
            if not taken:
                raise Unconfirmed(f"the coordinator granted no credit within {self._confirm:g} s of the first output")

    async def _room(self) -> None:
        if self._credit <= KEPT_FOR_LAST or not self._link.roomy:
            async with self._reader.waiting():
                while self._credit <= KEPT_FOR_LAST:
                    self._granted.clear()
                    await self._granted.wait()
                await self._link.drained()
        await self._link.drained()

    def _seal(self, part: bytes, *, last: bool) -> bytes:
        self.meter.chunk(part)
        return self._sealer.seal(part, last=last)


def _head_chunk(head: Head) -> bytes:
    return dump_response_head(ResponseHead(head.status, head.content_type))
