"""Receipts on their way into the books: numbered, signed, durable. The only place where this node signs one.

Receipts of one payer follow each other, so each waits for the one before to be on disk. What could not be stored is not sent, and
its number is the next one's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple
from weakref import WeakValueDictionary

import structlog

from node.domain.order_admission import Admitted, Matched
from node.domain.tabs import Tabs
from node.domain.usage_meter import NOTHING, make_receipt
from node.ports import JobStore, ReceiptRecord
from tallystick.protocol.eip712 import Domain, Signer, Verified
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.pricing import Usage
from tallystick.protocol.types import ZERO_HASH, Address, Amount, Hash

log = structlog.get_logger()


class _ReceiptContent(NamedTuple):
    """How an order ended, and the cap that it held in flight on its tab."""

    cap: Amount = Amount(0)
    usage: Usage = NOTHING
    outcome: Outcome = Outcome.PROVIDER_ERROR
    commitment: Hash = ZERO_HASH


class ReceiptSigner:
    """See the module's docstring. `unfinished`: the orders that a killed process had begun."""

    def __init__(
        self,
        *,
        signer: Signer,
        domain: Domain,
        tabs: Tabs,
        store: JobStore,
        unfinished: Iterable[Matched] = (),
        now: Callable[[], float] = time.time,
    ) -> None:
        self._signer, self._domain, self._tabs, self._store, self._now = signer, domain, tabs, store, now
        self.unfinished = list(unfinished)
        self._locks: WeakValueDictionary[Address, asyncio.Lock] = WeakValueDictionary()

    async def sign_for_job(
        self, admitted: Admitted, durable: asyncio.Task[None], usage: Usage, outcome: Outcome, commitment: Hash
    ) -> Verified[Receipt] | None:
        """The receipt of a job that ended, once `durable` (its order) and it are on disk. None if they can't be."""
        return await self._write(admitted, _ReceiptContent(admitted.max_cost, usage, outcome, commitment), after=durable)

    async def sign_refusal(self, matched: Matched) -> Verified[Receipt] | None:
        """The receipt at no cost of an order that is refused and used up. None if it can't be stored."""
        return await self._write(matched, _ReceiptContent(outcome=Outcome.REFUSED))

    async def close_unfinished(self) -> int:
        """Receipts at no cost for the orders that a killed process had begun: no last chunk of theirs left, so nothing is
        charged. Call it once it is sure which number each tab has reached. Returns how many receipts it made.
        """
        known = [self._tabs.account(one.payer) for one in self.unfinished]
        found = [
            one for one, account in zip(self.unfinished, known, strict=True) if account.funds.settled <= account.tab.cumulative
        ]
        self.unfinished = []
        made = [await self._write(one, _ReceiptContent(outcome=Outcome.PROVIDER_ERROR)) for one in found]
        return sum(receipt is not None for receipt in made)

    async def _write(
        self, matched: Matched, end: _ReceiptContent, after: asyncio.Task[None] | None = None
    ) -> Verified[Receipt] | None:
        store = self._store.record_refusal if end.outcome is Outcome.REFUSED and after is None else self._store.record_receipt
        lock = self._locks.setdefault(matched.payer, asyncio.Lock())
        try:
            if after is not None:
                await asyncio.shield(after)
            async with lock:
                tab = self._tabs.account(matched.payer).tab
                made = make_receipt(
                    matched.order,
                    matched.terms,
                    tab,
                    usage=end.usage,
                    outcome=end.outcome,
                    commitment=end.commitment,
                    finished_at=int(self._now()),
                )
                receipt = self._signer.sign(made, self._domain)
                await store(ReceiptRecord(matched, receipt))
                self._tabs.record(matched.payer, made.cost, end.cap)
        except Exception:  # whatever kept the receipt from being stored, the job must end, uncharged, and give its slot back
            log.exception("receipt not stored, the job is not charged", job=matched.job.hex())
            return None
        return receipt
