"""The cumulative caps that one payer signed, each with the time until which its order can be claimed.

A high cap that expires soon and a low cap that lasts are both worth keeping, and neither replaces the other: the authorised
amount depends on when the claim will be settled.
"""

from __future__ import annotations

from dataclasses import dataclass

from tallystick.protocol.types import Amount

MAX_CAPS = 32
"""Number of caps kept of one payer. Of more, the lowest are dropped, which only makes the node stricter with that payer."""


@dataclass(frozen=True, slots=True)
class SignedCap:
    """The cumulative `amount` that an order authorises, in base units, and its `claim_by` in Unix seconds."""

    amount: Amount
    claim_by: int


SignedCaps = tuple[SignedCap, ...]
"""Highest first. Each cap is lower than the one before it and stays claimable for longer."""


def add(held: SignedCaps, new: SignedCap) -> SignedCaps:
    """Returns the caps with `new` added. A cap that is neither higher nor claimable for longer than another is dropped."""
    if new.amount <= 0 or any(_covers(cap, new) for cap in held):
        return held
    kept = [*(cap for cap in held if not _covers(new, cap)), new]
    return tuple(sorted(kept, key=lambda cap: -cap.amount)[:MAX_CAPS])


def _covers(cap: SignedCap, other: SignedCap) -> bool:
    return cap.amount >= other.amount and cap.claim_by >= other.claim_by


def after(held: SignedCaps, time: int) -> SignedCaps:
    """Returns the caps that stay claimable after `time` (Unix seconds)."""
    return tuple(cap for cap in held if cap.claim_by > time)


def highest(held: SignedCaps, time: int) -> SignedCap | None:
    """Returns the highest cap that stays claimable after `time` (Unix seconds); None if there is none."""
    return next((cap for cap in held if cap.claim_by > time), None)
