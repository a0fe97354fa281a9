"""One admitted job: unseal, wait for a slot, ask the engine, deliver. It always ends in an `Ending`, never in an exception.

How it ends, which is also what the receipt will say:

    what happened                 before any output left             after
    the engine's answer ended     completed, length; upstream_error where it is a deterministic 4xx
    the engine failed             no receipt, try elsewhere          provider_error
    a phase took too long, by     no receipt, try elsewhere          timed_out
    its clock or the coordinator's
    the client cancels or stalls  client_cancelled                   client_cancelled
    the link was lost             no receipt                         provider_error
    the node shuts down           no receipt, try elsewhere          provider_error
    the request breaks a rule     no receipt, final                  -

What a receipt charges follows from its outcome (jobs.CHARGES); an answer of which nothing left charges nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import structlog

from node.admission import Admitted, check_request
from node.delivery import Delivery, Stalled
from node.meter import Meter
from node.ports import End, Engine, Head, Link, LinkLost, Piece
from node.requests import Call, prepare
from node.slots import Slots
from tallystick.protocol.errors import Code, Fault, TallyError, Unavailable
from tallystick.protocol.messages import Outcome
from tallystick.protocol.sealing import Sealer, SealingKey
from tallystick.protocol.wire import Dispatch, split_request

log = structlog.get_logger()
LOAD_WEIGHT = 0.2
"""Of the newest look at how many slots are taken; with a look every ten seconds that is about a minute."""
MAX_HELD = 1 << 20
"""Bytes that an engine may send before any output."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that each phase of a job may take. `queue`: until a slot is free; `first_token`: until the first output of a
    stream (an answer in one piece has `total`); `between_tokens`: from one output to the next; `stall`: while nobody reads;
    `taken`: until the coordinator confirms that it has output.
    """

    queue: float = 10.0
    first_token: float = 60.0
    between_tokens: float = 30.0
    total: float = 900.0
    stall: float = 60.0
    taken: float = 15.0


class Stop(Enum):
    """Why a running job is stopped from outside."""

    CANCELLED = "it was cancelled"
    TIMED_OUT = "the coordinator's time for it was up"
    LINK_LOST = "the link to the coordinator was lost"
    SHUTDOWN = "the node is shutting down"


class Ending(NamedTuple):
    """How a job ended: with a receipt of this outcome and these chunks still to send, or without one; why, for people; and what
    went wrong, if anything did.
    """

    outcome: Outcome | None
    reason: str
    last: tuple[bytes, ...] = ()
    error: TallyError | None = None


class Pool:
    """An engine and the jobs that it may run at once. `taken`: jobs that run or wait; `up`: it answered when last asked;
    `crowded`: it says that requests wait in it; `load`: the share of its slots that was taken lately.
    """

    def __init__(self, engine: Engine, slots: Slots | int) -> None:
        self.engine = engine
        self.gate = slots if isinstance(slots, Slots) else Slots(slots)
        self.taken = 0
        self.up, self.crowded = True, False
        self.load = 0.0

    @property
    def slots(self) -> int:
        """Jobs that may run at once, as it is known now."""
        return self.gate.limit

    @property
    def free(self) -> int:
        """Jobs that it could take now."""
        return max(0, self.slots - self.taken) if self.up and not self.crowded else 0

    def looked(self) -> None:
        """Called at every look: brings `load` up to date."""
        self.load += LOAD_WEIGHT * (min(1.0, self.taken / self.slots) - self.load)

    @asynccontextmanager
    async def slot(self, seconds: float) -> AsyncIterator[None]:
        """Holds a slot. Raises Unavailable (node_busy) if none is free in time."""
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(seconds):
                    await held.enter_async_context(self.gate.hold())
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
        pool: Pool,
        durable: asyncio.Task[None],
        sealing_key: SealingKey,
        deadlines: Deadlines,
    ) -> None:
        self.link, self.admitted, self.pool, self.durable = link, admitted, pool, durable
        self._sealing_key, self._deadlines = sealing_key, deadlines
        self._dispatch: Dispatch | None = dispatch
        self._delivery: Delivery | None = None
        self._work: asyncio.Task[Ending] | None = None
        self._stopped: Stop | None = None
        self._phase = "opening the request"
        self._started = time.monotonic()
        self._first: float | None = None

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
        return None if self._first is None else self._first - self._started

    @property
    def total_seconds(self) -> float:
        """How long the job has taken so far."""
        return time.monotonic() - self._started

    def grant(self, chunks: int) -> None:
        """More credit."""
        if self._delivery is not None:
            self._delivery.grant(chunks)

    def lose_link(self) -> None:
        """Nothing more comes from the coordinator."""
        if self._delivery is not None:
            self._delivery.lose()
        self.stop(Stop.LINK_LOST)

    def stop(self, why: Stop) -> None:
        """Stops the engine at once, unless the answer has ended already."""
        if self._work is not None and not self._work.done() and self._stopped is None:
            self._stopped = why
            self._work.cancel()

    async def run(self) -> Ending:
        """Runs it to its end, once."""
        dispatch, self._dispatch = self._dispatch, None
        if dispatch is None:
            raise RuntimeError("a job runs once")
        try:
            call = self._open(dispatch)
        except TallyError as error:
            return Ending(None, str(error), error=error)
        del dispatch
        self._work = asyncio.create_task(self._answer(call), name=f"answer {self.admitted.job.hex()}")
        await asyncio.wait({self._work})
        return self._ended(self._work)

    def _open(self, dispatch: Dispatch) -> Call:
        """Opens the seal, holds the request against its terms, and makes the engine's request of it. Raises TallyError."""
        admitted, terms = self.admitted, self.admitted.terms
        digest, provider = admitted.order.digest, admitted.order.message.provider
        key = self._sealing_key.unwrap(dispatch.candidate.wrapped_key, job=admitted.job, order_hash=digest, provider=provider)
        plain = key.open_request(admitted.job, dispatch.sealed)
        head, body = split_request(plain)
        check_request(terms, key.commitment_key, plain, body)
        call = prepare(head, body, admitted.offer, terms.max_output_tokens)
        meter = Meter(key, digest, terms, len(body))
        sealer = Sealer(key, admitted.job, digest)
        self._delivery = Delivery(self.link, admitted.job, sealer, meter, self._deadlines.stall)
        return call

    async def _answer(self, call: Call) -> Ending:
        limits, clock = self._deadlines, asyncio.get_running_loop().time
        self._phase = "waiting for a slot"
        async with asyncio.timeout(limits.total), self.pool.slot(limits.queue):
            self._phase = "waiting for the first output"
            async with (
                asyncio.timeout(limits.first_token if call.stream else None) as phase,
                aclosing(self.pool.engine.answer(call)) as events,
            ):
                status = 200
                async for event in events:
                    if isinstance(event, Piece):
                        if await self._deliver(event, phase):
                            phase.reschedule(clock() + limits.between_tokens)
                    elif isinstance(event, Head):
                        status = event.status
                        self.delivery.head(event)
                    else:
                        phase.reschedule(None)
                        return await self._finish(event, status)
        raise Unavailable(Code.ENGINE_UNAVAILABLE, "the engine's answer broke off", fault=Fault.ENGINE)

    async def _deliver(self, piece: Piece, phase: asyncio.Timeout) -> bool:
        """Sends a piece, or holds it back before any output. True if it was sent. Only `stall` bounds how long that takes."""
        self.delivery.meter.reported(piece.counted)
        if not (piece.output or self.has_output):
            if self.delivery.hold(piece.data) > MAX_HELD:
                raise Unavailable(Code.ENGINE_UNAVAILABLE, "the engine sent much and no output", fault=Fault.ENGINE)
            return False
        phase.reschedule(None)
        await self._first_output()
        await self.delivery.send(piece.data, piece.text)
        return True

    async def _first_output(self) -> None:
        if self._first is None:
            self._first = time.monotonic()
            self._phase = "between two outputs"
            await asyncio.shield(self.durable)

    async def _finish(self, end: End, status: int) -> Ending:
        self.delivery.meter.reported(end.counted)
        await self._first_output()
        last = await self.delivery.close(end.tail, end.text)
        if status >= 400:
            return Ending(Outcome.UPSTREAM_ERROR, f"the engine answered {status}", last)
        return Ending(Outcome.LENGTH if end.truncated else Outcome.COMPLETED, "the answer ended", last)

    def _ended(self, work: asyncio.Task[Ending]) -> Ending:
        error = None if work.cancelled() else work.exception()
        if not work.cancelled() and error is None:
            return work.result()
        outcome, cause = self._judge(error)
        return Ending(outcome, str(cause), () if outcome is None else self.delivery.abort(), cause)

    def _judge(self, error: BaseException | None) -> tuple[Outcome | None, TallyError]:
        """The table above: the outcome for the receipt, or None for no receipt, and the cause."""
        after = self.has_output
        if self._stopped is Stop.CANCELLED or isinstance(error, Stalled):
            return Outcome.CLIENT_CANCELLED, Unavailable(Code.CANCELLED, str(error or Stop.CANCELLED.value))
        if self._stopped is Stop.TIMED_OUT or isinstance(error, TimeoutError):
            cause = Unavailable(Code.TIMED_OUT, f"took too long: {self._phase}", fault=Fault.ENGINE)
            return (Outcome.TIMED_OUT if after else None), cause
        if error is None or isinstance(error, LinkLost):
            stop = Stop.LINK_LOST if error else (self._stopped or Stop.SHUTDOWN)
            return (Outcome.PROVIDER_ERROR if after else None), Unavailable(Code.NODE_BUSY, stop.value, fault=Fault.PROVIDER)
        if isinstance(error, TallyError):
            if error.code is Code.COORDINATOR_UNAVAILABLE:  # the storage's word, which both sides share
                error = Unavailable(Code.PROVIDER_FAILED, f"the node cannot store the order: {error}", fault=Fault.PROVIDER)
            return (Outcome.PROVIDER_ERROR if after else None), error
        # A bug in one job must not take the others down; it is logged in full, and the client is told to go elsewhere.
        log.error("bug in a job", job=self.admitted.job.hex(), exc_info=error)
        cause = Unavailable(Code.PROVIDER_FAILED, "the node failed", fault=Fault.PROVIDER)
        return (Outcome.PROVIDER_ERROR if after else None), cause
