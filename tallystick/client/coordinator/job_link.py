"""The client's end of the link to its coordinator: one WebSocket that carries all its jobs (tallystick/protocol/job_link.py).

Frames come as calls and go to the stream of their job, which holds at most what was granted. One timer watches all streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.job_stream import Frame, LinkLost, Sink, StreamLost
from tallystick.protocol.errors import BadMessage, Fault, TallyError, error_from_json
from tallystick.protocol.job_link import (
    CREDIT_BYTES,
    FRAME_HEAD,
    LAST_FRAMES,
    LINK_STREAM,
    MAX_CLIENT_MESSAGE,
    MAX_STREAM,
    WINDOW_BYTES,
    pack_number,
    pack_orders,
    pack_record,
    pack_submit,
    read_greeting,
    read_records,
)
from tallystick.protocol.wire import MAX_FRAME, Candidate, Kind, loads
from tallystick.runtime.lean_event import LeanEvent
from tallystick.runtime.websocket_client import FastPathConnection

SWEEP_SECONDS = 1.0
MAX_BUFFERED = WINDOW_BYTES + MAX_FRAME
"""Bytes of one stream that are held, for a coordinator that keeps the rules: what was granted, and one frame beyond it."""
_QUIET = frozenset((Kind.MATCH, Kind.HEDGE, Kind.CHUNK))
"""Frames that a reader who wants the whole answer need not see at once."""
_LEFT = StreamLost("this client stopped reading")
"""Why nothing more comes on a stream that its reader has closed. It is never raised: nobody reads any more."""


class LinkJobStream:
    """One job on the link (job_stream.JobStream)."""

    __slots__ = (
        "_added",
        "_begun",
        "_buffered",
        "_cancelled",
        "_frames",
        "_granted",
        "_link",
        "_number",
        "_over",
        "_sink",
        "_urgent",
        "_waiter",
        "_whole",
        "began",
        "last",
        "matched",
        "waiting",
    )

    def __init__(self, link: JobLink, number: int, began: float) -> None:
        self._link, self._number, self.began = link, number, began
        self._frames: list[Frame] = []
        self._begun = self._cancelled = self._urgent = self._whole = False
        self._buffered = self._granted = 0
        self._over: TallyError | None = None
        self._sink: Sink | None = None
        """What takes chunks while the reader waits."""
        self._waiter: asyncio.Future[None] | None = None
        self._added: asyncio.Future[bytes] | None = None
        self.waiting: float | None = None
        """Since when the reader has waited for a frame."""
        self.matched = False
        """Whether a provider has the job, as far as this client knows."""
        self.last = False
        """Whether the frame came that ends the job."""

    def take(self, kind: Kind, payload: bytes) -> None:
        """Takes a frame of the link."""
        if kind is Kind.CHUNK and self._sink is not None and not self._frames and self._sink(payload):
            self._grant(FRAME_HEAD + len(payload))
            self.waiting = self._link.clock()
        elif kind is Kind.END:
            self.lose(StreamLost("the coordinator closed it"))
        elif kind is Kind.ERROR:
            self.lose(self._read_error(payload))
        elif kind is Kind.ADDED:
            self._grant(FRAME_HEAD + len(payload))
            if self._added is not None and not self._added.done():
                self._added.set_result(payload)
        else:
            self._begun = True
            self.matched = self.matched or kind is not Kind.BEAT
            self._frames.append((kind, payload))
            self._buffered += FRAME_HEAD + len(payload)
            if kind not in _QUIET or self._buffered >= CREDIT_BYTES:
                self._urgent = True
            self.last = self.last or kind in LAST_FRAMES
            if self._buffered > MAX_BUFFERED:
                text = f"link: expected at most {WINDOW_BYTES} bytes of a stream before more are granted"
                self.lose(BadMessage(text, fault=Fault.COORDINATOR))
                self._link.leave(self._number)
            if self._urgent or not self._whole:
                self._wake()
            elif self.waiting is not None:
                self.waiting = self._link.clock()

    def _read_error(self, payload: bytes) -> TallyError:
        try:
            error = error_from_json(loads(payload, "error"), 502)
        except BadMessage as malformed:
            malformed.fault = Fault.COORDINATOR
            return malformed
        return StreamLost(str(error)) if self._begun else error

    def lose(self, error: TallyError) -> None:
        """Notes that nothing more comes, and why."""
        if self._over is None:
            self._over = error
        self._link.forget(self._number)
        self._wake()
        if self._added is not None and not self._added.done():
            self._added.set_exception(StreamLost(str(error)))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def opened(self) -> None:
        """Waits until the coordinator has begun to answer. Raises its refusal, or LinkLost."""
        await self._wait()
        if not self._frames and self._over is not None:
            raise self._over

    async def _wait(self, *, whole: bool = False, sink: Sink | None = None) -> None:
        self._whole = whole and not self._cancelled
        while self._over is None and not (self._urgent if self._whole else self._frames):
            self._waiter = asyncio.get_running_loop().create_future()
            self.waiting, self._sink = self._link.clock(), sink
            try:
                await self._waiter
            finally:
                self.waiting = self._sink = None

    async def read(self, *, whole: bool = False, sink: Sink | None = None) -> Sequence[Frame]:
        """See JobStream."""
        await self._wait(whole=whole, sink=sink)
        if not self._frames and self._over is not None:
            raise self._over
        frames, self._frames, self._urgent = self._frames, [], False
        size, self._buffered = self._buffered, 0
        self._grant(size)
        return frames

    def _grant(self, size: int) -> None:
        """Counts bytes that were read, and grants as many once they are worth a frame."""
        self._granted += size
        if self._granted >= CREDIT_BYTES and self._over is None:
            self._link.post(pack_record(self._number, Kind.CREDIT, pack_number(self._granted)))
            self._granted = 0

    def close(self) -> None:
        """See JobStream."""
        if self._over is None and not self.last:
            self._link.leave(self._number)
        self.lose(_LEFT)

    def cancel(self) -> bool:
        """See JobStream. Its reader gets at once what came: a receipt that never comes may charge for that."""
        self._cancelled, self._whole = True, False
        if self._frames:
            self._wake()
        if self._over is None:
            self._link.post(pack_record(self._number, Kind.CANCEL))
        return self._over is None

    async def add_orders(self, candidates: Sequence[Candidate]) -> bool:
        """See JobStream."""
        if self._over is not None or self._added is not None:
            return False
        self._added = asyncio.get_running_loop().create_future()
        try:
            self._link.post(pack_record(self._number, Kind.ORDERS, pack_orders(candidates)))
            answer = await self._added
        finally:
            self._added = None
        if answer:
            raise error_from_json(loads(answer, "error"), 502)
        return True


class JobLink:
    """One connection. Open it with `job_links.open_link`."""

    def __init__(self, connection: FastPathConnection, config: ClientConfig) -> None:
        self._connection, self._config = connection, config
        self._loop = asyncio.get_running_loop()
        self.clock = self._loop.time
        self.streams: dict[int, LinkJobStream] = {}
        self._last_stream = LINK_STREAM
        self._parts: list[bytes] = []
        self._size = 0
        self._sweeping: asyncio.TimerHandle | None = None
        self._writable = LeanEvent()
        self._writable.set()
        self.welcomed: asyncio.Future[None] = self._loop.create_future()
        self.problem: TallyError | None = None
        """Why no more jobs may be sent here; None while they may."""
        self._heard_at = self.clock()
        """When a message came last, or the first job was sent after a rest."""
        connection.on_message = self._take
        connection.on_writable, connection.on_lost = self._writable.set, self._lost

    @property
    def usable(self) -> bool:
        """Whether a job may be sent here."""
        return self.problem is None and self._last_stream < MAX_STREAM

    async def submit(self, submission: bytes, linger: int | None) -> LinkJobStream:
        """Submits a job. Raises the coordinator's refusal, or LinkLost."""
        if self._connection.paused:
            self._writable.clear()
            await self._writable.wait()
        if self.problem is not None:
            raise LinkLost(str(self.problem))
        if not self.streams:
            self._heard_at = self.clock()
        self._last_stream += 1
        stream = self.streams[self._last_stream] = LinkJobStream(self, self._last_stream, self.clock())
        self.post(pack_record(self._last_stream, Kind.SUBMIT, pack_submit(submission, linger)))
        if self._sweeping is None:
            self._sweeping = self._loop.call_later(SWEEP_SECONDS, self._sweep)
        try:
            await stream.opened()
        except BaseException:
            stream.close()
            raise
        return stream

    def leave(self, number: int) -> None:
        """Tells the coordinator that a stream is read no further."""
        self.post(pack_record(number, Kind.LEAVE))

    def post(self, record: bytes) -> None:
        """Sends a record, together with what else is posted in this turn of the event loop."""
        if self._size + len(record) > MAX_CLIENT_MESSAGE:
            self._flush()
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(record)
        self._size += len(record)

    def _flush(self) -> None:
        if self._parts:
            parts, self._parts, self._size = self._parts, [], 0
            self._connection.send_parts(parts)

    def _take(self, message: bytes | str) -> None:
        self._heard_at = self.clock()
        try:
            if not isinstance(message, bytes):
                raise BadMessage("link: expected binary messages, got text")
            for number, kind, payload in read_records(message):
                if number == LINK_STREAM:
                    self._take_of_link(kind, payload)
                elif (stream := self.streams.get(number)) is not None:
                    stream.take(kind, payload)
        except TallyError as error:
            error.fault = Fault.COORDINATOR
            self._fail(error)

    def _take_of_link(self, kind: Kind, payload: bytes) -> None:
        if kind is Kind.WELCOME:
            read_greeting(payload, "welcome", "the coordinator")
            if not self.welcomed.done():
                self.welcomed.set_result(None)
        elif kind is Kind.ERROR:
            self._fail(error_from_json(loads(payload, "error"), 502))
        else:
            raise BadMessage(f"link: expected WELCOME or ERROR on stream {LINK_STREAM}, got {kind.name}")

    def _fail(self, error: TallyError) -> None:
        """The coordinator broke the rules of the link, or says that this client did."""
        self.problem = self.problem or error
        if not self.welcomed.done():
            self.welcomed.set_exception(error)
        self._connection.transport.abort()

    @property
    def quiet_since(self) -> float | None:
        """Since when nothing has come; None if no job waits for a provider here."""
        return None if all(stream.matched for stream in self.streams.values()) else self._heard_at

    def abandon(self, reason: str) -> None:
        """Ends the streams of jobs that no provider has. The others go on, if the coordinator does."""
        self.problem = self.problem or StreamLost(reason)
        for stream in tuple(self.streams.values()):
            if not stream.matched:
                stream.lose(LinkLost(reason))
        if not self.streams:
            self._connection.transport.abort()

    def forget(self, number: int) -> None:
        """Takes a stream out. The last one of a link that takes no more jobs ends it."""
        self.streams.pop(number, None)
        if self.problem is not None and not self.streams:
            self._connection.transport.abort()

    def _lost(self) -> None:
        if self.problem is None:
            reason = self._connection.close_reason or "the connection was lost"
            self.problem = StreamLost(reason)
        if not self.welcomed.done():
            self.welcomed.set_exception(LinkLost(str(self.problem)))
        self._writable.set()
        if self._sweeping is not None:
            self._sweeping.cancel()
        for stream in tuple(self.streams.values()):
            stream.lose(LinkLost(str(self.problem)))

    def _sweep(self) -> None:
        """Gives up streams on which nothing came for too long, or which last too long, while there are any."""
        self._sweeping = self._loop.call_later(SWEEP_SECONDS, self._sweep) if self.streams else None
        now, config = self.clock(), self._config
        for number, stream in tuple(self.streams.items()):
            idle = stream.waiting is not None and now - stream.waiting > config.stream_idle_seconds
            if idle or now - stream.began > config.run_seconds:
                seconds = config.stream_idle_seconds if idle else config.run_seconds
                self.leave(number)
                stream.lose(StreamLost(f"nothing came for {seconds:g} s" if idle else f"it did not end within {seconds:g} s"))

    async def close(self) -> None:
        """Closes the connection."""
        self._flush()
        self.problem = self.problem or StreamLost("this client closed the link")
        await self._connection.close()
