"""Receipts, in time or late: checked, counted, stored, acknowledged, in this order. What was acknowledged is on disk.

A receipt that is not acknowledged is sent again by its node, so what cannot be stored now is not lost. Each attempt of a job
has a receipt of its own: a provider that was given up on may still hand one in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from coordinator.exposure import Exposure
from coordinator.ports import AttemptRecord, Bus, JobRecord, JobStore, KnownJob, node_subject
from coordinator.reputation import Reputation
from tallystick.protocol.eip712 import Domain, Signed, Verified, read_signed
from tallystick.protocol.errors import BadMessage, BadReceipt, BadSignature
from tallystick.protocol.jobs import ENDS, TERMINAL, State, step
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Order, Outcome, Receipt, Terms
from tallystick.protocol.tab import check_receipt
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import Kind, loads, pack_link

MAX_SEQ = (1 << 63) - 1
"""No honest tab has that many receipts; keeps seqs within what databases count."""


class Receipts:
    """See the module's docstring."""

    def __init__(
        self, *, domain: Domain, store: JobStore, bus: Bus, exposure: Exposure, reputation: Reputation, now: Callable[[], float]
    ) -> None:
        self._domain, self._store, self._bus = domain, store, bus
        self._exposure, self._reputation, self._now = exposure, reputation, now

    def check(self, order: Verified[Order], terms: Terms, payload: bytes) -> Verified[Receipt]:
        """What a provider sent, as a receipt for this order. Raises BadReceipt: whatever is wrong is the provider's fault."""
        try:
            signed = read_signed(Receipt, loads(payload, "receipt"))
        except BadMessage as error:
            raise BadReceipt(str(error)) from None
        return self._verify(order, terms, signed)

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
        await self._keep(job, order, receipt, record)
        self._reputation.record(receipt.message.provider, Outcome(receipt.message.outcome))

    async def _keep(self, job: JobId, order: Signed[Order], receipt: Verified[Receipt], record: JobRecord | None) -> None:
        message = receipt.message
        total = self._exposure.book(message.payer, message.provider, message.cumulative_cost, order.message.ceiling)
        await self._store.put_receipt(job, receipt, total, record)
        self._acknowledge(message.provider, job)

    async def take_late(self, known: KnownJob, provider: Address, payload: bytes, *, unended: bool) -> None:
        """A receipt that comes when its attempt is over here. Raises BadReceipt, Unavailable.

        `unended`: nobody else will tell the store how the job ended, if it does not know yet.
        """
        record, stored = known.record, known.receipts.get(provider)
        attempt = record.attempt_of(provider)
        if attempt is None:
            raise BadReceipt("receipt: of a provider that never had the job")
        receipt = self.check(attempt.order.verify(self._domain), attempt.terms, payload)
        if stored is None:
            await self.put(record.job, attempt.order, receipt, self._ended(record, receipt.message) if unended else None)
        elif (stored.message, stored.signature) == (receipt.message, receipt.signature):
            self._acknowledge(provider, record.job)
        else:
            raise BadReceipt(f"receipt: a second one for the same order; the first has seq {stored.message.seq}")

    async def take_unknown(self, job: JobId, late: LateReceipt) -> None:
        """A receipt of a job that was lost with a process before it was written down: payer and provider both signed for it.

        It says nothing of the provider's quality, since nobody here saw the job. Raises BadReceipt, Unavailable.
        """
        try:
            order = late.order.verify(self._domain)
        except (BadMessage, BadSignature) as error:
            raise BadReceipt(str(error)) from None
        receipt = self._verify(order, late.terms, late.receipt)
        state = step(State.RUNNING, ENDS[Outcome(receipt.message.outcome)])
        attempt = AttemptRecord(late.order, late.terms, state, "told by its provider, after this coordinator had lost it")
        at = receipt.message.finished_at
        await self._keep(job, late.order, receipt, JobRecord(job, order.message.payer, state, at, at, (attempt,)))

    def _ended(self, record: JobRecord, receipt: Receipt) -> JobRecord | None:
        """How a job ended of which the store knows no end, because it could not take it when it came."""
        if record.state in TERMINAL or receipt.provider != record.last.provider:
            return None
        state = step(record.state, ENDS[Outcome(receipt.outcome)])
        attempts = (*record.attempts[:-1], replace(record.last, state=state))
        return replace(record, state=state, finished_at=int(self._now()), attempts=attempts)

    def _acknowledge(self, provider: Address, job: JobId) -> None:
        self._bus.send(node_subject(provider), pack_link(Kind.RECEIPT_ACK, job))
