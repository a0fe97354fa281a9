"""Evidence that adds up over answers: surprisal and cut endings, which show little in one answer and much in many. Pure.

A product of bets against an honest provider stays a fair bet, however many answers there are and whoever scored them (Ville's
inequality). So a provider is confirmed at the same rate of false alarms as by suspect answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tallystick.audit.surprisal import TILTS, Surprisal
from tallystick.audit.verdicts import FALSE_SUSPECT, MAX_FALSE, Referees, Verdict
from tallystick.client.audits.planning import is_own

SUSPECT: Final = -math.log(FALSE_SUSPECT)
CONFIRMED: Final = -math.log(MAX_FALSE)
MOST_OF_ONE: Final = SUSPECT
AGREES: Final = 2.0
"""Nats that a referee's own answers must show for it to count as one that agrees."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Evidence of some answers, in nats: the wealth of each tilt, and the evidence that they were cut."""

    surprisal: Surprisal = field(default_factory=Surprisal)
    cut: float = 0.0

    def __add__(self, other: Pool) -> Pool:
        return Pool(self.surprisal + other.surprisal, self.cut + other.cut)

    @property
    def log_evidence(self) -> float:
        """The stronger of both kinds."""
        return max(self.surprisal.log_evidence, self.cut)

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return {"wealth": list(self.surprisal.wealth), "positions": self.surprisal.positions, "cut": self.cut}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Pool:
        """Of a file."""
        return cls(Surprisal(tuple(raw["wealth"]), raw["positions"]), raw["cut"])


NO_POOL: Final = Pool()


def pool_of(surprisal: Surprisal | None, cut: float | None, *, untruncated: bool) -> Pool:
    """The evidence of one answer. Bets on likely tokens count only if the request declares that nothing is truncated."""
    if surprisal is None:
        return Pool(cut=cut or 0.0)
    wealth = tuple(value if tilt > 0 or untruncated else 0.0 for tilt, value in zip(TILTS, surprisal.wealth, strict=True))
    return Pool(Surprisal(wealth, surprisal.positions), cut or 0.0)


def bounded(pool: Pool) -> Pool:
    """The evidence of one answer as it adds up: at most MOST_OF_ONE, so that one answer alone convicts nobody."""
    wealth = tuple(min(value, MOST_OF_ONE) for value in pool.surprisal.wealth)
    return Pool(Surprisal(wealth, pool.surprisal.positions), min(pool.cut, MOST_OF_ONE))


def judge_pools(by_referee: Mapping[str, Pool], rules: Referees) -> Verdict:
    """The verdict by all answers of a provider. CONFIRMED only if as many referees agree as must on a job, or the user's own."""
    total = sum(by_referee.values(), start=NO_POOL)
    if not total.surprisal.positions and not total.cut:
        return Verdict.INCONCLUSIVE
    if total.log_evidence <= SUSPECT:
        return Verdict.PASS
    agreeing = sum(pool.log_evidence >= AGREES for pool in by_referee.values())
    own = any(is_own(referee) and pool.log_evidence > CONFIRMED for referee, pool in by_referee.items())
    if total.log_evidence > CONFIRMED and (agreeing >= rules.opinions or own):
        return Verdict.CONFIRMED
    return Verdict.SUSPECT
