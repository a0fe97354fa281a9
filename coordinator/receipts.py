"""Receipts, in time or late: checked, counted, stored, acknowledged, in this order. What was acknowledged is on disk.

A receipt that is not acknowledged is sent again by its node, so what cannot be stored now is not lost. Each attempt of a job
has a receipt of its own: a provider that was given up on may still hand one in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from coordinator.exposure import Exposure
from coordinator.ports import Bus, JobRecord, JobStore, KnownJob, node_subject
from coordinator.reputation import Reputation
from tallystick.protocol.eip712 import Domain, Signed, Verified, read_signed
from tallystick.protocol.errors import BadMessage, BadReceipt, BadSignature
from tallystick.protocol.jobs import ENDS, TERMINAL, step
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
            receipt = _read(payload).verify(self._domain)
        except (BadMessage, BadSignature) as error:
            raise BadReceipt(str(error)) from None
        check_receipt(order, terms, receipt.message)
        if not 0 < receipt.message.seq <= MAX_SEQ:
            raise BadReceipt(f"receipt.seq: {receipt.message.seq}; tabs count from 1, and no tab is that long")
        return receipt

    async def put(self, job: JobId, order: Signed[Order], receipt: Verified[Receipt], record: JobRecord | None = None) -> None:
        """Counts, stores and acknowledges a checked receipt, and with it the job's final state. Raises Unavailable."""
        message = receipt.message
        total = self._exposure.book(message.payer, message.provider, message.cumulative_cost, order.message.ceiling)
        await self._store.put_receipt(job, receipt, total, record)
        self._reputation.record(message.provider, Outcome(message.outcome))
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

    def _ended(self, record: JobRecord, receipt: Receipt) -> JobRecord | None:
        """How a job ended of which the store knows no end, because it could not take it when it came."""
        if record.state in TERMINAL or receipt.provider != record.last.provider:
            return None
        state = step(record.state, ENDS[Outcome(receipt.outcome)])
        attempts = (*record.attempts[:-1], replace(record.last, state=state))
        return replace(record, state=state, finished_at=int(self._now()), attempts=attempts)

    def _acknowledge(self, provider: Address, job: JobId) -> None:
        self._bus.send(node_subject(provider), pack_link(Kind.RECEIPT_ACK, job))


def _read(payload: bytes) -> Signed[Receipt]:
    return read_signed(Receipt, loads(payload, "receipt"))
