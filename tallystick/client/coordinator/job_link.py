"""The client's end of the link to its coordinator: one WebSocket that carries all its jobs (tallystick/protocol/job_link.py).

Frames come as calls and go to the stream of their job, which holds at most what was granted. One timer watches all streams.
A coordinator without such a link, or a proxy in between that opens no WebSocket, gets each job by HTTP instead.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import structlog
from websockets.exceptions import WebSocketException

from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.job_stream import Frame, LinkLost, Sink, StreamLost
from tallystick.protocol.errors import BadMessage, Fault, TallyError, Unavailable, error_from_json
from tallystick.protocol.job_link import (
    CREDIT_BYTES,
    FRAME_HEAD,
    LAST_FRAMES,
    LINK_PATH,
    LINK_STREAM,
    MAX_CLIENT_MESSAGE,
    MAX_COORDINATOR_MESSAGE,
    MAX_STREAM,
    MAX_SUBMISSION,
    WINDOW_BYTES,
    pack_greeting,
    pack_number,
    pack_orders,
    pack_record,
    pack_submit,
    read_greeting,
    read_records,
)
from tallystick.protocol.proxies import uses_proxy
from tallystick.protocol.wire import MAX_FRAME, Candidate, Kind, loads
from tallystick.runtime.lean_event import LeanEvent
from tallystick.runtime.websocket_client import CheckPeer, FastPathConnection, open_websocket
from tallystick.version import __version__

log = structlog.get_logger()
SOFTWARE = f"tallystick/{__version__}"
PING_SECONDS = 20.0
CLOSE_SECONDS = 3.0
SWEEP_SECONDS = 1.0
WITHOUT_LINK_SECONDS = 60.0
"""Seconds for which jobs go by HTTP after a link could not be opened."""
BUSY_SECONDS = 5.0
"""The same, after a coordinator that has no room for a link now."""
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
        self._link.streams.pop(self._number, None)
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
    """One connection. Open it with `open_link`."""

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


async def open_link(
    url: str, config: ClientConfig, open_seconds: float | None = None, check_peer: CheckPeer | None = None
) -> JobLink:
    """Opens a link to the coordinator at this URL, http or https, within `open_seconds` (None: the config's `connect_seconds`).

    `check_peer` is called with the address of the server before anything is sent.
    Raises OSError, TimeoutError or WebSocketException if there is no such link, and the coordinator's refusal.
    """
    seconds = config.connect_seconds if open_seconds is None else open_seconds
    connection = await open_websocket(
        "ws" + url.removeprefix("http") + LINK_PATH,
        max_size=MAX_COORDINATOR_MESSAGE,
        open_seconds=seconds,
        ping_seconds=PING_SECONDS,
        close_seconds=CLOSE_SECONDS,
        user_agent=SOFTWARE,
        use_proxy=uses_proxy(url),
        check_peer=check_peer,
    )
    link = JobLink(connection, config)
    try:
        link.post(pack_record(LINK_STREAM, Kind.HELLO, pack_greeting(SOFTWARE)))
        async with asyncio.timeout(seconds):
            await link.welcomed
    except BaseException:
        connection.transport.abort()
        raise
    return link


class JobLinks:
    """The link of one client to its coordinator, which is opened when a job needs it, and again after it was lost."""

    def __init__(self, url: str, config: ClientConfig, check_peer: CheckPeer | None = None) -> None:
        self._url, self._config, self._check_peer = url, config, check_peer
        self._link: JobLink | None = None
        self._opening: asyncio.Task[JobLink | None] | None = None
        self._without_until = 0.0

    @property
    def in_use(self) -> bool:
        """Whether a job is read on the link."""
        return self._link is not None and bool(self._link.streams)

    async def find(self, size: int, open_seconds: float | None = None) -> JobLink | None:
        """The link for a submission of `size` bytes; None if it goes by HTTP. Raises BadMessage for another protocol.

        `open_seconds`: see `open_link`.
        """
        if self._link is not None and self._link.usable and size <= MAX_SUBMISSION:
            return self._link
        if size > MAX_SUBMISSION or asyncio.get_running_loop().time() < self._without_until:
            return None
        if self._opening is None:
            self._opening = asyncio.create_task(self._open(open_seconds), name="open link")
            self._opening.add_done_callback(self._opened)
        return await asyncio.shield(self._opening)

    def _opened(self, task: asyncio.Task[JobLink | None]) -> None:
        self._opening = None
        if not task.cancelled() and task.exception() is None:
            self._link = task.result()

    async def _open(self, open_seconds: float | None) -> JobLink | None:
        try:
            return await open_link(self._url, self._config, open_seconds, self._check_peer)
        except Unavailable as error:
            self._go_without(error, BUSY_SECONDS)
        except (WebSocketException, TimeoutError, ImportError) as error:  # ImportError: of a SOCKS proxy
            self._go_without(error, WITHOUT_LINK_SECONDS)
        except OSError:
            pass  # nobody answers, as the request by HTTP will say
        return None

    def _go_without(self, error: Exception, seconds: float) -> None:
        """Sends jobs by HTTP for a while."""
        self._without_until = asyncio.get_running_loop().time() + seconds
        log.info("no link to the coordinator; jobs go by HTTP", url=self._url, reason=str(error), retry_seconds=seconds)

    async def close(self) -> None:
        """Closes the link."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        if self._link is not None:
            with contextlib.suppress(OSError, WebSocketException):
                await self._link.close()
