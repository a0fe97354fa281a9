"""Orders that are refused: which of them get a receipt at no cost, and how much of that a coordinator can ask for.

Such a receipt releases the order's cap at its payer, and uses the order up here. It costs this node a signature and some rows on
disk, for a payer who may owe it nothing: so for each coordinator BURST at once and RATE a second, and AT_ONCE under way together.
Of these one payer gets a quarter at most: who orders only to be refused does not leave the others without. What is beyond that
is refused all the same, without a receipt; its payer counts the cap until the order's claimBy.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable

from node.domain.order_admission import Matched
from node.domain.tabs import Funds, Tabs
from node.jobs.receipt_signer import ReceiptSigner
from node.ports import ChainView
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.messages import Receipt
from tallystick.protocol.types import Address, Amount

BURST, RATE = 256, 1.0
AT_ONCE = 64
SHARE = 4
"""One payer's part of BURST and RATE is one in so many."""
REMEMBERED = 1_000
"""Payers that were refused last."""
FUNDS_SECONDS = 1.0


class RefusalReceipts:
    """See the module's docstring. `claim` uses an order up, unless it was seen meanwhile; `now` gives Unix seconds."""

    def __init__(
        self,
        *,
        receipt_signer: ReceiptSigner,
        tabs: Tabs,
        chain: ChainView,
        consume_order: Callable[[Matched], bool],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._receipt_signer, self._tabs, self._chain, self._consume_order, self._now = (
            receipt_signer,
            tabs,
            chain,
            consume_order,
            now,
        )
        self._left_by_endpoint: dict[str, tuple[float, float]] = {}
        self._left_by_payer: OrderedDict[Address, tuple[float, float]] = OrderedDict()
        self._under_way = 0

    async def issue(self, endpoint: str, matched: Matched) -> Verified[Receipt] | None:
        """The receipt for an order that came from there and is refused. None where it would release nothing, where there are too
        many, where the order was seen before, or where it can't be stored.
        """
        if self._under_way >= AT_ONCE or not self._take_allowance(endpoint, matched.payer):
            return None
        self._under_way += 1
        try:
            funds = await self._funds(matched)
            total = self._tabs.account(matched.payer).tab.cumulative
            if not releases(matched.order.message.claim_by, funds, total, int(self._now())) or not self._consume_order(matched):
                return None
            return await self._receipt_signer.sign_refusal(matched)
        finally:
            self._under_way -= 1

    async def _funds(self, matched: Matched) -> Funds:
        """What the chain says of the payer; nothing, where that takes long: the next provider waits for this refusal."""
        try:
            async with asyncio.timeout(FUNDS_SECONDS):
                return await self._chain.funds(matched.payer)
        except TimeoutError:
            return Funds()

    def _take_allowance(self, endpoint: str, payer: Address) -> bool:
        now = self._now()
        of_payer, of_all = (
            _refilled(self._left_by_payer.get(payer), SHARE, now),
            _refilled(self._left_by_endpoint.get(endpoint), 1, now),
        )
        if min(of_payer, of_all) < 1:
            return False
        self._left_by_endpoint[endpoint] = of_all - 1, now
        self._left_by_payer[payer] = of_payer - 1, now
        self._left_by_payer.move_to_end(payer)
        if len(self._left_by_payer) > REMEMBERED:
            self._left_by_payer.popitem(last=False)
        return True


def _refilled(left: tuple[float, float] | None, part: int, now: float) -> float:
    """How many receipts are left at `now` of what was left when one was last given."""
    burst, (amount, at) = BURST / part, left or (BURST / part, now)
    return min(burst, amount + max(0.0, now - at) * RATE / part)


def releases(claim_by: int, funds: Funds, cumulative: Amount, now: int) -> bool:
    """Whether a receipt at no cost is worth its number: the order can still be claimed on, the payer is not known to have nothing
    that could be collected, and this node's record of the tab is not known to be older than the chain's.
    """
    if claim_by <= now or funds.settled > cumulative:
        return False
    return not funds.known or funds.free + funds.reserved + funds.thawing > 0
