"""The ceilings that one payer signed, each with the time until which its order can be claimed on. Pure.

A high ceiling that expires soon and a low one that lasts are both worth keeping, and neither may be taken for the other: what is
authorised depends on how long from now the claim will come.
"""

from __future__ import annotations

from dataclasses import dataclass

from tallystick.protocol.types import Amount

MOST = 32
"""Ceilings kept of one payer; of more, the lowest are forgotten, which makes the node only stricter with that payer."""


@dataclass(frozen=True, slots=True)
class SignedCap:
    """The cumulative `amount` that an order signs, in base units, and its `claim_by` in Unix seconds."""

    amount: Amount
    claim_by: int


SignedCaps = tuple[SignedCap, ...]
"""Highest first; each is lower than the one before it, and lasts longer."""


def add(held: SignedCaps, new: SignedCap) -> SignedCaps:
    """The ceilings with one more; whatever is neither higher nor longer-lived than another is left out."""
    if new.amount <= 0 or any(_covers(one, new) for one in held):
        return held
    kept = [*(one for one in held if not _covers(new, one)), new]
    return tuple(sorted(kept, key=lambda one: -one.amount)[:MOST])


def _covers(one: SignedCap, other: SignedCap) -> bool:
    return one.amount >= other.amount and one.claim_by >= other.claim_by


def after(held: SignedCaps, time: int) -> SignedCaps:
    """Those that can be claimed on later than `time` (Unix seconds)."""
    return tuple(one for one in held if one.claim_by > time)


def highest(held: SignedCaps, time: int) -> SignedCap | None:
    """The highest that can be claimed on later than `time` (Unix seconds); None if none can."""
    return next((one for one in held if one.claim_by > time), None)
