"""POST /v1/jobs: the hot route, raw ASGI inside the same app. It parses, calls the market and passes frames on.

With the header X-Tally-Linger (seconds) a job does not end with its connection: it goes on for so long, and whoever posts the
same bytes again gets its answer from the first frame on, while it runs and as long as it is kept, also by the next process.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import Any

import structlog
from starlette.types import Receive, Scope, Send

from coordinator.domain.limits import IntakeLimits
from coordinator.domain.rate_limiter import RateLimiter
from coordinator.http.request_bodies import BodyReservation, RequestBodies
from coordinator.http.request_limiter import send_error
from coordinator.http.response_buffer import ResponseBuffer, ResponseBuffers, Retention
from coordinator.http.watchdog import Watchdog
from coordinator.jobs.live_job import LiveJob
from coordinator.jobs.market import Market
from coordinator.ports import ResponseStore, StoredResponse
from tallystick.protocol.errors import BadMessage, TallyError, Unavailable
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import Kind, Submission, pack_frame

log = structlog.get_logger()
PATH = "/v1/jobs"
FRAMES = b"application/vnd.tallystick.frames"
LINGER = b"x-tally-linger"
_SECONDS = re.compile(rb"[0-9]{1,9}")
BURST = 16
"""Frames that wait already are sent together, up to so many."""
STALL_SECONDS = 45
"""A client that takes nothing for this long counts as gone: less than a provider may stay silent, so that it is not blamed."""


class JobsRoute:
    """The route as an ASGI app. A client that leaves cancels its job; the job is then driven to its receipt all the same."""

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
        """`store`: where answers outlive the process; without one they don't. `manners` and `bodies` may be shared with other
        routes.
        """
        self._market, self._store, self._intake = market, store, intake or IntakeLimits()
        self._rate_limiter = rate_limiter or RateLimiter(self._intake, time.monotonic)
        self._bodies = bodies or RequestBodies(self._intake)
        self._answers = ResponseBuffers(retention or Retention(), time.monotonic)
        self._drivers: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One job. Who sends too much that must be refused is no longer listened to, for a while."""
        address = (scope.get("client") or ("",))[0]
        request = _Request(address)
        try:
            await self._take(scope, receive, send, request)
        except TallyError as error:  # what the request held is let go: its client may not even read this
            self._rate_limiter.count_refusal(address, error, request.payer)
            await send_error(send, error)
        except ConnectionResetError:
            return

    async def _take(self, scope: Scope, receive: Receive, send: Send, request: _Request) -> None:
        self._rate_limiter.check_address(request.address)
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
        linger = _linger(scope)
        request.payer = submission.candidates[0].order.message.payer
        self._rate_limiter.check_signer(request.payer)
        if linger is not None:
            posted = _Posted(submission, hashlib.sha256(body).digest(), linger)
            await self._serve_kept(posted, receive, send, request)
            return
        del body
        job = await self._market.place_order(submission)
        gone = asyncio.create_task(self._cancel_when_gone(receive, job.id))
        try:
            await self._relay(job, send)
        finally:
            gone.cancel()

    async def _relay(self, job: LiveJob, send: Send) -> None:
        """Drives a job to its end, whether its client still takes the frames or not. Its last frame ends the response."""
        held: list[bytes] = []
        begun = False
        with closing(Watchdog(STALL_SECONDS)) as watchdog:
            async with aclosing(self._market.run(job)) as frames:
                async for kind, payload in frames:
                    held.append(pack_frame(kind, payload))
                    if job.more_frames_queued and len(held) < BURST:
                        continue
                    body = {"type": "http.response.body", "body": b"".join(held), "more_body": not job.ended}
                    held.clear()
                    try:
                        if not begun:
                            begun = True
                            await watchdog.wait(send(_start(200, FRAMES, job.id)))
                        await watchdog.wait(send(body))
                    except (TimeoutError, OSError):
                        self._market.cancel(job.id)
                        send = _nowhere

    # Jobs that outlive their connection

    async def _serve_kept(self, posted: _Posted, receive: Receive, send: Send, request: _Request) -> None:
        """Reads a job's answer from its first frame on, new or begun before. Raises TallyError before anything is sent."""
        submission, fingerprint = posted.submission, posted.fingerprint
        answer = self._answers.find(submission.job, fingerprint) or await self._restore(submission.job, fingerprint)
        if answer is None:
            answer = self._answers.begin(submission.job, fingerprint, submission.candidates[0].order.message.payer)
            driver = asyncio.create_task(self._drive(submission, answer, request.lend()), name=f"kept {submission.job.hex()}")
            self._drivers.add(driver)
            driver.add_done_callback(self._drivers.discard)
        elif answer.ended and request.reservation is not None:
            self._bodies.hold(request.reservation, answer.size)  # a client that does not read it makes a copy of it wait
        answer.linger = max(answer.linger, min(posted.linger, self._answers.retention.linger_seconds))
        relay = asyncio.create_task(self._pass_on(submission.job, answer, send), name="relay")
        gone = asyncio.create_task(_until_gone(receive), name="client-gone")
        try:
            await asyncio.wait({relay, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            relay.cancel()
            results = await asyncio.gather(relay, gone, return_exceptions=True)
            answer.leave()
            if not answer.ended and not answer.readers:
                # the longest that anybody asked for: who posts the same bytes, and leaves, does not end the payer's job
                asyncio.get_running_loop().call_later(answer.linger, self._cancel_unread, submission.job, answer)
        if isinstance(results[0], Exception) and not isinstance(results[0], OSError | TimeoutError):
            raise results[0]

    async def _restore(self, job: JobId, fingerprint: bytes) -> ResponseBuffer | None:
        """The answer of a job that a former process ended. Raises Refusal if those were other bytes; Unavailable."""
        if self._store is None or not self._market.placed_before(job):
            return None
        kept = await self._store.response(job, self._horizon())
        known = self._answers.find(job, fingerprint)  # another may have been faster
        if kept is None or known is not None:
            return known
        return self._answers.restore(job, kept.fingerprint, kept.frames, kept.payer).of(job, fingerprint)

    async def _keep(self, job: JobId, answer: ResponseBuffer, receipt: bytes) -> None:
        """Writes an answer down before its receipt leaves, which says that it can be had again."""
        if crowded := self._answers.dropped():
            log.info("answers are kept by the database only: no room in memory", count=len(crowded))
        frames = answer.frames(receipt)
        if self._store is None or frames is None:
            return
        kept = StoredResponse(job, answer.fingerprint, frames, int(time.time()), answer.payer)
        try:
            await self._store.put_response(kept, since=self._horizon(), max_bytes=self._answers.retention.stored_bytes)
        except Unavailable as error:
            log.warning("answer not kept beyond this process", job=job.hex(), error=str(error))

    def _horizon(self) -> int:
        return int(time.time() - self._answers.retention.seconds)

    async def _drive(self, submission: Submission, answer: ResponseBuffer, reservation: BodyReservation | None) -> None:
        """A job from its order to its end, whether anybody reads or not. Its body counts until then."""
        refusal: TallyError | None = None
        try:
            job = await self._market.place_order(submission)
            async with aclosing(self._market.run(job)) as frames:
                async for kind, payload in frames:
                    frame = pack_frame(kind, payload)
                    if kind is Kind.RECEIPT:
                        await self._keep(submission.job, answer, frame)
                    await answer.add(frame)
        except TallyError as error:
            refusal = error
        finally:
            self._answers.end(submission.job, refusal)
            if reservation is not None:
                self._bodies.close(reservation)

    async def _pass_on(self, job: JobId, answer: ResponseBuffer, send: Send) -> None:
        begun = False
        with closing(Watchdog(STALL_SECONDS)) as watchdog:
            async with aclosing(answer.read()) as frames:
                async for data in frames:
                    if not begun:
                        begun = True
                        await watchdog.wait(send(_start(200, FRAMES, job)))
                    await watchdog.wait(send({"type": "http.response.body", "body": data, "more_body": True}))
            await watchdog.wait(send({"type": "http.response.body", "body": b""}))

    def _cancel_unread(self, job: JobId, answer: ResponseBuffer) -> None:
        if not answer.ended and not answer.readers:
            self._market.cancel(job)

    async def _cancel_when_gone(self, receive: Receive, job: JobId) -> None:
        await _until_gone(receive)
        self._market.cancel(job)


@dataclass(frozen=True, slots=True)
class _Posted:
    """A job that may outlive its connection, for so many seconds. `fingerprint`: of the bytes that were posted."""

    submission: Submission
    fingerprint: bytes
    linger: float


class _Request:
    """One request: what it holds, and who ordered, as the order says."""

    __slots__ = ("address", "payer", "reservation")

    def __init__(self, address: str) -> None:
        self.address = address
        self.reservation: BodyReservation | None = None
        self.payer: Address | None = None

    def lend(self) -> BodyReservation | None:
        """What it holds is from now on its job's, which may outlive it."""
        reservation, self.reservation = self.reservation, None
        return reservation


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _linger(scope: Scope) -> float | None:
    """What X-Tally-Linger says, if it is there. Raises BadMessage."""
    for name, value in scope.get("headers", ()):
        if name == LINGER:
            if not _SECONDS.fullmatch(value):
                raise BadMessage("x-tally-linger: expected whole seconds, of at most 9 digits")
            return float(value)
    return None


async def _nowhere(_event: Any) -> None:
    """Where the frames for a client go that is gone."""


def _start(status: int, content_type: bytes, job: JobId | None = None) -> dict[str, Any]:
    headers = [(b"content-type", content_type), (b"cache-control", b"no-store")]
    if job is not None:
        headers.append((b"x-tally-job", job.hex().encode()))
    return {"type": "http.response.start", "status": status, "headers": headers}
