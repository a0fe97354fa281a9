"""What the attempts at one request of a caller came to so far: what they cost, what they may still cost, and whether there may be
another.

A job that failed may be billed all the same, as long as its orders are not released by a receipt. So what such an attempt may
cost counts in the request's max_cost, the caller is told of it, and is not told to try again: the next try may be paid for twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tallystick.client.gateway.aliases import is_sold, may_fall_back
from tallystick.client.jobs.job import Job
from tallystick.client.jobs.result import Result
from tallystick.protocol.errors import Code, TallyError
from tallystick.protocol.types import Amount

_NOT_DELIVERED = (Code.COORDINATOR_UNAVAILABLE, Code.DATABASE_UNAVAILABLE)


@dataclass(slots=True)
class Attempts:
    """The attempts at one request. `results` are answers that were paid for and would not do."""

    results: list[Result] = field(default_factory=list)
    _stakes: list[tuple[str, Amount]] = field(default_factory=list)
    _failed: list[TallyError] = field(default_factory=list)

    @property
    def stake(self) -> Amount:
        """What attempts that failed may still cost, in base units."""
        return Amount(sum(most for _, most in self._stakes))

    def note(self, job: Job, error: TallyError, stake: Amount) -> None:
        """An attempt that was placed failed so, and may still cost `stake` base units."""
        self._failed.append(error)
        if stake:
            model = job.candidates[0].terms.model if job.candidates else ""
            self._stakes.append((f"{model}; job={job.id.hex()}; at-most={int(stake)}", stake))

    def may_fall_back(self, error: TallyError) -> bool:
        """Whether another model may be asked after this error: not after one of a placed job that says not to try again."""
        final = not error.retry and any(one is error for one in self._failed)
        return may_fall_back(error) and (not final or not is_sold(error))

    def may_retry(self, error: TallyError, *, keyed: bool) -> bool:
        """Whether the caller may send the request again without a person's thought. With an idempotency key that is the same job,
        if only the way to the coordinator or this client's own database failed.
        """
        return error.retry and (not self.stake or (keyed and error.code in _NOT_DELIVERED))

    def headers(self) -> dict[str, str]:
        """Tells the caller of attempts that failed and may still cost something."""
        return {"x-tally-at-stake": ", ".join(text for text, _ in self._stakes)} if self._stakes else {}
