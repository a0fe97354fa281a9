"""D5: how far the provider's five best log-probabilities are from the referee's. It sees other weights, coarser quantization and
hidden prompts. It does not see who wrote the text: a small model may write what a large one scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tallystick.audit.scores import Answer, Row

TOP = 5
"""Tokens of a position that are compared."""
MIN_POSITIONS = 8
"""Positions from which the mean means something."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """The mean distance over `positions` positions; 0 for equal numbers, at most TOP / 2."""

    mean: float
    positions: int

    @property
    def conclusive(self) -> bool:
        """Whether enough positions were compared."""
        return self.positions >= MIN_POSITIONS


def measure_divergence(provider: Answer, referee: Answer) -> Divergence:
    """Compares all positions that both have, if both speak of the same token there.

    A position with another token or without rows is left out: misaligned rows are nobody's guilt.
    """
    distances = [
        _distance(row, theirs)
        for position, row in provider.items()
        if (theirs := referee.get(position)) is not None and theirs.token == row.token and row.logprobs and theirs.logprobs
    ]
    return Divergence(math.fsum(distances) / len(distances) if distances else 0.0, len(distances))


def _distance(provider: Row, referee: Row) -> float:
    """The sum of |a - b| / (|a| + |b|) over the provider's best tokens, halved.

    A token that the referee does not list is at most as probable as its last one, so the distance is at least that to its last.
    """
    best = sorted(provider.logprobs.items(), key=lambda entry: -entry[1])[:TOP]
    floor, total = referee.lowest, 0.0
    for token, ours in best:
        theirs = referee.logprobs.get(token)
        if theirs is None:
            theirs = min(floor, ours) if ours < floor else floor
        size = abs(ours) + abs(theirs)
        if size > 0:
            total += abs(ours - theirs) / size
    return total / 2
