"""A client's link: one WebSocket that carries many jobs (tallystick/protocol/job_link.py). No job waits for another one's reader.

Everything here runs in the calls of the connection and of the jobs' tasks; no task, queue or timer is a link's own. Frames of one
turn of the event loop leave as one message.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from coordinator.domain.peer_errors import error_for_peers
from coordinator.domain.rate_limiter import RateLimiter
from coordinator.domain.resource_bounds import LOOKUP_UNITS
from tallystick.protocol.errors import BadMessage, TallyError
from tallystick.protocol.job_link import (
    CREDIT_BYTES,
    LINK_STREAM,
    ONE_FRAME_HEAD,
    RECORD_HEAD,
    WINDOW_BYTES,
    frames_head,
    pack_greeting,
    pack_record,
    read_greeting,
    read_number,
    read_records,
    read_submit,
    record_head,
)
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import Kind, dumps
from tallystick.runtime.websocket import DirectSocket

MAX_BATCH = 64 * 1024
"""Bytes from which on what was posted is sent at once."""

Submit = Callable[["LinkStream", bytes], asyncio.Task[None]]
"""Starts to serve a submission on a new stream."""


class LinkStream:
    """One job's frames on their way to its client (job_service.ClientSink).

    `linger`: seconds for which the job goes on without its client; None: not at all. `job` is set once the job is known.
    """

    __slots__ = (
        "_waiter",
        "abandoned",
        "adding",
        "first_at",
        "job",
        "linger",
        "link",
        "number",
        "room",
        "sent_bytes",
        "task",
        "waiting_since",
    )

    def __init__(self, link: ClientLink, number: int, linger: int | None) -> None:
        self.link, self.number, self.linger = link, number, linger
        self.job: JobId | None = None
        self.abandoned = False
        self.adding = False
        """Whether further orders are being added."""
        self.room = WINDOW_BYTES
        """Bytes that may be sent before the client grants more."""
        self.sent_bytes, self.first_at = 0, 0.0
        self.waiting_since: float | None = None
        self.task: asyncio.Task[None] | None = None
        self._waiter: asyncio.Future[None] | None = None

    def take_chunk(self, payload: bytes) -> bool:
        """See FrameSink."""
        link, size = self.link, len(payload)
        room = self.room - ONE_FRAME_HEAD - size
        if room <= 0 or self.abandoned or link.paused:
            return False
        if not self.sent_bytes:
            self.first_at = link.clock()
        self.sent_bytes += ONE_FRAME_HEAD + size
        self.room = room
        link.post(record_head(self.number, _CHUNK, size), payload)
        return True

    def put(self, kind: Kind, payload: bytes, *, more: bool = False) -> bool:  # noqa: ARG002 - frames are joined anyway
        """See FrameSink."""
        if self.abandoned:
            return False
        return self._sent(len(payload), record_head(self.number, kind, len(payload)), payload)

    def put_last(self, kind: Kind, payload: bytes) -> bool:
        """See FrameSink."""
        self.put(kind, payload)
        self.end()
        return True

    def take_frame(self, frame: bytes) -> bool:
        """Sends a packed frame if that keeps nobody waiting. Returns whether it was sent."""
        if len(frame) > CREDIT_BYTES or self.room <= RECORD_HEAD + len(frame) or self.abandoned or self.link.paused:
            return False
        self.put_frames(frame)
        return True

    def put_frames(self, frames: bytes) -> bool:
        """Sends packed frames. Returns as `put` does."""
        return not self.abandoned and self._sent(len(frames), frames_head(self.number, len(frames)), frames)

    def _sent(self, size: int, head: bytes, payload: bytes) -> bool:
        link = self.link
        if not self.sent_bytes:
            self.first_at = link.clock()
        self.sent_bytes += len(head) + size
        self.room -= len(head) + size
        link.post(head, payload)
        return self.room <= 0 or link.paused

    async def wait(self) -> None:
        """See FrameSink."""
        while not self.abandoned and (self.room <= 0 or self.link.paused):
            self._waiter = asyncio.get_running_loop().create_future()
            self.waiting_since = self.link.clock()
            try:
                await self._waiter
            finally:
                self.waiting_since = None

    def grant(self, size: int) -> bool:
        """Grants further bytes. Returns whether any were outstanding."""
        outstanding = self.room < WINDOW_BYTES
        self.room = min(WINDOW_BYTES, self.room + size)
        self.wake()
        return outstanding and size > 0

    def wake(self) -> None:
        """Lets the job look again whether there is room."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def end(self) -> None:
        """Ends the stream after its last frame."""
        self._close(Kind.END, b"")

    def fail(self, error: TallyError) -> None:
        """Ends the stream with an error."""
        self._close(Kind.ERROR, dumps(error_for_peers(error).as_json()))

    def _close(self, kind: Kind, payload: bytes) -> None:
        if self.link.streams.pop(self.number, None) is not None:
            self.link.post(record_head(self.number, kind, len(payload)), payload)

    def drop(self) -> None:
        """Notes that nobody reads the stream any more."""
        self.abandoned = True
        self.link.streams.pop(self.number, None)
        self.wake()


class ClientLink:
    """One connection, whose messages it takes (runtime.websocket.MessageHandler)."""

    def __init__(
        self,
        address: str,
        rate_limiter: RateLimiter,
        *,
        submit: Submit,
        left: Callable[[LinkStream], None],
        cancelled: Callable[[LinkStream], None],
        ordered: Callable[[LinkStream, bytes], None],
        refused: Callable[[ClientLink, TallyError], None],
        greeted: Callable[[ClientLink], None],
    ) -> None:
        """What the link calls: `submit` for a new job, `left`, `cancelled` and `ordered` for what the client wants of one,
        `refused` for a client that breaks the rules, whose connection must be closed, and `greeted` after its HELLO.
        """
        self.address, self._rate_limiter = address, rate_limiter
        self._submit, self._left, self._cancelled, self._ordered = submit, left, cancelled, ordered
        self._refused, self._greeted = refused, greeted
        self._loop = asyncio.get_running_loop()
        self.clock = time.monotonic  # the loop's own clock may have whole milliseconds
        self.streams: dict[int, LinkStream] = {}
        self.software: str | None = None
        """What the client calls itself; None before its HELLO."""
        self.paused = self.closed = False
        self._last_stream = LINK_STREAM
        self._parts: list[bytes] = []
        self._size = 0
        self._socket: DirectSocket | None = None
        self._throttled: asyncio.TimerHandle | None = None

    def attach(self, socket: DirectSocket) -> None:
        """Sets the connection."""
        self._socket = socket

    # What the client sends

    def message_received(self, message: bytes | str) -> None:
        """See MessageHandler."""
        try:
            if not isinstance(message, bytes):
                raise BadMessage("link: expected binary messages, got text")
            for number, kind, payload in read_records(message):
                if self.closed:
                    return
                self._take(number, kind, payload)
        except TallyError as error:
            self.refuse(error)

    def _take(self, number: int, kind: Kind, payload: bytes) -> None:
        if self.software is None:
            self._greet(number, kind, payload)
        elif kind is Kind.SUBMIT:
            self._open(number, payload)
        elif kind not in _OF_STREAM or number == LINK_STREAM:
            raise BadMessage(f"link: expected a frame that clients send on stream {number}, got {kind.name}")
        elif (stream := self.streams.get(number)) is None:
            self.charge(1)  # it has ended, and its client may not know yet
        else:
            self._take_of_stream(stream, kind, payload)

    def _greet(self, number: int, kind: Kind, payload: bytes) -> None:
        if (number, kind) != (LINK_STREAM, Kind.HELLO):
            raise BadMessage(f"link: expected HELLO on stream {LINK_STREAM}, got {kind.name} on stream {number}")
        self.software = read_greeting(payload, "hello", "the client")
        self._greeted(self)
        self.post(pack_record(LINK_STREAM, Kind.WELCOME, pack_greeting()))

    def _open(self, number: int, payload: bytes) -> None:
        if number <= self._last_stream:
            raise BadMessage(f"submit: expected a stream above {self._last_stream}, got {number}")
        self._last_stream = number
        linger, body = read_submit(payload)
        stream = self.streams[number] = LinkStream(self, number, linger)
        stream.task = self._submit(stream, body)

    def _take_of_stream(self, stream: LinkStream, kind: Kind, payload: bytes) -> None:
        if kind is Kind.CREDIT:
            if not stream.grant(read_number(payload, "credit")):
                self.charge(1)
        elif kind is Kind.LEAVE:
            self._left(stream)
        elif kind is Kind.CANCEL:
            if stream.linger is not None:
                raise BadMessage("cancel: expected a job that ends with its client; POST /v1/jobs/ID/cancel for one that lingers")
            self.charge(1)
            self._cancelled(stream)
        else:
            if stream.adding:
                raise BadMessage("orders: expected the answer to the former ORDERS first")
            self.charge(LOOKUP_UNITS)
            self._ordered(stream, payload)

    def charge(self, units: int) -> None:
        """Counts what the client costs. The links of an address that costs too much are read slowly."""
        seconds = self._rate_limiter.count_frame(self.address, units)
        if seconds and self._throttled is None and self._socket is not None:
            self._socket.pause_reading()
            self._throttled = self._loop.call_later(seconds, self._unthrottle)

    def _unthrottle(self) -> None:
        self._throttled = None
        self._read_on()

    def _read_on(self) -> None:
        if self._socket is not None and self._throttled is None and not self.paused:
            self._socket.resume_reading()

    # What the client gets

    def post(self, head: bytes, payload: bytes = b"") -> None:
        """Sends a record, together with what else is posted in this turn of the event loop or in the next one.

        What arrived with a job's chunk, such as its receipt, goes through the job's task, which runs in the next turn.
        """
        if self.closed:
            return
        if not self._parts:
            self._loop.call_soon(self._loop.call_soon, self.flush)
        self._parts += (head, payload) if payload else (head,)
        self._size += RECORD_HEAD + len(payload)
        if self._size >= MAX_BATCH:
            self.flush()

    def flush(self) -> None:
        """Sends what was posted."""
        if self._parts and self._socket is not None:
            parts, self._parts, self._size = self._parts, [], 0
            self._socket.send_parts(parts)

    def pause_writing(self) -> None:
        """See MessageHandler. A client that does not read is not read either, since each of its frames may have an answer."""
        self.paused = True
        if self._socket is not None:
            self._socket.pause_reading()

    def resume_writing(self) -> None:
        """See MessageHandler."""
        self.paused = False
        for stream in tuple(self.streams.values()):
            stream.wake()
        self._read_on()

    def refuse(self, error: TallyError) -> None:
        """Sends the error, and closes the link."""
        if not self.closed:
            self.post(pack_record(LINK_STREAM, Kind.ERROR, dumps(error_for_peers(error).as_json())))
            self.flush()
            self.closed = True
            self._refused(self, error)

    def lost(self) -> None:
        """The connection has ended: every job's client is gone."""
        self.closed = True
        if self._throttled is not None:
            self._throttled.cancel()
        self._parts, self._socket = [], None
        for stream in tuple(self.streams.values()):
            self._left(stream)


_CHUNK = int(Kind.CHUNK)
"""As a plain number, which is packed in a third of the time."""
_OF_STREAM = frozenset({Kind.CREDIT, Kind.CANCEL, Kind.LEAVE, Kind.ORDERS})
