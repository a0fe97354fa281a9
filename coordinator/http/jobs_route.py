"""POST /v1/jobs: the hot route, raw ASGI inside the same app. It reads a submission, runs its job and relays the frames.

One task drives the job to its end and adds its frames to a response buffer; the request reads that buffer and sends the frames.
An ordinary job ends with its connection: the client's departure cancels it. With the header X-Tally-Linger (seconds) a job
continues for that long without a connection. A client that posts the same bytes again then gets the response from the first
frame on, while the job runs and for as long as the response is kept, from the next process too.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from contextlib import aclosing, closing
from typing import Any

import structlog
from starlette.types import Receive, Scope, Send

from coordinator.domain.limits import IntakeLimits
from coordinator.domain.rate_limiter import RateLimiter
from coordinator.http.request_bodies import BodyReservation, RequestBodies, refuse_codings
from coordinator.http.request_limiter import send_error
from coordinator.http.response_buffer import ResponseBuffer, ResponseBuffers, Retention
from coordinator.http.watchdog import Watchdog
from coordinator.jobs.market import Market
from coordinator.ports import ResponseStore, StoredResponse
from tallystick.protocol.errors import BadMessage, TallyError, Unavailable
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import Kind, Submission, pack_frame
from tallystick.runtime.access_log import record

log = structlog.get_logger()
PATH = "/v1/jobs"
FRAMES = b"application/vnd.tallystick.frames"
LINGER = b"x-tally-linger"
_SECONDS = re.compile(rb"[0-9]{1,9}")
STALL_SECONDS = 45
"""A client that takes nothing for this long counts as gone. A provider may stay silent for longer, so it is not at fault."""


class JobsRoute:
    """The route as an ASGI app. A job is driven to its receipt even if its client is gone."""

    def __init__(
        self,
        market: Market,
        store: ResponseStore | None = None,
        *,
        intake: IntakeLimits | None = None,
        retention: Retention | None = None,
        rate_limiter: RateLimiter | None = None,
        bodies: RequestBodies | None = None,
    ) -> None:
        """`store`: keeps responses beyond the process; None keeps them in memory only. `rate_limiter` and `bodies` may be shared
        with other routes.
        """
        self._market, self._store, self._intake = market, store, intake or IntakeLimits()
        self._rate_limiter = rate_limiter or RateLimiter(self._intake, time.monotonic)
        self._bodies = bodies or RequestBodies(self._intake)
        self._buffers = ResponseBuffers(retention or Retention(), time.monotonic)
        self._drivers: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        address = (scope.get("client") or ("",))[0]
        request = _Request(address)
        try:
            await self._reserve_and_serve(scope, receive, send, request)
        except TallyError as error:  # the reservation is released by now: the client may not even read this
            self._rate_limiter.count_refusal(address, error, request.payer)
            record(outcome=error.code.value)
            await send_error(send, error)
        except ConnectionResetError:
            return

    async def _reserve_and_serve(self, scope: Scope, receive: Receive, send: Send, request: _Request) -> None:
        self._rate_limiter.check_address(request.address)
        refuse_codings(scope)
        request.reservation = reservation = self._bodies.begin(request.address)
        try:
            await self._serve(scope, receive, send, request, reservation)
        finally:
            if request.reservation is not None:
                self._bodies.close(request.reservation)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, request: _Request, reservation: BodyReservation) -> None:
        """Raises TallyError before anything is sent."""
        body = await self._bodies.read(receive, reservation, self._intake.body_bytes, "a job")
        submission = Submission.loads(body)
        job, payer = submission.job, submission.candidates[0].order.message.payer
        record(job=job.hex(), model=submission.candidates[0].terms.model)
        linger = _read_linger(scope)
        _forget_headers(scope)
        request.payer = payer
        self._rate_limiter.check_signer(payer)
        # Neither the body nor the submission may be held here while the job waits: the queue replaces it by a smaller one.
        if linger is None:
            buffer = ResponseBuffer(payer=payer)
            driver = self._start(submission, buffer, request.release())
            del body, submission
            await self._serve_once(job, driver, buffer, receive, send)
        else:
            buffer = await self._find_or_begin(submission, hashlib.sha256(body).digest(), request)
            del body, submission
            await self._serve_kept(job, buffer, linger, receive, send)

    async def _serve_once(
        self, job: JobId, driver: asyncio.Task[None], buffer: ResponseBuffer, receive: Receive, send: Send
    ) -> None:
        """Serves a job that ends with its connection. Returns when the job has ended; if cancelled, the job fails at once."""
        try:
            await self._deliver(job, buffer, receive, send)
            if not buffer.ended:
                self._abandon(job, buffer)
            await driver
        finally:
            driver.cancel()
            await asyncio.wait({driver})

    # Responses that outlive their connection

    async def _find_or_begin(self, submission: Submission, fingerprint: bytes, request: _Request) -> ResponseBuffer:
        """Returns the buffer of a job that was posted before, or starts the job with a new one. Raises TallyError."""
        job = submission.job
        buffer = self._buffers.find(job, fingerprint) or await self._restore(job, fingerprint)
        if buffer is None:
            buffer = self._buffers.begin(job, fingerprint, submission.candidates[0].order.message.payer)
            driver = self._start(submission, buffer, request.release(), keep=True)
            self._drivers.add(driver)
            driver.add_done_callback(self._drivers.discard)
        elif buffer.ended and request.reservation is not None:
            self._bodies.hold(request.reservation, buffer.size)  # a client that does not read it makes a copy of it wait
        return buffer

    async def _serve_kept(self, job: JobId, buffer: ResponseBuffer, linger: float, receive: Receive, send: Send) -> None:
        """Serves a job that may outlive the connection by `linger` seconds."""
        buffer.linger = max(buffer.linger, min(linger, self._buffers.retention.linger_seconds))
        try:
            await self._deliver(job, buffer, receive, send)
        finally:
            if not buffer.ended and not buffer.readers:
                # The longest linger of all readers counts: a stranger that posts the same bytes and leaves ends no job.
                asyncio.get_running_loop().call_later(buffer.linger, self._cancel_unread, job, buffer)

    def _cancel_unread(self, job: JobId, buffer: ResponseBuffer) -> None:
        if not buffer.ended and not buffer.readers:
            self._abandon(job, buffer)

    async def _restore(self, job: JobId, fingerprint: bytes) -> ResponseBuffer | None:
        """Returns a stored response, or None. Raises Refusal if the job was posted with other bytes; Unavailable."""
        if self._store is None or not self._market.placed_before(job):
            return None
        stored = await self._store.response(job, self._horizon())
        known = self._buffers.find(job, fingerprint)  # another request may have been faster
        if stored is None or known is not None:
            return known
        buffer = self._buffers.restore(job, stored.fingerprint, stored.frames, stored.payer)
        return buffer.check_fingerprint(job, fingerprint)

    async def _keep(self, job: JobId, buffer: ResponseBuffer, receipt: bytes) -> None:
        """Stores a response before its receipt leaves, since the receipt tells the client that the response can be had again."""
        if evicted := self._buffers.take_evicted():
            log.info("responses evicted from memory; the database still keeps them", count=len(evicted))
        frames = buffer.joined(receipt)
        if self._store is None or frames is None:
            return
        stored = StoredResponse(job, buffer.fingerprint, frames, int(time.time()), buffer.payer)
        try:
            await self._store.put_response(stored, since=self._horizon(), max_bytes=self._buffers.retention.stored_bytes)
        except Unavailable as error:
            log.warning("response not stored; it is lost if this process ends", job=job.hex(), error=str(error))

    def _horizon(self) -> int:
        return int(time.time() - self._buffers.retention.seconds)

    # One job and its readers

    def _start(
        self, submission: Submission, buffer: ResponseBuffer, reservation: BodyReservation | None, *, keep: bool = False
    ) -> asyncio.Task[None]:
        drive = self._drive(submission, buffer, reservation, keep=keep)
        return asyncio.create_task(drive, name=f"job {submission.job.hex()}")

    async def _drive(
        self, submission: Submission, buffer: ResponseBuffer, reservation: BodyReservation | None, *, keep: bool
    ) -> None:
        """Runs a job from its order to its end, whether anybody reads or not. Its body counts until then.

        An ordinary job waits for its reader after each burst of frames. The market counts that wait as the reader's time.
        """
        refusal, job_id = None, submission.job
        try:
            job = await self._market.place_order(submission)
            del submission
            if buffer.abandoned:
                self._market.cancel(job.id)
            async with aclosing(self._market.run(job)) as frames:
                async for kind, payload in frames:
                    frame = pack_frame(kind, payload)
                    if keep and kind is Kind.RECEIPT:
                        await self._keep(job.id, buffer, frame)
                    await buffer.add(frame, more=job.more_frames_queued)
            record(outcome=job.state.value)
            if job.attempt is not None:  # a job that waited for a slot in vain never had a provider
                record(provider=job.provider)
        except TallyError as error:
            refusal = error
        finally:
            if keep:
                self._buffers.end(job_id, refusal)
            else:
                buffer.end(time.monotonic(), refusal)
            if reservation is not None:
                self._bodies.close(reservation)

    def _abandon(self, job: JobId, buffer: ResponseBuffer) -> None:
        """Cancels a job that nobody reads, now or as soon as it is admitted."""
        buffer.abandoned = True
        self._market.cancel(job)

    async def _deliver(self, job: JobId, buffer: ResponseBuffer, receive: Receive, send: Send) -> None:
        """Sends a response until it ends or its client is gone. Raises TallyError before anything is sent."""
        relay = asyncio.create_task(_relay(job, buffer, send), name="relay")
        gone = asyncio.create_task(_wait_until_gone(receive), name="client-gone")
        try:
            await asyncio.wait({relay, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            relay.cancel()
            results = await asyncio.gather(relay, gone, return_exceptions=True)
            buffer.first_reader_left()
        if isinstance(results[0], Exception) and not isinstance(results[0], OSError | TimeoutError):
            raise results[0]


async def _relay(job: JobId, buffer: ResponseBuffer, send: Send) -> None:
    """Sends the frames of a buffer. Raises TimeoutError for a client that takes nothing for STALL_SECONDS."""
    begun = False
    with closing(Watchdog(STALL_SECONDS)) as watchdog:
        async with aclosing(buffer.read()) as frames:
            async for data in frames:
                if not begun:
                    begun = True
                    await watchdog.wait(send(_response_start(job)))
                await watchdog.wait(send({"type": "http.response.body", "body": data, "more_body": True}))
        await watchdog.wait(send({"type": "http.response.body", "body": b""}))


class _Request:
    """One request: its address, its reservation, and the payer that its order names."""

    __slots__ = ("address", "payer", "reservation")

    def __init__(self, address: str) -> None:
        self.address = address
        self.reservation: BodyReservation | None = None
        self.payer: Address | None = None

    def release(self) -> BodyReservation | None:
        """Returns the reservation, which from now on belongs to the job: the job may outlive the request."""
        reservation, self.reservation = self.reservation, None
        return reservation


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _read_linger(scope: Scope) -> float | None:
    """Returns the seconds of X-Tally-Linger, or None without that header. Raises BadMessage."""
    for name, value in scope.get("headers", ()):
        if name == LINGER:
            if not _SECONDS.fullmatch(value):
                raise BadMessage("x-tally-linger: expected whole seconds, of at most 9 digits")
            return float(value)
    return None


def _forget_headers(scope: Scope) -> None:
    """Frees the request's headers, which are not read any more, while its job waits."""
    headers = scope.get("headers")
    if isinstance(headers, list):
        headers.clear()


def _response_start(job: JobId) -> dict[str, Any]:
    headers = [(b"content-type", FRAMES), (b"cache-control", b"no-store"), (b"x-tally-job", job.hex().encode())]
    return {"type": "http.response.start", "status": 200, "headers": headers}
