"""Cut and replayed answers: two things that show in a text whatever weights wrote it."""

from __future__ import annotations

import math
from collections.abc import Sequence

MIN_REPLAY_TOKENS = 16
"""A shorter answer, such as a greeting, may be repeated by an honest model."""


def cut_evidence(end_logprob: float, tokens: int) -> float:
    """The logarithm of the evidence that an answer was cut, in nats; negative for evidence against. Add it up over answers.

    `end_logprob`: the natural logarithm of the probability, by the referee, that the answer ends where it did, over all tokens
    that end a turn. `tokens`: of the answer. An honest answer ends at one of its `tokens` + 1 positions where the end has a
    probability of a / (`tokens` + 1) with a probability of at most a. That p-value becomes evidence by the calibrator
    1 / (2 sqrt(p)) (Vovk and Wang 2021), whose expectation is at most 1 for an honest provider. Raises ValueError.
    """
    if not end_logprob <= 0 or tokens < 0:
        raise ValueError("expected a logarithm of at most 0 and a number of tokens of at least 0")
    log_p = min(0.0, end_logprob + math.log(tokens + 1))
    return -math.log(2) - log_p / 2


def replay_evidence(tokens: Sequence[int], surprisals: Sequence[float], earlier: Sequence[int]) -> float:
    """The logarithm of the evidence that a sampled answer replays an earlier one of another job, in nats; at least 0.

    `surprisals`: of the answer's tokens under the declared sampling, in nats. A model that draws anew repeats a given text with
    the probability exp(-sum of its surprisals). Only the common start counts. Subtract the logarithm of the number of earlier
    answers that were compared. Raises ValueError if there are not as many surprisals as tokens.
    """
    if len(tokens) != len(surprisals):
        raise ValueError(f"surprisals: expected {len(tokens)}, as many as tokens, got {len(surprisals)}")
    common = 0
    for mine, theirs in zip(tokens, earlier, strict=False):
        if mine != theirs:
            break
        common += 1
    return math.fsum(max(0.0, value) for value in surprisals[:common]) if common >= MIN_REPLAY_TOKENS else 0.0
