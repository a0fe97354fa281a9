"""How a model's lowest price, its fastest first token and its free slots changed in the last day. Pure.

It is kept in memory, bounded in models and samples, and begins anew with the process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

SAMPLE_SECONDS = 300.0
MAX_SAMPLES = 288
"""A day of samples."""
MAX_MODELS = 1_000
"""Models with a history: those of the most asks. A sample of all takes some 40 KB."""


class Sample(NamedTuple):
    """One look at a model. `at`: Unix seconds; `output_price`: base units per 1,000,000 tokens; 0 ms: unknown."""

    at: int
    output_price: int
    first_token_ms: int
    free: int


class ModelHistory:
    """The samples of each model, oldest first."""

    def __init__(self) -> None:
        self._samples: dict[str, deque[Sample]] = {}
        self._due = 0.0

    def is_due(self, tick: float) -> bool:
        """Whether SAMPLE_SECONDS have passed since the last sample."""
        return tick >= self._due

    def add(self, samples: Iterable[tuple[str, int, Sample]], tick: float) -> None:
        """Adds a sample of each model on offer, with the number of its asks. Models that are not on offer any more are forgotten
        as their samples grow old.
        """
        self._due = tick + SAMPLE_SECONDS
        chosen = sorted(samples, key=lambda entry: (-entry[1], entry[0]))[:MAX_MODELS]
        for name, _, sample in chosen:
            self._samples.setdefault(name, deque(maxlen=MAX_SAMPLES)).append(sample)
        newest = max((sample.at for _, _, sample in chosen), default=None)
        if newest is not None:
            oldest = newest - SAMPLE_SECONDS * MAX_SAMPLES
            self._samples = {name: kept for name, kept in self._samples.items() if kept[-1].at >= oldest}
        while len(self._samples) > MAX_MODELS:
            del self._samples[min(self._samples, key=lambda name: self._samples[name][-1].at)]

    def of(self, model: str) -> Sequence[Sample]:
        """Returns the samples of a model, oldest first."""
        return tuple(self._samples.get(model, ()))
