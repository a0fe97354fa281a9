"""D5: how far the provider's five best log-probabilities are from the referee's. It sees other weights, coarser quantization and
hidden prompts. It does not see who wrote the text: a small model may write what a large one scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from tallystick.audit.sampling import other_weight
from tallystick.audit.scores import Answer, MeanStatistic, Row

TOP = 5
"""Tokens of a position that are compared."""
FLOOR = 0.1
"""Nats that are added to each pair of logarithms. Evidence is rounded to 0.001, and 0.0004 and 0 are entirely different numbers.
Without it, a third of the audits of honest engines were suspect; with it, none (docs/explanation/trust.md).
"""
MIN_POSITIONS = 8
"""Positions from which the mean means something."""


MODEL_SCALE = 1.0


def measure_divergence(provider: Answer, referee: Answer, temperatures: Iterable[float] = (MODEL_SCALE,)) -> MeanStatistic:
    """The mean distance over all positions that both have with the same token: 0 for equal numbers, at most TOP / 2.

    A position with another token or without rows is left out: misaligned rows are nobody's guilt.

    `temperatures`: at which the provider's engine may report. Most report the model's own probabilities, and SGLang those at the
    temperature of the request. The nearest counts: a scale makes no other model like the right one.
    """
    pairs = [
        (row, theirs)
        for position, row in provider.items()
        if (theirs := referee.get(position)) is not None and theirs.token == row.token and row.logprobs and theirs.logprobs
    ]
    means = (
        MeanStatistic.of([_distance(row, _tempered(theirs, row, temperature)) for row, theirs in pairs], MIN_POSITIONS)
        for temperature in {MODEL_SCALE, *temperatures}
        if temperature > 0
    )
    return min(means, key=lambda statistic: statistic.mean)


def _tempered(referee: Row, provider: Row, temperature: float) -> Row:
    """A referee's row at a temperature. How much the tokens weigh that it lacks is known within bounds only.

    Within these, the provider's best token is believed.
    """
    if temperature == MODEL_SCALE:
        return referee
    scaled = {token: value / temperature for token, value in referee.logprobs.items()}
    listed = math.fsum(map(math.exp, scaled.values()))
    least, most = other_weight(referee, 1 / temperature)
    low, high = (math.log(max(listed + others, 1e-300)) for others in (least, most))
    best = max(provider.logprobs, key=lambda token: provider.logprobs[token])
    total = min(max(scaled.get(best, min(scaled.values())) - provider.logprobs[best], low), high)
    return Row(referee.token, {token: min(value - total, 0.0) for token, value in scaled.items()})


def _distance(provider: Row, referee: Row) -> float:
    """The mean of |a - b| / (|a| + |b| + FLOOR) over the provider's best tokens, times TOP / 2: a row with fewer is no nearer.

    A token that the referee does not list is at most as probable as its last one, so the distance is at least that to its last.
    """
    best = sorted(provider.logprobs.items(), key=lambda entry: -entry[1])[:TOP]
    floor, total = referee.lowest, 0.0
    for token, ours in best:
        theirs = referee.logprobs.get(token)
        if theirs is None:
            theirs = min(floor, ours) if ours < floor else floor
        total += abs(ours - theirs) / (abs(ours) + abs(theirs) + FLOOR)
    return total / len(best) * TOP / 2
