"""Thresholds of the tests, per spec: data that is calibrated from pairs of honest engines, because honest hardware differs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields

from tallystick.protocol.errors import BadMessage

QUANTILE, MARGIN = 0.999, 1.5
"""A calibrated threshold is MARGIN times the QUANTILE of what honest pairs show."""
MIN_SAMPLES = 100
"""Honest audits from which a threshold is calibrated."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Statistics above these are suspect. `divergence`: D5; `margin`: nats; the others: logarithms of evidence, in nats.

    The defaults of `divergence` and `margin` suit engines of one kind on one kind of machine; calibrate others. Those of evidence
    hold for any honest provider: ln(1,000) is exceeded by one audit in 1,000 at most.
    """

    divergence: float = 0.01
    margin: float = 0.05
    surprisal: float = math.log(1_000)
    cut: float = math.log(1_000)
    replay: float = math.log(1_000_000)

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf):
                raise BadMessage(f"thresholds.{name}: expected a number above 0, got {value!r}")

    @classmethod
    def of(cls, document: object) -> Thresholds:
        """Reads thresholds from a JSON object; members that are left out keep their defaults. Raises BadMessage."""
        if not isinstance(document, Mapping):
            raise BadMessage(f"thresholds: expected an object, got {type(document).__name__}")
        names = {field.name for field in fields(cls)}
        if unknown := sorted(str(name) for name in document.keys() - names):
            raise BadMessage(f"thresholds.{unknown[0]}: expected one of {', '.join(sorted(names))}")
        return cls(**document)


def calibrate(honest: Iterable[float]) -> float:
    """A threshold from the statistics of audits of honest providers by honest referees. Raises ValueError for too few."""
    ordered = sorted(value for value in honest if not math.isnan(value))
    if len(ordered) < MIN_SAMPLES:
        raise ValueError(f"expected at least {MIN_SAMPLES} honest audits, got {len(ordered)}")
    return MARGIN * ordered[min(len(ordered) - 1, math.ceil(QUANTILE * len(ordered)) - 1)]
