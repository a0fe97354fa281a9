"""The margin test, for answers at temperature 0: how far each returned token is below the referee's best one.

An honest engine of the same model returns the best token, but for near-ties that the last digits decide. The test sees a text
that another model wrote, though the right one scored it. It says nothing of sampled answers.
"""

from __future__ import annotations

from tallystick.audit.scores import Answer, MeanStatistic

MAX_MARGIN = 3.0
"""Nats. One token that is entirely unlikely, as after a rare numeric accident, counts no more than this."""
MIN_POSITIONS = 16
"""Positions from which the mean means something."""


def measure_margin(referee: Answer) -> MeanStatistic:
    """The mean margin of an answer at temperature 0, in nats.

    A token that the referee does not list is at most as probable as its last one.
    """
    margins = []
    for row in referee.values():
        if row.logprobs:
            returned = row.logprobs.get(row.token, row.lowest)
            margins.append(min(max(row.logprobs.values()) - returned, MAX_MARGIN))
    return MeanStatistic.of(margins, MIN_POSITIONS)
