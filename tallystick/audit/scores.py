"""What a referee says of the tokens of an answer, and the numbers that the provider committed to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tallystick.protocol.token_evidence import EvidenceRow
from tallystick.protocol.token_scores import ScoreResponse


@dataclass(frozen=True, slots=True)
class Row:
    """One position of an answer: the token that was returned, and the probabilities of likely tokens.

    `token`: the engine's id of the token. `logprobs`: natural logarithms of the model's own probabilities, by token id, before
    temperature and truncation. It need not contain `token`. Raises ValueError if a logarithm is above 0 or not a number.
    """

    token: int
    logprobs: Mapping[int, float]

    def __post_init__(self) -> None:
        if not all(value <= 0 for value in self.logprobs.values()):
            raise ValueError("log-probabilities: expected numbers of at most 0")

    @classmethod
    def of(cls, evidence: EvidenceRow) -> Row:
        """Of what a node committed to."""
        return cls(evidence.token, {token: -size / 1_000 for token, size in evidence.top})

    @property
    def lowest(self) -> float:
        """The smallest logarithm of the row, in nats. Tokens that the row lacks are at most as probable. 0 if it is empty."""
        return min(self.logprobs.values(), default=0.0)


@dataclass(frozen=True, slots=True)
class MeanStatistic:
    """A mean over `positions` positions of an answer. It decides something from `least` positions on."""

    mean: float
    positions: int
    least: int

    @classmethod
    def of(cls, values: Sequence[float], least: int) -> MeanStatistic:
        """The mean of one value a position; 0 without any."""
        return cls(math.fsum(values) / len(values) if values else 0.0, len(values), least)

    @property
    def conclusive(self) -> bool:
        """Whether there are enough positions."""
        return self.positions >= self.least


Answer = Mapping[int, Row]
"""Rows by their position in the answer, from 0. Positions may be missing."""


def scored_answer(response: ScoreResponse) -> Answer:
    """What a referee scored, without the row of the answer's end.

    A token below the row's best ones is left out, though its probability may be known: `Row.lowest` must bound all others.
    """
    rows = (row for row in response.rows if row is not None)
    return {row.position: Row(row.token, dict(row.top)) for row in rows if row.token is not None}


def other_mass(row: Row) -> float:
    """The probability of all tokens that the row lacks, between 0 and 1."""
    return max(0.0, 1.0 - math.fsum(map(math.exp, row.logprobs.values())))
