"""The value of a claim: what it would pay as the chain stands, and whether that is worth its gas. It reads as little as it must.

One valuer serves one batch of claims. It reads each purse and each tab once and deducts what a claim will pay from both, so the
same money does not make two claims worth sending. All rows of one payer are one debt, even with different orders.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from coordinator.ports import PendingClaim
from tallystick.chain.escrow import Escrow
from tallystick.protocol.types import Address, Amount

NOTHING_OWED, UNFUNDED = "nothing owed", "too little to be paid"
IDLE_ROWS = "pays less than the gas of all its rows: claim those that pay"
NO_PURSE = "most of its first payers have no purse"
INCLUSION_SECONDS = 30
"""How long a transaction may take to be included. An order that expires sooner pays nothing."""
MAX_PURSELESS_PAYERS = 8
"""Payers without a purse that are read in vain, plus as many as there were payers with one."""

SettledTotal = Callable[[Address, Address], Awaitable[int]]
"""Returns the settled total of a tab (payer, provider) as it is known without a chain read."""


@dataclass(slots=True)
class _Tab:
    settled: int
    reserved: int


class ClaimValuer:
    """See the module's docstring. Amounts are base units, `now` is Unix time, `reads` counts the chain reads.

    `min_claim`: what a claim must pay; `min_claim_row`: what it must pay per row on average.
    """

    def __init__(self, escrow: Escrow, settled: SettledTotal, *, min_claim: Amount, min_claim_row: Amount, now: float) -> None:
        self._escrow, self._settled, self._now = escrow, settled, now
        self._min_claim, self._min_claim_row = min_claim, min_claim_row
        self._free: dict[Address, int | None] = {}
        self._tabs: dict[tuple[Address, Address], _Tab] = {}
        self.reads = 0

    async def rejection(self, claim: PendingClaim) -> str:
        """Returns why a claim is not worth its gas; empty if it is. Raises Unavailable if the chain does not answer."""
        provider = claim.request.claim.message.provider
        need = max(self._min_claim, self._min_claim_row * len(claim.request.orders))
        pays: dict[Address, int] = {}
        funded, purseless, paid, owed = 0, 0, 0, False
        for payer, total in (await self._owed(claim)).items():
            free = await self._free_of(payer)
            if free is None:
                purseless += 1
                if purseless >= MAX_PURSELESS_PAYERS + funded:
                    return NO_PURSE
                continue
            funded += 1
            tab = await self._tab(payer, provider)
            owed = owed or total > tab.settled
            pays[payer] = max(0, min(total - tab.settled, tab.reserved + free))
            paid += pays[payer]
            if paid >= need:
                self._deduct(provider, pays)
                return ""
        if purseless and not funded:
            return NO_PURSE
        if not owed:
            return NOTHING_OWED
        return UNFUNDED if paid < self._min_claim else IDLE_ROWS

    async def _owed(self, claim: PendingClaim) -> dict[Address, int]:
        """Returns the total of each tab of the claim whose orders can be claimed on and that is not known to be settled."""
        owed: dict[Address, int] = {}
        rows = claim.request.claim.message.rows
        for row, order in zip(rows, claim.request.orders, strict=True):
            if order.message.claim_by >= self._now + INCLUSION_SECONDS:
                total = min(row.cumulative_cost, order.message.ceiling)
                owed[row.payer] = max(total, owed.get(row.payer, 0))
        provider = claim.request.claim.message.provider
        return {payer: total for payer, total in owed.items() if total > await self._settled(payer, provider)}

    async def _free_of(self, payer: Address) -> int | None:
        """Returns the free balance of a purse, or None if the payer has no purse."""
        if payer not in self._free:
            self.reads += 1
            purse = await self._escrow.purse(payer)
            self._free[payer] = None if purse.owner is None else purse.free
        return self._free[payer]

    async def _tab(self, payer: Address, provider: Address) -> _Tab:
        pair = (payer, provider)
        if pair not in self._tabs:
            self.reads += 1
            tab = await self._escrow.tab(payer, provider)
            self._tabs[pair] = _Tab(tab.settled, tab.reserved)
        return self._tabs[pair]

    def _deduct(self, provider: Address, pays: dict[Address, int]) -> None:
        for payer, amount in pays.items():
            tab = self._tabs[payer, provider]
            from_free = max(0, amount - tab.reserved)
            tab.settled += amount
            tab.reserved -= amount - from_free
            self._free[payer] = (self._free[payer] or 0) - from_free
