"""Toy language models for tests of the statistics: the next token depends on the last one, by fixed random numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from tallystick.audit.scores import Row

VOCABULARY, LISTED = 60, 20


class ToyModel:
    """A model of VOCABULARY tokens. `noise` changes its weights a little, as a coarser quantization does."""

    def __init__(self, seed: int, noise: float = 0.0) -> None:
        weights, other = random.Random(seed), random.Random(seed + 10**6)
        self._logits = [[weights.gauss(0, 2.5) + other.gauss(0, noise) for _ in range(VOCABULARY)] for _ in range(VOCABULARY)]

    def logprobs(self, last: int, temperature: float = 1.0) -> list[float]:
        """Natural logarithms of the next token's probabilities."""
        logits = [value / temperature for value in self._logits[last]]
        top = max(logits)
        total = top + math.log(math.fsum(math.exp(value - top) for value in logits))
        return [value - total for value in logits]

    def write(self, draws: random.Random, length: int, temperature: float = 1.0) -> list[int]:
        """Draws an answer; at temperature 0 the best token each time, after a drawn first one."""
        tokens = [draws.randrange(VOCABULARY)]
        while len(tokens) < length:
            row = self.logprobs(tokens[-1], temperature or 1.0)
            best = max(range(VOCABULARY), key=row.__getitem__)
            tokens.append(draws.choices(range(VOCABULARY), [math.exp(value) for value in row])[0] if temperature else best)
        return tokens

    def score(self, tokens: Sequence[int], listed: int = LISTED) -> dict[int, Row]:
        """The rows of an answer's positions after the first, each with the `listed` most probable tokens."""
        return {position: self.row(tokens[position - 1], tokens[position], listed) for position in range(1, len(tokens))}

    def row(self, last: int, token: int, listed: int = LISTED) -> Row:
        """The row of one position."""
        values = self.logprobs(last)
        best = sorted(range(VOCABULARY), key=lambda token: -values[token])[:listed]
        return Row(token, {token: values[token] for token in best})
