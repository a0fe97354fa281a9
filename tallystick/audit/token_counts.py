"""Token counts: what a provider billed against what its texts contain. Pooled: single answers differ for honest reasons."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from tallystick.audit.verdicts import Verdict

MIN_TOKENS = 20_000
"""Counted tokens from which a share is judged."""
SUSPECT, CONFIRMED = Fraction(1, 100), Fraction(2, 100)
"""Billed tokens above the counted ones, as a share of these, above which a provider is suspect, or confirmed."""


@dataclass(frozen=True, slots=True)
class PooledCounts:
    """Tokens that a provider billed for a model, and those that its texts contain by the model's tokenizer."""

    billed: int = 0
    counted: int = 0

    def add(self, billed: int, counted: int) -> PooledCounts:
        """With one more answer. Raises ValueError for negative numbers."""
        if billed < 0 or counted < 0:
            raise ValueError("tokens: expected numbers of at least 0")
        return PooledCounts(self.billed + billed, self.counted + counted)

    @property
    def surplus(self) -> Fraction:
        """What is billed above what is counted, as a share of it; negative if less is billed."""
        return Fraction(self.billed - self.counted, self.counted) if self.counted else Fraction(0)

    @property
    def verdict(self) -> Verdict:
        """INCONCLUSIVE for too few tokens. CONFIRMED needs no second referee: the counts can be repeated by anyone."""
        if self.counted < MIN_TOKENS:
            return Verdict.INCONCLUSIVE
        if self.surplus > CONFIRMED:
            return Verdict.CONFIRMED
        return Verdict.SUSPECT if self.surplus > SUSPECT else Verdict.PASS
