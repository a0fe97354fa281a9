"""The verdict on a provider: by the answers that referees found suspect, and by the tokens that it bills. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tallystick.audit.token_counts import PooledCounts
from tallystick.audit.verdicts import Audit, Referees, Verdict, judge_provider
from tallystick.client.audits.planning import is_own

MIN_COUNTERS = 2
"""Referees that must find the same surplus; one alone could invent it. An engine of the user's own is enough."""


def judge_counts(by_referee: Mapping[str, PooledCounts]) -> Verdict:
    """The verdict on a provider's token counts. CONFIRMED only if several referees, or the user's own engine, count so."""
    pooled = PooledCounts()
    for counts in by_referee.values():
        pooled = pooled.add(counts.billed, counts.counted)
    verdict = pooled.verdict
    if verdict is not Verdict.CONFIRMED:
        return verdict
    agreeing = [referee for referee, counts in by_referee.items() if counts.surplus * 100 > 2]
    sure = len(agreeing) >= MIN_COUNTERS or any(map(is_own, agreeing))
    return Verdict.CONFIRMED if sure else Verdict.SUSPECT


def judge_provider_and_counts(history: Sequence[Audit], by_referee: Mapping[str, PooledCounts], rules: Referees) -> Verdict:
    """The worse of both."""
    order = (Verdict.CONFIRMED, Verdict.SUSPECT, Verdict.PASS, Verdict.INCONCLUSIVE)
    return min((judge_provider(history, rules), judge_counts(by_referee)), key=order.index)
