"""Receipts, in time or late: checked, counted, stored, acknowledged, in this order. What was acknowledged is on disk.

A receipt that is not acknowledged is sent again by its node, so what cannot be stored now is not lost. Each attempt of a job
has a receipt of its own: a provider that was given up on may still hand one in.

A receipt is held against what this coordinator relayed, too: one that charges needs the answer's last chunk, one that says
that the client cancelled needs that cancel. To refuse a receipt is to neither store it nor vouch for it. It takes no money:
whatever its provider did deliver, it can collect on chain with the order and its own signature until `claimBy`. What an attempt
relayed is written down with its end. Where a process died before that, nobody knows: the receipt is then stored, says nothing
of the provider's quality, and the client holds it against what arrived.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from coordinator.domain.exposure import Exposure
from coordinator.domain.reputation import Reputation
from coordinator.domain.token_bucket import TokenBucket
from coordinator.ports import AttemptRecord, Bus, Funds, JobRecord, JobStore, node_subject
from tallystick.protocol.eip712 import Domain, Signed, Verified, read_signed
from tallystick.protocol.errors import BadMessage, BadReceipt, BadSignature, Code, Fault, Refusal, Unavailable
from tallystick.protocol.jobs import CHARGES, ENDS, TERMINAL, Charge, State, step
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Order, Outcome, Receipt, Terms
from tallystick.protocol.tab import MAX_SEQ, check_receipt
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import Kind, loads, pack_link

UNKNOWN_JOBS_PER_SECOND, UNKNOWN_JOBS_BURST = 0.1, 100
"""Receipts of one provider for jobs that are not known here: each costs a look-up and perhaps two signatures."""
ALL_UNKNOWN_JOBS_PER_SECOND, ALL_UNKNOWN_JOBS_BURST = 2, 1_000
"""Of all providers together, those of them that payer and provider signed: each costs two chain reads and perhaps a row."""
_ALL = "all"


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

    def read(self, attempt: AttemptRecord, order: Verified[Order], payload: bytes) -> Verified[Receipt]:
        """What a provider sent, as a receipt for this attempt. Raises BadReceipt: whatever is wrong is the provider's fault."""
        try:
            signed = read_signed(Receipt, loads(payload, "receipt"))
        except BadMessage as error:
            raise BadReceipt(str(error)) from None
        receipt = self._verify(order, attempt.terms, signed)
        check_relayed(attempt, receipt.message)
        return receipt

    def read_void(self, attempt: AttemptRecord, order: Verified[Order], payload: bytes) -> Verified[Receipt] | None:
        """The receipt at no cost that a FAIL brings, if it brings one. Raises BadReceipt."""
        try:
            raw = loads(payload, "failure")
        except BadMessage:
            return None
        shown = raw.get("receipt") if isinstance(raw, dict) else None
        if shown is None:
            return None
        try:
            signed = read_signed(Receipt, shown, "failure.receipt")
        except BadMessage as error:
            raise BadReceipt(str(error)) from None
        receipt = self._verify(order, attempt.terms, signed)
        outcome = Outcome(receipt.message.outcome)
        if CHARGES[outcome] is not Charge.NOTHING:
            raise BadReceipt(
                f"receipt.outcome: {outcome.name.lower()} beside a failure; expected an outcome that charges nothing"
            )
        return receipt

    def _verify(self, order: Verified[Order], terms: Terms, signed: Signed[Receipt]) -> Verified[Receipt]:
        try:
            receipt = signed.verify(self._domain)
        except (BadMessage, BadSignature) as error:
            raise BadReceipt(str(error)) from None
        check_receipt(order, terms, receipt.message)
        if not 0 < receipt.message.seq <= MAX_SEQ:
            raise BadReceipt(f"receipt.seq: {receipt.message.seq}; tabs count from 1, and no tab is that long")
        return receipt

    async def put(self, job: JobId, order: Signed[Order], receipt: Verified[Receipt], record: JobRecord | None = None) -> None:
        """Counts, stores and acknowledges a checked receipt, and with it the job's final state. Raises Unavailable."""
        message = receipt.message
        total = self._exposure.record_receipt(message.payer, message.provider, message.cumulative_cost, order.message.ceiling)
        await self._store.put_receipt(job, receipt, total, record)
        self._acknowledge(message.provider, job)

    async def accept_late(self, provider: Address, job: JobId, payload: bytes, newest: JobRecord | None) -> bool:
        """A receipt that comes when its attempt is over here. False if the job is not known. Raises BadReceipt, Unavailable.

        `newest`: what is known of the job beyond what is stored. Where there is nothing, nobody but the receipt tells the store
        how the job ended, if it does not know yet.
        """
        self._check_pace(provider)
        known = await self._store.job(job)
        if known is None:
            self._unknown_jobs.try_spend(provider, self._tick())
            return False
        record = newest or known.record
        await self._accept_known(record, known.receipts.get(provider), provider, payload, unended=newest is None)
        return True

    async def _accept_known(
        self, record: JobRecord, stored: Signed[Receipt] | None, provider: Address, payload: bytes, *, unended: bool
    ) -> None:
        attempt = record.attempt_of(provider)
        if attempt is None:
            raise BadReceipt("receipt: of a provider that never had the job")
        if unended and record.state not in TERMINAL and attempt is record.last:
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

    def _check_pace(self, provider: Address) -> None:
        """Raises Unavailable where a provider handed in too many receipts for jobs that are not known here, taken or not."""
        if wait := self._unknown_jobs.delay(provider, self._tick()):
            text = f"too many receipts for jobs that are not known here; the next is looked at in {wait:.0f} s"
            raise Unavailable(Code.RATE_LIMITED, text, fault=Fault.PROVIDER)

    async def accept_unknown(self, job: JobId, late: LateReceipt) -> None:
        """A receipt of a job that was lost with a process before it was written down: payer and provider both signed for it, and
        the payer has a purse, so that it is no stranger made up for this.

        It says nothing of the provider's quality, since nobody here saw the job. Raises BadReceipt, Refusal, Unavailable.
        """
        if late.terms.job != job:
            raise BadReceipt("receipt: its order is for another job")
        if late.order.message.claim_by <= self._now():
            raise Refusal(Code.UNKNOWN_JOB, "this coordinator does not know that job, and its order can no longer be claimed on")
        try:
            order = late.order.verify(self._domain)
        except (BadMessage, BadSignature) as error:
            raise BadReceipt(str(error)) from None
        receipt = self._verify(order, late.terms, late.receipt)
        payer = order.message.payer
        if not self._all_unknown_jobs.try_spend(_ALL, self._tick()):
            text = "this coordinator was told of too many jobs that it does not know; tell it again later"
            raise Unavailable(Code.RATE_LIMITED, text, fault=Fault.COORDINATOR)
        if not (await self._funds.backing(payer, receipt.message.provider)).opened:
            text = f"this coordinator does not know that job, and {payer} has no purse that could pay for it"
            raise Refusal(Code.INSUFFICIENT_FUNDS, text)
        state = step(State.RUNNING, ENDS[Outcome(receipt.message.outcome)])
        why = "told by its provider, after this coordinator had lost it"
        attempt = AttemptRecord(late.order, late.terms, state, why, unseen=True)
        at = receipt.message.finished_at
        await self.put(job, late.order, receipt, JobRecord(job, payer, state, at, at, (attempt,)))

    def _ended(self, record: JobRecord, receipt: Receipt) -> JobRecord | None:
        """How a job ended of which the store knows no end, because it could not take it when it came."""
        if record.state in TERMINAL or receipt.provider != record.last.provider:
            return None
        state = step(record.state, ENDS[Outcome(receipt.outcome)])
        attempts = (*record.attempts[:-1], replace(record.last, state=state, unseen=True))
        return replace(record, state=state, finished_at=int(self._now()), attempts=attempts)

    def _acknowledge(self, provider: Address, job: JobId) -> None:
        self._bus.send(node_subject(provider), pack_link(Kind.RECEIPT_ACK, job))


def check_unique(stored: Signed[Receipt] | None, receipt: Signed[Receipt]) -> None:
    """Holds a receipt against the one that its attempt has already. Raises BadReceipt."""
    if stored is not None and (stored.message, stored.signature) != (receipt.message, receipt.signature):
        raise BadReceipt(f"receipt: a second one for the same order; the first has seq {stored.message.seq}")


def check_relayed(attempt: AttemptRecord, receipt: Receipt) -> None:
    """Holds a receipt against what was relayed of its attempt. Raises BadReceipt.

    An answer that is said to have ended, and any charge, needs the last chunk; that the client cancelled, our word to the node.
    """
    if attempt.unseen:
        return
    outcome = Outcome(receipt.outcome)
    if outcome is Outcome.CLIENT_CANCELLED and not attempt.cancelled:
        raise BadReceipt("receipt.outcome: client_cancelled, but this coordinator told the provider of no cancel by the client")
    if not attempt.delivered and (receipt.cost or outcome in (Outcome.COMPLETED, Outcome.LENGTH)):
        text = f"{outcome.name.lower()} at a cost of {receipt.cost}, but the answer's last chunk never reached this coordinator"
        raise BadReceipt(f"receipt.outcome: {text}")
