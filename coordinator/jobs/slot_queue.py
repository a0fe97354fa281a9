"""Waiting for a slot: a job whose candidates are all busy keeps its place in the queue until one of them has a free slot.

The job's client gets a BEAT with the job's place at once and every few seconds. The wait ends with a match, when the client
leaves, when its time is up, or when no candidate is connected any more. Nothing was dispatched and nothing is owed until then.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace

from coordinator.domain.job_queue import MAX_RETRY_SECONDS, QueuedJob
from coordinator.domain.limits import JobLimits, check_order
from coordinator.domain.listed_ask import SlotKey
from coordinator.domain.matching import check_terms
from coordinator.jobs.invitations import ANSWER_SECONDS, Invitations
from coordinator.jobs.live_job import LiveJob
from coordinator.jobs.matchmaker import Matchmaker, SlotsBusy
from tallystick.protocol.errors import Code, Fault, Refusal, Unavailable
from tallystick.protocol.match_log import MAX_CONSIDERED
from tallystick.protocol.queue_place import QueuePlace
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import Candidate

BEAT_SECONDS = 5.0
"""Between two messages about a job's place."""
Tell = Callable[[LiveJob, bytes], Awaitable[None]]
"""Gives the client of a job the payload of a BEAT frame."""


async def _nothing_to_check(_job: JobId) -> None:
    pass


class SlotQueue:
    """Matches jobs, now or when a slot is free. `address`: the coordinator's. `now`: Unix time; `tick`: a monotonic clock."""

    def __init__(
        self,
        matchmaker: Matchmaker,
        limits: JobLimits,
        *,
        address: Address,
        now: Callable[[], float],
        tick: Callable[[], float],
    ) -> None:
        self._matchmaker, self._queue, self._limits, self._tick = matchmaker, matchmaker.queue, limits, tick
        self._closing: Unavailable | None = None
        self._address, self._now, self._invitations = address, now, Invitations(matchmaker, now, tick)
        self.before_waiting: Callable[[JobId], Awaitable[None]] = _nothing_to_check
        """Awaited before a job without an attempt begins to wait. May raise TallyError."""

    async def match_or_enter(self, job: LiveJob) -> None:
        """Begins the job's next attempt, or lets it enter the queue if only slots are missing. Raises TallyError."""
        busy = await self._match(job)
        if busy is not None:
            await self._matchmaker.check_waiting(job, busy)
            if not job.attempts:
                await self.before_waiting(job.id)
            if self._closing is not None:
                raise self._closing
            self._enter(job, busy)

    async def _match(self, job: LiveJob) -> frozenset[Address] | None:
        """Begins the job's next attempt, or returns the providers that miss only a slot. Raises TallyError.

        It does not return the error itself, whose traceback holds all that the match looked at.
        """
        try:
            await self._matchmaker.match(job)
        except SlotsBusy as busy:
            if self._seconds_left(job) <= 0:
                raise job.last_error or busy from None  # of a job that failed, why it failed tells its client more
            return busy.busy
        return None

    async def wait(self, job: LiveJob, tell: Tell) -> None:
        """Waits until the job's next attempt began, and tells its client its place meanwhile.

        Raises the error that says why there is none.
        """
        try:
            while job.queued is not None:
                queued = job.queued
                if queued.granted is None:
                    queued.wake_at = self._tick() + min(BEAT_SECONDS, self._seconds_left(job))
                    asks = tuple(listed_ask.ask.to_json() for listed_ask in self._invitations.take(job))
                    await tell(job, replace(self._place(queued), asks=asks).dumps())
                    await job.woken.wait()
                job.woken.clear()
                self._check(job, queued)
                if queued.granted is not None:
                    await self._use_grant(job, queued)
        finally:
            self._leave(job)

    def close(self, error: Unavailable) -> None:
        """Ends all waits with this error."""
        self._closing = error
        for queued in list(self._queue):
            queued.wake()

    def sweep(self) -> None:
        """Runs once a second: wakes the jobs that are due for a message or whose time is up, and those without any provider."""
        tick, book = self._tick(), self._matchmaker.book
        self._queue.end_without(lambda key: bool(book.groups_of(key)), tick)
        for queued in list(self._queue):
            if tick >= queued.wake_at:
                queued.wake()
        for key in self._queue.expire_grants(tick):
            self._offer(key)
        self._invitations.sweep()

    async def add_orders(self, job: LiveJob, candidates: Sequence[Candidate]) -> None:
        """Adds orders on asks that a waiting job was invited to; the job keeps its place.

        Raises Refusal or Unavailable for the first that cannot be used, and BadSignature; the orders before it are added.
        """
        for candidate in candidates:
            if job.queued is None:
                raise Refusal(Code.ORDER_EXPIRED, f"job {job.id.hex()} waits no more; these orders are not used")
            order, terms = candidate.order.message, candidate.terms
            if candidate.order in (other.order for other in job.candidates):
                continue  # posted before
            if len(job.orders) >= MAX_CONSIDERED:
                raise Refusal(Code.ORDER_TERMS, f"job {job.id.hex()} has orders on {MAX_CONSIDERED} providers, the maximum")
            if (order.payer, terms.job, terms.model) != (job.payer, job.id, job.model):
                raise Refusal(Code.ORDER_TERMS, f"order: expected the payer and the model of job {job.id.hex()}, got others")
            check_order(order, terms, coordinator=self._address, limits=self._limits, now=int(self._now()))
            self._invitations.check(job, candidate)
            listed_ask = self._matchmaker.book.find(terms.ask)
            if listed_ask is None:
                raise Unavailable(Code.NO_PROVIDER, f"provider {order.provider} withdrew its ask", fault=Fault.PROVIDER)
            check_terms(candidate, listed_ask, batch=job.submission.batch)
            candidate.order.verify(self._matchmaker.domain)
            await self._matchmaker.check_order(order, terms)
            self._add_candidate(job, candidate, listed_ask.slot_group.key)

    def _add_candidate(self, job: LiveJob, candidate: Candidate, key: SlotKey) -> None:
        provider = candidate.order.message.provider
        others = (other for other in job.candidates if other.order.message.provider != provider)
        job.replace_candidates((*others, candidate))
        self._invitations.answered(job, key)
        if job.queued is not None:
            self._queue.join(job.queued, (key,))
            self._offer(key)

    def _enter(self, job: LiveJob, busy: Collection[Address]) -> None:
        groups = self._waited_for(job, busy)
        if job.served is None:
            job.queued = self._place_in_queue(job, groups)
        else:
            self._queue.enter_again(job.served, groups)
            job.queued = job.served
        job.pack()
        job.woken.clear()
        if job.trace is not None:
            job.trace.queued()
        self._invitations.add(job.queued, job)
        for key in job.queued.groups:  # a slot may be free that no earlier job waits for
            self._offer(key)
        self._invitations.invite_to_spare(job.queued, job)

    def _place_in_queue(self, job: LiveJob, groups: Sequence[SlotKey]) -> QueuedJob:
        """Lets a job enter the queue. Its payer's weight is what it reserved for the providers that the job waits for."""
        exposure, providers = self._matchmaker.exposure, {provider for provider, _ in groups}
        tabs = (exposure.known(job.payer, provider) for provider in providers)
        return self._queue.enter(
            job.model,
            job.payer,
            groups,
            cost=max(order.max_cost for order in job.orders if order.provider in providers),
            weight=sum(tab.reserved for tab in tabs if tab is not None),
            tick=self._tick(),
            wake=job.woken.set,
            batch=job.submission.batch,
            size=len(job.submission.sealed),
        )

    def _waited_for(self, job: LiveJob, busy: Collection[Address]) -> list[SlotKey]:
        """Returns the slot groups that may take the job later: busy ones, and those of providers that may come back.

        Others would be granted to the job in vain, in place of jobs that can use them.
        """
        book, groups = self._matchmaker.book, list[SlotKey]()
        for order in job.orders:
            provider = order.provider
            if provider in job.tried:
                continue
            listed_ask = book.find(order.ask)
            if provider in busy and listed_ask is not None:
                groups.append(listed_ask.slot_group.key)
            elif provider in busy or book.node(provider) is None:
                groups.append((provider, None))
        return groups

    def _offer(self, key: SlotKey) -> None:
        for group in self._matchmaker.book.groups_of(key):
            self._queue.offer(group, self._tick())

    def _check(self, job: LiveJob, queued: QueuedJob) -> None:
        """Raises the error of a wait that is over without a slot."""
        if job.cancelled:
            raise Refusal(Code.CANCELLED, "the job was cancelled while it waited for a provider")
        if self._closing is not None:
            raise self._closing
        if queued.granted is not None:
            return
        if queued.ended:
            text = (
                "the providers that the job waited for are gone or sell it no more, or its client did not read when one was free"
            )
            raise Unavailable(Code.NO_PROVIDER, text, fault=Fault.PROVIDER)
        if self._seconds_left(job) <= 0:
            position, expected = self._queue.place(queued, self._tick())
            text = f"no slot became free within {self._limit(job):g} s; the job was number {position} in the queue"
            error = Unavailable(Code.NODE_BUSY, text, fault=Fault.PROVIDER)
            error.retry_after = None if expected is None else min(max(1, round(expected)), MAX_RETRY_SECONDS)
            raise error

    async def _use_grant(self, job: LiveJob, queued: QueuedJob) -> None:
        """Matches a job that was granted a slot. A job that cannot use it returns to its place; the next one gets the slot.

        A job whose order names an ask that is gone waits a little for its client to order on the new one.
        """
        granted = queued.granted
        if granted is not None and not self._invitations.may_use(job, granted[0]):
            self._queue.enter_again(queued, (key for key in queued.groups if key[0] != granted[0]))
            queued.kept_until = self._tick() + ANSWER_SECONDS
            self._offer(granted)
            return
        job.unpack()
        try:
            await self._matchmaker.match(job)
        except SlotsBusy as busy:
            job.pack()
            self._queue.enter_again(queued, self._waited_for(job, busy.busy))
            if granted is not None:
                self._offer(granted)
        else:
            self._leave(job)

    def _leave(self, job: LiveJob) -> None:
        queued, job.queued = job.queued, None
        if queued is None:
            return
        job.served = queued
        granted = queued.granted
        self._invitations.discard(queued, job)
        self._queue.leave(queued)
        if granted is not None:
            self._offer(granted)  # a slot that was not used goes to the next job

    def place_of(self, job: LiveJob) -> QueuePlace | None:
        """Returns the place of a job that waits; None for a job that does not."""
        queued = job.queued
        return None if queued is None or queued.granted is not None or queued.ended else self._place(queued)

    def _place(self, queued: QueuedJob) -> QueuePlace:
        position, expected = self._queue.place(queued, self._tick())
        return QueuePlace(position, None if expected is None else round(1_000 * expected))

    def _limit(self, job: LiveJob) -> float:
        """Returns the seconds that the job may wait. Once its last order has expired, no provider can take it."""
        wanted, ordered = job.submission.wait, max(order.deadline for order in job.orders) - job.created_at
        return min(self._limits.wait if wanted is None else wanted, self._limits.max_wait, ordered)

    def _seconds_left(self, job: LiveJob) -> float:
        return job.started + self._limit(job) - self._tick()
