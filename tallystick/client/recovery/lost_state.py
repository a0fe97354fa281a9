"""Recovers tabs that the ledger does not know completely: it was lost or restored, or the key also signs with another file.

The coordinator is asked for this payer's receipts, and the chain for what it paid and on which orders. A receipt or a payment
counts only together with an order that this key signed, and only up to that order's ceiling, which its provider could collect
anyway. Therefore a party that invents receipts or payments for a payer with a lost ledger gains nothing that was not signed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.http_client import CoordinatorClient
from tallystick.client.coordinator.info import CoordinatorInfo
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.queries import KnownJob, KnownOrder
from tallystick.client.ledger.receipt_writes import IncomingReceipt
from tallystick.client.ledger.repair import OrderEvidence, PaidOrder, RecoveryResult
from tallystick.client.ledger.schema import JobState, OrderState
from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.recovery.escrow import PayerEscrow
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadReceipt, Code, PeerError, TallyError, Unavailable
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Inquiry
from tallystick.protocol.tab import check_receipt
from tallystick.protocol.types import Address, Amount, JobId, format_amount

log = structlog.get_logger()
QUERY_TIMEOUT_SECONDS = 5.0
"""Longest wait for all answers while a job waits. Without them the job is placed on what the ledger knows."""
SEARCH_TIMEOUT_SECONDS = 30.0
"""Longest wait while no job waits: to find the orders of a payment can take many requests to the chain."""
WATCHED_PROVIDERS = 64
"""Providers whose payments are watched, the most recently used ones."""
QUERY_INTERVAL_SECONDS = 1.0
"""Shortest time between two queries about the same provider's tab."""
_SHARE_LEDGER = (
    "let all processes of a wallet use one ledger file (`ledger_file` in the config), or give each machine a key of its own"
)


class TabRecovered(Unavailable):
    """An order was refused because the ledger lacked a part of the tab, which it has now: the request may succeed if repeated."""


@dataclass(frozen=True, slots=True)
class TabRecovery:
    """Recovers the tabs of one wallet at one coordinator; see the module's docstring.

    `info` identifies the coordinator. `escrow` is None if the config names no chain. `asked_at` has, by provider, the monotonic
    time of the last query about its tab.
    """

    ledger: Ledger
    coordinator: CoordinatorClient
    signer: Signer
    info: Callable[[], Awaitable[CoordinatorInfo]]
    now: Callable[[], int]
    ledger_file: Path
    escrow: PayerEscrow | None
    asked_at: dict[Address, float]

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
        escrow: PayerEscrow | None,
    ) -> TabRecovery:
        """Creates the recovery of one market."""
        return cls(ledger, coordinator, signer, info, now, config.ledger_path(signer.address), escrow, {})

    async def recover_unknown(self, providers: Iterable[Address]) -> None:
        """Recovers the tabs of providers that the ledger does not know, before an order is signed for them.

        Never raises TallyError.
        """
        new = [provider for provider in dict.fromkeys(providers) if provider not in self.asked_at]
        if not new:
            return
        info = await self.info()
        known = await self.ledger.providers_with_tab(info.domain, new)
        self.asked_at.update(dict.fromkeys(known, float("-inf")))
        await self.recover([provider for provider in new if provider not in known], chain=False)

    async def recover(
        self, providers: Sequence[Address], *, chain: bool, interval: float | None = None, wait_seconds: float | None = None
    ) -> list[RecoveryResult]:
        """Queries these tabs, except those queried within the last `interval` seconds, and merges what is proven.

        Queries that take longer than `wait_seconds` are cancelled. `chain`: the chain is queried too, which may be slow. Never
        raises TallyError.
        """
        since = time.monotonic() - (QUERY_INTERVAL_SECONDS if interval is None else interval)
        due = [provider for provider in providers if self.asked_at.get(provider, float("-inf")) < since]
        self.asked_at.update(dict.fromkeys(due, time.monotonic()))
        tasks = [asyncio.create_task(self._recover(provider, chain=chain), name="recover") for provider in due]
        if not tasks:
            return []
        done, late = await asyncio.wait(tasks, timeout=QUERY_TIMEOUT_SECONDS if wait_seconds is None else wait_seconds)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        return [result for task in done if (result := task.result()) is not None]

    async def check_payments(self, interval: float) -> None:
        """Compares the chain's payments to the most recently used providers with the ledger, at most once in `interval` seconds.

        Never raises TallyError.
        """
        if self.escrow is None:
            return
        try:
            accounts = await self.ledger.accounts((await self.info()).domain, self.now())
        except TallyError as error:
            log.info("payments not checked for now", reason=str(error))
            return
        watched = [account.provider for account in accounts[:WATCHED_PROVIDERS]]
        await self.recover(watched, chain=True, interval=interval, wait_seconds=SEARCH_TIMEOUT_SECONDS)

    async def _recover(self, provider: Address, *, chain: bool) -> RecoveryResult | None:
        try:
            info = await self.info()
            receipts, settled = await asyncio.gather(self._receipts(info, provider), self._settled(provider, chain=chain))
            await self._record_late_receipts(info, receipts)
            tab = await self.ledger.tab(info.domain, provider, self.now())
            paid: list[PaidOrder] | None = []
            if self.escrow is not None and settled > tab.explained_total:
                paid = await self.escrow.paid(provider, settled)
            result = await self.ledger.merge_proven(info.domain, provider, receipts, settled, self.now(), paid=paid)
        except TallyError as error:
            log.info("tab not recovered for now", provider=provider, reason=str(error))
            return None
        if result.blocked_reason:
            log.error("provider blocked: it gets no more orders", provider=provider, reason=result.blocked_reason)
        elif result.unexplained:
            log.warning(
                "a provider collected more than its receipts show",
                provider=provider,
                amount=format_amount(result.unexplained),
                hint="the caps of orders without a receipt cover it; exclude the provider if no receipt follows",
            )
        if result.raised:
            hint = self.origin_hint(result)
            log.warning("recovered a tab", provider=provider, amount=format_amount(result.raised), hint=hint)
        return result

    async def _receipts(self, info: CoordinatorInfo, provider: Address) -> list[OrderEvidence]:
        """The coordinator's list of this payer's orders with their receipts; invalid entries are left out."""
        inquiry = Inquiry(payer=self.signer.address, provider=provider, coordinator=info.coordinator, asked_at=max(self.now(), 0))
        try:
            listed = await self.coordinator.receipts(self.signer.sign(inquiry, info.domain))
        except PeerError as error:  # a coordinator without this route
            log.info("the coordinator does not list this wallet's receipts", reason=str(error))
            return []
        receipts: list[OrderEvidence] = []
        for late in listed:
            try:
                receipts.append(self._verify(info, provider, late))
            except PeerError as error:
                log.warning("ignored an invalid receipt from the coordinator", provider=provider, reason=str(error))
        return receipts

    async def _record_late_receipts(self, info: CoordinatorInfo, receipts: Sequence[OrderEvidence]) -> None:
        """Records receipts for orders whose jobs ended here without one."""
        jobs = await self.ledger.known_orders([shown.order for shown in receipts])
        for shown in receipts:
            job = jobs.get(shown.order.digest)
            known = None if job is None else await self.ledger.find_job(job)
            order = None if known is None else next(each for each in known.orders if each.digest == shown.order.digest)
            if known is None or order is None or not _awaits_receipt(known, order):
                continue
            placed, receipt = PlacedOrder(shown.order, order.terms), shown.receipt
            final = receipt.message.cost > 0
            error = await self.ledger.record_receipt(
                IncomingReceipt(info.domain, known.job, placed, receipt, None, self.now(), final=final)
            )
            if error is not None:
                log.warning("refused a late receipt", job=known.job.hex(), reason=str(error))

    def _verify(self, info: CoordinatorInfo, provider: Address, late: LateReceipt) -> OrderEvidence:
        order, receipt = late.order.verify(info.domain), late.receipt.verify(info.domain)
        if (order.message.payer, order.message.provider) != (self.signer.address, provider):
            raise BadReceipt(
                f"order: expected payer {self.signer.address} and provider {provider}, got {order.message.payer} and "
                f"{order.message.provider}"
            )
        check_receipt(order, late.terms, receipt.message)
        return OrderEvidence(order, receipt)

    async def _settled(self, provider: Address, *, chain: bool) -> Amount:
        return Amount(0) if self.escrow is None or not chain else await self.escrow.settled(provider)

    async def explain_refusal(self, job: JobId, failure: TallyError) -> TallyError:
        """Finds out why a provider refused an order whose ceiling was below the provider's tab, and returns the error to raise.

        The missing part of the tab is recovered if it can be proven. The job never ran, so a repeated request places a new job,
        also under its idempotency key.
        """
        await self.ledger.forget_key_of(job)
        known = await self.ledger.find_job(job)
        providers = [order.order.message.provider for order in known.orders] if known is not None else []
        results = await self.recover(providers, chain=True)
        raised = Amount(sum(result.raised for result in results))
        if raised:
            text = (
                f"{failure}. This wallet's ledger lacked {format_amount(raised)} dollars; {self.origin_hint(*results)}. Ask again"
            )
            return TabRecovered(Code.UNAUTHORISED_TAB, text, fault=failure.fault)
        text = (
            f"{failure}. This wallet's ledger ({self.ledger_file}) has less on the tab. Interrupted jobs count until they have "
            f"ended, so ask again in a moment; if the error persists, {_SHARE_LEDGER}"
        )
        return Unavailable(Code.UNAUTHORISED_TAB, text, fault=failure.fault)

    def origin_hint(self, *results: RecoveryResult) -> str:
        """Says where the missing orders were probably signed, and what to do about it."""
        last = max((result.elsewhere for result in results), default=0)
        if last:
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(last))
            return f"another process signs with this key and does not use {self.ledger_file} (last: {at} UTC); {_SHARE_LEDGER}"
        return (
            f"it was recovered from orders that this wallet signed, or from the chain: {self.ledger_file} is new, lost or "
            f"restored; if another process signs with this key, {_SHARE_LEDGER}"
        )


def _awaits_receipt(job: KnownJob, order: KnownOrder) -> bool:
    """Whether an order has no receipt and a late one should be recorded.

    An order of an ended job may await its receipt even if it was never matched, because only the coordinator said so.
    """
    if order.state is OrderState.DISPATCHED:
        return True
    return order.state in (OrderState.OPEN, OrderState.CLOSED) and job.state not in (JobState.OPEN, JobState.LOST)
