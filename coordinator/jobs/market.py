"""The market: the life of a job from its order to its terminal state. Only the market orders the events of a job.

`place_order` admits a job, for which the matchmaker finds a provider. `run` drives the job: match, relay, failover, receipt. The
frames of a job arrive in its inbox; the caller of `run` passes on the frames that it yields. All I/O goes through ports; time
comes from two clocks.

While the reader of a job's frames takes one, no deadline runs against the provider. The reader has an allowance of its own
(`JobLimits.reader`), shorter than the nodes' own allowance. When it is used up, the job is cancelled for its client.

However node, client and store behave, a job ends in one terminal state, and its exposure and its node's slot are released.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import structlog

from coordinator.domain.limits import JobLimits, check_order
from coordinator.domain.peer_errors import error_for_peers
from coordinator.jobs.deadlines import enforce_deadlines
from coordinator.jobs.deferred_writes import DeferredWrites
from coordinator.jobs.live_job import Attempt, LiveJob, link_payload
from coordinator.jobs.matchmaker import Matchmaker
from coordinator.jobs.receipts import Receipts
from coordinator.jobs.reputation_updates import count_failure, count_receipt, read_failure
from coordinator.jobs.slot_queue import SlotQueue
from coordinator.ports import Bus, Funds, JobStore, node_subject
from tallystick.protocol.eip712 import Domain, Signer
from tallystick.protocol.errors import BadReceipt, Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.jobs import ENDS, Event, State
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Match, Outcome
from tallystick.protocol.sealing import is_last
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import CancelReason, Dispatch, Kind, Submission, dumps, pack_link

log = structlog.get_logger()
CREDIT_STEP = 32
_CHANCE = random.SystemRandom().random
REQUEST_FAULTS = frozenset({Code.BAD_MESSAGE, Code.BODY_TOO_LARGE, Code.UNKNOWN_ROUTE, Code.CANCELLED})
"""Codes of errors in the request itself: every other provider would answer the same."""
GONE = Kind.ERROR
"""Kind of the inbox frame that reports the loss of the node's connection; never relayed."""


class Market:
    """See the module's docstring. One instance per process. `chance` draws uniformly from 0 to 1."""

    def __init__(
        self,
        *,
        domain: Domain,
        signer: Signer,
        bus: Bus,
        store: JobStore,
        funds: Funds,
        limits: JobLimits,
        now: Callable[[], float] = time.time,
        tick: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = _CHANCE,
    ) -> None:
        self.domain, self.address, self.limits = domain, signer.address, limits
        self.matchmaker = maker = Matchmaker(domain=domain, funds=funds, limits=limits, now=now, tick=tick, chance=chance)
        self.book, self.exposure = maker.book, maker.exposure
        self.reputation, self.decision_log = maker.reputation, maker.decision_log
        exposure, reputation = self.exposure, self.reputation
        self._signer, self._bus, self._store = signer, bus, store
        self._receipts = Receipts(
            domain=domain, store=store, bus=bus, exposure=exposure, reputation=reputation, funds=funds, now=now, tick=tick
        )
        self._now, self._tick = now, tick
        self._slot_queue = SlotQueue(maker, limits, tick)
        self._live: dict[JobId, LiveJob] = {}
        self._running: Counter[Address] = Counter()
        self._seen: OrderedDict[JobId, int] = OrderedDict()
        """When each job was placed, for as long as a replay is possible."""
        self._writes = DeferredWrites(store, self.reputation)
        self._stopping = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        """Loads the store's state: recent jobs, to detect replays, the totals of all tabs, and the providers' reputation."""
        now = int(self._now())
        stored = await self._store.load_state(now, now - self.limits.max_order_seconds)
        self._seen = OrderedDict.fromkeys(stored.jobs, now)
        if stored.jobs:
            self.matchmaker.restarted()
        for (payer, provider), total in stored.totals.items():
            self.exposure.record_receipt(payer, provider, total, total)
        self.reputation.restore(stored.records)

    async def drain(self, seconds: float) -> None:
        """Refuses new orders and waits for the live jobs. Jobs left after `seconds` end when their nodes' links are closed."""
        self._stopping = True
        self._slot_queue.close(Unavailable(Code.COORDINATOR_UNAVAILABLE, "this coordinator is stopping", fault=Fault.COORDINATOR))
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            log.warning("jobs still running at shutdown", count=len(self._live))
        self._writes.save_reputations()

    # Nodes

    def node_gone(self, provider: Address) -> None:
        """Removes the asks of a node that disconnected, and interrupts its jobs."""
        self.matchmaker.drop(provider)
        for job in self._live.values():
            if job.at_node and job.provider == provider:
                job.interrupt(pack_link(GONE, job.id))

    @property
    def live(self) -> int:
        """The number of jobs between order and terminal state."""
        return len(self._live)

    @property
    def waiting(self) -> int:
        """The number of jobs that wait for a free slot."""
        return len(self.matchmaker.queue)

    def placed_before(self, job_id: JobId) -> bool:
        """Whether a job with this id was placed here recently, in this process or a former one."""
        return job_id in self._seen

    def payer_of(self, job_id: JobId) -> Address | None:
        """Returns the payer of a live job, or None."""
        job = self._live.get(job_id)
        return None if job is None else job.payer

    def subject_of(self, job_id: JobId, provider: Address) -> str | None:
        """Returns the bus subject of a live job that this provider has now, or None."""
        job = self._live.get(job_id)
        return job.subject if job is not None and job.at_node and job.provider == provider else None

    # Orders

    async def place_order(self, submission: Submission) -> LiveJob:
        """Admits a job and makes its first match. The caller must then `run` it.

        Raises TallyError. Nothing was dispatched and nothing is owed then.
        """
        now = int(self._now())
        if self._stopping or self._writes.pending:
            why = "is stopping" if self._stopping else "cannot write to its database"
            raise Unavailable(Code.COORDINATOR_UNAVAILABLE, f"this coordinator {why}", fault=Fault.COORDINATOR)
        if submission.job in self._seen:
            raise Refusal(Code.ORDER_REPLAYED, f"job {submission.job.hex()} was placed before; GET /v1/jobs/ID shows its state")
        for candidate in submission.candidates:
            order, terms = candidate.order.message, candidate.terms
            check_order(order, terms, coordinator=self.address, limits=self.limits, now=now)
        if self._running[submission.candidates[0].order.message.payer] >= self.limits.jobs_per_payer:
            text = f"this payer already runs {self.limits.jobs_per_payer} jobs here, the maximum per payer; wait for one to end"
            raise Unavailable(Code.RATE_LIMITED, text, fault=Fault.CLIENT)
        job = LiveJob(submission, created_at=now, started=self._tick(), last_frame_at=self._tick())
        self._seen[job.id] = now
        self._running[job.payer] += 1
        try:
            await self._slot_queue.match_or_enter(job)
        except BaseException:
            self._seen.pop(job.id, None)
            self._count_out(job.payer)
            raise
        self._live[job.id] = job
        self._idle.clear()
        return job

    # Jobs

    async def run(self, job: LiveJob) -> AsyncGenerator[tuple[Kind, bytes], None]:
        """Drives an admitted job to its end and yields the frames for its client.

        If the client leaves, the caller calls `cancel` and iterates to the end. Closing the generator early fails the job.
        """
        try:
            while not job.ended:
                steps = self._next_attempt(job) if job.state is State.QUEUED else self._attempt(job)
                async with aclosing(steps) as frames:
                    async for frame in frames:
                        job.reading_since = self._tick()
                        yield frame
                        job.frame_taken(self._tick())
        finally:
            if not job.ended:
                if job.at_node:
                    self._stop(job, CancelReason.COORDINATOR)
                why = "the coordinator stopped relaying this job"
                self._end(job, Unavailable(Code.COORDINATOR_UNAVAILABLE, why, fault=Fault.COORDINATOR))
            del self._live[job.id]
            self._count_out(job.payer)
            if not self._live:
                self._idle.set()

    def _count_out(self, payer: Address) -> None:
        self._running[payer] -= 1
        if not self._running[payer]:
            del self._running[payer]

    async def _next_attempt(self, job: LiveJob) -> AsyncGenerator[tuple[Kind, bytes], None]:
        """Begins the next attempt of a job, which may wait for a slot meanwhile. Yields what its client gets to know of that.

        If there is none, the job ends with the error that says why.
        """
        try:
            if job.last_error is not None and (self._stopping or job.cancelled or job.spent(self._tick()) > self.limits.total):
                raise job.last_error
            if job.queued is None:
                await self._slot_queue.match_or_enter(job)
            async with aclosing(self._slot_queue.wait(job)) as places:
                async for place in places:
                    yield Kind.BEAT, place
        except TallyError as error:
            yield self._end(job, error)

    async def _attempt(self, job: LiveJob) -> AsyncGenerator[tuple[Kind, bytes], None]:
        attempt, subject = job.current, job.subject

        def deliver(frame: bytes) -> None:
            # A node signs no receipt that charges before it knows that no other attempt begins. Empty credit tells it so as
            # soon as its output arrives: a reader that takes nothing must not make this coordinator seem silent.
            if job.deliver(frame):
                self._bus.send(node_subject(job.provider), pack_link(Kind.CREDIT, job.id, bytes(4)))

        self._bus.attach(subject, deliver)
        try:
            yield self._dispatch(job, attempt)
            while job.at_node:
                frame = await job.inbox.get()
                if frame[0] == Kind.FAIL and (void := await self._void(job, attempt, link_payload(frame))):
                    yield Kind.VOID, void
                relayed = await self._handle(job, attempt, frame)
                if relayed is not None:
                    yield relayed
                    if relayed[0] is Kind.CHUNK:
                        self._grant_credit(job)
        finally:
            self._bus.detach(subject, deliver)
            self.exposure.release(job.payer, attempt.slot_group.provider, attempt.candidate.terms.max_cost)
            self.matchmaker.release(attempt.slot_group)

    def _dispatch(self, job: LiveJob, attempt: Attempt) -> tuple[Kind, bytes]:
        """Sends the job to its node. Returns the MATCH for its client, or the FAIL of a job that was cancelled or not stored."""
        try:
            if job.cancelled:
                raise Refusal(Code.CANCELLED, "the job was cancelled before a provider had it")
            self._store.enqueue_job(job.record())  # before the dispatch: without it, a later receipt could not be checked
        except TallyError as error:
            return self._end(job, error)
        match = self._signer.sign(
            Match(
                coordinator=self.address,
                job=job.id,
                provider=job.provider,
                order_hash=attempt.order.digest,
                attempt=len(job.attempts) - 1,
                matched_at=int(self._now()),
            ),
            self.domain,
        )
        frame = pack_link(Kind.DISPATCH, job.id, Dispatch(match, attempt.candidate, job.submission.sealed).dumps())
        if not self._bus.send(node_subject(job.provider), frame):
            job.interrupt(pack_link(GONE, job.id))
        return Kind.MATCH, dumps(match.to_json())

    async def _handle(self, job: LiveJob, attempt: Attempt, frame: bytes) -> tuple[Kind, bytes] | None:
        """Applies one frame of the node to the job. Returns the frame for the client, or None."""
        kind, payload = frame[0], link_payload(frame)
        if kind == Kind.RECEIPT:
            return await self._finish(job, attempt, payload)
        if kind in (Kind.FAIL, GONE):
            return self._fail(job, self._connection_error(job) if kind == GONE else read_failure(job, payload))
        if kind == Kind.CHUNK:
            if job.delivered:
                return None  # the response has ended; no client could open a later chunk
            if is_last(payload):
                job.mark_delivered()
            if job.state is not State.STREAMING:
                job.move(Event.OUTPUT)
            job.last_frame_at = self._tick()
            job.extend(job.last_frame_at + self.limits.idle)
            return Kind.CHUNK, payload
        if kind == Kind.ACCEPT and job.state is not State.STREAMING:
            if job.state is State.MATCHED:
                job.move(Event.ACCEPT)
            # A repeated ACCEPT is a sign of life: a response in one piece has no output for long. `total` bounds it.
            job.extend(self._tick() + self.limits.first_output)
        return (Kind.BEAT, b"") if kind == Kind.BEAT else None

    def _grant_credit(self, job: LiveJob) -> None:
        job.uncredited += 1
        if job.uncredited == CREDIT_STEP:
            job.uncredited = 0
            self._bus.send(node_subject(job.provider), pack_link(Kind.CREDIT, job.id, CREDIT_STEP.to_bytes(4, "big")))

    def _connection_error(self, job: LiveJob) -> TallyError:
        if self._stopping:
            return Unavailable(Code.COORDINATOR_UNAVAILABLE, "this coordinator is stopping", fault=Fault.COORDINATOR)
        return Unavailable(Code.NODE_GONE, f"the connection to provider {job.provider} was lost", fault=Fault.PROVIDER)

    async def _void(self, job: LiveJob, attempt: Attempt, payload: bytes) -> bytes | None:
        """Stores the receipt at no cost that a FAIL carries. Returns it for the client; None without a valid one."""
        try:
            receipt = self._receipts.read_void(job.attempts[-1], attempt.order, payload)
        except BadReceipt as error:
            self._refuse(job, error)
            return None
        if receipt is None:
            return None
        try:
            await self._receipts.put(job.id, attempt.order, receipt)
        except Unavailable as error:  # not acknowledged, so its node will send it again
            log.warning("void receipt not stored", job=job.id.hex(), provider=job.provider, error=str(error))
        return dumps(receipt.to_json())

    def _refuse(self, job: LiveJob, error: BadReceipt) -> None:
        """Refuses a bad receipt for good: tells its node, and counts it against the provider."""
        log.warning("bad receipt", job=job.id.hex(), provider=job.provider, error=str(error))
        self._bus.send(node_subject(job.provider), pack_link(Kind.RECEIPT_REFUSED, job.id, dumps(error.as_json())))
        count_failure(self.reputation, job, error)

    def _fail(self, job: LiveJob, error: TallyError) -> tuple[Kind, bytes] | None:
        """Ends a failed attempt. The job fails too, unless no output came yet and another provider may succeed.

        A node's refusal concerns its own tab, ask or clock, so the next candidate is tried all the same.
        """
        if job.state is State.STREAMING or error.code in REQUEST_FAULTS or job.cancelled:
            return self._end(job, error)
        log.info("attempt failed", job=job.id.hex(), provider=job.provider, reason=str(error))
        count_failure(self.reputation, job, error)
        job.close_attempt(State.FAILED, str(error))
        job.last_error = error
        job.move(Event.ATTEMPT_FAILED)
        return None

    async def _finish(self, job: LiveJob, attempt: Attempt, payload: bytes) -> tuple[Kind, bytes]:
        """Ends a job with its receipt; a bad receipt fails the job."""
        try:
            receipt = self._receipts.read(job.attempts[-1], attempt.order, payload)
        except BadReceipt as error:
            self._refuse(job, error)
            return self._end(job, error)
        count_receipt(self.reputation, job, Outcome(receipt.message.outcome))
        job.move(ENDS[Outcome(receipt.message.outcome)])
        job.finished_at = int(self._now())
        job.close_attempt(job.state)
        record = job.record()
        try:
            await self._receipts.put(job.id, attempt.order, receipt, record)
        except Unavailable as error:  # not acknowledged, so its node will send it again
            log.warning("receipt not stored", job=job.id.hex(), provider=job.provider, error=str(error))
            self._writes.save_end(record)
        return Kind.RECEIPT, payload

    def _end(self, job: LiveJob, error: TallyError) -> tuple[Kind, bytes]:
        """Ends a job without a receipt."""
        tried = job.at_node
        if tried:
            count_failure(self.reputation, job, error)
        job.move(Event.CANCEL if job.cancelled else Event.EXPIRE if error.code is Code.TIMED_OUT else Event.FAIL)
        if tried:
            job.close_attempt(job.state, str(error))
        job.finished_at = int(self._now())
        if job.attempts:
            self._writes.save_end(job.record())
        return Kind.FAIL, dumps(error_for_peers(error).as_json())

    def cancel(self, job_id: JobId) -> bool:
        """Tells the job's node to stop; its receipt will end the job. Returns False if no such job is live."""
        job = self._live.get(job_id)
        if job is None or job.ended:
            return False
        if not job.cancelled:
            tick = self._tick()
            job.deadline = min(job.due(tick), tick + self.limits.cancel)
            job.cancelled = True
            job.woken.set()
            if job.at_node and self._stop(job, CancelReason.CLIENT):
                job.mark_cancelled()
        return True

    def _stop(self, job: LiveJob, reason: CancelReason) -> bool:
        return self._bus.send(node_subject(job.provider), pack_link(Kind.CANCEL, job.id, reason.value.encode()))

    async def accept_receipt(self, provider: Address, job_id: JobId, payload: bytes) -> bool:
        """Accepts a receipt outside a live attempt: after a lost link, a failover, or a restart.

        Returns False for an unknown job. Raises BadReceipt or Unavailable, and then does not acknowledge the receipt.
        """
        live = self._live.get(job_id)
        newest = self._writes.unsaved(job_id) if live is None else live.record()
        return await self._receipts.accept_late(provider, job_id, payload, newest)

    async def accept_late(self, provider: Address, job_id: JobId, late: LateReceipt) -> None:
        """Accepts a receipt together with its order, for a known or a lost job. Raises BadReceipt, Refusal, Unavailable."""
        if await self.accept_receipt(provider, job_id, dumps(late.receipt.to_json())):
            return
        if (late.order.message.coordinator, late.order.message.provider) != (self.address, provider):
            raise BadReceipt(f"receipt: expected an order on {provider} through {self.address}, got another party")
        await self._receipts.accept_unknown(job_id, late)
        self._seen.setdefault(job_id, int(self._now()))

    def sweep(self) -> None:
        """Runs once a second: ends overdue jobs, sends signs of life for silent ones, forgets old ids, retries failed writes."""
        tick, horizon = self._tick(), int(self._now()) - self.limits.max_order_seconds
        for job in list(self._live.values()):
            if job.at_node:
                enforce_deadlines(job, tick, self.limits, cancel=self.cancel, stop=self._stop)
        self._slot_queue.sweep()
        while self._seen and next(iter(self._seen.values())) <= horizon:
            self._seen.popitem(last=False)
        self._writes.retry()
