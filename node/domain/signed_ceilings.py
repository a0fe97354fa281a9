"""The cumulative ceilings that one payer signed, each with the time until which its order can be claimed.

A high ceiling that expires soon and a low ceiling that lasts are both worth keeping, and neither replaces the other: the
authorised amount depends on when the claim will be settled.
"""

from __future__ import annotations

from dataclasses import dataclass

from tallystick.protocol.types import Amount

MAX_CEILINGS = 32
"""Number of ceilings kept of one payer. Of more, the lowest are dropped, which only makes the node stricter with that payer."""


@dataclass(frozen=True, slots=True)
class SignedCeiling:
    """The cumulative `amount` that an order authorises, in base units, and its `claim_by` in Unix seconds."""

    amount: Amount
    claim_by: int


SignedCeilings = tuple[SignedCeiling, ...]
"""Highest first. Each ceiling is lower than the one before it and stays claimable for longer."""


def add(held: SignedCeilings, new: SignedCeiling) -> SignedCeilings:
    """Returns the ceilings with `new` added, without those that are neither higher nor claimable for longer than another."""
    if new.amount <= 0 or any(_covers(ceiling, new) for ceiling in held):
        return held
    kept = [*(ceiling for ceiling in held if not _covers(new, ceiling)), new]
    return tuple(sorted(kept, key=lambda ceiling: -ceiling.amount)[:MAX_CEILINGS])


def _covers(ceiling: SignedCeiling, other: SignedCeiling) -> bool:
    return ceiling.amount >= other.amount and ceiling.claim_by >= other.claim_by


def after(held: SignedCeilings, time: int) -> SignedCeilings:
    """Returns the ceilings that stay claimable after `time` (Unix seconds)."""
    return tuple(ceiling for ceiling in held if ceiling.claim_by > time)


def highest(held: SignedCeilings, time: int) -> SignedCeiling | None:
    """Returns the highest ceiling that stays claimable after `time` (Unix seconds); None if there is none."""
    for ceiling in held:
        if ceiling.claim_by > time:
            return ceiling
    return None
