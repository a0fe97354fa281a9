"""Begins the answer to a streaming request while its job still waits for a free slot, and tells the caller its place meanwhile.

After NOTICE_AFTER seconds in the queue, the caller gets status 200, the headers, and a comment with the job's place; further
comments follow as the place changes, and at least every KEEP_ALIVE_SECONDS until the answer begins. Clients ignore comments
(WHATWG HTML, 9.2.6); the bytes keep the connection from looking dead to them and to proxies. What fails sooner has a status of
its own, and a client's SDK retries it. What fails later is the stream's last event.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping

from starlette.types import Message, Send

from tallystick.client.dialects.dialect import ErrorFormat
from tallystick.client.jobs.job import Job, run_of
from tallystick.client.openai.errors import read_engine_error
from tallystick.protocol.errors import TallyError
from tallystick.protocol.lenient_json import dump_lenient, load_lenient
from tallystick.protocol.queue_place import QueuePlace
from tallystick.protocol.routes import media_type
from tallystick.protocol.sse import EVENT_STREAM
from tallystick.runtime.access_log import record

NOTICE_AFTER = 2.0
"""Seconds in the queue before the answer begins with a comment. Most waits are shorter, and end as if there had been no queue."""
KEEP_ALIVE_SECONDS = 10.0
STREAM_HEADERS: Mapping[str, str] = {"cache-control": "no-store", "x-accel-buffering": "no"}
"""Without the second header nginx holds a stream back until its buffer is full."""
DONE = b"data: [DONE]\n\n"
"""The last event of OpenAI's streams."""


class EarlyStream:
    """An ASGI `send` for one answer, which may have begun as an event stream before the answer is known.

    Then an answer that is no event stream is sent as the stream's last event. `early`: whether it has begun that way.
    """

    def __init__(self, send: Send, errors: ErrorFormat) -> None:
        self._send, self._errors = send, errors
        self.early = False
        self._request_id = ""
        self._status = 0
        self._whole: bytearray | None = None

    async def __call__(self, message: Message) -> None:
        """Passes on a message of ASGI."""
        if not self.early:
            await self._send(message)
        elif message["type"] == "http.response.start":
            headers = {name.lower(): value for name, value in message["headers"]}
            is_stream = media_type(headers.get(b"content-type", b"").decode("latin-1")) == EVENT_STREAM
            self._status, self._whole = message["status"], None if is_stream else bytearray()
        elif self._whole is None:
            await self._send(message)
        else:
            self._whole += message.get("body", b"")
            if not message.get("more_body"):
                await self._end(self._as_event(bytes(self._whole)))

    @property
    def begun(self) -> Send:
        """What passes on the rest of an answer whose head was sent: without a further step, unless it began early."""
        return self if self.early else self._send

    async def begin(self, request_id: str, headers: Mapping[str, str]) -> None:
        """Begins the stream, unless it has begun."""
        if not self.early:
            self.early, self._request_id = True, request_id
            raw = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
            raw.append((b"content-type", EVENT_STREAM.encode()))
            await self._send({"type": "http.response.start", "status": 200, "headers": raw})

    async def comment(self, text: str) -> None:
        """Sends a comment."""
        await self._send({"type": "http.response.body", "body": b": " + text.encode() + b"\n\n", "more_body": True})

    async def fail(self, error: TallyError, *, retry: bool) -> None:
        """Ends a stream that began early with an error."""
        record(outcome=error.code.value, fault=error.fault.value)
        await self._end(self._errors.render_error_event(error, request_id=self._request_id, retry=retry))

    async def _end(self, event: bytes) -> None:
        await self._send({"type": "http.response.body", "body": event})

    def _as_event(self, body: bytes) -> bytes:
        if self._status < 400:
            return whole_as_stream(body)
        error = read_engine_error(self._status, body)
        return self._errors.render_error_event(error, request_id=self._request_id, retry=error.retry)


def whole_as_stream(body: bytes) -> bytes:
    """The stream of an engine that does not stream: its whole chat completion as one chunk; another document as it is."""
    try:
        document = load_lenient(body)
    except ValueError:
        document = None
    if isinstance(document, dict) and document.get("object") == "chat.completion" and isinstance(document.get("choices"), list):
        choices = [
            {"delta" if name == "message" else name: value for name, value in choice.items()}
            for choice in document["choices"]
            if isinstance(choice, dict)
        ]
        body = dump_lenient(document | {"object": "chat.completion.chunk", "choices": choices})
    return b"data: " + b" ".join(body.splitlines()) + b"\n\n" + DONE


def place_headers(place: QueuePlace) -> dict[str, str]:
    """The headers that tell a job's place, and the expected wait in seconds if it is known."""
    headers = {"x-tally-queue-position": str(place.position)}
    return headers if place.seconds is None else headers | {"x-tally-queue-wait": str(place.seconds)}


@contextlib.asynccontextmanager
async def telling_place(stream: EarlyStream, job: Job, headers: Callable[[], Mapping[str, str]]) -> AsyncIterator[None]:
    """Tells the caller the place of a job while the block waits for the job's answer. `headers`: those of the stream.

    A message to the caller is never cut off: leaving the block waits until it is sent.
    """
    notices = _Notices(stream, job, headers)
    run_of(job).on_place = notices.moved
    telling = asyncio.create_task(notices.run(), name="queue-notices")
    try:
        yield
    finally:
        notices.stop()
        try:
            await telling
        finally:
            telling.cancel()


class _Notices:
    """The comments about one job."""

    def __init__(self, stream: EarlyStream, job: Job, headers: Callable[[], Mapping[str, str]]) -> None:
        self._stream, self._job, self._headers = stream, job, headers
        self._moved, self._stopped = asyncio.Event(), asyncio.Event()
        self._last: QueuePlace | None = None

    def moved(self, place: QueuePlace) -> None:
        self._last = place
        self._moved.set()

    def stop(self) -> None:
        self._stopped.set()
        self._moved.set()

    async def run(self) -> None:
        await self._moved.wait()
        if self._last is None or (not self._stream.early and await self._stops_within(NOTICE_AFTER)):
            return
        await self._stream.begin(self._job.id.hex(), {**self._headers(), **place_headers(self._last)})
        while not self._stopped.is_set():
            self._moved.clear()
            await self._stream.comment(self._text())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                    await self._moved.wait()

    async def _stops_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopped.wait()
        return self._stopped.is_set()

    def _text(self) -> str:
        place = self._job.place
        return "waiting for the first output" if place is None else f"queued {place.position}{place.words}"
