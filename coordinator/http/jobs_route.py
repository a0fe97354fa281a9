"""POST /v1/jobs: the hot route, raw ASGI inside the same app. It reads a submission, runs its job and relays the frames.

One task drives the job to its end and adds its frames to a response buffer; the request reads that buffer and sends the frames.
An ordinary job ends with its connection. With the header X-Tally-Linger (seconds) a job lingers; see job_service.py.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable
from contextlib import aclosing, suppress
from functools import partial
from typing import Any

from starlette.types import Receive, Scope, Send

from coordinator.http.client_watch import ClientWatch
from coordinator.http.job_service import STALL_SECONDS, JobRequest, JobService
from coordinator.http.request_bodies import refuse_codings
from coordinator.http.request_limiter import send_error
from coordinator.http.response_buffer import ResponseBuffer
from coordinator.http.watchdog import Watchdog
from tallystick.protocol.errors import BadMessage, TallyError
from tallystick.protocol.types import JobId

PATH = "/v1/jobs"
FRAMES = b"application/vnd.tallystick.frames"
LINGER = b"x-tally-linger"
_SECONDS = re.compile(rb"[0-9]{1,9}")


class JobsRoute:
    """The route as an ASGI app. A job is driven to its receipt even if its client is gone."""

    def __init__(self, service: JobService, *, stall_seconds: float = STALL_SECONDS) -> None:
        self._service, self._stall_seconds = service, stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        address = (scope.get("client") or ("",))[0]
        request: JobRequest | None = None
        try:
            request = self._service.open(address)
            try:
                refuse_codings(scope)
                await (await self._begin(scope, receive, send, request))
            finally:
                self._service.close(request)
        except TallyError as error:  # the reservation is released by now: the client may not even read this
            self._service.count_refusal(request, address, error)
            await send_error(send, error)
        except ConnectionResetError:
            return

    async def _begin(self, scope: Scope, receive: Receive, send: Send, request: JobRequest) -> Awaitable[None]:
        """Reads the request. Returns what serves it, which raises TallyError before anything is sent. Raises TallyError."""
        service = self._service
        if request.reservation is None:
            raise RuntimeError("a request without a reservation")
        body = await service.bodies.read(receive, request.reservation, service.intake.body_bytes, "a job")
        linger = _read_linger(scope)
        job = service.read(request, body)
        watch = ClientWatch(scope, receive)
        _forget(scope)
        if linger is None:
            return self._serve_once(request, job, watch, send)
        buffer = await service.find_or_begin(request, job, body)
        return self._serve_kept(job, buffer, linger, watch, send)

    async def _serve_once(self, request: JobRequest, job: JobId, watch: ClientWatch, send: Send) -> None:
        """Serves a job that ends with its connection. Returns when the job has ended; if cancelled, the job fails at once."""
        buffer = ResponseBuffer(payer=request.payer or "")
        driver = self._service.start(request, job, buffer)
        try:
            try:
                await self._deliver(job, buffer, watch, send)
            finally:
                buffer.first_reader_left()
            if not buffer.ended:
                self._service.abandon(job, buffer)
            await driver
        finally:
            driver.cancel()
            await asyncio.wait({driver})

    async def _serve_kept(self, job: JobId, buffer: ResponseBuffer, linger: float, watch: ClientWatch, send: Send) -> None:
        """Serves a job that may outlive the connection by `linger` seconds."""
        self._service.set_linger(buffer, linger)
        try:
            await self._deliver(job, buffer, watch, send)
        finally:
            self._service.left(job, buffer)

    async def _deliver(self, job: JobId, buffer: ResponseBuffer, watch: ClientWatch, send: Send) -> None:
        """Sends a response until it ends or its client is gone. One that takes nothing for `stall_seconds` counts as gone.

        Raises TallyError before anything is sent.
        """
        watchdog, begun = Watchdog(self._stall_seconds), False
        try:
            async with asyncio.timeout(None) as connected, aclosing(buffer.read()) as frames:
                watch.begin(partial(_interrupt, connected))
                async for data in frames:
                    if not begun:
                        begun = True
                        await watchdog.wait(send(_response_start(job)))
                    await watchdog.wait(send({"type": "http.response.body", "body": data, "more_body": True}))
                    del data  # what was sent is not held until the next frame comes
                await watchdog.wait(send({"type": "http.response.body", "body": b""}))
        except (OSError, TimeoutError):
            pass
        finally:
            watch.end()
            watchdog.close()


def _interrupt(connected: asyncio.Timeout) -> None:
    """Ends the relay to a client that is gone, unless the relay has ended."""
    with suppress(RuntimeError):
        connected.reschedule(0.0)


def _read_linger(scope: Scope) -> float | None:
    """Returns the seconds of X-Tally-Linger, or None without that header. Raises BadMessage."""
    for name, value in scope.get("headers", ()):
        if name == LINGER:
            if not _SECONDS.fullmatch(value):
                raise BadMessage("x-tally-linger: expected whole seconds, of at most 9 digits")
            return float(value)
    return None


def _forget(scope: Scope) -> None:
    """Frees the request's headers and the server's extensions, which are not read any more, while its job waits."""
    headers = scope.get("headers")
    if isinstance(headers, list):
        headers.clear()
    scope.pop("extensions", None)


def _response_start(job: JobId) -> dict[str, Any]:
    headers = [(b"content-type", FRAMES), (b"cache-control", b"no-store"), (b"x-tally-job", job.hex().encode())]
    return {"type": "http.response.start", "status": 200, "headers": headers}
