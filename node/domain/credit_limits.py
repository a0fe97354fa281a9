"""Credit limits: how much a payer may owe beyond its reservation, and how much unearned credit the node grants in a day.

Credit is what a payer may owe beyond the amount that the chain reserves for this provider. Past payments earn a payer part of its
credit; the rest is unearned. A new key costs nothing, so the unearned credit of any 24 hours has a limit of its own. A payer that
defaults therefore costs at most

    new_payers_per_day  base units in any 24 hours, over all payers and any number of keys, and beyond that
    percent_of_paid / 100 * settled(payer)  once for each payer, never more than `per_payer`,

and all payers together never owe more than `total` at one time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tallystick.protocol.types import Amount

DAY = 86_400
SLICE = 900
"""Length of a time slice in seconds. Unearned credit counts for 24 hours and up to one slice longer."""


@dataclass(frozen=True, slots=True)
class CreditLimits:
    """The limits, in base units. Times are seconds.

    `new_payer`: credit of a payer that has paid nothing; `percent_of_paid`: additional credit, in percent of what a payer has
    paid; `per_payer`: largest credit of one payer; `new_payers_per_day`: unearned credit granted in 24 hours, over all payers;
    `total`: credit of all payers at one time.

    `claim_margin`: an order counts only if it stays claimable for longer than this; `write_off_after`: debt of a payer that has
    ordered nothing for this long no longer counts against `total`.
    """

    per_payer: Amount = Amount(1_000_000)
    total: Amount = Amount(10_000_000)
    claim_margin: int = 1_800
    new_payer: Amount = Amount(250_000)
    percent_of_paid: int = 50
    new_payers_per_day: Amount = Amount(2_000_000)
    write_off_after: int = 2 * DAY

    def earned_by(self, settled: int) -> int:
        """Returns the credit that a payer has earned by settling `settled` base units, in base units."""
        return int(settled) * self.percent_of_paid // 100

    def payer_limit(self, settled: int) -> int:
        """Returns the credit limit of a payer that has settled `settled` base units, in base units."""
        return min(int(self.per_payer), int(self.new_payer) + self.earned_by(settled))


class UnearnedCredit(NamedTuple):
    """Unearned credit of one payer, in base units. `recent` was granted in time slice `slice`, `old` more than 24 hours
    before.
    """

    slice: int = 0
    recent: int = 0
    old: int = 0


class DailyUnearnedCredit:
    """The unearned credit granted in the last 24 hours, over all payers. Credit that grows within 24 hours counts as granted
    anew.
    """

    def __init__(self) -> None:
        self._granted: dict[int, int] = {}
        self._first_slice = 0

    def granted(self, now: int) -> int:
        """Returns the credit granted in the 24 hours before `now` (Unix seconds), in base units."""
        self._first_slice = max(self._first_slice, (now - DAY) // SLICE)
        for slice_ in [key for key in self._granted if key < self._first_slice]:
            del self._granted[slice_]
        return sum(self._granted.values())

    def aged(self, credit: UnearnedCredit) -> UnearnedCredit:
        """Returns the credit as of the last call of `granted`: `recent` is the part that still counts there."""
        return credit if credit.slice >= self._first_slice else UnearnedCredit(old=credit.recent + credit.old)

    def update(self, credit: UnearnedCredit, total: int, at: int) -> UnearnedCredit:
        """Returns the credit after it changed to `total` base units at time `at` (Unix seconds). Increases are granted at `at`;
        decreases return the newest credit first.
        """
        former = self.aged(credit)
        old = min(former.old, total)
        grows = total > former.recent + former.old
        new = UnearnedCredit(max(former.slice, at // SLICE) if grows else former.slice, total - old, old)
        for slice_, change in ((former.slice, -former.recent), (new.slice, new.recent)):
            self._granted[slice_] = self._granted.get(slice_, 0) + change
        return new
