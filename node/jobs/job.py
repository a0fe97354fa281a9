"""One admitted job: open the request, wait for a slot, ask the engine, deliver. It always ends in a `JobResult`, never in an
exception.

How a job ends is decided in `node.jobs.endings`. A receipt always follows (`node.jobs.runner`).

`total` limits the engine's time. Waits for the reader (credit, room on the link) have an allowance of their own, `reader`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

import structlog

from node.domain.answer_rows import AnswerRows, CommittedRows
from node.domain.order_admission import AdmittedJob, check_request
from node.domain.requests import EngineRequest, prepare
from node.domain.usage_meter import Throughput, UsageMeter
from node.jobs.deadlines import Deadlines
from node.jobs.delivery import Delivery, ReaderTimer
from node.jobs.endings import BY_COORDINATOR, JobResult, StopReason, classify, is_expected
from node.jobs.job_timeout import JobTimeout
from node.jobs.job_trace import JobTrace
from node.jobs.kept_evidence import KeptEvidence
from node.jobs.pooled_engine import PooledEngine
from node.ports import EngineEvent, Link, ResponseEnd, ResponsePart, ResponseStart
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.protocol.messages import Outcome
from tallystick.protocol.plaintext_heads import split_request
from tallystick.protocol.routes import EVIDENCE_ROUTE
from tallystick.protocol.sealing import ContentKey, Sealer, SealingKey
from tallystick.protocol.wire import Dispatch, Kind

log = structlog.get_logger()
KEEPALIVE_SECONDS = 30.0
"""Interval at which a job without output reports that it is running: several times within the two minutes that coordinators
wait.
"""
MAX_TOKENS_PER_PART = 16
"""Output tokens in a part of a stream, on average, above which the engine did not deliver them as it generated them."""
MAX_HELD_BYTES = 1 << 20
"""Bytes that an engine may send before any output."""


class Job:
    """See the module's docstring. `order_stored` is the write of the order; no output leaves before it is done.

    `queue_seconds`: how long the job may wait for a slot.
    """

    def __init__(
        self,
        *,
        link: Link,
        admitted: AdmittedJob,
        dispatch: Dispatch,
        engine: PooledEngine,
        order_stored: asyncio.Future[None],
        sealing_key: SealingKey,
        deadlines: Deadlines,
        queue_seconds: float,
        kept_evidence: KeptEvidence,
        trace: JobTrace | None = None,
    ) -> None:
        self.link, self.admitted, self.engine, self.order_stored = link, admitted, engine, order_stored
        self._sealing_key, self._deadlines, self._queue_seconds = sealing_key, deadlines, queue_seconds
        self._kept_evidence, self.trace = kept_evidence, trace
        self._clock = asyncio.get_running_loop().time
        self._dispatch: Dispatch | None = dispatch
        self._content_key: ContentKey | None = None
        self._delivery: Delivery | None = None
        self._task: asyncio.Task[Any] | None = None
        """The task that runs the job, until the job has ended."""
        self._has_ended = False
        self._stopped: StopReason | None = None
        self._coordinator_stopped = self._engine_asked = False
        self.client_log_head = b""
        """The head of the match log that the client passed on; empty until the request was opened, or if there is none."""
        self.wants_evidence = False
        """Whether the client wants the rows of evidence with the response."""
        self._rows = AnswerRows()
        self.hedged = False
        """Whether another provider had the job too and was faster, even if the response had already ended."""
        self._reader_timer = ReaderTimer(deadlines.reader)
        self._phase = "opening the request"
        self._started_at = self._clock()
        self._slot_at: float | None = None
        self._queued_at_engine = False
        self._first_output_at: float | None = None
        self._streams, self._parts = False, 0
        self._keepalive: asyncio.TimerHandle | None = None

    @property
    def has_output(self) -> bool:
        """Whether any part of the response left."""
        return self._delivery is not None and self._delivery.started

    @property
    def delivery(self) -> Delivery:
        """The delivery of the response; it exists once the request was opened."""
        if self._delivery is None:
            raise RuntimeError("the request was not opened")
        return self._delivery

    @property
    def first_seconds(self) -> float | None:
        """Seconds until the first output; None if there was none."""
        return None if self._first_output_at is None else self._first_output_at - self._started_at

    @property
    def engine_seconds(self) -> float | None:
        """Seconds that the engine took for the first output, without the wait for a slot; None if there was none."""
        return None if self._first_output_at is None or self._slot_at is None else self._first_output_at - self._slot_at

    @property
    def queued_at_engine(self) -> bool:
        """Whether the engine had as many jobs as slots already when it got this one, which therefore waited there."""
        return self._queued_at_engine

    def measure(self, throughput: Throughput, tokens: int) -> None:
        """Adds a finished job with `tokens` of output. Only output that came as it was generated shows its speed by its gaps.

        A job that waited in the engine's own queue shows nothing.
        """
        if self.first_seconds is None or self.engine_seconds is None or self._queued_at_engine:
            return
        if self._streams and self._parts * MAX_TOKENS_PER_PART >= tokens:
            throughput.add(first=self.first_seconds, total=self.total_seconds, tokens=tokens)
        else:
            throughput.add_whole(seconds=self.engine_seconds, tokens=tokens)

    @property
    def total_seconds(self) -> float:
        """Seconds that the job has taken so far, without the waits for its reader."""
        return self._clock() - self._started_at - self._reader_timer.spent

    @property
    def request_opened(self) -> bool:
        """Whether the request was opened and `delivery` exists."""
        return self._delivery is not None

    @property
    def engine_asked(self) -> bool:
        """Whether the engine was asked and its work has begun."""
        return self._engine_asked

    @property
    def coordinator_stopped(self) -> bool:
        """Whether the coordinator stopped the job or its link was lost, even if the response had already ended."""
        return self._coordinator_stopped

    def commit_rows(self, *, truncated: bool) -> CommittedRows:
        """The rows of evidence for the receipt of this job, which ended. `truncated`: at its output limit."""
        return self._rows.commit(self.delivery.meter.reported_output, truncated=truncated)

    def grant_credit(self, chunks: int) -> None:
        """Adds credit for `chunks` chunks."""
        if self._delivery is not None:
            self._delivery.grant_credit(chunks)

    def link_lost(self) -> None:
        """Stops the job, since nothing more can come from the coordinator."""
        if self._delivery is not None:
            self._delivery.link_lost()
        self.stop(StopReason.LINK_LOST)

    def stop(self, reason: StopReason) -> None:
        """Stops the engine at once; the first reason counts. A response that has ended continues, but `coordinator_stopped` is
        updated.
        """
        self._coordinator_stopped = self._coordinator_stopped or reason in BY_COORDINATOR
        self.hedged = self.hedged or reason is StopReason.HEDGED
        if self._stopped is None and not self._has_ended:
            self._stopped = reason
            if self._task is not None:
                self._task.cancel()

    async def run(self) -> JobResult:
        """Runs the job to its end, in the task of its caller, which `stop` cancels meanwhile. Call it once."""
        if self._dispatch is None:
            raise RuntimeError("Job.run was called twice")
        result, error = None, None
        if self._stopped is None:
            self._task = task = asyncio.current_task()
            try:
                result = await self._answer()
            except asyncio.CancelledError:
                if self._stopped is None:  # the process ends
                    raise
            except Exception as failure:  # noqa: BLE001 - `classify` knows them all
                error = failure
            finally:
                self._has_ended, self._task = True, None
                if self._keepalive is not None:
                    self._keepalive.cancel()
            if self._stopped is not None and task is not None:
                result = None
                await _take_back_cancellation(task)
        self._has_ended, self._dispatch = True, None
        return result or self._failed(error)

    def _open_request(self) -> EngineRequest:
        """Opens the sealed request, checks it against its terms, and converts it for the engine. Raises TallyError.

        A request may be large, so its sealed form is not kept.
        """
        dispatch, self._dispatch = self._dispatch, None
        if dispatch is None:
            raise RuntimeError("the request was opened before")
        admitted, terms = self.admitted, self.admitted.terms
        digest, provider = admitted.order.digest, admitted.order.message.provider
        key = self._sealing_key.unwrap(dispatch.candidate.wrapped_key, job=admitted.job, order_hash=digest, provider=provider)
        self._content_key = key
        plain = key.open_request(admitted.job, dispatch.sealed)
        head, body = split_request(plain)
        check_request(terms, key.commitment_key, plain, body, admitted.offer.context_tokens)
        self.client_log_head = head.log_head
        request = prepare(head, body, admitted.offer, terms.max_output_tokens)
        self.wants_evidence, self._rows = head.evidence, request.rows
        meter = UsageMeter(key, digest, terms, len(body), context_tokens=0 if request.bounded else admitted.offer.context_tokens)
        sealer = Sealer(key, admitted.job, digest)
        self._delivery = Delivery(
            self.link,
            admitted.job,
            sealer,
            meter,
            reader_timer=self._reader_timer,
            first_credit_seconds=self._deadlines.first_credit,
        )
        return replace(request, on_sent=meter.mark_request_sent)

    async def _answer(self) -> JobResult:
        limits = self._deadlines
        request = self._open_request()
        first_token = limits.first_token_for(len(request.body)) if request.stream else limits.total
        self._streams = request.stream
        self._phase = "waiting for a slot"
        self._keep_alive()
        async with JobTimeout(limits.total) as timeout, self.engine.slot(self._queue_seconds):
            self._reader_timer.engine_deadline = timeout
            self._phase, self._slot_at, self._engine_asked = "waiting for the first output", self._clock(), True
            self._queued_at_engine = self.engine.slot_limiter.running > self.engine.slots
            timeout.renew(first_token)
            if self.trace is not None:
                request = replace(request, traceparent=self.trace.engine_asked(self.admitted))
            async with aclosing(self._events(request)) as events:
                status = 200
                async for event in events:
                    if isinstance(event, ResponsePart):
                        # Signs of life before any output, such as comments, extend the wait for it.
                        sent = self._deliver_now(event) or await self._deliver(event, timeout)
                        timeout.renew(limits.between_tokens if sent else first_token)
                    elif isinstance(event, ResponseStart):
                        status = event.status
                        self.delivery.meter.mark_request_sent()
                        self.delivery.set_head(event)
                    else:
                        timeout.pause()
                        return await self._finish(event, status)
        raise Unavailable(Code.ENGINE_UNAVAILABLE, "the engine's response broke off", fault=Fault.ENGINE)

    def _events(self, request: EngineRequest) -> AsyncGenerator[EngineEvent, None]:
        """The engine's answer, or that of the node's own route, whose speed says nothing of the engine."""
        if request.path != EVIDENCE_ROUTE:
            return self.engine.engine.answer(request)
        self._slot_at = None
        return self._kept_evidence.answer(request.body, self.admitted.payer)

    def _keep_alive(self) -> None:
        """Reports now and then that the job is running, until there is output or `_answer` ends.

        A response in one piece may take long, and a coordinator that hears nothing would give the job to another provider,
        unpaid.
        """
        if self.has_output:
            return
        if self._keepalive is not None:
            self.link.post(Kind.ACCEPT, self.admitted.job)
        self._keepalive = asyncio.get_running_loop().call_later(KEEPALIVE_SECONDS, self._keep_alive)

    def _deliver_now(self, piece: ResponsePart) -> bool:
        """Sends a part of a response that has begun, if nothing has to wait for it. Returns whether it was sent."""
        if self._first_output_at is None or not self.delivery.send_now(piece.data, piece.text_bytes):
            return False
        if piece.usage is not None:
            self.delivery.meter.set_reported(piece.usage)
        self._parts += 1
        return True

    async def _deliver(self, piece: ResponsePart, wait: JobTimeout) -> bool:
        """Sends a part, or holds it back before any output; returns whether it was sent. Only the reader's time limits the
        wait.
        """
        self.delivery.meter.set_reported(piece.usage)
        if not (piece.has_output or self.has_output):
            if self.delivery.hold_back(piece.data) > MAX_HELD_BYTES:
                raise Unavailable(
                    Code.ENGINE_UNAVAILABLE,
                    f"the engine sent more than {MAX_HELD_BYTES} bytes without any output",
                    fault=Fault.ENGINE,
                )
            return False
        wait.pause()
        await self._first_output()
        self._parts += 1
        await self.delivery.send(piece.data, piece.text_bytes)
        return True

    async def _first_output(self) -> None:
        if self._first_output_at is None:
            self._first_output_at = self._clock()
            self._phase = "waiting for the next output"
            if self.trace is not None:
                self.trace.first_output(self.engine_seconds)
            if not self.order_stored.done():
                await asyncio.shield(self.order_stored)
            self.order_stored.result()

    async def _finish(self, end: ResponseEnd, status: int) -> JobResult:
        self.delivery.meter.set_reported(end.usage)
        await self._first_output()
        await self.delivery.close(end.tail, end.text_bytes)
        if status >= 400:
            return JobResult(Outcome.UPSTREAM_ERROR, f"the engine returned status {status}")
        return JobResult(Outcome.LENGTH if end.truncated else Outcome.COMPLETED, "the response ended")

    def _failed(self, error: Exception | None) -> JobResult:
        """How a job ended that was stopped (no error) or failed."""
        if error is not None and self._stopped is None and not is_expected(error):
            # A bug in one job must not stop the others. It is logged in full, and the client tries another provider.
            log.error("bug in a job", job=self.admitted.job.hex(), exc_info=error)
        result = classify(self._stopped, error, phase=self._phase, request_opened=self.request_opened)
        if result.error is not None and result.error.private_reason is not None and self._content_key is not None:
            digest = self.admitted.order.digest
            result.error.sealed_reason = self._content_key.seal_reason(digest, result.error.private_reason)
        busy = result.error is not None and result.error.code is Code.NODE_BUSY and result.error.fault is Fault.ENGINE
        idle = not self._engine_asked and result.outcome is not Outcome.CLIENT_CANCELLED
        return result._replace(outcome=Outcome.REFUSED) if not self.has_output and (idle or busy) else result


async def _take_back_cancellation(task: asyncio.Task[Any]) -> None:
    """Takes back one cancellation of the current task, whether or not it has reached the task already.

    Raises CancelledError if the task was cancelled once more.
    """
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
    if task.uncancel():
        raise asyncio.CancelledError
