"""The market: the life of a job from its order to its terminal state. Only the market orders the events of a job.

`place_order` admits a job, for which the matchmaker finds a provider. `run` drives the job: match, relay, failover, receipt. What
happens at its nodes is the relay's part. The frames of a job arrive in its inbox, and leave through its sink: a chunk that need
not wait at once, in the call that brings it. All I/O goes through ports; time comes from two clocks.

While the reader of a job's frames has no room for the next one, no deadline runs against the provider. The reader has its own
allowance (`JobLimits.reader`), shorter than that of nodes. When it is used up, the job is cancelled for its client.

However node, client and store behave, a job ends in one terminal state, and its exposure and its node's slot are released.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from coordinator.domain.limits import JobLimits
from coordinator.jobs.admission import Admission
from coordinator.jobs.attempt import Attempt
from coordinator.jobs.audit_reports import AuditReports
from coordinator.jobs.deadlines import enforce_deadlines
from coordinator.jobs.decision_keeper import DecisionKeeper
from coordinator.jobs.deferred_writes import DeferredWrites
from coordinator.jobs.hedging import CallLater, Hedging, call_later
from coordinator.jobs.job_totals import JobTotals
from coordinator.jobs.job_trace import JobTrace
from coordinator.jobs.live_job import BeforeReceipt, LiveJob
from coordinator.jobs.match_log import MatchLog
from coordinator.jobs.matchmaker import Matchmaker
from coordinator.jobs.node_returns import NodeReturns
from coordinator.jobs.payer_totals import LoadTotals, PayerTotals
from coordinator.jobs.receipts import OnTotal, Receipts
from coordinator.jobs.relay import GONE, Relay, not_relayed
from coordinator.jobs.report_store import ReportStore
from coordinator.jobs.shared_match_log import SharedMatchLog
from coordinator.jobs.shared_store import SharedStore
from coordinator.jobs.slot_queue import SlotQueue
from coordinator.ports import Bus, FrameSink, Funds, JobStore, LogStore
from tallystick.protocol.eip712 import Domain, Signer
from tallystick.protocol.errors import BadReceipt, Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.jobs import State
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.match_log import draw_of
from tallystick.protocol.queue_place import QueuePlace
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import CancelReason, Candidate, Kind, Submission, pack_link
from tallystick.tracing.spans import Tracer

log = structlog.get_logger()
FOLLOW_SECONDS = 1.0
_CHANCE = random.SystemRandom().random


class Market:
    """See the module's docstring. One instance per process. `chance` draws uniformly from 0 to 1, `draw` for a match; `later`
    calls a function after some seconds.
    """

    def __init__(
        self,
        *,
        domain: Domain,
        signer: Signer,
        bus: Bus,
        store: JobStore,
        log_store: LogStore,
        report_store: ReportStore,
        funds: Funds,
        limits: JobLimits,
        now: Callable[[], float] = time.time,
        tick: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = _CHANCE,
        later: CallLater = call_later,
        draw: Callable[[JobId, int], float] = draw_of,
        shared: SharedStore | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """`shared`: what this process shares with the other replicas of its coordinator; None for a lone one. `tracer`: what
        records jobs; None if nothing does.
        """
        self.tracer = tracer
        self.domain, self.address, self.limits = domain, signer.address, limits
        self.matchmaker = maker = Matchmaker(domain=domain, funds=funds, limits=limits, now=now, tick=tick, chance=chance)
        maker.draw = draw
        self.book, self.exposure = maker.book, maker.exposure
        self.reputation, self.decision_log = maker.reputation, maker.decision_log
        exposure, reputation = self.exposure, self.reputation
        self._store = store
        self._receipts = Receipts(
            domain=domain, store=store, bus=bus, exposure=exposure, reputation=reputation, funds=funds, now=now, tick=tick
        )
        self._now, self._tick = now, tick
        self._slot_queue = SlotQueue(maker, limits, address=self.address, now=now, tick=tick)
        self.admission = Admission(
            maker, limits, coordinator=self.address, shared=shared, blocked=self._blocked, now=now, tick=tick
        )
        self._slot_queue.before_waiting = self.admission.check_placed_elsewhere
        self._live = self.live_jobs = dict[JobId, LiveJob]()
        self._writes = DeferredWrites(store, self.reputation, maker.speeds, shared)
        self.hedging = Hedging(maker, limits.hedge_share, tick, later)
        self._decision_keeper = DecisionKeeper(self.decision_log, log_store)
        heads, keep = limits.match_log_seconds, limits.match_log_keep_seconds
        self.shared = shared
        if shared is not None:
            self._receipts.end_lost = shared.end_lost
        log_options: dict[str, Any] = {"head_seconds": heads, "keep_seconds": keep, "lost": limits.match_log_lost}
        shared_log = None if shared is None else SharedMatchLog(log_store, signer, domain, now, shared=shared, **log_options)
        self.match_log = shared_log or MatchLog(log_store, signer, domain, now, **log_options)
        self._log_store = log_store
        self.audit_reports = AuditReports(
            match_log=self.match_log,
            integrity=maker.integrity,
            jobs=store,
            store=report_store,
            find_ask=maker.find_ask,
            now=now,
            tick=tick,
            shared=shared,
        )
        self._relay = Relay(
            match_log=self.match_log,
            shared_log=shared_log,
            bus=bus,
            store=store,
            matchmaker=maker,
            receipts=self._receipts,
            writes=self._writes,
            hedging=self.hedging,
            limits=limits,
            now=now,
            tick=tick,
            count_out=self.admission.count_out,
        )
        self.node_frames = self._relay.frames
        self._returns = NodeReturns(bus, tick, limits.node_return)
        self.job_totals = JobTotals()
        self._totals: PayerTotals | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        """Loads the store's state: recent jobs, to detect replays, the totals of all tabs, and the providers' reputation."""
        now = int(self._now())
        stored = await self._store.load_state(now, now - self.limits.max_order_seconds)
        self.admission.restore(stored.jobs)
        if stored.follows:
            self.matchmaker.restarted()
        for (payer, provider), total in stored.totals.items():
            self.exposure.record_receipt(payer, provider, total, total)
        self.reputation.restore(stored.records)
        self.matchmaker.speeds.restore(stored.speeds)
        await self._decision_keeper.restore()
        self.book.decisions = self.decision_log.count
        await self.match_log.start()
        await self.audit_reports.start(self._log_store)

    async def drain(self, seconds: float) -> None:
        """Refuses new orders and waits for the live jobs, for `seconds` at most; `dismiss_nodes` ends those that are left."""
        if not await self._wait_until_idle(seconds):
            log.warning("jobs still running at shutdown", count=len(self._live))
        self.hedging.stopped = True  # the log of matches gets no more
        await self._writes.close()
        self._decision_keeper.save()
        await self.match_log.close()

    async def dismiss_nodes(self, seconds: float) -> None:
        """Tells the nodes of the live jobs to stop, and waits for their answers, for `seconds` at most.

        What they had sent before is read with that. A last chunk that nobody read would be charged, and not be delivered. Jobs
        whose nodes do not answer end when their links are closed.
        """
        self.hedging.stopped = True
        for job in self._live.values():
            for attempt in job.rivals:
                if attempt.return_by is None:
                    self._relay.dismiss(attempt)
                else:  # its node is away; nobody knows what it had sent
                    attempt.cut_off, attempt.return_by = True, None
                    job.interrupt(attempt, pack_link(GONE, job.id))
        await self._wait_until_idle(seconds)

    async def _wait_until_idle(self, seconds: float) -> bool:
        """Refuses new orders, ends jobs that no node has, and waits for the others. Returns whether all have ended in time."""
        self._relay.stopping = True
        self._slot_queue.close(Unavailable(Code.COORDINATOR_UNAVAILABLE, "this coordinator is stopping", fault=Fault.COORDINATOR))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        return self._idle.is_set()

    def _blocked(self) -> str | None:
        """Why no order is taken now; None if orders are taken."""
        if self._relay.stopping:
            return "is stopping"
        if self._writes.pending or self.match_log.blocked:
            return self.match_log.conflict or "cannot write to its database"
        return None

    # Replicas

    async def follow(self) -> None:
        """Takes what other replicas found about providers, once a second, until cancelled."""
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            try:
                await self.audit_reports.refresh()
            except Unavailable as error:
                log.warning("reports of audits at other replicas not read", error=str(error))

    def share_totals(self, load: LoadTotals, on_total: OnTotal) -> None:
        """Prepares for other replicas: reads a payer's totals with `load` when it comes, and calls `on_total` when one rose."""
        self._totals = PayerTotals(self.exposure, load, self._tick)
        self.matchmaker.before_admission = self._totals.refresh
        self._receipts.on_total = on_total

    def forget_loaded_totals(self, payer: Address | None = None) -> None:
        """Has the payers' totals read again, since notices of other replicas may be lost; those of one payer soon."""
        if self._totals is not None:
            self._totals.forget() if payer is None else self._totals.hint(payer)

    # Nodes

    def node_gone(self, provider: Address, *, cut_off: bool = False) -> None:
        """Removes the asks of a node that disconnected. Its jobs end, or wait for its return.

        `cut_off`: this process ended the connection.
        """
        self.matchmaker.drop(provider)
        for job, attempt in self._attempts_of(provider):
            attempt.cut_off = cut_off
            if self._relay.stopping or cut_off or not self._returns.wait_for(attempt):
                job.interrupt(attempt, pack_link(GONE, job.id))
        self._relay.trace_takers.discard(provider)
        self._returns.resumers.discard(provider)

    def node_connected(self, provider: Address, *, trace: bool, resume: bool) -> None:
        """Notes which frames a connected node takes, and goes on with its jobs that wait for its return."""
        if trace:
            self._relay.trace_takers.add(provider)
        if resume:
            self._returns.resumers.add(provider)
        for job, attempt in self._attempts_of(provider):
            self._returns.resume(job, attempt)
        self.node_offers(provider)

    def node_offers(self, provider: Address) -> None:
        """Notes that a node connected, or that its asks changed."""
        self._relay.lost_dispatches.node_is_back(provider)

    def _attempts_of(self, provider: Address) -> list[tuple[LiveJob, Attempt]]:
        """The open attempts of a provider, each with its job."""
        return [(job, attempt) for job in self._live.values() for attempt in job.open_attempts if attempt.provider == provider]

    @property
    def live(self) -> int:
        """The number of jobs between order and terminal state."""
        return len(self._live)

    @property
    def waiting(self) -> int:
        """The number of jobs that wait for a free slot."""
        return len(self.matchmaker.queue)

    def payer_of(self, job_id: JobId) -> Address | None:
        """Returns the payer of a live job, or None."""
        job = self._live.get(job_id)
        return None if job is None else job.payer

    def queued_job(self, job_id: JobId) -> tuple[LiveJob, QueuePlace | None] | None:
        """Returns a live job that no provider has now, and its place if it waits for a free slot; None for any other job."""
        job = self._live.get(job_id)
        return None if job is None or job.state is not State.QUEUED else (job, self._slot_queue.place_of(job))

    # Orders

    async def place_order(self, submission: Submission, trace: JobTrace | None = None) -> LiveJob:
        """Admits a job and makes its first match. The caller must then `run` it. `trace`: records it.

        Raises TallyError. Nothing was dispatched and nothing is owed then.
        """
        job = self.admission.admit(submission)
        job.trace = trace
        del submission  # which must not be held while the job waits for the chain
        try:
            await self._slot_queue.match_or_enter(job)
        except BaseException as error:
            self.admission.withdraw(job)
            if isinstance(error, TallyError):
                await self.admission.check_placed_elsewhere(job.id)  # which then is why it cannot be placed here
            raise
        self._live[job.id] = job
        self._idle.clear()
        return job

    async def add_orders(self, job_id: JobId, candidates: Sequence[Candidate]) -> None:
        """Adds orders to a job that waits for a free slot; see `SlotQueue.add_orders`. Raises TallyError."""
        job = self._live.get(job_id)
        if job is None:
            raise Refusal(Code.UNKNOWN_JOB, f"job {job_id.hex()} does not wait for a slot here")
        await self._slot_queue.add_orders(job, candidates)

    # Jobs

    async def run(self, job: LiveJob, sink: FrameSink, before_receipt: BeforeReceipt | None = None) -> None:
        """Drives an admitted job to its end. `sink` gets the frames for its client.

        `before_receipt` is awaited with the payload of the receipt before the sink gets it. If the client leaves, the caller
        calls `cancel` and waits on. Cancelling the task that runs this fails the job.
        """
        job.sink, job.before_receipt = sink, before_receipt
        try:
            while not job.ended:
                if job.state is State.QUEUED:
                    await self._next_attempt(job)
                else:
                    await self._relay.attempts(job)
        finally:
            if not job.ended:
                self._relay.end(job, not_relayed())
            del self._live[job.id]
            self.admission.count_out(job)
            self.job_totals.add(job)
            if job.trace is not None:
                job.trace.ended(job.state, job.last_error, len(job.attempts))
            if not self._live:
                self._idle.set()

    async def _next_attempt(self, job: LiveJob) -> None:
        """Begins the next attempt of a job, which may wait for a slot meanwhile, as its client gets to know.

        If there is none, the job ends with the error that says why.
        """
        try:
            if job.last_error is not None and (
                self._relay.stopping or job.cancelled or job.spent(self._tick()) > self.limits.total
            ):
                raise job.last_error
            if job.queued is None:
                await self._slot_queue.match_or_enter(job)
            await self._slot_queue.wait(job, self._tell_place)
        except TallyError as error:
            await job.put(*self._relay.end(job, error), self._tick)

    async def _tell_place(self, job: LiveJob, place: bytes) -> None:
        await job.put(Kind.BEAT, place, self._tick)

    def cancel(self, job_id: JobId) -> bool:
        """Tells the job's nodes to stop; the receipt of one will end the job. Returns False if no such job is live."""
        job = self._live.get(job_id)
        if job is None or job.ended:
            return False
        if not job.cancelled:
            tick = self._tick()
            for attempt in job.open_attempts:
                attempt.deadline = min(job.due(attempt, tick), tick + self.limits.cancel)
            job.cancelled = True
            job.woken.set()
            if job.at_node:
                leader = job.leader
                self._relay.decide(job, leader)  # only one provider may charge for a job that its client left
                if self._relay.stop(leader, CancelReason.CLIENT):
                    leader.mark_cancelled()
        return True

    async def accept_receipt(self, provider: Address, job_id: JobId, payload: bytes) -> bool:
        """Accepts a receipt outside a live attempt: after a lost link, a failover, or a restart.

        Returns False for an unknown job. Raises BadReceipt or Unavailable, and then does not acknowledge the receipt.
        """
        live = self._live.get(job_id)
        newest = self._writes.unsaved(job_id) if live is None else live.record()
        return await self._receipts.accept_late(provider, job_id, payload, newest)

    async def accept_late(self, provider: Address, job_id: JobId, late: LateReceipt) -> None:
        """Accepts a receipt together with its order, for a known or a lost job. Raises BadReceipt, Refusal, Unavailable."""
        if await self.accept_receipt(provider, job_id, late.receipt.to_bytes()):
            return
        if (late.order.message.coordinator, late.order.message.provider) != (self.address, provider):
            raise BadReceipt(f"receipt: expected an order on {provider} through {self.address}, got another party")
        await self._receipts.accept_unknown(job_id, late)
        self.admission.note_placed(job_id)

    def sweep(self) -> None:
        """Runs once a second: ends overdue jobs, sends signs of life for silent ones, forgets old ids, retries failed writes."""
        tick = self._tick()
        for job in list(self._live.values()):
            if job.at_node:
                enforce_deadlines(job, tick, self.limits, cancel=self.cancel, stop=self._relay.stop)
                for attempt in filter(self._returns.is_over, job.open_attempts):
                    job.interrupt(attempt, pack_link(GONE, job.id))
        self._slot_queue.sweep()
        self.admission.sweep()
        self._writes.retry()
        self._decision_keeper.save()
