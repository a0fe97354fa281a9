"""The payer's view of its tab with one provider: what was accepted, what may still be collected, and whether it may order more.

A payer has one tab with each provider, for life. Receipts of concurrent jobs arrive in any order, and a lost connection can lose
one. Each receipt carries the total of the tab, so a later receipt tells the cost of the lost ones. That total is only the
provider's word. It counts as accepted in so far as no open order explains it but something else does: expired orders without a
receipt, or orders signed by this key that the ledger lacked and that were proven later. Released or unmatched orders explain
nothing. The most that an error here can cost the payer is the sum of the caps in flight.
"""

from __future__ import annotations

from dataclasses import dataclass

from tallystick.protocol.tab import PayerTab
from tallystick.protocol.types import Amount

MAX_AWAITING_RECEIPTS = 8
"""Dispatched orders of ended jobs that may lack a receipt at the same time. At this number the provider gets no more orders until
receipts arrive or the orders' `claim_by` passes, because each such order raises the ceilings of later orders by its cap.
"""


@dataclass(frozen=True, slots=True)
class Tab:
    """What the ledger knows of one provider, in base units.

    `accepted`: cost of the receipts that the ledger holds. `total`: the highest cumulative cost among them. `open_caps`: caps of
    the orders that may still be collected (not released, and before their `claim_by`). `early_caps`: the part of `open_caps` that
    was signed before the receipt with that total came. `ceiling`: the highest ceiling ever signed. `order_seq`: seq of the last
    order. `awaiting_receipts`: number of orders of ended jobs without a receipt. `undelivered_quarters`: see
    `receipts.delivery_check`. `blocked_reason`: why this provider gets no orders until a person unblocks it; empty if it is not
    blocked. `expired_caps`: caps of the orders whose `claim_by` passed without a receipt. `recovered`: what was proven, or
    accepted by a person, beyond the receipts in this ledger.
    """

    accepted: Amount = Amount(0)
    total: Amount = Amount(0)
    open_caps: Amount = Amount(0)
    early_caps: Amount = Amount(0)
    ceiling: Amount = Amount(0)
    order_seq: int = 0
    blocked_reason: str = ""
    awaiting_receipts: int = 0
    undelivered_quarters: int = 0
    expired_caps: Amount = Amount(0)
    recovered: Amount = Amount(0)

    @property
    def exclusion_reason(self) -> str:
        """Why no order may be signed for this provider now; empty if one may."""
        return self.blocked_reason or awaiting_receipts_reason(self.awaiting_receipts)

    @property
    def protocol_tab(self) -> PayerTab:
        """The tab in the form of the protocol's arithmetic.

        Early open orders may explain the part of the total beyond `accepted`. The rest counts as accepted in so far as more than
        the provider's word supports it.
        """
        return PayerTab(Amount(max(self.accepted, min(self.total - self.early_caps, self._supported))), self.open_caps)

    @property
    def explained_total(self) -> Amount:
        """The part of `total` that orders signed by this key explain."""
        return Amount(min(self.total, self._supported + self.open_caps))

    @property
    def _supported(self) -> int:
        return self.accepted + self.recovered + self.expired_caps


def awaiting_receipts_reason(count: int) -> str:
    """Why a provider with this many orders without a receipt gets no orders for now; empty below MAX_AWAITING_RECEIPTS."""
    if count < MAX_AWAITING_RECEIPTS:
        return ""
    return (
        f"{count} orders of ended jobs still lack this provider's receipt, the limit is {MAX_AWAITING_RECEIPTS}; new orders "
        "follow when receipts arrive or the orders' claimBy passes"
    )
