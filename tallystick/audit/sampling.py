"""The distribution from which an honest engine draws a token, as far as a referee's row tells it.

A row lists the most probable tokens only. The others count as one outcome, `OTHER`. Each outcome gets an upper bound of its
probability, so a test built on it accuses honest providers no more often than it states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tallystick.audit.scores import Row, other_mass

OTHER = -1
"""Any token that the row does not list."""
NOISE, EDGE_NOISE = 3e-4, 1e-3
"""Probability that is added to each outcome: engines differ in the last digits. More if tokens are truncated, since that moves
some over the edge.
"""
VOCABULARY = 300_000
"""An upper bound for the size of a vocabulary."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Declared sampling parameters. `temperature` > 0; `top_k` 0 for none; `top_p` 1 for none; `min_p` 0 for none.

    Raises ValueError for a temperature of 0, at which nothing is drawn, and for values out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.temperature <= 100):
            raise ValueError(f"temperature: expected a number above 0, at most 100, got {self.temperature}")
        if not (0 < self.top_p <= 1 and 0 <= self.min_p <= 1 and self.top_k >= 0):
            raise ValueError("sampling: expected 0 < top_p <= 1, 0 <= min_p <= 1 and top_k >= 0")

    @property
    def truncates(self) -> bool:
        """Whether unlikely tokens are never drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


def outcome_bounds(row: Row, sampling: Sampling) -> dict[int, float]:
    """Upper bounds of the probability of each listed token and of OTHER, under the declared sampling."""
    weights = {token: math.exp(value / sampling.temperature) for token, value in row.logprobs.items()}
    least, most = other_weight(row, 1 / sampling.temperature)
    # How much is truncated depends on the weight of the others. The smallest set that can remain makes its members most probable;
    # the largest one says who may be a member.
    smallest, smallest_whole = _truncate(weights, sampling, least)
    largest, largest_whole = _truncate(weights, sampling, most)
    noise = EDGE_NOISE if sampling.truncates else NOISE
    below = math.fsum(smallest.values()) + (0.0 if smallest_whole else least)
    bounds = {
        token: (min(1.0, weight / below) if token in largest and below > 0 else 0.0) + noise for token, weight in weights.items()
    }
    above = math.fsum(weights.values()) + most
    bounds[OTHER] = (0.0 if largest_whole else min(1.0, most / above) if above > 0 else 1.0) + noise
    return bounds


def other_weight(row: Row, power: float) -> tuple[float, float]:
    """Bounds of the sum of p**power over the tokens that the row lacks, whose probabilities sum to a known mass."""
    if not row.logprobs:
        return 0.0, math.inf
    mass, ceiling = other_mass(row), math.exp(row.lowest)
    if mass <= 0 or ceiling <= 0:
        return 0.0, 0.0
    spread = VOCABULARY * (mass / VOCABULARY) ** power
    packed = mass * ceiling ** (power - 1)
    return min(spread, packed), max(spread, packed)


def _truncate(weights: Mapping[int, float], sampling: Sampling, others: float) -> tuple[Mapping[int, float], bool]:
    """The listed tokens that can be drawn if the others weigh `others`, and whether no other token can."""
    ordered, whole = sorted(weights.items(), key=lambda entry: -entry[1]), False
    if 0 < sampling.top_k <= len(ordered):
        ordered, whole = ordered[: sampling.top_k], True
    if sampling.min_p > 0 and ordered:
        passing = [entry for entry in ordered if entry[1] >= sampling.min_p * ordered[0][1]]
        ordered, whole = passing, whole or len(passing) < len(ordered)
    if sampling.top_p < 1:
        total, reached = math.fsum(weight for _, weight in ordered) + (0.0 if whole else others), 0.0
        for count, (_, weight) in enumerate(ordered, 1):
            reached += weight
            if reached >= sampling.top_p * total:
                return dict(ordered[:count]), True
    return dict(ordered), whole
