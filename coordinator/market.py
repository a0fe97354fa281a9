"""The market: the only place that decides in which order things happen to a job.

`place_asks` puts offers into the book, `shortlist` ranks them, `place_order` admits a job and `run` drives it: match, relay,
fail over, receipt. The frames of a job come through its inbox; the caller of `run` passes on what it yields. Everything that
touches the world comes in through ports; time comes in through two clocks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

import structlog

from coordinator.book import Book, Standing
from coordinator.bus import job_subject, node_subject
from coordinator.exposure import Exposure
from coordinator.live import LiveJob, link_payload
from coordinator.matching import Demand, Reason, judge, shortlist
from coordinator.ports import Bus, Funds, JobRecord, JobStore
from coordinator.reputation import Reputation
from tallystick.protocol.eip712 import Domain, Signed, Signer, Verified, read_signed
from tallystick.protocol.errors import (
    BadMessage,
    BadReceipt,
    Code,
    Fault,
    PeerError,
    Refusal,
    TallyError,
    Unavailable,
    from_public,
)
from tallystick.protocol.jobs import ENDS, Event, State
from tallystick.protocol.messages import Ask, Match, Order, Outcome, Receipt, Terms
from tallystick.protocol.tab import check_receipt
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import Candidate, Capacity, Dispatch, Kind, Submission, dumps, loads, pack_link

log = structlog.get_logger()
CREDIT_STEP = 32
GONE = Kind.ERROR
"""Put into a job's inbox when its node's connection is lost; never relayed."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Deadlines in seconds, and the rules for orders. Accepting is a node's answer to a dispatch; idle is between two chunks."""

    accept: float = 10
    first_output: float = 120
    idle: float = 60
    total: float = 3_600
    cancel: float = 15
    beat: float = 10
    order_horizon: int = 3_600
    min_claim_window: int = 3_600
    fee_bps: int = 0


class Market:
    """See the module's docstring. One instance a replica."""

    def __init__(
        self,
        *,
        domain: Domain,
        signer: Signer,
        bus: Bus,
        store: JobStore,
        funds: Funds,
        limits: Limits,
        now: Callable[[], float] = time.time,
        tick: Callable[[], float] = time.monotonic,
    ) -> None:
        self.domain, self.address, self.limits = domain, signer.address, limits
        self.book, self.exposure, self.reputation = Book(), Exposure(), Reputation()
        self._signer, self._bus, self._store, self._funds = signer, bus, store, funds
        self._now, self._tick = now, tick
        self._live: dict[JobId, LiveJob] = {}
        self._seen: dict[JobId, int] = {}

    async def start(self) -> None:
        """Takes up what the store remembers: recent jobs, so that replays are seen, and the totals of all tabs."""
        since = int(self._now()) - self.limits.order_horizon
        self._seen = dict.fromkeys(await self._store.recent(since), int(self._now()))
        for payer, provider, total in await self._store.totals():
            self.exposure.book(payer, provider, total)

    # Asks

    def place_asks(self, provider: Address, asks: Iterable[Signed[Ask]], capacity: Capacity | None = None) -> None:
        """Makes these a connected provider's standing asks. Raises PeerError if one is forged or another's."""
        verified = [ask.verify(self.domain) for ask in asks]
        if any(ask.message.provider != provider for ask in verified):
            raise BadMessage("asks: an ask of another provider")
        self.book.replace(provider, verified, capacity)

    def set_capacity(self, provider: Address, capacity: Capacity) -> None:
        """A node's own word on what it can take."""
        node = self.book.node(provider)
        if node is not None:
            node.capacity = capacity

    def node_gone(self, provider: Address) -> None:
        """A node's link is lost: its asks leave the book, its jobs learn of it."""
        self.book.drop(provider)
        for job in self._live.values():
            if job.provider == provider and not job.ended:
                job.inbox = asyncio.Queue(job.inbox.maxsize) if job.inbox.full() else job.inbox
                job.inbox.put_nowait(pack_link(GONE, job.id))

    @property
    def live(self) -> int:
        """How many jobs are between order and terminal state."""
        return len(self._live)

    def provider_of(self, job_id: JobId) -> Address | None:
        """Which provider has a live job now."""
        job = self._live.get(job_id)
        return job.provider if job is not None and not job.ended else None

    def shortlist(self, demand: Demand) -> list[Standing]:
        """The best asks for a demand, best first. Raises Refusal or Unavailable that say why there is none."""
        return shortlist(self.book.of_model(demand.model), demand, int(self._now()))

    # Orders

    async def place_order(self, submission: Submission) -> LiveJob:
        """Admits a job and makes its first match. Raises TallyError: then nothing was dispatched and nothing is owed."""
        now = int(self._now())
        if submission.job in self._seen:
            raise Refusal(Code.ORDER_REPLAYED, f"job {submission.job.hex()} was placed before; GET /v1/jobs/ID tells its state")
        for candidate in submission.candidates:
            self._check_order(candidate.order.message, candidate.terms, now)
        job = LiveJob(submission, created_at=now, started=self._tick(), heard=self._tick())
        self._seen[job.id] = now
        try:
            await self._match(job)
        except TallyError:
            del self._seen[job.id]
            raise
        self._live[job.id] = job
        return job

    def _check_order(self, order: Order, terms: Terms, now: int) -> None:
        if order.coordinator != self.address:
            raise Refusal(Code.ORDER_MISDIRECTED, f"order.coordinator: {order.coordinator}, but this is {self.address}")
        if order.deadline <= now:
            raise Refusal(Code.ORDER_EXPIRED, f"order.deadline: passed {now - order.deadline} s ago")
        if order.deadline > now + self.limits.order_horizon:
            raise Refusal(Code.ORDER_TERMS, f"order.deadline: more than {self.limits.order_horizon} s ahead")
        if order.claim_by < now + self.limits.min_claim_window:
            raise Refusal(Code.ORDER_TERMS, f"order.claimBy: must leave providers at least {self.limits.min_claim_window} s")
        if order.max_fee_bps < self.limits.fee_bps:
            raise Refusal(Code.ORDER_TERMS, f"order.maxFeeBps: this coordinator's fee is {self.limits.fee_bps}")
        if order.ceiling < terms.max_cost:
            raise Refusal(Code.UNAUTHORISED_TAB, f"order.ceiling: {order.ceiling} is below the job's own cap {terms.max_cost}")

    async def _match(self, job: LiveJob) -> None:
        """Begins an attempt with the best candidate left. Raises the reason why there is none."""
        reasons: list[str] = []
        for standing, candidate in self._ranked(job, reasons):
            order = candidate.order.verify(self.domain)
            if standing.node.free < 1:
                reasons.append(f"{order.message.provider}: {Reason.BUSY.value}")
                continue
            standing.node.assigned += 1
            try:
                await self._admit(order.message, candidate.terms)
            except TallyError:
                standing.node.assigned -= 1
                raise
            job.begin(candidate, order)
            job.deadline = self._tick() + self.limits.accept
            return
        if job.last_error is not None:
            raise job.last_error
        raise Unavailable(Code.NO_PROVIDER, "no candidate can take the job now: " + "; ".join(reasons), fault=Fault.PROVIDER)

    async def _admit(self, order: Order, terms: Terms) -> None:
        """Counts the job against the payer's funds. A no is said only of fresh figures: the payer may just have deposited."""
        for fresh in (False, True):
            backing = await self._funds.backing(order.payer, order.provider, fresh=fresh)
            self.exposure.observe(order.payer, order.provider, settled=backing.settled, reserved=backing.reserved)
            try:
                self.exposure.admit(order.payer, order.provider, terms.max_cost, backing.free)
            except Refusal:
                if fresh:
                    raise
            else:
                return

    def _ranked(self, job: LiveJob, reasons: list[str]) -> list[tuple[Standing, Candidate]]:
        fit: list[tuple[Standing, Candidate]] = []
        for candidate in job.submission.candidates:
            provider = candidate.order.message.provider
            reason, standing = self._fits(candidate)
            if provider in job.tried:
                reason = Reason.FAILED
            if reason is None and standing is not None:
                fit.append((standing, candidate))
            elif reason is not None:
                reasons.append(f"{provider}: {reason.value}")
        return sorted(fit, key=lambda pair: pair[0].price_key[0] / self.reputation.score(pair[0].node.provider))

    def _fits(self, candidate: Candidate) -> tuple[Reason | None, Standing | None]:
        terms = candidate.terms
        standing = self.book.find(terms.ask)
        if standing is None:
            return Reason.ASK_GONE, None
        ask = standing.ask.message
        if ask.provider != candidate.order.message.provider or ask.model != terms.model:
            raise Refusal(Code.ORDER_TERMS, "terms.ask: the ask of another provider or model")
        offered = (ask.input_price, ask.cached_input_price, ask.output_price)
        if offered != (terms.input_price, terms.cached_input_price, terms.output_price):
            raise Refusal(Code.ORDER_TERMS, f"terms: prices differ from the ask's {offered}")
        demand = Demand(model=terms.model, max_output_tokens=terms.max_output_tokens)
        return judge(standing, demand, int(self._now())), standing

    # Jobs

    async def run(self, job: LiveJob) -> AsyncIterator[tuple[Kind, bytes]]:
        """Drives an admitted job to its end and yields the frames for its client.

        The generator may be handed to another consumer when the client goes away, after `cancel`.
        """
        try:
            while not job.ended:
                async for frame in self._attempt(job):
                    yield frame
                if job.state is State.QUEUED:
                    try:
                        await self._match(job)
                    except TallyError as error:
                        yield self._end_without_receipt(job, Event.FAIL, error)
        finally:
            del self._live[job.id]

    async def _attempt(self, job: LiveJob) -> AsyncIterator[tuple[Kind, bytes]]:
        candidate, provider = job.current, job.provider
        subject = job_subject(job.id)
        self._bus.attach(subject, job.deliver)
        try:
            yield Kind.MATCH, self._dispatch(job, candidate)
            while job.state in (State.MATCHED, State.RUNNING, State.STREAMING):
                async for frame in self._take(job, candidate, await job.inbox.get()):
                    yield frame
        finally:
            self._bus.detach(subject, job.deliver)
            self.exposure.release(job.payer, provider, candidate.terms.max_cost)
            node = self.book.node(provider)
            if node is not None:
                node.assigned = max(0, node.assigned - 1)

    def _dispatch(self, job: LiveJob, candidate: Candidate) -> bytes:
        provider = job.provider
        match = self._signer.sign(
            Match(
                coordinator=self.address,
                job=job.id,
                provider=provider,
                order_hash=job.order.digest,
                attempt=len(job.attempts) - 1,
                matched_at=int(self._now()),
            ),
            self.domain,
        )
        self._store.note_job(job.record())
        frame = pack_link(Kind.DISPATCH, job.id, Dispatch(match, candidate, job.submission.sealed).dumps())
        if not self._bus.send(node_subject(provider), frame):
            job.deliver(pack_link(GONE, job.id))
        return dumps(match.to_json())

    async def _take(self, job: LiveJob, candidate: Candidate, frame: bytes) -> AsyncIterator[tuple[Kind, bytes]]:
        """What one frame of the node means for the job."""
        kind = frame[0]
        if kind == Kind.CHUNK:
            if job.state is not State.STREAMING:
                job.move(Event.OUTPUT)
            job.heard = self._tick()
            job.deadline = job.heard + self.limits.idle
            yield Kind.CHUNK, link_payload(frame)
            self._grant_credit(job)
        elif kind == Kind.ACCEPT:
            if job.state is State.MATCHED:
                job.move(Event.ACCEPT)
                job.deadline = self._tick() + self.limits.first_output
        elif kind == Kind.BEAT:
            yield Kind.BEAT, b""
        elif kind == Kind.RECEIPT:
            try:
                yield Kind.RECEIPT, await self._finish(job, candidate, link_payload(frame))
            except PeerError as error:
                log.warning("bad receipt", job=job.id.hex(), provider=job.provider, error=str(error))
                yield self._end_without_receipt(job, Event.FAIL, error)
        else:
            failure = self._failure(job, frame)
            if job.state is State.STREAMING or not failure.retry or job.cancelled:
                event = Event.CANCEL if job.cancelled else Event.EXPIRE if failure.code is Code.TIMED_OUT else Event.FAIL
                yield self._end_without_receipt(job, event, failure)
            else:
                self._attempt_failed(job, failure)

    def _grant_credit(self, job: LiveJob) -> None:
        job.unread += 1
        if job.unread == CREDIT_STEP:
            job.unread = 0
            self._bus.send(node_subject(job.provider), pack_link(Kind.CREDIT, job.id, CREDIT_STEP.to_bytes(4, "big")))

    def _failure(self, job: LiveJob, frame: bytes) -> TallyError:
        if frame[0] == GONE:
            return Unavailable(Code.NODE_GONE, f"the connection to provider {job.provider} was lost", fault=Fault.PROVIDER)
        try:
            return from_public(loads(link_payload(frame), "failure"), 502)
        except BadMessage as error:
            return Unavailable(Code.PROVIDER_FAILED, f"provider {job.provider} failed without a reason: {error}")

    def _attempt_failed(self, job: LiveJob, error: TallyError) -> None:
        log.info("attempt failed", job=job.id.hex(), provider=job.provider, reason=str(error))
        job.close_attempt("failed", str(error))
        job.last_error = error
        self._blame(job, error)
        job.move(Event.ATTEMPT_FAILED)

    def _blame(self, job: LiveJob, error: TallyError) -> None:
        if error.fault is Fault.PROVIDER and error.code is not Code.NODE_BUSY:
            self.reputation.record(job.provider, Outcome.PROVIDER_ERROR)

    async def _finish(self, job: LiveJob, candidate: Candidate, payload: bytes) -> bytes:
        receipt = self._check_receipt(job.order, candidate.terms, payload)
        outcome = Outcome(receipt.message.outcome)
        job.move(ENDS[outcome])
        job.finished_at = int(self._now())
        job.close_attempt(job.state.value)
        await self._store_receipt(job.record(), receipt)
        return payload

    def _check_receipt(self, order: Verified[Order], terms: Terms, payload: bytes) -> Verified[Receipt]:
        receipt = read_signed(Receipt, loads(payload, "receipt")).verify(self.domain)
        check_receipt(order, terms, receipt.message)
        return receipt

    def _end_without_receipt(self, job: LiveJob, event: Event, error: TallyError) -> tuple[Kind, bytes]:
        if job.state is not State.QUEUED:
            job.close_attempt("failed", str(error))
            self._blame(job, error)
        job.move(event)
        job.finished_at = int(self._now())
        self._store.note_job(job.record())
        return Kind.FAIL, dumps(error.as_json())

    def cancel(self, job_id: JobId) -> bool:
        """Asks the job's node to stop; its receipt will end the job. False if no such job lives here."""
        job = self._live.get(job_id)
        if job is None:
            return False
        if not job.cancelled:
            job.cancelled = True
            job.deadline = min(job.deadline, self._tick() + self.limits.cancel)
            self._bus.send(node_subject(job.provider), pack_link(Kind.CANCEL, job.id))
        return True

    # Receipts that come when their job is over here: after a lost link, a restart, or a client that left

    async def accept_receipt(self, provider: Address, job_id: JobId, payload: bytes) -> bool:
        """Stores and acknowledges a receipt outside a live attempt. Raises PeerError; False if the job is not known here."""
        known = await self._store.job(job_id)
        if known is None:
            return False
        record, stored = known
        if stored is None:
            receipt = self._check_receipt(record.order.verify(self.domain), record.terms, payload)
            if receipt.message.provider != provider:
                raise BadReceipt("receipt: sent by another provider")
            await self._store_receipt(record, receipt)
        else:
            self._acknowledge(provider, job_id)
        return True

    async def _store_receipt(self, record: JobRecord, receipt: Verified[Receipt]) -> None:
        message = receipt.message
        await self._store.put_receipt(record, receipt)
        self.exposure.book(message.payer, message.provider, message.cumulative_cost)
        self.reputation.record(message.provider, Outcome(message.outcome))
        self._acknowledge(message.provider, record.job)

    def _acknowledge(self, provider: Address, job_id: JobId) -> None:
        self._bus.send(node_subject(provider), pack_link(Kind.RECEIPT_ACK, job_id))

    def sweep(self) -> None:
        """Once a second: jobs past their phase's deadline end, silent ones beat for the client, old replay memory goes."""
        tick, now = self._tick(), int(self._now())
        error = Unavailable(Code.TIMED_OUT, "the provider took too long", fault=Fault.PROVIDER)
        for job in list(self._live.values()):
            if not job.ended and tick > min(job.deadline, job.started + self.limits.total) and not job.inbox.full():
                self._bus.send(node_subject(job.provider), pack_link(Kind.CANCEL, job.id))
                job.inbox.put_nowait(pack_link(Kind.FAIL, job.id, dumps(error.as_json())))
                job.deadline = tick + self.limits.cancel
            elif tick > job.heard + self.limits.beat and job.inbox.empty():
                job.heard = tick
                job.inbox.put_nowait(pack_link(Kind.BEAT, job.id))
        horizon = now - self.limits.order_horizon
        self._seen = {job: at for job, at in self._seen.items() if at > horizon}
