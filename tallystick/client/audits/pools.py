"""Evidence that adds up over answers: surprisal and cut endings, which show little in one answer and much in many. Pure.

A product of bets against an honest provider stays a fair bet, however many answers there are and whoever scored them (Ville's
inequality). So a provider is confirmed at the same rate of false alarms as by suspect answers.

Bets lose on honest answers. So that a long honest past excuses nothing, the bet is divided evenly among the latest answer, the
latest two, four, …, and all. A mixture of fair bets is a fair bet (Shafer 2021, "Testing by betting").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tallystick.audit.surprisal import TILTS, Surprisal
from tallystick.audit.verdicts import FALSE_SUSPECT, MAX_FALSE, Referees, Verdict
from tallystick.client.audits.planning import is_own

SUSPECT: Final = -math.log(FALSE_SUSPECT)
CONFIRMED: Final = -math.log(MAX_FALSE)
MOST_OF_ONE: Final = SUSPECT


@dataclass(frozen=True, slots=True)
class Pool:
    """Evidence of some answers, in nats: the wealth of each tilt, and the evidence that they were cut."""

    surprisal: Surprisal = field(default_factory=Surprisal)
    cut: float = 0.0

    def __add__(self, other: Pool) -> Pool:
        return Pool(self.surprisal + other.surprisal, self.cut + other.cut)

    @property
    def log_evidence(self) -> float:
        """The evidence of a bet that is divided evenly between both kinds."""
        return _log_mean((self.surprisal.log_evidence, self.cut))

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


@dataclass(frozen=True, slots=True)
class Pooled:
    """Evidence over answers, in nats. `without_captured`: without the referees that may be captured, those that accuse most."""

    log_evidence: float
    without_captured: float


def pool_answers(answers: Sequence[tuple[str, Pool]], captured: float = 0.0) -> Pooled:
    """Adds up answers with the referee that judged each, the oldest first. `captured`: the share of referees that may lie."""
    whole, trimmed = list[float](), list[float]()
    by_referee, size = dict[str, Pool](), 1
    for count, (referee, pool) in enumerate(reversed(answers), 1):
        by_referee[referee] = by_referee.get(referee, NO_POOL) + pool
        if count == size or count == len(answers):
            mildest_first = sorted(by_referee.values(), key=lambda total: total.log_evidence)
            kept = mildest_first[: max(0, len(mildest_first) - possibly_captured(len(mildest_first), captured))]
            whole.append(sum(mildest_first, start=NO_POOL).log_evidence)
            trimmed.append(sum(kept, start=NO_POOL).log_evidence)
            size *= 2
    return Pooled(_log_mean(whole), _log_mean(trimmed)) if answers else Pooled(0.0, 0.0)


def possibly_captured(referees: int, share: float) -> int:
    """How many of some referees may be captured if this share of all is: three standard deviations above the mean."""
    return math.ceil(referees * share + 3 * math.sqrt(referees * share * (1 - share)))


def judge_pools(answers: Sequence[tuple[str, Pool]], rules: Referees) -> Verdict:
    """The verdict by all answers of a provider, the oldest first, each with the referee that judged it.

    CONFIRMED only if those referees suspect it too that remain without the possibly captured ones, or if the user's own engine
    alone shows it.
    """
    if not any(pool.surprisal.positions or pool.cut for _, pool in answers):
        return Verdict.INCONCLUSIVE
    pooled = pool_answers(answers, rules.captured)
    if pooled.log_evidence <= SUSPECT:
        return Verdict.PASS
    enough = pooled.log_evidence > CONFIRMED and pooled.without_captured > SUSPECT
    many = len({referee for referee, _ in answers}) >= rules.opinions
    return Verdict.CONFIRMED if (enough and many) or _own_engine_shows(answers) else Verdict.SUSPECT


def _own_engine_shows(answers: Sequence[tuple[str, Pool]]) -> bool:
    owned = {referee for referee, _ in answers if is_own(referee)}
    return any(pool_answers([answer for answer in answers if answer[0] == own]).log_evidence > CONFIRMED for own in owned)


def _log_mean(logs: Sequence[float]) -> float:
    """The logarithm of the mean of numbers by their logarithms."""
    most = max(logs)
    return most + math.log(math.fsum(math.exp(value - most) for value in logs) / len(logs))
