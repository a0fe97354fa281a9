"""Recovering a tab that this state file does not know whole: it was lost or put back, or the key signs into another one too.

Asked are the coordinator, for this payer's receipts, and the chain, for what it settled and on which orders. No number counts
because somebody says it: a receipt or a payment counts with an order that this very key signed, and no further than that order's
ceiling, which its provider could collect anyhow. So who makes up receipts for a payer that lost its books, or a chain that paid,
gains nothing that was not signed for before.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.http_client import CoordinatorClient, CoordinatorInfo
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.queries import KnownJob, KnownOrder
from tallystick.client.ledger.repair import OrderEvidence, PaidOrder, RecoveryResult
from tallystick.client.ledger.schema import JobState, OrderState
from tallystick.client.ledger.writes import IncomingReceipt
from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.recovery.escrow import PayerEscrow
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadReceipt, Code, PeerError, TallyError, Unavailable
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Inquiry
from tallystick.protocol.tab import check_receipt
from tallystick.protocol.types import Address, Amount, JobId, format_amount

log = structlog.get_logger()
ASK_SECONDS = 5.0
"""The longest wait for all answers: without them a job is placed all the same, on what the ledger knows."""
SEARCH_SECONDS = 30.0
"""The same where no job waits: to find the orders of a payment can take many questions to the chain."""
WATCHED = 64
"""Providers whose payments are watched, those used last."""
AGAIN_SECONDS = 1.0
"""How long a provider's tab is not asked about again."""


class TabRecovered(Unavailable):
    """An order was refused for what these books lacked, and have now: asked again, it may do."""


@dataclass(frozen=True, slots=True)
class TabRecovery:
    """See the module's docstring. `info` says who the coordinator is; `onchain` the chain, where there is one to ask."""

    ledger: Ledger
    coordinator: CoordinatorClient
    signer: Signer
    info: Callable[[], Awaitable[CoordinatorInfo]]
    now: Callable[[], int]
    path: Path
    onchain: PayerEscrow | None
    asked: dict[Address, float]

    @classmethod
    def of(
        cls,
        ledger: Ledger,
        coordinator: CoordinatorClient,
        signer: Signer,
        info: Callable[[], Awaitable[CoordinatorInfo]],
        *,
        now: Callable[[], int],
        config: ClientConfig,
        onchain: PayerEscrow | None,
    ) -> TabRecovery:
        """A recovery for one market."""
        path = config.ledger_path(signer.address)
        return cls(ledger, coordinator, signer, info, now, path, onchain, {})

    async def know(self, providers: Iterable[Address]) -> None:
        """Asks about those of whom the ledger has never heard, before an order is signed for them. Never raises TallyError."""
        new = [one for one in dict.fromkeys(providers) if one not in self.asked]
        if not new:
            return
        info = await self.info()
        known = await self.ledger.providers_with_tab(info.domain, new)
        self.asked.update(dict.fromkeys(known, float("-inf")))
        await self.look([one for one in new if one not in known], chain=False)

    async def look(
        self, providers: Sequence[Address], *, chain: bool, again: float | None = None, wait: float | None = None
    ) -> list[RecoveryResult]:
        """Asks about these tabs now, unless that was done within `again` seconds, and takes up what is proved within `wait`
        seconds. Never raises TallyError. `chain`: it is asked too, which may be slow.
        """
        since = time.monotonic() - (AGAIN_SECONDS if again is None else again)
        due = [one for one in providers if self.asked.get(one, float("-inf")) < since]
        self.asked.update(dict.fromkeys(due, time.monotonic()))
        asking = [asyncio.create_task(self._recover(provider, chain=chain), name="recover") for provider in due]
        if not asking:
            return []
        done, late = await asyncio.wait(asking, timeout=ASK_SECONDS if wait is None else wait)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        return [found for task in done if (found := task.result()) is not None]

    async def watch(self, seconds: float) -> None:
        """Holds what the chain paid to the providers used last against the books, once in `seconds`. Never raises TallyError."""
        if self.onchain is None:
            return
        try:
            accounts = await self.ledger.accounts((await self.info()).domain, self.now())
        except TallyError as error:
            log.info("payments can't be watched now", reason=str(error))
            return
        watched = [account.provider for account in accounts[:WATCHED]]
        await self.look(watched, chain=True, again=seconds, wait=SEARCH_SECONDS)

    async def _recover(self, provider: Address, *, chain: bool) -> RecoveryResult | None:
        try:
            info = await self.info()
            shown, settled = await asyncio.gather(self._receipts(info, provider), self._settled(provider, chain=chain))
            await self._release(info, shown)
            tab = await self.ledger.tab(info.domain, provider, self.now())
            paid: list[PaidOrder] | None = []
            if self.onchain is not None and settled > tab.explained_total:
                paid = await self.onchain.paid(provider, settled)
            found = await self.ledger.merge_proven(info.domain, provider, shown, settled, self.now(), paid=paid)
        except TallyError as error:
            log.info("a tab can't be recovered yet", provider=provider, reason=str(error))
            return None
        if found.blocked_reason:
            log.error("a provider gets no more orders", provider=provider, why=found.blocked_reason)
        elif found.unexplained:
            note = "the caps of orders without a receipt explain it; if no receipt follows, exclude it"
            log.warning(
                "a provider collected more than it gave receipts for",
                provider=provider,
                base_units=int(found.unexplained),
                note=note,
            )
        if found.raised:
            log.warning("recovered a tab", provider=provider, base_units=int(found.raised), note=self.note(found))
        return found

    async def _receipts(self, info: CoordinatorInfo, provider: Address) -> list[OrderEvidence]:
        """The payer's own orders with the receipts for them, each checked; what is not so does not count."""
        question = Inquiry(
            payer=self.signer.address, provider=provider, coordinator=info.coordinator, asked_at=max(self.now(), 0)
        )
        try:
            listed = await self.coordinator.receipts(self.signer.sign(question, info.domain))
        except PeerError as error:  # a coordinator that knows no such question
            log.info("the coordinator does not tell this wallet's receipts", reason=str(error))
            return []
        shown: list[OrderEvidence] = []
        for late in listed:
            try:
                shown.append(self._check(info, provider, late))
            except PeerError as error:
                log.warning("a receipt that does not count was shown", provider=provider, reason=str(error))
        return shown

    async def _release(self, info: CoordinatorInfo, shown: Sequence[OrderEvidence]) -> None:
        """Books receipts of orders whose jobs ended here without one."""
        jobs = await self.ledger.known_orders([one.order.digest for one in shown])
        for one in shown:
            job = jobs.get(one.order.digest)
            known = None if job is None else await self.ledger.find_job(job)
            order = None if known is None else next(each for each in known.orders if each.digest == one.order.digest)
            if known is None or order is None or not _awaits(known, order):
                continue
            placed = PlacedOrder(one.order, order.terms)
            complaint = await self.ledger.record_receipt(
                IncomingReceipt(info.domain, known.job, placed, one.receipt, None, self.now(), final=one.receipt.message.cost > 0)
            )
            if complaint is not None:
                log.warning("a late receipt was refused", job=known.job.hex(), reason=str(complaint))

    def _check(self, info: CoordinatorInfo, provider: Address, late: LateReceipt) -> OrderEvidence:
        order, receipt = late.order.verify(info.domain), late.receipt.verify(info.domain)
        if (order.message.payer, order.message.provider) != (self.signer.address, provider):
            raise BadReceipt("order: not this wallet's, or of another provider")
        check_receipt(order, late.terms, receipt.message)
        return OrderEvidence(order, receipt)

    async def _settled(self, provider: Address, *, chain: bool) -> Amount:
        return Amount(0) if self.onchain is None or not chain else await self.onchain.settled(provider)

    # What to tell

    async def refused(self, job: JobId, failure: TallyError) -> TallyError:
        """A provider did not take an order since its ceiling was below what the tab is to that provider: finds out what is
        missing here, and says so. The job never ran: asking again, also with its idempotency key, is to place another one.
        """
        await self.ledger.forget_key_of(job)
        known = await self.ledger.find_job(job)
        found = await self.look([one.order.message.provider for one in known.orders] if known is not None else [], chain=True)
        raised = Amount(sum(one.raised for one in found))
        if raised:
            kind: type[Unavailable] = TabRecovered
            text = f"{failure}. This wallet's books lacked {format_amount(raised)}; {self.note(found[0], *found[1:])}. Ask again"
        else:
            kind = Unavailable
            text = (
                f"{failure}. These books ({self.path}) show less: jobs that were cut off count until they have ended, so ask "
                f"again in a moment; if it stays so, {_ELSEWHERE}"
            )
        return kind(Code.UNAUTHORISED_TAB, text, fault=failure.fault)

    def note(self, *found: RecoveryResult) -> str:
        """Where the missing orders were signed, as far as that can be told."""
        last = max((one.elsewhere for one in found), default=0)
        if last:
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(last))
            return f"another process signs with this key and does not use {self.path}, last at {at} UTC: {_ELSEWHERE}"
        return (
            f"it was learnt from orders that this wallet signed, or from the chain: {self.path} is new, was lost or put back; "
            f"if another process signs with this key, {_ELSEWHERE}"
        )


def _awaits(job: KnownJob, order: KnownOrder) -> bool:
    """Whether a receipt for an order is news: it has none. That a provider never had an order of an ended job is the
    coordinator's word alone.
    """
    if order.state is OrderState.DISPATCHED:
        return True
    return order.state in (OrderState.OPEN, OrderState.CLOSED) and job.state not in (JobState.OPEN, JobState.LOST)


_ELSEWHERE = "let all processes of a wallet use one state file (`state` in the config), or give each machine a key of its own"
