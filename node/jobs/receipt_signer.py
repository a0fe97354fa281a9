"""The receipt signer: numbers, signs and stores receipts. It is the only place where this node signs one.

Receipts of one payer follow each other, so each waits until the previous one is stored. A receipt that cannot be stored is not
sent, and the next receipt gets its number.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple
from weakref import WeakValueDictionary

import structlog

from node.domain.order_admission import AdmittedJob, MatchedOrder
from node.domain.tabs import Tabs
from node.domain.usage_meter import NOTHING, make_receipt
from node.ports import JobStore, ReceiptRecord
from tallystick.protocol.eip712 import Domain, Signer, Verified
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.pricing import Usage
from tallystick.protocol.types import ZERO_HASH, Address, Amount, Hash

log = structlog.get_logger()


class _ReceiptContent(NamedTuple):
    """How an order ended, and the maximum cost that it holds in flight on its tab."""

    cap: Amount = Amount(0)
    usage: Usage = NOTHING
    outcome: Outcome = Outcome.PROVIDER_ERROR
    commitment: Hash = ZERO_HASH


class ReceiptSigner:
    """See the module's docstring. `unfinished`: orders that a killed process began."""

    def __init__(
        self,
        *,
        signer: Signer,
        domain: Domain,
        tabs: Tabs,
        store: JobStore,
        unfinished: Iterable[MatchedOrder] = (),
        now: Callable[[], float] = time.time,
    ) -> None:
        self._signer, self._domain, self._tabs, self._store, self._now = signer, domain, tabs, store, now
        self.unfinished = list(unfinished)
        self._locks: WeakValueDictionary[Address, asyncio.Lock] = WeakValueDictionary()

    async def sign_for_job(
        self, admitted: AdmittedJob, order_stored: asyncio.Task[None], usage: Usage, outcome: Outcome, commitment: Hash
    ) -> Verified[Receipt] | None:
        """Signs the receipt of a job that ended, once its order is stored (`order_stored`). Returns None if either cannot be
        stored.
        """
        return await self._write(admitted, _ReceiptContent(admitted.max_cost, usage, outcome, commitment), after=order_stored)

    async def sign_refusal(self, matched: MatchedOrder) -> Verified[Receipt] | None:
        """Signs a receipt at no cost for an order that is refused and consumed. Returns None if it cannot be stored."""
        return await self._write(matched, _ReceiptContent(outcome=Outcome.REFUSED))

    async def close_unfinished(self) -> int:
        """Signs receipts at no cost for orders that a killed process began; returns the number of receipts.

        No last chunk of these orders left, so nothing is charged. Call it once the last receipt number of each tab is known.
        """
        accounts = [self._tabs.account(matched.payer) for matched in self.unfinished]
        complete = [
            matched
            for matched, account in zip(self.unfinished, accounts, strict=True)
            if account.funds.settled <= account.tab.cumulative
        ]
        self.unfinished = []
        receipts = [await self._write(matched, _ReceiptContent(outcome=Outcome.PROVIDER_ERROR)) for matched in complete]
        return sum(receipt is not None for receipt in receipts)

    async def _write(
        self, matched: MatchedOrder, content: _ReceiptContent, after: asyncio.Task[None] | None = None
    ) -> Verified[Receipt] | None:
        store = self._store.record_refusal if content.outcome is Outcome.REFUSED and after is None else self._store.record_receipt
        lock = self._locks.setdefault(matched.payer, asyncio.Lock())
        try:
            if after is not None:
                await asyncio.shield(after)
            async with lock:
                tab = self._tabs.account(matched.payer).tab
                unsigned = make_receipt(
                    matched.order,
                    matched.terms,
                    tab,
                    usage=content.usage,
                    outcome=content.outcome,
                    commitment=content.commitment,
                    finished_at=int(self._now()),
                )
                receipt = self._signer.sign(unsigned, self._domain)
                await store(ReceiptRecord(matched, receipt))
                self._tabs.record(matched.payer, unsigned.cost, content.cap)
        except Exception:  # after any failure to store it, the job must end uncharged and free its slot
            log.exception("receipt not stored; the job is not charged", job=matched.job.hex())
            return None
        return receipt
