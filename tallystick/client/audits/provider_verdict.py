"""The verdict on a provider: by the answers that referees found suspect, by what adds up over all, by its token counts. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from tallystick.audit.token_counts import CONFIRMED, PooledCounts
from tallystick.audit.verdicts import Audit, Referees, Verdict, judge_provider
from tallystick.client.audits.planning import is_own
from tallystick.client.audits.pools import Pool, judge_pools

_WORST_FIRST: Final = (Verdict.CONFIRMED, Verdict.SUSPECT, Verdict.PASS, Verdict.INCONCLUSIVE)


def judge_counts(by_referee: Mapping[str, PooledCounts], rules: Referees) -> Verdict:
    """The verdict on a provider's token counts. CONFIRMED only if as many referees count so as must agree, or the user's own."""
    pooled = PooledCounts()
    for counts in by_referee.values():
        pooled = pooled.add(counts.billed, counts.counted)
    verdict = pooled.verdict
    if verdict is not Verdict.CONFIRMED:
        return verdict
    agreeing = [referee for referee, counts in by_referee.items() if counts.surplus > CONFIRMED]
    return Verdict.CONFIRMED if len(agreeing) >= rules.opinions or any(map(is_own, agreeing)) else Verdict.SUSPECT


def judge_provider_and_counts(
    history: Sequence[Audit],
    counts: Mapping[str, PooledCounts],
    rules: Referees,
    pools: Sequence[tuple[str, Pool]] = (),
) -> Verdict:
    """The worst verdict of all. `counts`: by referee. `pools`: of each answer, with its referee, the oldest first."""
    verdicts = (judge_provider(history, rules), judge_counts(counts, rules), judge_pools(pools, rules))
    return min(verdicts, key=_WORST_FIRST.index)
