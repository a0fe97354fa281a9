"""The runner: which jobs start, and what is left of each when it ended. The only place that decides in which order that happens.

admitted -> ACCEPT -> the job runs (`node.job`) -> receipt signed -> durable -> last chunk and RECEIPT leave. A job without a
receipt ends with FAIL; if nothing of it left, it is forgotten, and may be dispatched again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from weakref import WeakValueDictionary

import structlog

from node.admission import Admission, Admitted, House, Rules
from node.job import Deadlines, Ending, Job, Pool, Stop
from node.meter import NOTHING, Pace, make_receipt
from node.offers import AskBook
from node.ports import Booking, ChainView, JobReport, JobStore, Link, Observer
from node.tabs import Tabs
from tallystick.protocol.eip712 import Domain, Signer, Verified
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.jobs import CHARGES, Charge
from tallystick.protocol.link import Capacity
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.sealing import SealingKey
from tallystick.protocol.types import Address, Amount, Hash, JobId
from tallystick.protocol.wire import CancelReason, Dispatch, Kind, dumps

log = structlog.get_logger()
_REMEMBERED = 10_000
_WAITING = 64
_STOPS = {
    CancelReason.CLIENT: Stop.CANCELLED,
    CancelReason.TIMED_OUT: Stop.TIMED_OUT,
    CancelReason.COORDINATOR: Stop.LINK_LOST,
}
_FOR_LACK_OF_MONEY = frozenset({Code.UNSECURED, Code.INSUFFICIENT_FUNDS})


class Runner:
    """See the module's docstring. `changed` is called whenever the free capacity has changed; `taken` holds the orders of a
    former life that must not run again, with their deadlines.
    """

    def __init__(
        self,
        *,
        signer: Signer,
        domain: Domain,
        sealing_key: SealingKey,
        book: AskBook,
        pools: Mapping[str, Pool],
        tabs: Tabs,
        store: JobStore,
        chain: ChainView,
        observer: Observer,
        rules: Rules | None = None,
        deadlines: Deadlines | None = None,
        taken: Mapping[Hash, int] | None = None,
        now: Callable[[], float] = time.time,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._signer, self._domain, self._sealing_key = signer, domain, sealing_key
        self._pools, self._tabs, self._store, self._chain = pools, tabs, store, chain
        self._deadlines, self._observer, self._now, self._changed = deadlines or Deadlines(), observer, now, changed
        self._taken = dict(taken or {})
        self._prune_at = _REMEMBERED
        self._admission = Admission(book, rules or Rules(), lambda order, job: order in self._taken or job in self._jobs)
        self._pending: dict[JobId, Link] = {}
        self._jobs: dict[JobId, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._books: WeakValueDictionary[Address, asyncio.Lock] = WeakValueDictionary()
        self._pace = Pace()
        self._draining = False

    # What the link brings

    def dispatch(self, link: Link, job: JobId, payload: bytes) -> None:
        """Takes a job up, or says why not with FAIL. Returns at once."""
        if self._draining or len(self._tasks) >= 4 * self.slots + _WAITING:
            reason = "is shutting down" if self._draining else "has too many jobs waiting"
            self._fail(link, job, Unavailable(Code.NODE_BUSY, f"this node {reason}", fault=Fault.PROVIDER))
            return
        task = asyncio.create_task(self._run(link, job, payload), name=f"job {job.hex()}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def cancel(self, link: Link, job: JobId, reason: CancelReason = CancelReason.CLIENT) -> None:
        """Stops a job at once, for its client or whoever else the reason names."""
        if self._pending.get(job) is link:
            del self._pending[job]
        running = self._jobs.get(job)
        if running is not None and running.link is link:
            running.stop(_STOPS[reason])

    def credit(self, link: Link, job: JobId, payload: bytes) -> None:
        """The coordinator will take more chunks of a job. Raises BadMessage."""
        if len(payload) != 4:
            raise BadMessage("credit: expected 4 bytes")
        running = self._jobs.get(job)
        if running is not None and running.link is link:
            running.grant(int.from_bytes(payload, "big"))

    def lost(self, link: Link) -> None:
        """A link ended: its jobs can't be answered any more."""
        self._pending = {job: on for job, on in self._pending.items() if on is not link}
        for running in list(self._jobs.values()):
            if running.link is link:
                running.lose_link()

    # What the daemon asks

    def adjust(self, rules: Rules, deadlines: Deadlines) -> None:
        """The config has changed: jobs that come from now on are held to this."""
        self._admission.rules, self._deadlines = rules, deadlines

    @property
    def slots(self) -> int:
        """Jobs that may run at once, over all engines."""
        return sum(pool.slots for pool in self._pools.values())

    @property
    def running(self) -> int:
        """Jobs that run now."""
        return len(self._jobs)

    def capacity(self) -> Capacity:
        """What this node can take now, over the engines that are up."""
        pools = [pool for pool in self._pools.values() if pool.up]
        free = 0 if self._draining else sum(pool.free for pool in pools)
        return Capacity(free, sum(pool.slots for pool in pools), self._pace.tokens_per_second, self._pace.first_token_ms)

    async def drain(self, grace: float) -> None:
        """Takes nothing new and waits for what runs; after `grace` seconds stops it. Every job still ends in order."""
        self._draining = True
        self._changed()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace)
        for job in list(self._jobs.values()):
            job.stop(Stop.SHUTDOWN)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._deadlines.stall)

    # One job

    async def _run(self, link: Link, job_id: JobId, payload: bytes) -> None:
        self._pending[job_id] = link
        try:
            dispatch = Dispatch.loads(payload)
            del payload  # a request may be large; from here on it is held once
            job = await self._admit(link, job_id, dispatch)
            del dispatch
        except TallyError as error:
            log.info("job refused", job=job_id.hex(), code=error.code.value, reason=str(error))
            self._fail(link, job_id, error)
            return
        finally:
            self._pending.pop(job_id, None)
        try:
            ending = await job.run()
            receipt = await self._book(job, ending)
            if receipt is None:
                await self._give_up(job, ending)
        finally:
            del self._jobs[job_id]
            job.pool.taken -= 1
            self._changed()

    async def _admit(self, link: Link, job_id: JobId, dispatch: Dispatch) -> Job:
        """Raises TallyError. From the last check on nothing waits: two dispatches can't both pass on one order or one sum."""
        now = int(self._now())
        house = House(self._signer.address, link.coordinator, self._domain)
        admitted = self._admission.verify(house, job_id, dispatch, now)
        await self._admit_to_tab(admitted, now)
        self._remember(admitted, now)
        pool = self._pools.get(admitted.offer.engine)
        if pool is None:
            self._tabs.drop(admitted.payer, admitted.cap)
            raise Unavailable(Code.NODE_BUSY, "the engine was taken out of service just now", fault=Fault.PROVIDER)
        # No job starts after its order's deadline, so none waits for a slot beyond it.
        queue = min(self._deadlines.queue, admitted.order.message.deadline - now)
        durable = asyncio.create_task(self._store.begin(admitted, now))
        job = Job(
            link=link,
            admitted=admitted,
            dispatch=dispatch,
            pool=pool,
            durable=durable,
            sealing_key=self._sealing_key,
            deadlines=replace(self._deadlines, queue=queue),
        )
        self._jobs[job_id] = job
        pool.taken += 1
        link.post(Kind.ACCEPT, job_id)
        self._changed()
        return job

    def _remember(self, admitted: Admitted, now: int) -> None:
        """Keeps an order from running again until its deadline, past which it is refused anyway."""
        self._taken[admitted.order.digest] = admitted.order.message.deadline
        if len(self._taken) > self._prune_at:
            self._taken = {digest: deadline for digest, deadline in self._taken.items() if deadline > now}
            self._prune_at = max(_REMEMBERED, 2 * len(self._taken))

    async def _admit_to_tab(self, admitted: Admitted, now: int) -> None:
        """What is known of a purse may be seconds old, so a no for lack of money asks the chain again first."""
        refused: Refusal | None = None
        for look in (self._chain.funds, self._chain.refresh):
            funds = await look(admitted.payer)
            if admitted.job not in self._pending:
                raise Unavailable(Code.CANCELLED, "cancelled before it began")
            self._admission.unseen(admitted)
            try:
                self._tabs.admit(admitted.order.message, admitted.cap, funds, now)
            except Refusal as refusal:
                if refusal.code not in _FOR_LACK_OF_MONEY:
                    raise
                refused = refusal
            else:
                return
        if refused is not None:
            raise refused

    async def _book(self, job: Job, ending: Ending) -> Receipt | None:
        """Signs the receipt, makes it durable, then lets it and the last chunk go. None if there is no receipt."""
        if ending.outcome is None:
            return None
        admitted = job.admitted
        outcome = await self._confirmed(job, ending.outcome)
        lock = self._books.setdefault(admitted.payer, asyncio.Lock())
        try:
            await asyncio.shield(job.durable)
            async with lock:
                receipt = self._sign(job, outcome)
                await self._store.book(Booking(admitted, receipt))
                self._tabs.book(admitted.payer, receipt.message.cost, admitted.cap)
        except Exception:  # whatever kept the receipt from being stored, the job must end, uncharged, and give its slot back
            log.exception("receipt not stored, the job is not charged", job=admitted.job.hex())
            return None
        for chunk in ending.last:
            job.delivery.post(chunk)
        job.link.post(Kind.RECEIPT, admitted.job, dumps(receipt.to_json()))
        self._tell(job, ending, receipt.message)
        return receipt.message

    async def _confirmed(self, job: Job, outcome: Outcome) -> Outcome:
        """The outcome, if it charges only where the coordinator has output of this attempt: else it may be giving the job to
        another, and two providers would charge for one job.
        """
        charges = CHARGES[outcome] is not Charge.NOTHING and job.has_output
        if charges and not await job.delivery.taken(self._deadlines.taken):
            log.warning("the coordinator never had the answer, so it is not charged", job=job.admitted.job.hex())
            return Outcome.PROVIDER_ERROR
        return outcome

    def _sign(self, job: Job, outcome: Outcome) -> Verified[Receipt]:
        admitted, meter = job.admitted, job.delivery.meter
        usage = NOTHING if outcome is Outcome.UPSTREAM_ERROR else meter.usage()
        if meter.clamped:
            log.warning("the engine's usage was clamped to what can be true", job=admitted.job.hex())
        tab = self._tabs.account(admitted.payer).tab
        receipt = make_receipt(
            admitted.order,
            admitted.terms,
            tab,
            usage=usage,
            outcome=outcome,
            commitment=meter.commitment,
            finished_at=int(self._now()),
        )
        return self._signer.sign(receipt, self._domain)

    async def _give_up(self, job: Job, ending: Ending) -> None:
        """Ends a job without a receipt."""
        admitted = job.admitted
        self._tabs.drop(admitted.payer, admitted.cap)
        broken = Unavailable(Code.PROVIDER_FAILED, "the node could not store its receipt", fault=Fault.PROVIDER)
        self._fail(job.link, admitted.job, ending.error or broken)
        self._tell(job, ending, None)
        try:
            await asyncio.shield(job.durable)
            if not job.has_output:
                await self._store.abandon(admitted.order.digest)
                del self._taken[admitted.order.digest]
        except TallyError as error:
            log.warning("order not forgotten, it will not run again", job=admitted.job.hex(), error=str(error))

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("bug in the runner", task=task.get_name(), exc_info=error)

    def _fail(self, link: Link, job: JobId, error: TallyError) -> None:
        link.post(Kind.FAIL, job, dumps(error.as_json()))

    def _tell(self, job: Job, ending: Ending, receipt: Receipt | None) -> None:
        first, total = job.first_seconds, job.total_seconds
        engine_busy = ending.error is not None and (ending.error.code, ending.error.fault) == (Code.NODE_BUSY, Fault.ENGINE)
        full = job.pool.taken >= job.pool.slots
        if job.pool.gate.learn(time.monotonic(), busy=engine_busy, first_seconds=first, full=full):
            log.info("slots learned", engine=job.admitted.offer.engine, slots=job.pool.slots)
        if receipt is not None and first is not None and receipt.output_tokens:
            self._pace.add(first=first, total=total, tokens=receipt.output_tokens)
        self._observer.ended(
            JobReport(
                job=job.admitted.job,
                payer=job.admitted.payer,
                model=job.admitted.offer.model,
                outcome=ending.outcome if receipt is not None else None,
                reason=ending.reason,
                cost=receipt.cost if receipt is not None else Amount(0),
                input_tokens=receipt.input_tokens if receipt is not None else 0,
                output_tokens=receipt.output_tokens if receipt is not None else 0,
                first_seconds=first,
                total_seconds=total,
                engine_fault=ending.error is not None and ending.error.fault is Fault.ENGINE,
            )
        )
