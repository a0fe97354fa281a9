"""One admitted job: unseal, wait for a slot, ask the engine, deliver. It always ends in an `Ending`, never in an exception.

How it ends, which is also what its receipt says; a receipt always follows (`node.jobs.runner`):

    what happened                 before any output left             after
    the engine's answer ended     completed, length; upstream_error where it is a deterministic 4xx
    the request breaks a rule     refused                            -
    no slot, or the engine is     refused                            -
    busy; or the coordinator is
    served no more by then
    the engine failed             provider_error                     provider_error
    a phase took too long         timed_out                          timed_out
    the client cancels            client_cancelled                   client_cancelled
    the coordinator's time is up  timed_out *                        timed_out *
    the coordinator gives it up,  provider_error *                   provider_error *
    or the link was lost
    no first credit came          -                                  provider_error *
    the reader's time is up, and  -                                  timed_out *
    the coordinator cancelled nothing
    the node shuts down           provider_error                     provider_error

Until the engine was asked, every ending but a cancellation is `refused`. What a receipt charges follows from its outcome
(jobs.CHARGES): an answer that ended by itself, and one that its client cancelled, which also pays for the input alone once the
engine has the request. The endings with a * are the coordinator's doing: what they would have cost is counted against it
(`node.jobs.coordinator_credit`). An answer that ended loses its last chunk and its charge where the coordinator stops it before
that left.

`total` is the engine's time. Waiting for the reader (credit, room on the link) has an allowance of its own, `reader`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

import structlog

from node.domain.order_admission import Admitted, check_request
from node.domain.requests import EngineRequest, prepare
from node.domain.slot_limiter import SlotLimiter
from node.domain.usage_meter import UsageMeter
from node.jobs.delivery import Delivery, FirstCreditTimeout, ReaderTimeout, ReaderTimer
from node.ports import Engine, Link, LinkLost, ResponseEnd, ResponsePart, ResponseStart
from tallystick.protocol.errors import Code, Fault, TallyError, Unavailable
from tallystick.protocol.messages import Outcome
from tallystick.protocol.sealing import Sealer, SealingKey
from tallystick.protocol.wire import Dispatch, Kind, split_request

log = structlog.get_logger()
LOAD_WEIGHT = 0.2
"""Of the newest look at how many slots are taken; with a look every ten seconds that is about a minute."""
TELL_SECONDS = 30.0
"""How often a job without output is said to be under way: several times in the two minutes that coordinators wait."""
MAX_HELD = 1 << 20
"""Bytes that an engine may send before any output."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that each phase of a job may take. `queue`: until a slot is free; `first_token`: until the first output of a
    stream (an answer in one piece has `total`); `between_tokens`: from one output to the next; `total`: all of it, but for the
    waits for the reader, which are `reader` together; `taken`: until the coordinator confirms that it has output.
    """

    queue: float = 10.0
    first_token: float = 60.0
    between_tokens: float = 30.0
    total: float = 900.0
    reader: float = 900.0
    first_credit: float = 15.0


class StopReason(Enum):
    """Why a running job is stopped from outside."""

    CANCELLED = "it was cancelled"
    TIMED_OUT = "the coordinator's time for it was up"
    COORDINATOR = "the coordinator gave it up"
    LINK_LOST = "the link to the coordinator was lost"
    SHUTDOWN = "the node is shutting down"
    COORDINATOR_SUSPENDED = "its coordinator leaves this node's work unpaid"


BY_COORDINATOR = frozenset({StopReason.TIMED_OUT, StopReason.COORDINATOR, StopReason.LINK_LOST})


class JobResult(NamedTuple):
    """How a job ended: the outcome for its receipt; why, for people; what went wrong, if anything did; and whether it is the
    coordinator's doing that what was done is not paid.
    """

    outcome: Outcome
    reason: str
    error: TallyError | None = None
    unpaid: bool = False


class PooledEngine:
    """An engine and the jobs that it may run at once. `taken`: jobs that run or wait; `up`: it answered when last asked;
    `crowded`: it says that requests wait in it; `load`: the share of its slots that was taken lately.
    """

    def __init__(self, engine: Engine, slots: SlotLimiter | int) -> None:
        self.engine = engine
        self.slot_limiter = slots if isinstance(slots, SlotLimiter) else SlotLimiter(slots)
        self.assigned = 0
        self.up, self.has_queue = True, False
        self.load = 0.0

    @property
    def slots(self) -> int:
        """Jobs that may run at once, as it is known now."""
        return self.slot_limiter.limit

    @property
    def free(self) -> int:
        """Jobs that it could take now."""
        return max(0, self.slots - self.assigned) if self.up and not self.has_queue else 0

    def update_load(self) -> None:
        """Called at every look: brings `load` up to date."""
        self.load += LOAD_WEIGHT * (min(1.0, self.assigned / self.slots) - self.load)

    @asynccontextmanager
    async def slot(self, seconds: float) -> AsyncIterator[None]:
        """Holds a slot. Raises Unavailable (node_busy) if none is free in time."""
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(seconds):
                    await held.enter_async_context(self.slot_limiter.hold())
            except TimeoutError:
                raise Unavailable(Code.NODE_BUSY, f"no slot was free within {seconds} s", fault=Fault.PROVIDER) from None
            yield


class Job:
    """See the module's docstring. `durable` is the write that remembers the order; no output leaves before it is done."""

    def __init__(
        self,
        *,
        link: Link,
        admitted: Admitted,
        dispatch: Dispatch,
        engine: PooledEngine,
        order_stored: asyncio.Task[None],
        sealing_key: SealingKey,
        deadlines: Deadlines,
    ) -> None:
        self.link, self.admitted, self.engine, self.order_stored = link, admitted, engine, order_stored
        self._sealing_key, self._deadlines = sealing_key, deadlines
        self._dispatch: Dispatch | None = dispatch
        self._delivery: Delivery | None = None
        self._work: asyncio.Task[JobResult] | None = None
        self._stopped: StopReason | None = None
        self._coordinator_stopped = self._engine_asked = False
        self._reader_timer = ReaderTimer(deadlines.reader)
        self._phase = "opening the request"
        self._started_at = time.monotonic()
        self._slot_at: float | None = None
        self._first_output_at: float | None = None

    @property
    def has_output(self) -> bool:
        """Whether anything of the answer left."""
        return self._delivery is not None and self._delivery.started

    @property
    def delivery(self) -> Delivery:
        """Where the answer goes. It exists from the moment the request was opened."""
        if self._delivery is None:
            raise RuntimeError("the request was not opened")
        return self._delivery

    @property
    def first_seconds(self) -> float | None:
        """How long the first output took."""
        return None if self._first_output_at is None else self._first_output_at - self._started_at

    @property
    def engine_seconds(self) -> float | None:
        """How long the engine took for the first output, without the wait for a slot."""
        return None if self._first_output_at is None or self._slot_at is None else self._first_output_at - self._slot_at

    @property
    def total_seconds(self) -> float:
        """How long the job has taken so far, without the waits for its reader."""
        return time.monotonic() - self._started_at - self._reader_timer.spent

    @property
    def request_opened(self) -> bool:
        """Whether the request was opened, so that there is a delivery."""
        return self._delivery is not None

    @property
    def engine_asked(self) -> bool:
        """Whether the engine was asked, so that its work is under way."""
        return self._engine_asked

    @property
    def coordinator_stopped(self) -> bool:
        """Whether the coordinator stopped it or its link was lost, be it after the answer had ended."""
        return self._coordinator_stopped

    def grant_credit(self, chunks: int) -> None:
        """More credit."""
        if self._delivery is not None:
            self._delivery.grant_credit(chunks)

    def link_lost(self) -> None:
        """Nothing more comes from the coordinator."""
        if self._delivery is not None:
            self._delivery.link_lost()
        self.stop(StopReason.LINK_LOST)

    def stop(self, why: StopReason) -> None:
        """Stops the engine at once, for the first reason that comes. An answer that has ended is left alone, but `forsaken` says
        whether its coordinator still wants it.
        """
        self._coordinator_stopped = self._coordinator_stopped or why in BY_COORDINATOR
        if self._stopped is None and (self._work is None or not self._work.done()):
            self._stopped = why
            if self._work is not None:
                self._work.cancel()

    async def run(self) -> JobResult:
        """Runs it to its end, once."""
        dispatch, self._dispatch = self._dispatch, None
        if dispatch is None:
            raise RuntimeError("a job runs once")
        self._work = asyncio.create_task(self._answer(dispatch), name=f"answer {self.admitted.job.hex()}")
        del dispatch
        if self._stopped is not None:
            self._work.cancel()
        await asyncio.wait({self._work})
        return self._result(self._work)

    def _open_request(self, dispatch: Dispatch) -> EngineRequest:
        """Opens the seal, holds the request against its terms, and makes the engine's request of it. Raises TallyError."""
        admitted, terms = self.admitted, self.admitted.terms
        digest, provider = admitted.order.digest, admitted.order.message.provider
        key = self._sealing_key.unwrap(dispatch.candidate.wrapped_key, job=admitted.job, order_hash=digest, provider=provider)
        plain = key.open_request(admitted.job, dispatch.sealed)
        head, body = split_request(plain)
        check_request(terms, key.commitment_key, plain, body)
        call = prepare(head, body, admitted.offer, terms.max_output_tokens)
        meter = UsageMeter(key, digest, terms, len(body))
        sealer = Sealer(key, admitted.job, digest)
        self._delivery = Delivery(
            self.link,
            admitted.job,
            sealer,
            meter,
            reader_timer=self._reader_timer,
            first_credit_seconds=self._deadlines.first_credit,
        )
        return replace(call, on_sent=meter.mark_request_sent)

    async def _answer(self, dispatch: Dispatch) -> JobResult:
        limits, clock = self._deadlines, asyncio.get_running_loop().time
        call = self._open_request(dispatch)
        del dispatch
        self._phase = "waiting for a slot"
        async with (
            self._send_keepalives(),
            asyncio.timeout(limits.total) as self._reader_timer.engine_deadline,
            self.engine.slot(limits.queue),
        ):
            self._phase, self._slot_at, self._engine_asked = "waiting for the first output", time.monotonic(), True
            async with (
                asyncio.timeout(limits.first_token if call.stream else None) as phase,
                aclosing(self.engine.engine.answer(call)) as events,
            ):
                status = 200
                async for event in events:
                    if isinstance(event, ResponsePart):
                        if await self._deliver(event, phase):
                            phase.reschedule(clock() + limits.between_tokens)
                    elif isinstance(event, ResponseStart):
                        status = event.status
                        self.delivery.meter.mark_request_sent()
                        self.delivery.set_head(event)
                    else:
                        phase.reschedule(None)
                        return await self._finish(event, status)
        raise Unavailable(Code.ENGINE_UNAVAILABLE, "the engine's answer broke off", fault=Fault.ENGINE)

    @asynccontextmanager
    async def _send_keepalives(self) -> AsyncIterator[None]:
        """Says now and then that the job is under way, until there is output: an answer in one piece may take long, and who hears
        nothing for so long would give the job to another, unpaid.
        """

        async def tell() -> None:
            await asyncio.sleep(TELL_SECONDS)
            while not self.has_output:
                self.link.post(Kind.ACCEPT, self.admitted.job)
                await asyncio.sleep(TELL_SECONDS)

        task = asyncio.create_task(tell(), name=f"under way {self.admitted.job.hex()}")
        try:
            yield
        finally:
            task.cancel()

    async def _deliver(self, piece: ResponsePart, phase: asyncio.Timeout) -> bool:
        """Sends a piece, or holds it back before any output. True if it was sent. Only the reader's time bounds how long."""
        self.delivery.meter.set_reported(piece.usage)
        if not (piece.has_output or self.has_output):
            if self.delivery.hold_back(piece.data) > MAX_HELD:
                raise Unavailable(Code.ENGINE_UNAVAILABLE, "the engine sent much and no output", fault=Fault.ENGINE)
            return False
        phase.reschedule(None)
        await self._first_output()
        await self.delivery.send(piece.data, piece.text_bytes)
        return True

    async def _first_output(self) -> None:
        if self._first_output_at is None:
            self._first_output_at = time.monotonic()
            self._phase = "between two outputs"
            await asyncio.shield(self.order_stored)

    async def _finish(self, end: ResponseEnd, status: int) -> JobResult:
        self.delivery.meter.set_reported(end.usage)
        await self._first_output()
        await self.delivery.close(end.tail, end.text_bytes)
        if status >= 400:
            return JobResult(Outcome.UPSTREAM_ERROR, f"the engine answered {status}")
        return JobResult(Outcome.LENGTH if end.truncated else Outcome.COMPLETED, "the answer ended")

    def _result(self, work: asyncio.Task[JobResult]) -> JobResult:
        error = None if work.cancelled() else work.exception()
        if not work.cancelled() and error is None:
            return work.result()
        ending = self._classify(error)
        busy = ending.error is not None and ending.error.code is Code.NODE_BUSY and ending.error.fault is Fault.ENGINE
        idle = not self._engine_asked and ending.outcome is not Outcome.CLIENT_CANCELLED
        return ending._replace(outcome=Outcome.REFUSED) if not self.has_output and (idle or busy) else ending

    def _classify(self, error: BaseException | None) -> JobResult:
        """The table above, for a job that was stopped (no error) or failed."""
        stop = self._stopped
        if stop is None and (error is None or isinstance(error, LinkLost)):
            stop = StopReason.SHUTDOWN if error is None else StopReason.LINK_LOST
        if stop is not None:
            return self._stop_result(stop)
        if isinstance(error, ReaderTimeout | FirstCreditTimeout):
            outcome = Outcome.TIMED_OUT if isinstance(error, ReaderTimeout) else Outcome.PROVIDER_ERROR
            cause: TallyError = Unavailable(Code.TIMED_OUT, str(error), fault=Fault.COORDINATOR)
            return JobResult(outcome, str(cause), cause, unpaid=True)
        if isinstance(error, TimeoutError):
            cause = Unavailable(Code.TIMED_OUT, f"took too long: {self._phase}", fault=Fault.ENGINE)
            return JobResult(Outcome.TIMED_OUT, str(cause), cause)
        if isinstance(error, TallyError):
            if error.code is Code.DATABASE_UNAVAILABLE:  # the node's own affair: its peers learn that the provider failed
                error = Unavailable(Code.PROVIDER_FAILED, f"the node cannot store the order: {error}", fault=Fault.PROVIDER)
            return JobResult(Outcome.PROVIDER_ERROR, str(error), error)
        # A bug in one job must not take the others down; it is logged in full, and the client is told to go elsewhere.
        log.error("bug in a job", job=self.admitted.job.hex(), exc_info=error)
        cause = Unavailable(Code.PROVIDER_FAILED, "the node failed", fault=Fault.PROVIDER)
        return JobResult(Outcome.PROVIDER_ERROR, str(cause), cause)

    def _stop_result(self, stop: StopReason) -> JobResult:
        if stop is StopReason.CANCELLED:
            cause = Unavailable(Code.CANCELLED, stop.value)
            return JobResult(Outcome.CLIENT_CANCELLED if self.request_opened else Outcome.REFUSED, stop.value, cause)
        if stop is StopReason.TIMED_OUT:
            cause = Unavailable(Code.TIMED_OUT, f"{stop.value}: {self._phase}", fault=Fault.COORDINATOR)
            return JobResult(Outcome.TIMED_OUT, str(cause), cause, unpaid=True)
        fault = Fault.COORDINATOR if stop is StopReason.COORDINATOR_SUSPENDED else Fault.PROVIDER
        cause = Unavailable(Code.NODE_BUSY, stop.value, fault=fault)
        return JobResult(Outcome.PROVIDER_ERROR, stop.value, cause, unpaid=stop in BY_COORDINATOR)
