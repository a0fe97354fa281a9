"""The gauge: what a claim would pay as the chain stands, and whether that is worth its gas. It reads no more than it must.

One gauge serves one batch of claims. It reads each purse and each tab once, and takes what a claim will pay off both, so that the
same money does not make two claims worth sending. Rows of one payer are one debt, whatever orders they are on.
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
"""What a transaction may take to land: an order that expires sooner pays nothing by then."""
MAX_PURSELESS_PAYERS = 8
"""Payers without a purse that are looked up in vain; as many more as there were payers with one."""

Settled = Callable[[Address, Address], Awaitable[int]]
"""What the chain is known to have paid on a tab, without asking it."""


@dataclass(slots=True)
class _Tab:
    settled: int
    reserved: int


class ClaimValuer:
    """See the module's docstring. `least` is what a claim must pay, `least_row` what it must pay for each of its rows, both in
    base units; `now` is Unix time; `reads` counts the chain reads.
    """

    def __init__(self, escrow: Escrow, settled: Settled, *, min_claim: Amount, min_claim_row: Amount, now: float) -> None:
        self._escrow, self._settled, self._min_claim, self._min_claim_row, self._now = (
            escrow,
            settled,
            min_claim,
            min_claim_row,
            now,
        )
        self._free: dict[Address, int | None] = {}
        self._tabs: dict[tuple[Address, Address], _Tab] = {}
        self.reads = 0

    async def rejection(self, claim: PendingClaim) -> str:
        """Why no gas is spent on a claim; empty if it is worth its gas. Raises Unavailable if the chain does not answer."""
        provider = claim.request.claim.message.provider
        need = max(self._min_claim, self._min_claim_row * len(claim.request.orders))
        pays: dict[Address, int] = {}
        funded, strangers, paid, owed = 0, 0, 0, False
        for payer, total in (await self._owed(claim)).items():
            free = await self._free_of(payer)
            if free is None:
                strangers += 1
                if strangers >= MAX_PURSELESS_PAYERS + funded:
                    return NO_PURSE
                continue
            funded += 1
            tab = await self._tab(payer, provider)
            owed = owed or total > tab.settled
            pays[payer] = max(0, min(total - tab.settled, tab.reserved + free))
            paid += pays[payer]
            if paid >= need:
                self._take(provider, pays)
                return ""
        if strangers and not funded:
            return NO_PURSE
        if not owed:
            return NOTHING_OWED
        return UNFUNDED if paid < self._min_claim else IDLE_ROWS

    async def _owed(self, claim: PendingClaim) -> dict[Address, int]:
        """What each tab of the claim comes to, as far as its orders can be claimed on and it is not known to be paid."""
        owed: dict[Address, int] = {}
        rows = claim.request.claim.message.rows
        for row, order in zip(rows, claim.request.orders, strict=True):
            if order.message.claim_by >= self._now + INCLUSION_SECONDS:
                total = min(row.cumulative_cost, order.message.ceiling)
                owed[row.payer] = max(total, owed.get(row.payer, 0))
        provider = claim.request.claim.message.provider
        return {payer: total for payer, total in owed.items() if total > await self._settled(payer, provider)}

    async def _free_of(self, payer: Address) -> int | None:
        """The free balance of a purse, None where there is no purse."""
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

    def _take(self, provider: Address, pays: dict[Address, int]) -> None:
        for payer, amount in pays.items():
            tab = self._tabs[payer, provider]
            beyond = max(0, amount - tab.reserved)
            tab.settled += amount
            tab.reserved -= amount - beyond
            self._free[payer] = (self._free[payer] or 0) - beyond
