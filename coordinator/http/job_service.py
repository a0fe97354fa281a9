"""Serves jobs, whichever way they are posted: by HTTP (jobs_route.py) or on a client's link (client_link.py).

An ordinary job ends with its client: the client's departure cancels it. A job that lingers continues for a while without one. A
client that posts the same bytes again then gets the response from the first frame on, while the job runs and for as long as the
response is kept, from the next process too.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Awaitable
from functools import partial
from typing import Protocol

import structlog

from coordinator.domain.limits import IntakeLimits
from coordinator.domain.rate_limiter import RateLimiter
from coordinator.domain.refusal_log import RefusalLog
from coordinator.http.request_bodies import BodyReservation, RequestBodies
from coordinator.http.response_buffer import ResponseBuffer, ResponseBuffers, Retention
from coordinator.jobs.accounts import AccessTiers
from coordinator.jobs.job_trace import JobTrace, recorded_job
from coordinator.jobs.market import Market
from coordinator.ports import FrameSink, ResponseStore, StoredResponse
from tallystick.protocol.errors import Code, TallyError, Unavailable
from tallystick.protocol.jobs import State
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import Kind, Submission, pack_frame
from tallystick.runtime.access_log import record
from tallystick.tracing.spans import Tracer

log = structlog.get_logger()
STORE_AGAIN_SECONDS = 1.0
"""How often responses are stored again that the store could not take."""
STALL_SECONDS = 45
"""A client that takes nothing for this long counts as gone. A provider may stay silent for longer, so it is not at fault."""


_SIGNED = frozenset({Code.TIER_LIMIT, Code.INSUFFICIENT_FUNDS, Code.UNSECURED})
"""Refusals that follow the check of the order's signature, so that they are the payer's own."""


class ClientSink(FrameSink, Protocol):
    """Takes the frames of a job for a client, who may leave."""

    abandoned: bool
    """Whether nobody reads the job any more, so that it is to be cancelled."""


class JobRequest:
    """A posted job: its address, its reservation, the payer that its orders name, and its submission until the job has it."""

    __slots__ = ("address", "job", "payer", "reservation", "submission")

    def __init__(self, address: str, reservation: BodyReservation) -> None:
        self.address = address
        self.reservation: BodyReservation | None = reservation
        self.payer: Address | None = None
        self.job: JobId | None = None
        self.submission: Submission | None = None

    def take(self) -> tuple[Submission, BodyReservation | None]:
        """Returns the submission and the reservation, which from now on belong to the job: it may outlive the request.

        The submission may not be held while the job waits: the queue replaces it by a smaller one.
        """
        submission, reservation = self.submission, self.reservation
        self.submission = self.reservation = None
        if submission is None:
            raise RuntimeError("the submission was taken before, or not read")
        return submission, reservation


class JobService:
    """See the module's docstring."""

    def __init__(
        self,
        market: Market,
        store: ResponseStore | None = None,
        *,
        intake: IntakeLimits | None = None,
        retention: Retention | None = None,
        rate_limiter: RateLimiter | None = None,
        bodies: RequestBodies | None = None,
        tiers: AccessTiers | None = None,
        refusals: RefusalLog | None = None,
        store_again_seconds: float = STORE_AGAIN_SECONDS,
    ) -> None:
        """`store`: keeps responses beyond the process; None keeps them in memory only. `rate_limiter` and `bodies` may be shared
        with other routes. `store_again_seconds`: when responses are stored again that the store could not take. `tiers`: limits
        by wallet; `refusals`: where payers find why their jobs came to nothing.
        """
        self._tiers, self._refusals = tiers, refusals or RefusalLog()
        self.market, self._store, self.intake = market, store, intake or IntakeLimits()
        self.rate_limiter = rate_limiter or RateLimiter(self.intake, time.monotonic)
        self.bodies = bodies or RequestBodies(self.intake)
        self.buffers = ResponseBuffers(retention or Retention(), time.monotonic)
        self._drivers: set[asyncio.Task[None]] = set()
        self._unstored: dict[JobId, int] = {}
        """Jobs whose responses the store could not take, with the times of their ends."""
        self._store_again_seconds = store_again_seconds
        self._storing: asyncio.Task[None] | None = None

    # Requests

    def open(self, address: str) -> JobRequest:
        """Begins a request. Raises Unavailable (rate_limited)."""
        self.rate_limiter.check_address(address)
        return JobRequest(address, self.bodies.begin(address))

    def close(self, request: JobRequest) -> None:
        """Ends a request. A job that it began keeps what it holds."""
        if request.reservation is not None:
            self.bodies.close(request.reservation)
            request.reservation = None

    def hold(self, request: JobRequest, size: int, limit: int) -> None:
        """Counts a body that arrived at once. Raises Refusal if it is too long, Unavailable if there is no room for it."""
        if request.reservation is not None:
            self.bodies.hold_body(request.reservation, size, min(limit, self.intake.body_bytes), "a job")

    def read(self, request: JobRequest, body: bytes) -> JobId:
        """Reads the submission. Raises BadMessage, and Unavailable (rate_limited) for a payer without funds."""
        submission = Submission.loads(body)
        request.submission, request.job = submission, submission.job
        request.payer = submission.candidates[0].order.message.payer
        record(job=submission.job.hex(), model=submission.candidates[0].terms.model)
        self.rate_limiter.check_signer(request.payer)
        return submission.job

    def count_refusal(self, request: JobRequest | None, address: str, error: TallyError) -> None:
        """Counts a refused request against those who caused it."""
        self.rate_limiter.count_refusal(address, error, None if request is None else request.payer)
        record(outcome=error.code.value)

    # One job

    def run(self, request: JobRequest, sink: ClientSink, *, kept: ResponseBuffer | None = None) -> Awaitable[None]:
        """Runs a job; see `_run`. Records it if this coordinator has a tracer."""
        if self.market.tracer is None or request.submission is None:
            return self._run(request, sink, kept, None)
        return self._run_recorded(request, request.submission, sink, kept, self.market.tracer)

    async def _run_recorded(
        self, request: JobRequest, submission: Submission, sink: ClientSink, kept: ResponseBuffer | None, tracer: Tracer
    ) -> None:
        with recorded_job(tracer, submission) as trace:
            del submission
            record(trace_id=trace.trace_id)
            await self._run(request, sink, kept, trace)

    async def _run(self, request: JobRequest, sink: ClientSink, kept: ResponseBuffer | None, trace: JobTrace | None) -> None:
        """Runs a job from its order to its end, whether anybody reads or not. Its body counts until then.

        `kept`: the response as it is kept, for a job that lingers. The market counts the waits for the sink as the reader's time.
        Raises TallyError for a job that was not admitted. If cancelled, the job fails at once.
        """
        submission, reservation = request.take()
        market, first = self.market, submission.candidates[0]
        payer, model, job_id, tiers = first.order.message.payer, first.terms.model, submission.job, self._tiers
        tier, entered, placed = None, False, False
        try:
            if tiers is not None:
                first.order.verify(market.domain)  # nobody else may use up what the payer's tier allows
                await market.admission.check_new(submission)  # nor with orders that the payer once signed
                tier = await tiers.enter(payer, model)
                entered = True
            del first
            placing = market.place_order(submission, trace)
            del submission  # the job replaces it by a smaller one before it waits
            job = await placing
            del placing
            placed = True
            if sink.abandoned:
                market.cancel(job.id)
            await market.run(job, sink, None if kept is None else partial(self._keep, job.id, kept))
            record(outcome=job.state.value)
            if job.attempt is not None:  # a job that waited for a slot in vain never had a provider
                record(provider=job.provider)
            if job.last_error is not None and job.state in (State.FAILED, State.EXPIRED):
                self._refusals.note(payer, job_id, model, job.last_error, int(time.time()))
        except TallyError as error:
            if error.code in _SIGNED or (tiers is not None and not entered and error.code is Code.RATE_LIMITED):
                self._refusals.note(payer, job_id, model, error, int(time.time()))
            raise
        finally:
            if tiers is not None and entered:
                if placed:
                    tiers.leave(payer)
                else:
                    tiers.give_back(payer, tier)
            if reservation is not None:
                self.bodies.close(reservation)

    def start(self, request: JobRequest, job: JobId, buffer: ResponseBuffer, *, keep: bool = False) -> asyncio.Task[None]:
        """Runs a job in a task of its own, into a buffer."""
        driver = asyncio.create_task(self._drive(request, job, buffer, keep=keep), name=f"job {job.hex()}")
        self._drivers.add(driver)
        driver.add_done_callback(self._drivers.discard)
        return driver

    async def _drive(self, request: JobRequest, job: JobId, buffer: ResponseBuffer, *, keep: bool) -> None:
        refusal = None
        try:
            await self.run(request, buffer, kept=buffer if keep else None)
        except TallyError as error:
            refusal = error
        finally:
            if keep:
                self.buffers.end(job, refusal)
            else:
                buffer.end(time.monotonic(), refusal)

    def abandon(self, job: JobId, sink: ClientSink) -> None:
        """Cancels a job that nobody reads, now or as soon as it is admitted."""
        sink.abandoned = True
        self.market.cancel(job)

    # Responses that outlive their clients

    async def find_or_begin(self, request: JobRequest, job: JobId, body: bytes) -> ResponseBuffer:
        """Returns the buffer of a job that was posted before, or starts the job with a new one. Raises TallyError."""
        fingerprint = hashlib.sha256(body).digest()
        buffer = self.buffers.find(job, fingerprint) or await self._restore(job, fingerprint)
        if buffer is None:
            buffer = self.buffers.begin(job, fingerprint, request.payer or "")
            self._begin(request, job, buffer)
        elif buffer.ended and request.reservation is not None:
            self.bodies.hold(request.reservation, buffer.size)  # a client that does not read it makes a copy of it wait
        return buffer

    def _begin(self, request: JobRequest, job: JobId, buffer: ResponseBuffer) -> None:
        submission, reservation = request.take()
        of_job = JobRequest(request.address, reservation) if reservation is not None else request
        of_job.submission = submission
        self.start(of_job, job, buffer, keep=True)

    def left(self, job: JobId, buffer: ResponseBuffer) -> None:
        """Notes that a reader left the response of a job that lingers.

        The longest linger of all readers counts: a stranger that posts the same bytes and leaves ends no job.
        """
        buffer.first_reader_left()
        if not buffer.ended and not buffer.readers:
            asyncio.get_running_loop().call_later(buffer.linger, self._cancel_unread, job, buffer)

    def set_linger(self, buffer: ResponseBuffer, seconds: float) -> None:
        """Notes for how long a reader wants the job to go on without it."""
        buffer.linger = max(buffer.linger, min(seconds, self.buffers.retention.linger_seconds))

    def _cancel_unread(self, job: JobId, buffer: ResponseBuffer) -> None:
        if not buffer.ended and not buffer.readers:
            self.abandon(job, buffer)

    async def _restore(self, job: JobId, fingerprint: bytes) -> ResponseBuffer | None:
        """Returns a stored response, or None. Raises Refusal if the job was posted with other bytes; Unavailable."""
        if self._store is None or not await self.market.admission.was_placed(job):
            return None
        stored = await self._store.response(job, self._horizon())
        known = self.buffers.find(job, fingerprint)  # another request may have been faster
        if stored is None or known is not None:
            return known
        buffer = self.buffers.restore(job, stored.fingerprint, stored.frames, stored.payer)
        return buffer.check_fingerprint(job, fingerprint)

    async def _keep(self, job: JobId, buffer: ResponseBuffer, receipt: bytes) -> None:
        """Stores a response before its receipt leaves, since the receipt tells the client that the response can be had again.

        `receipt`: the payload of its frame.
        """
        if evicted := self.buffers.take_evicted():
            log.info("responses evicted from memory; the database still keeps them", count=len(evicted))
        frames = buffer.joined(pack_frame(Kind.RECEIPT, receipt))
        if self._store is None or frames is None:
            return
        stored = StoredResponse(job, buffer.fingerprint, frames, int(time.time()), buffer.payer)
        try:
            await self._store.put_response(stored, since=self._horizon(), max_bytes=self.buffers.retention.stored_bytes)
        except Unavailable as error:
            log.warning("response not stored yet; it is lost if this process ends first", job=job.hex(), error=str(error))
            self._unstored[job] = stored.ended_at
            if self._storing is None:
                self._storing = asyncio.create_task(self._store_again(self._store), name="responses")

    async def _store_again(self, store: ResponseStore) -> None:
        """Stores what the store could not take, such as on a full disk, once it can. Memory bounds what this may be."""
        try:
            while self._unstored:
                await asyncio.sleep(self._store_again_seconds)
                with contextlib.suppress(Unavailable):
                    await self._store_unstored(store)
        finally:
            self._storing = None

    async def _store_unstored(self, store: ResponseStore) -> None:
        """Raises Unavailable if the store still cannot take them."""
        for job, ended_at in list(self._unstored.items()):
            if self.buffers.is_growing(job):  # its receipt follows
                continue
            buffer = self.buffers.ended(job)
            frames = None if buffer is None else buffer.frames
            if buffer is not None and frames is not None:
                stored = StoredResponse(job, buffer.fingerprint, frames, ended_at, buffer.payer)
                await store.put_response(stored, since=self._horizon(), max_bytes=self.buffers.retention.stored_bytes)
                log.info("response stored after all", job=job.hex())
            del self._unstored[job]

    def _horizon(self) -> int:
        return int(time.time() - self.buffers.retention.seconds)
