"""The rules by which a provider accepts orders and coordinators."""

from __future__ import annotations

from dataclasses import dataclass

from tallystick.protocol.types import Amount


@dataclass(frozen=True, slots=True)
class AdmissionRules:
    """The orders and coordinators that a provider accepts.

    `max_deadline_ahead`: seconds that an order's deadline may lie ahead; `claim_window`: seconds that must be left to claim;
    `max_fee_bps`: largest part of the payment that an order may grant its coordinator, in basis points.

    A coordinator is served while the work that it left unpaid within a day costs at most the larger of `max_unpaid` (base units)
    and `max_unpaid_percent` of the earnings through it.
    """

    max_deadline_ahead: int = 86_400
    claim_window: int = 1_800
    max_fee_bps: int = 1_000
    max_unpaid: Amount = Amount(100_000)
    max_unpaid_percent: int = 5
