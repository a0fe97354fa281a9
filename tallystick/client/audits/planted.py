"""Planted audits: answers that are known to be good or bad, by which a referee is checked. It cannot tell them from others. Pure.

A bad one is a good answer in whose second half tokens have changed places. Whoever runs the model finds those unlikely, and what
stands before them as likely as ever; whoever invents numbers, or passes everything, does not know where they are.
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
"""Nats by which the swapped tokens are less likely than those before them, in the median, to any honest referee."""


@dataclass(frozen=True, slots=True)
class BadAnswer:
    """An answer with swapped tokens, and where they are."""

    tokens: tuple[int, ...]
    swapped: frozenset[int]


def make_bad(tokens: Sequence[int], positions: Sequence[int], random: Random) -> BadAnswer | None:
    """Swaps tokens at some of the later positions for others of the same answer. None if the answer has too few tokens."""
    inside = [position for position in positions if 0 < position < len(tokens)]
    chosen = inside[len(inside) // 2 :]
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
    swapped, before = list[float](), list[float]()
    first = min(bad.swapped, default=0)
    for row in response.rows:
        if row is None or row.token is None or not (row.position < first or row.position in bad.swapped):
            continue
        listed = dict(row.top)
        value = row.logprob if row.logprob is not None else listed.get(row.token, min(listed.values(), default=0.0))
        (swapped if row.position in bad.swapped else before).append(value)
    if len(swapped) < MIN_SWAPPED or len(before) < MIN_SWAPPED:
        return Verdict.INCONCLUSIVE
    drop = statistics.median(before) - statistics.median(swapped)
    return judge([Finding("planted", MIN_DROP - drop, 0.0)])


def bad_question(request: ScoreRequest, bad: BadAnswer) -> ScoreRequest:
    """The question about the bad answer in place of the good one."""
    inside = tuple(position for position in request.positions if position <= len(bad.tokens))
    return ScoreRequest(request.model, request.prompt, bad.tokens, inside, request.top)
