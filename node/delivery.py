"""One response on its way out: held back until there is output, cut, counted, sealed, and posted under credit."""

from __future__ import annotations

import asyncio
import contextlib

from node.meter import Meter
from node.ports import Head, Link
from tallystick.protocol.sealing import Sealer
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import INITIAL_CREDIT, Kind, ResponseHead, dump_response_head

CHUNK_BYTES = 64 * 1024
KEPT_FOR_LAST = 1
"""Credit that is never used up before the end, so that a response can always be closed."""
CANCELLED_HEAD = Head(499, "application/json")


class Stalled(Exception):
    """Nobody reads at the other end: no credit came in time."""


class Delivery:
    """Sends one job's chunks. Sealing, counting and posting a chunk happen without a pause between them, so that stopping a job
    anywhere leaves a stream without a gap.
    """

    def __init__(self, link: Link, job: JobId, sealer: Sealer, meter: Meter, stall_seconds: float) -> None:
        self._link, self._job, self._sealer, self._stall = link, job, sealer, stall_seconds
        self.meter = meter
        self._credit = INITIAL_CREDIT
        self._granted = asyncio.Event()
        self._taken: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._head = CANCELLED_HEAD
        self._held = bytearray()
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

    async def taken(self, seconds: float) -> bool:
        """Whether the coordinator said that it has the output of this attempt; waits for its word for a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
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
        """Sends output, after the head and what was held. Raises Stalled or LinkLost."""
        if not self.started:
            await self._room()
            self.started = True
            self.post(self._seal(_head_chunk(self._head), last=False))
        if self._held:
            data, self._held = bytes(self._held) + data, bytearray()
        for start in range(0, len(data), CHUNK_BYTES):
            await self._room()
            part = data[start : start + CHUNK_BYTES]
            self.meter.output(len(part), text if start + CHUNK_BYTES >= len(data) else 0)
            self.post(self._seal(part, last=False))

    async def close(self, tail: bytes, text: int = 0) -> tuple[bytes, ...]:
        """Sends all but the end of `tail`; returns the last sealed chunk, counted but not sent. Raises Stalled or LinkLost."""
        tail, self._held = bytes(self._held) + tail, bytearray()
        cut = max(0, len(tail) - 1) // CHUNK_BYTES * CHUNK_BYTES
        if cut or not self.started:
            await self.send(tail[:cut])
        self.meter.output(len(tail) - cut, text)
        return (self._seal(tail[cut:], last=True),)

    def abort(self) -> tuple[bytes, ...]:
        """What is left to send of a response that ends here, sealed but not sent; what was held back is not in it."""
        head = () if self.started else (self._seal(_head_chunk(CANCELLED_HEAD), last=False),)
        return (*head, self._seal(b"", last=True))

    def post(self, sealed: bytes) -> None:
        """Sends a chunk that `close` or `abort` returned."""
        self._credit -= 1
        self._link.post(Kind.CHUNK, self._job, sealed)

    async def _room(self) -> None:
        if self._credit <= KEPT_FOR_LAST:
            try:
                async with asyncio.timeout(self._stall):
                    while self._credit <= KEPT_FOR_LAST:
                        self._granted.clear()
                        await self._granted.wait()
            except TimeoutError:
                raise Stalled(f"no credit for {self._stall} s") from None
        await self._link.drained()

    def _seal(self, part: bytes, *, last: bool) -> bytes:
        self.meter.chunk(part)
        return self._sealer.seal(part, last=last)


def _head_chunk(head: Head) -> bytes:
    return dump_response_head(ResponseHead(head.status, head.content_type))
