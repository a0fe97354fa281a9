"""Limits of hedging: which share of jobs may run at two providers, and how much work providers lose by it. Pure.

The share holds for all jobs and for the jobs of each payer. Counts are halved now and then, so the share is one of recent jobs
and a quiet week allows no flood.

The attempt that loses is not paid, and its node counts that work as left unpaid by this coordinator. A node stops serving a
coordinator that leaves more than 5 % of its earnings unpaid (and more than 0.10 dollars). So a provider takes part only while
hedging has cost it less than MAX_LOST_PERCENT of what it earned here, or less than MAX_LOST.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from tallystick.protocol.types import Address, Amount

RECENT_JOBS = 1_000
"""Counts are halved when they reach twice this many jobs."""
MAX_LOST, MAX_LOST_PERCENT = Amount(20_000), 2
RECENT_SECONDS = 43_200
"""A provider's sums are halved after this long: a node counts the last 24 hours."""
MAX_KNOWN = 10_000
"""Payers that are counted, and providers: those that were seen last. A payer that is forgotten begins anew."""


@dataclass(slots=True)
class _Counts:
    jobs: int = 0
    hedged: int = 0

    def add_job(self) -> None:
        self.jobs += 1
        if self.jobs >= 2 * RECENT_JOBS:
            self.jobs, self.hedged = self.jobs // 2, -(-self.hedged // 2)

    def allows(self, share: float) -> bool:
        """Whether one more hedged job keeps the share. The first one is always allowed."""
        return share > 0 and self.hedged + 1 <= max(1.0, share * self.jobs)


@dataclass(slots=True)
class HedgeShare:
    """Keeps hedged jobs at `share` (0 to 1) of all jobs, and of each payer's. With 0, no job is hedged."""

    share: float
    _all: _Counts = field(default_factory=_Counts)
    _payers: OrderedDict[Address, _Counts] = field(default_factory=OrderedDict)

    def add_job(self, payer: Address) -> None:
        """Counts a job that was matched."""
        self._all.add_job()
        self._of(payer).add_job()

    def allows(self, payer: Address) -> bool:
        """Whether one more job of this payer may be hedged."""
        return self._all.allows(self.share) and self._of(payer).allows(self.share)

    def add_hedge(self, payer: Address) -> None:
        """Counts a job that is hedged."""
        self._all.hedged += 1
        self._of(payer).hedged += 1

    def _of(self, payer: Address) -> _Counts:
        counts = self._payers.get(payer)
        if counts is None:
            counts = self._payers[payer] = _Counts()
            if len(self._payers) > MAX_KNOWN:
                self._payers.popitem(last=False)
        else:
            self._payers.move_to_end(payer)
        return counts


@dataclass(slots=True)
class _Sums:
    since: float
    earned: int = 0
    lost: int = 0


@dataclass(slots=True)
class HedgeLosses:
    """What each provider earned here lately, and what hedging cost it, in base units."""

    _providers: OrderedDict[Address, _Sums] = field(default_factory=OrderedDict)

    def add_earned(self, provider: Address, cost: int, tick: float) -> None:
        """Counts a receipt."""
        self._of(provider, tick).earned += cost

    def add_lost(self, provider: Address, cost: int, tick: float) -> None:
        """Counts an attempt that another one outran, at what its work would have cost."""
        self._of(provider, tick).lost += cost

    def allows(self, provider: Address, tick: float) -> bool:
        """Whether a provider may lose one more attempt."""
        sums = self._providers.get(provider)
        if sums is None:
            return True
        sums = self._of(provider, tick)
        return sums.lost <= max(MAX_LOST, sums.earned * MAX_LOST_PERCENT // 100)

    def _of(self, provider: Address, tick: float) -> _Sums:
        sums = self._providers.get(provider)
        if sums is None:
            sums = self._providers[provider] = _Sums(tick)
            if len(self._providers) > MAX_KNOWN:
                self._providers.popitem(last=False)
            return sums
        self._providers.move_to_end(provider)
        while tick - sums.since >= RECENT_SECONDS and (sums.earned or sums.lost):
            sums.since += RECENT_SECONDS
            sums.earned, sums.lost = sums.earned // 2, sums.lost // 2
        if not (sums.earned or sums.lost):
            sums.since = tick
        return sums
