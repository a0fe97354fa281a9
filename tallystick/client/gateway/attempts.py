"""Tracks the attempts at one request of a caller: what they cost, what they may still cost, and whether another may follow.

A failed job may still be billed until a receipt releases its orders. Therefore the possible cost of a failed attempt counts
towards the request's max_cost. The caller learns of it and is told not to retry, because a retry could be paid for twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tallystick.client.gateway.aliases import is_sold, may_fall_back
from tallystick.client.jobs.job import Job
from tallystick.client.jobs.result import Result
from tallystick.protocol.errors import Code, TallyError
from tallystick.protocol.types import Amount


@dataclass(slots=True)
class Attempts:
    """The attempts at one request. `results` are the answers that were paid for and not accepted.

    `upstream_cost`: what answers of upstreams cost that were not accepted, in base units.
    """

    results: list[Result] = field(default_factory=list)
    upstream_cost: Amount = Amount(0)
    _failed_jobs: list[tuple[str, Amount]] = field(default_factory=list)
    _errors: list[TallyError] = field(default_factory=list)

    @property
    def possible_cost(self) -> Amount:
        """What failed attempts may still cost, in base units."""
        return Amount(sum(cost for _, cost in self._failed_jobs))

    @property
    def spent(self) -> Amount:
        """What the attempts cost so far, or may still cost, in base units."""
        if not (self._failed_jobs or self.results):
            return self.upstream_cost
        return Amount(self.possible_cost + sum(result.highest_cost for result in self.results) + self.upstream_cost)

    def record_failure(self, job: Job, error: TallyError, possible_cost: Amount) -> None:
        """Records that a submitted attempt failed with `error` and may still cost `possible_cost` base units."""
        self._errors.append(error)
        if possible_cost:
            model = job.candidates[0].terms.model if job.candidates else ""
            self._failed_jobs.append((f"{model}; job={job.id.hex()}; at-most={int(possible_cost)}", possible_cost))

    def may_fall_back(self, error: TallyError, *, to_upstream: bool = False) -> bool:
        """Whether another model may be tried after this error. Not if a submitted job failed with it and must not be retried.

        An engine that lacks the model or the route fails for good too, but another model has another engine.
        """
        of_engine = error.code is Code.ENGINE_UNAVAILABLE and not self.possible_cost
        final = not error.retry and not of_engine and any(recorded is error for recorded in self._errors)
        return may_fall_back(error, to_upstream=to_upstream) and (not final or not is_sold(error))

    @staticmethod
    def decisive_error(first: TallyError | None, last: TallyError) -> TallyError:
        """The error to report of the first and the last model that failed. `first`: None if only one failed.

        That is the last one, unless max_cost leaves too little for the last model while the first one is sold.
        """
        return first if first is not None and last.code is Code.COST_ABOVE_CAP and is_sold(first) else last

    def may_retry(self, error: TallyError, *, keyed: bool) -> bool:
        """Whether the caller may send the same request again without further checks.

        With an idempotency key (`keyed`) a retry is the same job, so it is safe if only the coordinator could not be reached.
        """
        return error.retry and (not self.possible_cost or (keyed and error.code is Code.COORDINATOR_UNAVAILABLE))

    def headers(self) -> dict[str, str]:
        """The header that lists failed attempts which may still cost something; empty if there are none."""
        return {"x-tally-at-stake": ", ".join(text for text, _ in self._failed_jobs)} if self._failed_jobs else {}
