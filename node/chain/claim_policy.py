"""When the collector claims a tab, and when the node must settle a claim itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tallystick.protocol.types import Amount

if TYPE_CHECKING:
    from node.ports import ClaimableTab

CHECKS_PER_WITHDRAWAL = 4
"""How often tabs are checked within the time after which a payer that withdraws has its funds back."""


@dataclass(frozen=True, slots=True)
class ClaimPolicy:
    """When to claim. Amounts are base units, times are seconds, `reserve_percent` is a percentage of a tab's reservation.

    `check_interval`: how often tabs are checked; `claim_amount`, `max_age`: the due amount and the waiting time from which a tab
    is claimed; `expiry_margin`: a tab is claimed when its order's claimBy is this near; `retry_after`: time that a claim may take
    to be settled; `dust`: smaller amounts are never claimed.

    `gas_cost_per_tab`: cost of settling one tab; a claim must bring `min_gas_multiple` times that, unless its order expires.
    `direct_margin`: how near claimBy may come before the node settles a claim itself (0: never), if that brings
    `direct_min_amount`.
    """

    check_interval: float = 15.0
    claim_amount: Amount = Amount(1_000_000)
    max_age: float = 3_600.0
    reserve_percent: int = 50
    expiry_margin: float = 86_400.0
    retry_after: float = 120.0
    dust: Amount = Amount(1)
    gas_cost_per_tab: Amount = Amount(0)
    min_gas_multiple: int = 10
    direct_margin: float = 3_600.0
    direct_min_amount: Amount = Amount(10_000)

    def is_due(self, tab: ClaimableTab, now: float) -> bool:
        """Whether to claim this tab now."""
        due = tab.due
        if due < max(1, self.dust):
            return False
        if tab.order.message.claim_by - now <= self.expiry_margin:
            return True
        return due >= self.min_gas_multiple * self.gas_cost_per_tab and (
            due >= self.claim_amount
            or now - tab.since >= self.max_age
            or (tab.reserved > 0 and due * 100 >= tab.reserved * self.reserve_percent)
        )

    def is_pending(self, tab: ClaimableTab, now: float) -> bool:
        """Whether the last claim may still be settled."""
        return now - tab.claimed_at < self.retry_after and tab.claimed > tab.settled

    def must_settle_directly(self, tab: ClaimableTab, now: float, *, linked: bool, wait: float = float("inf")) -> bool:
        """Whether the node must settle this tab itself now.

        `linked`: its coordinator is connected; `wait`: seconds until a payer that withdraws has its funds back, else infinite.
        """
        left = tab.order.message.claim_by - now
        if self.direct_margin <= 0 or (left > self.direct_margin and wait == float("inf")):
            return False
        settle_time = min(self.retry_after, wait / CHECKS_PER_WITHDRAWAL)
        unsettled = tab.claimed > tab.settled and now - tab.claimed_at >= settle_time
        return unsettled or not linked or left <= self.retry_after + self.check_interval
