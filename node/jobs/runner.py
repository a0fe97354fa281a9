"""The job runner: decides which jobs start and settles each job that ended. It alone decides the order of these steps:

    admit -> ACCEPT -> run the job (`node.jobs.job`) -> sign the receipt -> store it -> send the last chunk and RECEIPT

Every order matched with this node ends with a receipt, and no order runs twice. A job that is refused, or that ends before any
output left, gets a FAIL frame that carries a receipt at no cost. FAIL comes without a receipt in three cases: the order was seen
before, the receipt could not be stored, or `node.jobs.refusal_receipts` grants none.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any

import structlog

from node.domain.admission_rules import AdmissionRules
from node.domain.order_admission import Admission, AdmittedJob, LinkIdentity, MatchedOrder
from node.domain.published_asks import PublishedAsks
from node.domain.tabs import Tabs
from node.jobs.billing import close_response, confirm_charge, unpaid_work
from node.jobs.coordinator_credit import CoordinatorCredit
from node.jobs.deadlines import Deadlines
from node.jobs.endings import JobResult, StopReason
from node.jobs.job import Job
from node.jobs.job_trace import JobTrace, JobTraces, JobTracing
from node.jobs.kept_evidence import KeptEvidence
from node.jobs.pooled_engine import PooledEngine
from node.jobs.receipt_signer import ReceiptSigner
from node.jobs.refusal_receipts import RefusalReceipts
from node.jobs.resumable_answers import ResumableAnswers
from node.ports import ChainView, JobReport, JobStore, Link, Observer
from tallystick.protocol.eip712 import Domain, Signed, Verified
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.link import Capacities
from tallystick.protocol.match_log import Match
from tallystick.protocol.messages import Order, Receipt
from tallystick.protocol.payer_rules import payer_rule
from tallystick.protocol.sealing import SealingKey
from tallystick.protocol.tiers import Tiers
from tallystick.protocol.types import Address, Amount, Hash, JobId
from tallystick.protocol.wire import MAX_HEADER, CancelReason, Dispatch, Failure, Kind

log = structlog.get_logger()
_PRUNE_SIZE = 10_000
_MAX_REFUSING = 64
_DRAIN_SECONDS = 45.0
MAX_HELD_BYTES = 256 << 20
"""Bytes of all requests that wait or run."""
_STOPS = {
    CancelReason.CLIENT: StopReason.CANCELLED,
    CancelReason.TIMED_OUT: StopReason.TIMED_OUT,
    CancelReason.COORDINATOR: StopReason.COORDINATOR,
    CancelReason.HEDGED: StopReason.HEDGED,
}
OnMatch = Callable[[Link, Match, Signed[Order]], None]
"""Takes a match that was checked, and its order."""
_FUNDS_CODES = frozenset({Code.UNSECURED, Code.INSUFFICIENT_FUNDS})


class JobRunner:
    """See the module's docstring.

    `on_capacity_change` is called whenever the free capacity changed. `consumed_orders`: orders that must not run again, with
    their deadlines. `may_take_jobs` returns whether state recovery with a link's coordinator is complete. `on_stranded_receipt`
    is called when a receipt was stored whose link has ended.
    """

    def __init__(
        self,
        *,
        provider: Address,
        domain: Domain,
        sealing_key: SealingKey,
        asks: PublishedAsks,
        engines: Mapping[str, PooledEngine],
        receipt_signer: ReceiptSigner,
        tabs: Tabs,
        store: JobStore,
        chain: ChainView,
        observer: Observer,
        coordinator_credit: CoordinatorCredit,
        rules: AdmissionRules | None = None,
        deadlines: Deadlines | None = None,
        consumed_orders: Mapping[Hash, int] | None = None,
        now: Callable[[], float] = time.time,
        on_capacity_change: Callable[[], None] = lambda: None,
        may_take_jobs: Callable[[Link], bool] = lambda _link: True,
        on_match: OnMatch = lambda _link, _match, _order: None,
        on_client_head: Callable[[Link, bytes], None] = lambda _link, _head: None,
        on_stranded_receipt: Callable[[], None] = lambda: None,
        kept_evidence: KeptEvidence | None = None,
        tracing: JobTracing | None = None,
        tiers: Tiers | None = None,
    ) -> None:
        self._provider, self.domain, self._sealing_key = provider, domain, sealing_key
        self._engines, self._tabs, self._store, self._chain = engines, tabs, store, chain
        self._receipt_signer, self._coordinator_credit, self._observer = receipt_signer, coordinator_credit, observer
        self._deadlines, self._now, self.traces = deadlines or Deadlines(), now, JobTraces(tracing)
        self._on_capacity_change, self._may_take_jobs = on_capacity_change, may_take_jobs
        self._consumed_orders = dict(consumed_orders or {})
        self._remembered_since = int(now())
        """Orders with an earlier deadline are not known to be new: none of them gets a receipt for its refusal."""
        self._prune_at = _PRUNE_SIZE
        self._kept_evidence, self._tiers = kept_evidence or KeptEvidence(), tiers or Tiers(())
        self._on_match, self._on_client_head, self._on_stranded_receipt = on_match, on_client_head, on_stranded_receipt
        self._admission = Admission(
            asks, rules or AdmissionRules(), lambda order, job: order in self._consumed_orders or job in self._jobs
        )
        self._refusals = RefusalReceipts(
            receipt_signer=receipt_signer, tabs=tabs, chain=chain, consume_order=self._consume_order, now=now
        )
        self.resumable = ResumableAnswers()
        self._pending: dict[JobId, Link] = {}
        self._jobs: dict[JobId, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._refusing: set[asyncio.Task[None]] = set()
        self._held_bytes = 0
        self._draining = False

    # Frames of the link

    def dispatch(self, link: Link, job: JobId, payload: bytes) -> None:
        """Starts a job, or refuses it with FAIL. Returns at once."""
        overload = self._overload(len(payload))
        if not self._may_take_jobs(link):
            text = "this node is still recovering the receipts that it signed before; try another provider"
            self._fail(link, job, Unavailable(Code.NODE_BUSY, text, fault=Fault.PROVIDER))
        elif overload is None:
            self._held_bytes += len(payload)
            self._pending[job] = link
            work = self._run(link, job, payload, self.traces.begin(link, job))
            self._start(self._tasks, work, f"job {job.hex()}")
        elif len(self._refusing) < _MAX_REFUSING:
            self._start(self._refusing, self._refuse_unread(link, job, payload[:MAX_HEADER], overload), f"refusal {job.hex()}")
        else:
            self._fail(link, job, overload)

    def _overload(self, size: int) -> TallyError | None:
        if self._draining:
            reason = "is shutting down"
        elif len(self._tasks) >= sum(pool.most_jobs for pool in self._engines.values()):
            reason = "has too many jobs waiting"
        elif self._held_bytes + size > MAX_HELD_BYTES:
            reason = "has too many bytes of waiting requests"
        else:
            return None
        return Unavailable(Code.NODE_BUSY, f"this node {reason}", fault=Fault.PROVIDER)

    def _start(self, group: set[asyncio.Task[None]], work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        group.add(task)
        task.add_done_callback(group.discard)
        task.add_done_callback(_report_bug)

    def cancel(self, link: Link, job: JobId, reason: CancelReason = CancelReason.CLIENT) -> None:
        """Stops a job at once."""
        if self._pending.get(job) is link:
            del self._pending[job]
        running = self._jobs.get(job)
        if running is not None and running.link is link:
            running.stop(_STOPS[reason])

    def grant_credit(self, link: Link, job: JobId, payload: bytes) -> None:
        """Grants a job credit for more chunks. Raises BadMessage."""
        if len(payload) != 4:
            raise BadMessage(f"credit: expected 4 bytes, got {len(payload)}")
        running = self._jobs.get(job)
        if running is not None and running.link is link:
            running.grant_credit(int.from_bytes(payload, "big"))

    def link_lost(self, link: Link) -> None:
        """Stops the jobs of a link that ended."""
        self._pending = {job: job_link for job, job_link in self._pending.items() if job_link is not link}
        for running in list(self._jobs.values()):
            if running.link is link:
                running.link_lost()

    # For the daemon

    def close_unfinished(self, then: Callable[[], None]) -> None:
        """Signs the receipts of orders that a killed process began, once. Then calls `then`, if there were any."""
        if self._receipt_signer.unfinished:
            self._start(self._refusing, self._close_unfinished(then), "unfinished orders")

    def reopen(self, orders: Iterable[MatchedOrder]) -> None:
        """Takes orders whose receipts were voided, for `close_unfinished`."""
        self._receipt_signer.reopen(orders)

    def reconfigure(self, rules: AdmissionRules, deadlines: Deadlines, tiers: Tiers) -> None:
        """Applies new rules, deadlines and tiers to later jobs."""
        self._tiers = tiers
        self._admission.rules = self._coordinator_credit.rules = rules
        self._deadlines = deadlines

    @property
    def running(self) -> int:
        """Number of jobs that run now."""
        return len(self._jobs)

    def capacities(self) -> Capacities:
        """Returns the current capacity of each engine, by the number of its slot group."""
        return {pool.number: pool.capacity(draining=self._draining) for pool in self._engines.values()}

    async def drain(self, grace: float) -> None:
        """Refuses new jobs and waits for running ones; stops them after `grace` seconds. Every job still ends with its
        receipt.
        """
        self._draining = True
        self._on_capacity_change()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace)
        for job in list(self._jobs.values()):
            job.stop(StopReason.SHUTDOWN)
        last = self._tasks | self._refusing
        if last:
            await asyncio.wait(last, timeout=self._deadlines.first_credit + _DRAIN_SECONDS)
        await self._coordinator_credit.save()

    async def _close_unfinished(self, then: Callable[[], None]) -> None:
        count = await self._receipt_signer.close_unfinished()
        log.warning("orders that a killed process began are closed without a charge", receipts=count)
        then()

    # One job

    async def _run(self, link: Link, job_id: JobId, payload: bytes, trace: JobTrace | None) -> None:
        size = len(payload)
        try:
            dispatch = Dispatch.loads(payload)
            del payload  # a request may be large: keeps one copy only
            matched = self._match(link, job_id, dispatch)
            if trace is not None:
                trace.matched(matched)
            try:
                job = await self._admit(link, matched, dispatch, trace)
            except TallyError as error:
                if trace is not None:
                    trace.refused(error)
                await self._refuse(link, matched, error)
                return
            finally:
                if self._pending.get(job_id) is link:
                    del self._pending[job_id]
            del dispatch
            try:
                await self._settle(job, await job.run())
            finally:
                if job.client_log_head:
                    self._on_client_head(link, job.client_log_head)
                del self._jobs[job_id]
                job.engine.job_ended()
                self._on_capacity_change()
        except TallyError as error:
            log.info("dispatch refused", job=job_id.hex(), code=error.code.value, reason=str(error))
            self._fail(link, job_id, error)
            if trace is not None:
                trace.refused(error)
        finally:
            if trace is not None:
                trace.end()
            self._held_bytes -= size
            if self._pending.get(job_id) is link:
                del self._pending[job_id]

    async def _refuse_unread(self, link: Link, job_id: JobId, head: bytes, cause: TallyError) -> None:
        """Refuses a job of which only the start of the payload, `head`, is read; with a receipt if the order is on this node."""
        try:
            matched = self._match(link, job_id, Dispatch.loads(head))
        except TallyError as error:
            log.info("dispatch refused", job=job_id.hex(), code=error.code.value, reason=str(error))
            self._fail(link, job_id, cause)
            return
        del head
        await self._refuse(link, matched, cause)

    def _match(self, link: Link, job_id: JobId, dispatch: Dispatch) -> MatchedOrder:
        matched = self._admission.match(LinkIdentity(self._provider, link.coordinator, self.domain), job_id, dispatch)
        self._on_match(link, dispatch.match, dispatch.candidate.order)
        return matched

    async def _refuse(self, link: Link, matched: MatchedOrder, cause: TallyError) -> None:
        log.info("job refused", job=matched.job.hex(), code=cause.code.value, reason=str(cause))
        receipt = await self._refusals.issue(link.endpoint, matched)
        self._fail(link, matched.job, cause, receipt)
        if receipt is not None and link.is_lost:
            self._on_stranded_receipt()

    async def _admit(self, link: Link, matched: MatchedOrder, dispatch: Dispatch, trace: JobTrace | None) -> Job:
        """Admits a job. Raises TallyError.

        Nothing waits after the last check, so two dispatches cannot both pass on one order or on the same funds.
        """
        now = int(self._now())
        self._coordinator_credit.require_served(link.endpoint)
        admitted = self._admission.admit(matched, now)
        self._engine_for(admitted)  # a full engine costs no chain read
        settled = await self._admit_to_tab(link, admitted, now)
        try:
            self._check_tier(admitted, settled)
            pool = self._engine_for(admitted)
        except (Refusal, Unavailable):
            self._tabs.drop(admitted.payer, admitted.max_cost)
            raise
        self._remember(admitted, now)
        # A job never starts after its order's deadline, so it does not wait for a slot beyond it.
        queue = min(self._deadlines.queue, admitted.order.message.deadline - now)
        job = Job(
            link=link,
            admitted=admitted,
            dispatch=dispatch,
            engine=pool,
            order_stored=self._store.begin(admitted, now),
            sealing_key=self._sealing_key,
            deadlines=self._deadlines,
            queue_seconds=queue,
            kept_evidence=self._kept_evidence,
            trace=trace,
        )
        if trace is not None:
            trace.admitted()
        self._jobs[admitted.job] = job
        pool.assigned += 1
        link.post(Kind.ACCEPT, admitted.job)
        self._on_capacity_change()
        return job

    def _check_tier(self, admitted: AdmittedJob, settled: Amount) -> None:
        """Raises Refusal (tier_limit) or Unavailable (rate_limited) for a job beyond what the payer's access tier allows, or at a
        price for others.
        """
        rule = payer_rule(admitted.offer.spec.features)
        if rule is not None:
            rule.check(admitted.payer, settled)
        tier = self._tiers.of(admitted.payer, settled)
        if tier is not None:
            self._tiers.check(tier, settled, admitted.offer.model)
            if tier.jobs_in_flight is not None:
                running = sum(job.admitted.payer == admitted.payer for job in self._jobs.values())
                self._tiers.check_running(tier, settled, running)

    def _engine_for(self, admitted: AdmittedJob) -> PooledEngine:
        """Returns the engine of an admitted job. Raises Unavailable (`node_busy`) if it takes no further job, or is gone."""
        pool = self._engines.get(admitted.offer.engine)
        if pool is None:
            raise Unavailable(Code.NODE_BUSY, "the engine was removed from the config a moment ago", fault=Fault.PROVIDER)
        pool.check_room(admitted.offer.model)
        return pool

    def _consume_order(self, matched: MatchedOrder) -> bool:
        """Consumes a refused order; returns False if it was seen before, or may have been."""
        if matched.order.digest in self._consumed_orders or matched.job in self._jobs:
            return False
        if matched.order.message.deadline <= self._remembered_since:
            return False
        self._remember(matched, int(self._now()))
        return True

    def _remember(self, matched: MatchedOrder, now: int) -> None:
        """Prevents an order from running again before its deadline; after that it is refused anyway. The store remembers it for
        ever.
        """
        self._consumed_orders[matched.order.digest] = min(
            matched.order.message.deadline, now + self._admission.rules.max_deadline_ahead
        )
        if len(self._consumed_orders) > self._prune_at:
            self._consumed_orders = {digest: deadline for digest, deadline in self._consumed_orders.items() if deadline > now}
            self._prune_at, self._remembered_since = max(_PRUNE_SIZE, 2 * len(self._consumed_orders)), now

    async def _admit_to_tab(self, link: Link, admitted: AdmittedJob, now: int) -> Amount:
        """Admits the job to the payer's tab, and returns what the payer has settled on it. Known funds may be seconds old, so a
        refusal for lack of funds asks the chain once more.
        """
        refused: Refusal | None = None
        for read_funds in (self._chain.funds, self._chain.refresh):
            funds = await read_funds(admitted.payer)
            self._admission.require_unseen(admitted)
            if self._pending.get(admitted.job) is not link:
                raise Unavailable(Code.CANCELLED, "the job was cancelled before it began")
            try:
                self._tabs.admit(admitted.order.message, admitted.max_cost, funds, now)
            except Refusal as refusal:
                if refusal.code not in _FUNDS_CODES:
                    raise
                refused = refusal
            else:
                return funds.settled
        raise refused or RuntimeError("neither admitted nor refused")

    async def _settle(self, job: Job, result: JobResult) -> None:
        """Signs and stores the receipt, then sends it with the last chunk."""
        if job.trace is not None:
            job.trace.answered(result.outcome)
        result = await confirm_charge(job, result)
        admitted, unpaid = job.admitted, unpaid_work(job) if result.unpaid else Amount(0)
        if unpaid:  # recorded at once, because other jobs wait for this job's slot
            self._coordinator_credit.record_unpaid(job.link.endpoint, unpaid)
            self._stop_queued_jobs(job.link.endpoint)
        end = close_response(job, result.outcome)
        receipt = await self._receipt_signer.sign_for_job(
            admitted, job.order_stored, end.usage, result.outcome, end.commitment, evidence_root=end.rows.root
        )
        self._send_end(job, result, end.last, receipt)
        self._report(job, result, receipt.message if receipt is not None else None, unpaid)
        if job.trace is not None:
            job.trace.settled(receipt.message if receipt is not None else None)
        if receipt is not None and end.rows.packed and not end.rows_sent:
            self._kept_evidence.keep(admitted.job, admitted.payer, end.rows.packed)
        if receipt is not None:
            self._coordinator_credit.record_earned(job.link.endpoint, receipt.message.cost)
        if unpaid:
            await self._coordinator_credit.save()

    def _send_end(self, job: Job, result: JobResult, last: tuple[bytes, ...], receipt: Verified[Receipt] | None) -> None:
        """Sends the last chunks of a job with its receipt, or its failure."""
        admitted, link = job.admitted, job.link
        if receipt is None:
            self._tabs.drop(admitted.payer, admitted.max_cost)
            fallback = Unavailable(Code.PROVIDER_FAILED, "the node could not store the receipt", fault=Fault.PROVIDER)
            self._fail(link, admitted.job, result.error or fallback)
            return
        if last or job.has_output:
            job.delivery.post(*last)
            link.post(Kind.RECEIPT, admitted.job, receipt.to_bytes())
            if last:
                self.resumable.keep(link, admitted.job, job.delivery.sent, receipt.to_bytes())
        else:
            fallback = Unavailable(Code.PROVIDER_FAILED, result.reason, fault=Fault.PROVIDER)
            self._fail(link, admitted.job, result.error or fallback, receipt)
        if link.is_lost:
            self._on_stranded_receipt()

    def _stop_queued_jobs(self, endpoint: str) -> None:
        """Stops jobs that wait for a slot if their coordinator is suspended."""
        if not self._coordinator_credit.serves(endpoint):
            for job in list(self._jobs.values()):
                if job.link.endpoint == endpoint and not job.engine_asked:
                    job.stop(StopReason.COORDINATOR_SUSPENDED)

    def _fail(self, link: Link, job: JobId, error: TallyError, receipt: Verified[Receipt] | None = None) -> None:
        link.post(Kind.FAIL, job, Failure(error, receipt).dumps())

    def _report(self, job: Job, result: JobResult, receipt: Receipt | None, written_off: Amount) -> None:
        first, total = job.first_seconds, job.total_seconds
        engine_busy = result.error is not None and (result.error.code, result.error.fault) == (Code.NODE_BUSY, Fault.ENGINE)
        full = job.engine.assigned >= job.engine.slots
        seconds = None if job.queued_at_engine else job.engine_seconds
        if job.engine.slot_limiter.learn(time.monotonic(), busy=engine_busy, first_seconds=seconds, full=full):
            log.info("slot limit changed", engine=job.admitted.offer.engine, slots=job.engine.slots)
        if receipt is not None and first is not None and receipt.output_tokens:
            job.measure(job.engine.throughput, receipt.output_tokens)
        self._observer.job_ended(
            JobReport(
                job=job.admitted.job,
                payer=job.admitted.payer,
                model=job.admitted.offer.model,
                outcome=result.outcome if receipt is not None else None,
                reason=result.reason,
                cost=receipt.cost if receipt is not None else Amount(0),
                input_tokens=receipt.input_tokens if receipt is not None else 0,
                output_tokens=receipt.output_tokens if receipt is not None else 0,
                first_seconds=first,
                total_seconds=total,
                engine_fault=result.error is not None and result.error.fault is Fault.ENGINE,
                fault="" if result.error is None else result.error.fault.value,
                endpoint=job.link.endpoint,
                written_off=written_off,
                trace_id="" if job.trace is None else job.trace.trace_id,
            )
        )


def _report_bug(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("bug in the runner", task=task.get_name(), exc_info=error)
