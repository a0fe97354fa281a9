"""The surprisal test: whether a text is as surprising to the model as a text that was drawn from it.

It bets against the honest provider at each position with likelihood ratios tilted towards likelier and unlikelier tokens: q is
proportional to p**(1-l). The product of the ratios is an e-process: for a text that was drawn as declared, its expectation is at
most 1 however long one looks. So it exceeds 1/a with a probability of at most a (Ville's inequality; Shafer 2021, "Testing by
betting"). The test needs only the text and the declared sampling. It sees another model or temperature, not a quantization.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tallystick.audit.sampling import OTHER, Sampling, outcome_bounds
from tallystick.audit.scores import Answer

TILTS = (-0.3, -0.15, -0.05, 0.05, 0.15, 0.3)
"""The bets. A positive tilt wins by unlikely tokens, such as another model's; a negative one by likely ones, as at a low
temperature.
"""
WEIGHTS = (0.2, 0.1, 0.05, 0.05, 0.2, 0.4)
"""How the stake is divided among the bets. The strong ones get most: what they see shows in answers of ordinary length."""
LOOSE = 1.1
"""Positions at which the bounds add up to more are left out. The row of likely tokens says too little there for a bet to gain:
the bound of all others is far above their probability. So half as many answers of a smaller model convict it
(docs/explanation/trust.md).
"""


@dataclass(frozen=True, slots=True)
class Surprisal:
    """The logarithm of each tilt's wealth, in nats, after bets on `positions` positions. Add those of answers to pool them."""

    wealth: tuple[float, ...] = (0.0,) * len(TILTS)
    positions: int = 0

    def __add__(self, other: Surprisal) -> Surprisal:
        wealth = tuple(mine + theirs for mine, theirs in zip(self.wealth, other.wealth, strict=True))
        return Surprisal(wealth, self.positions + other.positions)

    @property
    def log_evidence(self) -> float:
        """The logarithm of the mixture over the tilts, in nats. ln(1,000) = 6.9 is reached by 1 in 1,000 honest providers."""
        best = max(self.wealth)
        shares = zip(WEIGHTS, self.wealth, strict=True)
        return best + math.log(math.fsum(weight * math.exp(value - best) for weight, value in shares))


def measure_surprisal(referee: Answer, sampling: Sampling) -> Surprisal:
    """Bets on every position that the referee scored, unless its row says too little (LOOSE), whatever the token is.

    The positions must have been chosen without looking at the text.
    """
    wealth, positions = [0.0] * len(TILTS), 0
    for row in referee.values():
        bounds = outcome_bounds(row, sampling) if row.logprobs else {}
        if not bounds or math.fsum(bounds.values()) > LOOSE:
            continue
        positions += 1
        outcome = row.token if row.token in row.logprobs else OTHER
        for index, tilt in enumerate(TILTS):
            wealth[index] += _log_ratio(bounds, outcome, tilt)
    return Surprisal(tuple(wealth), positions)


def _log_ratio(bounds: Mapping[int, float], outcome: int, tilt: float) -> float:
    """ln(q / p) of the outcome. `bounds` are at least p, and q sums to 1, so the expectation of q / p is at most 1."""
    total = math.fsum(bound ** (1 - tilt) for bound in bounds.values())
    return -tilt * math.log(bounds[outcome]) - math.log(total)
