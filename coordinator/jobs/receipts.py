"""Receipts, on time or late: each is checked, counted, stored and acknowledged, in this order.

An acknowledged receipt is on disk. A node sends a receipt again until it is acknowledged, so a receipt that cannot be stored now
is not lost. Each attempt of a job has its own receipt: a provider that was given up on may still send one.

A receipt is also checked against what this coordinator relayed. A receipt that charges needs the last chunk of the response; a
receipt that reports a cancel by the client needs that cancel. Refusing a receipt means that it is neither stored nor vouched
for. It takes no money: a provider that did deliver can collect on chain with the order and its own signature until `claimBy`.
What an attempt relayed is stored when it ends. If the process died before, nobody knows. The receipt is then stored without
effect on the provider's reputation, and the client checks it against what arrived. A job that was ended as failed only because
nobody saw its end then ends as the receipt says, so that coordinator and client tell the same.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

from coordinator.domain.exposure import Exposure
from coordinator.domain.reputation import Reputation
from coordinator.ports import AttemptRecord, Bus, Funds, JobRecord, JobStore, node_subject
from tallystick.protocol.eip712 import Domain, Signed, Verified, read_signed_bytes
from tallystick.protocol.errors import (
    BadMessage,
    BadReceipt,
    BadSignature,
    Code,
    Fault,
    Refusal,
    Unavailable,
    Undelivered,
    rate_limited,
)
from tallystick.protocol.jobs import CHARGES, ENDS, TERMINAL, Charge, State, step
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Order, Outcome, Receipt, Terms
from tallystick.protocol.tab import MAX_SEQ, check_receipt
from tallystick.protocol.types import Address, Amount, JobId, format_amount
from tallystick.protocol.wire import Failure, Kind, pack_link
from tallystick.runtime.token_bucket import TokenBucket

UNKNOWN_JOBS_PER_SECOND, UNKNOWN_JOBS_BURST = 0.1, 100
"""Receipts of one provider for unknown jobs: each costs a lookup and up to two signature checks."""
ALL_UNKNOWN_JOBS_PER_SECOND, ALL_UNKNOWN_JOBS_BURST = 2, 1_000
"""Receipts of all providers for unknown jobs that payer and provider signed: each costs two chain reads and may be stored."""
_ALL = "all"
_REPORTED = "reported by its provider, after this coordinator had lost it"
EndLost = Callable[[JobId, str], Awaitable[bool]]
"""Ends a job that another replica, which is named, ran, if that one is gone. Returns whether it did."""
OnTotal = Callable[[Address, Address, Amount], None]
"""Takes payer, provider and total of a tab, in base units."""


class Receipts:
    """See the module's docstring. `now` is Unix time, `tick` a monotonic clock, both in seconds."""

    def __init__(
        self,
        *,
        domain: Domain,
        store: JobStore,
        bus: Bus,
        exposure: Exposure,
        reputation: Reputation,
        funds: Funds,
        now: Callable[[], float],
        tick: Callable[[], float],
    ) -> None:
        self._domain, self._store, self._bus = domain, store, bus
        self._exposure, self._reputation, self._funds, self._now, self._tick = exposure, reputation, funds, now, tick
        self._unknown_jobs = TokenBucket(UNKNOWN_JOBS_PER_SECOND, UNKNOWN_JOBS_BURST)
        self._all_unknown_jobs = TokenBucket(ALL_UNKNOWN_JOBS_PER_SECOND, ALL_UNKNOWN_JOBS_BURST)
        self.on_total: OnTotal = lambda *_: None
        """Called after a receipt was stored."""
        self.end_lost: EndLost = _runs_on

    def read(self, attempt: AttemptRecord, order: Verified[Order], payload: bytes) -> Verified[Receipt]:
        """Reads a provider's receipt for this attempt. Raises BadReceipt for any fault in it."""
        try:
            signed = read_signed_bytes(Receipt, payload, "receipt")
        except BadMessage as error:
            raise BadReceipt(str(error)) from None
        receipt = self._verify(order, attempt.terms, signed)
        check_relayed(attempt, receipt.message)
        return receipt

    def read_void(self, attempt: AttemptRecord, order: Verified[Order], payload: bytes) -> Verified[Receipt] | None:
        """Reads the receipt at no cost that a FAIL may carry; None if it carries none. Raises BadReceipt."""
        _, raw_receipt = Failure.split(payload)
        if raw_receipt is None:
            return None
        try:
            signed = read_signed_bytes(Receipt, raw_receipt, "failure.receipt")
        except BadMessage as error:
            raise BadReceipt(str(error)) from None
        return _check_free(self._verify(order, attempt.terms, signed), "failure.receipt")

    def read_free(self, attempt: AttemptRecord, order: Verified[Order], payload: bytes) -> Verified[Receipt]:
        """Reads the receipt of an attempt that may charge nothing, since the job goes on with another. Raises BadReceipt."""
        return _check_free(self.read(attempt, order, payload), "receipt")

    def _verify(self, order: Verified[Order], terms: Terms, signed: Signed[Receipt]) -> Verified[Receipt]:
        try:
            receipt = signed.verify(self._domain)
        except (BadMessage, BadSignature) as error:
            raise BadReceipt(str(error)) from None
        check_receipt(order, terms, receipt.message)
        if not 0 < receipt.message.seq <= MAX_SEQ:
            raise BadReceipt(f"receipt.seq: expected 1 to {MAX_SEQ}, got {receipt.message.seq}")
        return receipt

    async def put(
        self,
        job: JobId,
        order: Signed[Order],
        receipt: Verified[Receipt],
        record: JobRecord | None = None,
        *,
        counted: Callable[[], None] = lambda: None,
    ) -> None:
        """Counts, stores and acknowledges a checked receipt, together with the job's final state. Raises Unavailable.

        `counted` is called once its total counts, before it is stored.
        """
        message = receipt.message
        total = self._exposure.record_receipt(message.payer, message.provider, message.cumulative_cost, order.message.ceiling)
        counted()
        await self._store.put_receipt(job, receipt, total, record)
        self.on_total(message.payer, message.provider, total)
        self._acknowledge(message.provider, job)

    async def accept_late(self, provider: Address, job: JobId, payload: bytes, newest: JobRecord | None) -> bool:
        """Accepts a receipt whose attempt is over here. Returns False for an unknown job. Raises BadReceipt, Unavailable.

        `newest`: the job as this process knows it, if newer than what is stored. Without it, the receipt alone tells how a job
        ended that the store has as open.
        """
        self._check_rate(provider)
        known = await self._store.job(job)
        if known is None:
            self._unknown_jobs.try_spend(provider, self._tick())
            return False
        if known.replica and await self.end_lost(job, known.replica):
            known = await self._store.job(job) or known
        if known.replica:
            text = f"another replica of this coordinator runs job {job.hex()}; send it there, or again when the job has ended"
            raise Unavailable(Code.COORDINATOR_UNAVAILABLE, text, fault=Fault.COORDINATOR)
        record = newest or known.record
        await self._accept_known(record, known.receipts.get(provider), provider, payload, unended=newest is None)
        return True

    async def _accept_known(
        self, record: JobRecord, stored: Signed[Receipt] | None, provider: Address, payload: bytes, *, unended: bool
    ) -> None:
        attempt = record.attempt_of(provider)
        if attempt is None:
            raise BadReceipt(f"receipt: provider {provider} never had this job")
        if unended and record.state not in TERMINAL and attempt.state not in TERMINAL:
            attempt = replace(attempt, unseen=True)
        try:
            receipt = self.read(attempt, attempt.order.verify(self._domain), payload)
            check_unique(stored, receipt)
        except BadReceipt:
            self._reputation.record(provider, Outcome.PROVIDER_ERROR)
            raise
        if stored is None:
            await self.put(record.job, attempt.order, receipt, self._ended(record, receipt.message) if unended else None)
        else:
            self._acknowledge(provider, record.job)

    def _check_rate(self, provider: Address) -> None:
        """Raises Unavailable for a provider that sent too many receipts for unknown jobs, accepted or not."""
        if delay := self._unknown_jobs.delay(provider, self._tick()):
            raise rate_limited("too many receipts for unknown jobs", delay, fault=Fault.PROVIDER)

    async def accept_unknown(self, job: JobId, late: LateReceipt) -> None:
        """Accepts a receipt of a job that this coordinator lost before it was stored.

        Payer and provider both signed for the job, and the payer must have a purse, so it is not a stranger made up for this.
        The receipt does not affect the provider's reputation, since nobody here saw the job. Raises BadReceipt, Refusal,
        Unavailable.
        """
        if late.terms.job != job:
            raise BadReceipt("receipt: its order is for another job")
        if late.order.message.claim_by <= self._now():
            raise Refusal(Code.UNKNOWN_JOB, "this coordinator does not know the job, and its order can no longer be claimed on")
        try:
            order = late.order.verify(self._domain)
        except (BadMessage, BadSignature) as error:
            raise BadReceipt(str(error)) from None
        receipt = self._verify(order, late.terms, late.receipt)
        payer = order.message.payer
        tick = self._tick()
        if not self._all_unknown_jobs.try_spend(_ALL, tick):
            text, delay = "this coordinator got too many receipts for unknown jobs", self._all_unknown_jobs.delay(_ALL, tick)
            raise rate_limited(text, delay, fault=Fault.COORDINATOR)
        if not (await self._funds.backing(payer, receipt.message.provider)).opened:
            text = f"this coordinator does not know the job, and {payer} has no purse that could pay for it"
            raise Refusal(Code.INSUFFICIENT_FUNDS, text)
        state = step(State.RUNNING, ENDS[Outcome(receipt.message.outcome)])
        attempt = AttemptRecord(late.order, late.terms, state, _REPORTED, unseen=True)
        at = receipt.message.finished_at
        await self.put(job, late.order, receipt, JobRecord(job, payer, state, at, at, (attempt,)))

    def _ended(self, record: JobRecord, receipt: Receipt) -> JobRecord | None:
        """Returns the end of a job that the store has as open, or as failed, because the end was not stored, or not seen."""
        is_open = record.state not in TERMINAL
        open_attempts = record.open_attempts() if is_open else record.unseen_attempts()
        ended = next((attempt for attempt in open_attempts if attempt.provider == receipt.provider), None)
        undecided = len(open_attempts) > 1 and not receipt.cost
        if ended is None or undecided:
            return None
        state = step(record.state if is_open else State.RUNNING, ENDS[Outcome(receipt.outcome)])
        if state is record.state:
            return None
        ends = {attempt.provider: replace(attempt, state=State.CANCELLED, outrun=True, unseen=True) for attempt in open_attempts}
        ends[ended.provider] = replace(ended, state=state, unseen=True, reason=ended.reason if is_open else _REPORTED)
        attempts = tuple(ends.get(attempt.provider, attempt) for attempt in record.attempts)
        at = int(self._now()) if is_open else record.finished_at
        return replace(record, state=state, finished_at=at, attempts=attempts)

    def _acknowledge(self, provider: Address, job: JobId) -> None:
        self._bus.send(node_subject(provider), pack_link(Kind.RECEIPT_ACK, job))


async def _runs_on(_job: JobId, _replica: str) -> bool:
    """What a lone coordinator says of a job that another replica runs."""
    return False


def _check_free(receipt: Verified[Receipt], member: str) -> Verified[Receipt]:
    outcome = Outcome(receipt.message.outcome)
    if CHARGES[outcome] is not Charge.NOTHING:
        raise BadReceipt(f"{member}.outcome: expected an outcome that charges nothing, got {outcome.name.lower()}")
    return receipt


def check_unique(stored: Signed[Receipt] | None, receipt: Signed[Receipt]) -> None:
    """Checks a receipt against the one that its attempt has already. Raises BadReceipt if they differ."""
    if stored is not None and (stored.message, stored.signature) != (receipt.message, receipt.signature):
        raise BadReceipt(f"receipt: a second one for the same order; the first has seq {stored.message.seq}")


def check_relayed(attempt: AttemptRecord, receipt: Receipt) -> None:
    """Checks a receipt against what was relayed of its attempt. Raises BadReceipt.

    A finished response, and any charge, needs the last chunk; without it, the error is Undelivered. A cancel by the client needs
    this coordinator's cancel to the node.
    """
    if attempt.unseen:
        return
    outcome = Outcome(receipt.outcome)
    if outcome is Outcome.CLIENT_CANCELLED and not attempt.cancelled:
        raise BadReceipt("receipt.outcome: client_cancelled, but this coordinator sent the provider no cancel by the client")
    if not attempt.delivered and (receipt.cost or outcome in (Outcome.COMPLETED, Outcome.LENGTH)):
        charged = f"{outcome.name.lower()} at a cost of {format_amount(receipt.cost)} dollars"
        raise Undelivered(f"receipt.outcome: {charged}, but the last chunk of the response never reached this coordinator")
