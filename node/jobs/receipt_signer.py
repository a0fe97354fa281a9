"""The receipt signer: numbers, signs and stores receipts. It is the only place where this node signs one.

Receipts of one payer follow each other. The next one is signed on top of those that are queued for the store, so one sync to disk
stores many. The store writes them in order and compares each with the tab that it has, so all that follow a receipt that cannot
be stored fail with it. None of them was sent, so the next receipt gets the number of the first of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import structlog

from node.domain.order_admission import AdmittedJob, MatchedOrder
from node.domain.tabs import Tabs
from node.domain.usage_meter import NOTHING, make_receipt
from node.ports import JobStore, ReceiptRecord, TabConflict
from tallystick.protocol.eip712 import Domain, Signer, Verified
from tallystick.protocol.errors import TallyError
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.pricing import Usage
from tallystick.protocol.tab import ProviderTab
from tallystick.protocol.types import ZERO_HASH, Address, Amount, Hash

log = structlog.get_logger()


class _ReceiptContent(NamedTuple):
    """How an order ended, and the maximum cost that it holds in flight on its tab."""

    cap: Amount = Amount(0)
    usage: Usage = NOTHING
    outcome: Outcome = Outcome.PROVIDER_ERROR
    commitment: Hash = ZERO_HASH
    evidence_root: Hash = ZERO_HASH


@dataclass(slots=True)
class _Chain:
    """The receipts of one payer that are signed and not stored yet: their number, and the tab after the last of them."""

    last: ProviderTab
    pending: int = 0


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
        self._chains: dict[Address, _Chain] = {}

    async def sign_for_job(
        self,
        admitted: AdmittedJob,
        order_stored: asyncio.Future[None],
        usage: Usage,
        outcome: Outcome,
        commitment: Hash,
        *,
        evidence_root: Hash = ZERO_HASH,
    ) -> Verified[Receipt] | None:
        """Signs the receipt of a job that ended, once its order is stored (`order_stored`). Returns None if either cannot be
        stored.
        """
        content = _ReceiptContent(admitted.max_cost, usage, outcome, commitment, evidence_root)
        return await self._write(admitted, content, after=order_stored)

    async def sign_refusal(self, matched: MatchedOrder) -> Verified[Receipt] | None:
        """Signs a receipt at no cost for an order that is refused and consumed. Returns None if it cannot be stored."""
        return await self._write(matched, _ReceiptContent(outcome=Outcome.REFUSED))

    def reopen(self, orders: Iterable[MatchedOrder]) -> None:
        """Takes orders whose receipts were voided. `close_unfinished` signs receipts at no cost for them."""
        self.unfinished += orders

    async def close_unfinished(self) -> int:
        """Signs receipts at no cost for orders that a killed process began; returns the number of receipts.

        No last chunk of these orders arrived, so nothing is charged. Call it once the last receipt number of each tab is known.
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
        self, matched: MatchedOrder, content: _ReceiptContent, after: asyncio.Future[None] | None = None
    ) -> Verified[Receipt] | None:
        try:
            if after is not None:
                await (after if after.done() else asyncio.shield(after))
            receipt, stored = self._sign(matched, content, is_refusal=content.outcome is Outcome.REFUSED and after is None)
            await asyncio.shield(stored)
        except (TallyError, TabConflict) as error:
            log.error("receipt not stored; the job is not charged", job=matched.job.hex(), reason=str(error))  # noqa: TRY400 - expected, no bug
            return None
        except Exception:  # after any failure to store it, the job must end uncharged and free its slot
            log.exception("bug in the store; the job is not charged", job=matched.job.hex())
            return None
        return receipt

    def _sign(
        self, matched: MatchedOrder, content: _ReceiptContent, *, is_refusal: bool
    ) -> tuple[Verified[Receipt], asyncio.Future[None]]:
        """Signs the next receipt of a payer and queues it for the store. Returns it with its write."""
        payer = matched.payer
        chain = self._chains.get(payer) or _Chain(self._tabs.account(payer).tab)
        unsigned = make_receipt(
            matched.order,
            matched.terms,
            chain.last,
            usage=content.usage,
            outcome=content.outcome,
            commitment=content.commitment,
            finished_at=int(self._now()),
            evidence_root=content.evidence_root,
        )
        record = ReceiptRecord(matched, self._signer.sign(unsigned, self._domain))
        stored = self._store.record_refusal(record) if is_refusal else self._store.record_receipt(record)
        chain.last, chain.pending = ProviderTab(unsigned.seq, unsigned.cumulative_cost), chain.pending + 1
        self._chains[payer] = chain
        stored.add_done_callback(partial(self._written, chain, unsigned, content.cap))
        return record.receipt, stored

    def _written(self, chain: _Chain, receipt: Receipt, cap: Amount, stored: asyncio.Future[None]) -> None:
        """Follows the store, whoever still waits for the write: the tab continues after the last receipt that is stored."""
        chain.pending -= 1
        error = asyncio.CancelledError() if stored.cancelled() else stored.exception()
        if (error is not None or not chain.pending) and self._chains.get(receipt.payer) is chain:
            del self._chains[receipt.payer]
        if error is None:
            self._tabs.continue_from(receipt.payer, receipt.seq - 1, Amount(receipt.cumulative_cost - receipt.cost))
            self._tabs.record(receipt.payer, receipt.cost, cap)
        elif isinstance(error, TabConflict):
            self._tabs.continue_from(receipt.payer, error.seq, error.cumulative)
