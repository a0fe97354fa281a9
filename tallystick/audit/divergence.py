"""D5: how far the provider's five best log-probabilities are from the referee's. It sees other weights, coarser quantization and
hidden prompts. It does not see who wrote the text: a small model may write what a large one scores.
"""

from __future__ import annotations

from tallystick.audit.scores import Answer, MeanStatistic, Row

TOP = 5
"""Tokens of a position that are compared."""
FLOOR = 0.1
"""Nats that are added to each pair of logarithms. Evidence is rounded to 0.001, and 0.0004 and 0 are entirely different numbers.
Without it, half of the audits of honest engines were above the threshold; with it, none (docs/explanation/trust.md).
"""
MIN_POSITIONS = 8
"""Positions from which the mean means something."""


def measure_divergence(provider: Answer, referee: Answer) -> MeanStatistic:
    """The mean distance over all positions that both have with the same token: 0 for equal numbers, at most TOP / 2.

    A position with another token or without rows is left out: misaligned rows are nobody's guilt.
    """
    distances = [
        _distance(row, theirs)
        for position, row in provider.items()
        if (theirs := referee.get(position)) is not None and theirs.token == row.token and row.logprobs and theirs.logprobs
    ]
    return MeanStatistic.of(distances, MIN_POSITIONS)


def _distance(provider: Row, referee: Row) -> float:
    """The sum of |a - b| / (|a| + |b| + FLOOR) over the provider's best tokens, halved.

    A token that the referee does not list is at most as probable as its last one, so the distance is at least that to its last.
    """
    best = sorted(provider.logprobs.items(), key=lambda entry: -entry[1])[:TOP]
    floor, total = referee.lowest, 0.0
    for token, ours in best:
        theirs = referee.logprobs.get(token)
        if theirs is None:
            theirs = min(floor, ours) if ours < floor else floor
        total += abs(ours - theirs) / (abs(ours) + abs(theirs) + FLOOR)
    return total / 2
