"""Receipts for refused orders: which refused orders get a receipt at no cost, and how many a coordinator and a payer can cause.

Such a receipt releases the order's cap at its payer and consumes the order here. It costs this node a signature and disk space,
for a payer that may owe it nothing. Each coordinator therefore gets BURST receipts at once and RATE per second; MAX_CONCURRENT
are made at a time. One payer gets at most one part in PAYER_SHARE of that, so a payer whose orders are all refused does not use
up the allowance of others. Further orders are refused without a receipt; their payer counts the cap until the order's claimBy.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from node.domain.order_admission import MatchedOrder
from node.domain.tabs import Funds, Tabs
from node.jobs.receipt_signer import ReceiptSigner
from node.ports import ChainView
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.messages import Receipt
from tallystick.protocol.types import Address, Amount
from tallystick.runtime.token_bucket import TokenBucket

BURST, RATE = 256, 1.0
MAX_CONCURRENT = 64
PAYER_SHARE = 4
"""One payer gets one part in this many of BURST and RATE."""
MAX_PAYERS = 1_000
"""Number of payers whose allowance is remembered, most recently refused first."""
FUNDS_SECONDS = 1.0


class RefusalReceipts:
    """See the module's docstring. `consume_order` consumes an order and returns False if it was seen meanwhile; `now` returns
    Unix seconds.
    """

    def __init__(
        self,
        *,
        receipt_signer: ReceiptSigner,
        tabs: Tabs,
        chain: ChainView,
        consume_order: Callable[[MatchedOrder], bool],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._receipt_signer, self._tabs, self._chain, self._consume_order, self._now = (
            receipt_signer,
            tabs,
            chain,
            consume_order,
            now,
        )
        self._by_endpoint = TokenBucket(RATE, BURST)
        self._by_payer = TokenBucket(RATE / PAYER_SHARE, BURST / PAYER_SHARE, MAX_PAYERS)
        self._in_progress = 0

    async def issue(self, endpoint: str, matched: MatchedOrder) -> Verified[Receipt] | None:
        """Returns a receipt at no cost for a refused order from `endpoint`.

        Returns None if the receipt would release nothing, if the allowance is used up, if the order was seen before, or if the
        receipt cannot be stored.
        """
        if self._in_progress >= MAX_CONCURRENT or not self._take_allowance(endpoint, matched.payer):
            return None
        self._in_progress += 1
        try:
            funds = await self._funds(matched)
            total = self._tabs.account(matched.payer).tab.cumulative
            if not releases(matched.order.message.claim_by, funds, total, int(self._now())) or not self._consume_order(matched):
                return None
            return await self._receipt_signer.sign_refusal(matched)
        finally:
            self._in_progress -= 1

    async def _funds(self, matched: MatchedOrder) -> Funds:
        """Returns the payer's funds; unknown funds if the chain is slow, because the client waits for the refusal to try the next
        provider.
        """
        try:
            async with asyncio.timeout(FUNDS_SECONDS):
                return await self._chain.funds(matched.payer)
        except TimeoutError:
            return Funds()

    def _take_allowance(self, endpoint: str, payer: Address) -> bool:
        now = self._now()
        if self._by_payer.delay(payer, now) or self._by_endpoint.delay(endpoint, now):
            return False
        self._by_payer.overdraw(payer, now)
        self._by_endpoint.overdraw(endpoint, now)
        return True


def releases(claim_by: int, funds: Funds, cumulative: Amount, now: int) -> bool:
    """Returns whether a receipt at no cost is useful.

    It is if the order is still claimable, the payer is not known to have nothing that could be collected, and this node's record
    of the tab is not known to be older than the chain's.
    """
    if claim_by <= now or funds.settled > cumulative:
        return False
    return not funds.known or funds.free + funds.reserved + funds.thawing > 0
