"""Where earned money is: every base unit of every receipt is in exactly one column. Pure.

A receipt's cost is accrued or claimable while an order of its payer covers it and the payer's money does too. Without the money
it is owed on trust, and without an order it is lost. What the chain settled went to coordinators as fees, is credited in the
escrow, or was cashed out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from node.domain.tabs import Funds
from tallystick.protocol.types import Address, Amount


@dataclass(frozen=True, slots=True)
class TabMoney:
    """A tab as receipts, orders and chain state it, in base units: total of the receipts, highest ceiling that can still be
    claimed on (0: none), and until when (Unix seconds).
    """

    payer: Address
    cumulative: Amount
    ceiling: Amount
    claim_by: int
    funds: Funds

    @property
    def signed(self) -> int:
        """The unsettled amount that an order covers, in base units."""
        return max(0, min(self.cumulative, self.ceiling) - self.funds.settled)

    @property
    def collectable(self) -> int:
        """What a claim would be paid now, in base units; all that is signed if the payer's funds are unknown."""
        return min(self.signed, self.funds.payable) if self.funds.known else self.signed

    @property
    def owed_on_trust(self) -> int:
        """The signed amount that the payer has no money for now, in base units."""
        return self.signed - self.collectable

    @property
    def lost(self) -> int:
        """The unsettled amount that no order covers any more, in base units."""
        return max(0, self.cumulative - self.funds.settled) - self.signed


@dataclass(frozen=True, slots=True)
class EarnedMoney:
    """All earned money by its place, in base units. The columns add up to `earned`.

    `accrued` is collectable on tabs that hold less than a claim should bring; `claimable` on all others. `credited` is in the
    escrow, `cashed_out` was paid out of it, `coordinator_fees` never reached the provider.
    """

    accrued: Amount
    claimable: Amount
    owed_on_trust: Amount
    lost: Amount
    coordinator_fees: Amount
    credited: Amount
    cashed_out: Amount

    @property
    def earned(self) -> Amount:
        """The sum of all receipts, in base units; more only if the chain settled receipts that this state has lost."""
        return Amount(sum(getattr(self, column.name) for column in fields(self)))


def locate_money(tabs: Iterable[TabMoney], *, least: int, fees: int = 0, credit: int = 0) -> EarnedMoney:
    """Divides what was earned among its places.

    `least`: a tab with less is accrued, not claimable. `fees`: what coordinators took out of the settled amounts. `credit`: the
    provider's credit in the escrow. All are base units.
    """
    accrued = claimable = trust = lost = settled = 0
    for tab in tabs:
        if tab.collectable >= least:
            claimable += tab.collectable
        else:
            accrued += tab.collectable
        trust, lost, settled = trust + tab.owed_on_trust, lost + tab.lost, settled + tab.funds.settled
    taken = min(fees, settled)
    credited = min(credit, settled - taken)
    places = (accrued, claimable, trust, lost, taken, credited, settled - taken - credited)
    return EarnedMoney(*map(Amount, places))
