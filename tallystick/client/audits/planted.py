"""Planted audits: answers that are known to be good or bad, by which a referee is checked. It cannot tell them from others. Pure.

A bad one is a good answer in which tokens have changed places. Whoever runs the model finds those unlikely; whoever invents
numbers, or passes everything, does not know where they are.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tallystick.audit.verdicts import Finding, Verdict, judge
from tallystick.client.audits.planning import Random, shuffle
from tallystick.protocol.token_scores import ScoreRequest, ScoreResponse

SWAPPED_SHARE: Final = 4
"""One in so many positions that are asked about has another token."""
MIN_SWAPPED: Final = 6
MIN_DROP: Final = 2.0
"""Nats by which the swapped tokens are less likely than the others, in the median, to any honest referee."""


@dataclass(frozen=True, slots=True)
class BadAnswer:
    """An answer with swapped tokens, and where they are."""

    tokens: tuple[int, ...]
    swapped: frozenset[int]


def make_bad(tokens: Sequence[int], positions: Sequence[int], random: Random) -> BadAnswer | None:
    """Swaps tokens at some of the positions for others of the same answer. None if the answer has too few tokens."""
    inside = [position for position in positions if 0 < position < len(tokens)]
    chosen = list(inside)
    shuffle(chosen, random)
    chosen = chosen[: max(MIN_SWAPPED, len(inside) // SWAPPED_SHARE)]
    changed, swapped = list(tokens), set[int]()
    for position, other in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        if tokens[other] != tokens[position]:
            changed[position] = tokens[other]
            swapped.add(position)
    return BadAnswer(tuple(changed), frozenset(swapped)) if len(swapped) >= MIN_SWAPPED else None


def judge_bad(bad: BadAnswer, response: ScoreResponse) -> Verdict:
    """PASS if the referee found the swapped tokens unlikely, SUSPECT if it did not, INCONCLUSIVE for too few rows."""
    swapped, others = list[float](), list[float]()
    for row in response.rows:
        if row is None or row.token is None:
            continue
        listed = dict(row.top)
        value = row.logprob if row.logprob is not None else listed.get(row.token, min(listed.values(), default=0.0))
        (swapped if row.position in bad.swapped else others).append(value)
    if len(swapped) < MIN_SWAPPED or len(others) < MIN_SWAPPED:
        return Verdict.INCONCLUSIVE
    drop = statistics.median(others) - statistics.median(swapped)
    return judge([Finding("planted", MIN_DROP - drop, 0.0)])


def bad_question(request: ScoreRequest, bad: BadAnswer) -> ScoreRequest:
    """The question about the bad answer in place of the good one."""
    return ScoreRequest(request.model, request.prompt, bad.tokens, request.positions, request.top)
