"""How far a referee is believed: by the disputes in which it was in the minority.

A referee sees tokens and nothing of who wrote them, so one that invents numbers, copies, or passes the answers of its friends
disagrees with honest ones. Disputes alone count: agreement on good answers costs a dishonest referee nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tallystick.audit.verdicts import DEFAULT_REFEREES, Audit, Referees, Verdict, judge_job

MIN_LOST = 2
"""Lost disputes from which a referee can be distrusted."""


@dataclass(frozen=True, slots=True)
class RefereeRecord:
    """Disputes that a referee won and lost."""

    won: int = 0
    lost: int = 0

    def after(self, *, lost: bool) -> RefereeRecord:
        """With one more dispute."""
        return RefereeRecord(self.won + (not lost), self.lost + lost)

    @property
    def trusted(self) -> bool:
        """Whether it may be asked: it lost few disputes, or fewer than it won."""
        return self.lost < MIN_LOST or self.lost <= self.won


def dispute_losers(audits: Iterable[Audit], referees: Referees = DEFAULT_REFEREES) -> dict[bytes, bool]:
    """Whether each referee of a disputed job is in the minority. Empty if they agree, or while the dispute is open."""
    known = [audit for audit in audits if audit.verdict is not Verdict.INCONCLUSIVE]
    verdict = judge_job(known, referees)
    if verdict is Verdict.INCONCLUSIVE or len({audit.verdict is Verdict.PASS for audit in known}) < 2:
        return {}
    return {audit.referee: (audit.verdict is Verdict.PASS) != (verdict is Verdict.PASS) for audit in known}
