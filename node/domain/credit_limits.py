"""How much a node gives on trust, and how much of that is new each day. Pure.

Trust is what payers may come to owe beyond what the chain has reserved for this provider. What a payer has paid before earns it a
part of its trust; all the rest is a gift to strangers, and a stranger costs nothing to make: so the gifts of any 24 hours have a
limit of their own. A payer that defaults therefore costs at most

    newcomers_per_day  base units in any 24 hours, over all payers and however many keys they make, and beyond that
    paid_percent / 100 * settled(payer)  once for each payer, never more than `per_payer`,

and all payers together never owe more than `total` at one time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tallystick.protocol.types import Amount

DAY = 86_400
SLICE = 900
"""Seconds that are counted as one: gifts count for 24 hours and up to this much longer."""


@dataclass(frozen=True, slots=True)
class CreditLimits:
    """The limits, in base units. `newcomer`: for a payer that has paid nothing yet; one that has paid is trusted with
    `paid_percent` of that more, up to `per_payer`. `newcomers_per_day`: new trust beyond what was earned by paying, over all
    payers. `total`: for all payers at one time.

    Times are seconds. `claim_margin`: an order is counted on only if it can be claimed for longer than this. `write_off`: a debt
    of a payer that ordered nothing for so long no longer counts against `total`.
    """

    per_payer: Amount = Amount(1_000_000)
    total: Amount = Amount(10_000_000)
    claim_margin: int = 1_800
    new_payer: Amount = Amount(250_000)
    percent_of_paid: int = 50
    new_payers_per_day: Amount = Amount(2_000_000)
    write_off_after: int = 2 * DAY

    def earned_by(self, settled: int) -> int:
        """The trust that a payer has earned by paying so much on chain, in base units."""
        return settled * self.percent_of_paid // 100

    def payer_limit(self, settled: int) -> int:
        """What a payer that has paid so much may owe beyond its reservation, in base units."""
        return min(self.per_payer, self.new_payer + self.earned_by(settled))


class UnearnedCredit(NamedTuple):
    """Trust that a payer holds beyond what it has earned, in base units: `amount` of it was given in one slice of time, and the
    `old` rest more than 24 hours before.
    """

    slice: int = 0
    recent: int = 0
    old: int = 0


class DailyUnearnedCredit:
    """The gifts of the last 24 hours, over all payers. A gift that grows within 24 hours counts as given anew."""

    def __init__(self) -> None:
        self._granted: dict[int, int] = {}
        self._first_slice = 0

    def granted(self, now: int) -> int:
        """What was given within 24 hours before `now` (Unix seconds), in base units."""
        self._first_slice = max(self._first_slice, (now - DAY) // SLICE)
        for slice_ in [key for key in self._granted if key < self._first_slice]:
            del self._granted[slice_]
        return sum(self._granted.values())

    def aged(self, gift: UnearnedCredit) -> UnearnedCredit:
        """The gift as of when `used` was last asked: `amount` is its part of that."""
        return gift if gift.slice >= self._first_slice else UnearnedCredit(old=gift.recent + gift.old)

    def update(self, gift: UnearnedCredit, total: int, at: int) -> UnearnedCredit:
        """A gift that now is of `total` base units: more of it is given at that time (Unix seconds), the newest is given back
        first.
        """
        held = self.aged(gift)
        old = min(held.old, total)
        grows = total > held.recent + held.old
        new = UnearnedCredit(max(held.slice, at // SLICE) if grows else held.slice, total - old, old)
        for slice_, change in ((held.slice, -held.recent), (new.slice, new.recent)):
            self._granted[slice_] = self._granted.get(slice_, 0) + change
        return new
