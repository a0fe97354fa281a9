"""Hedging: gives a job whose first output is late to a second provider too. The first output of either decides.

The client asks for it with the submission's `hedgeAfterMs` and has signed an order on each provider already. A job is hedged at
most once, within the limits of `domain.hedge_limits`, and only on a free slot for which no other job waits. The choice of the
second provider may read the chain, so it runs beside the relay, which takes the new attempt from the job's inbox.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import structlog

from coordinator.domain.hedge_limits import HedgeLosses, HedgeShare
from coordinator.jobs.attempt import Attempt
from coordinator.jobs.live_job import LiveJob
from coordinator.jobs.matchmaker import Matchmaker, SlotsBusy
from tallystick.protocol.errors import TallyError
from tallystick.protocol.jobs import State
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.pricing import Usage, charge
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import Kind, pack_link

log = structlog.get_logger()
BEGIN = Kind.DISPATCH
"""Kind of the inbox frame with which a second attempt begins; no node sends it."""
CallLater = Callable[[float, Callable[[], None]], Callable[[], object]]
"""Calls a function after some seconds; returns how to cancel that."""
STARTED, WON, SHARE, LOSSES, NO_SLOT, NOT_ADMITTED = RESULTS = ("started", "won", "share", "losses", "no_slot", "not_admitted")


def call_later(seconds: float, callback: Callable[[], None]) -> Callable[[], object]:
    """Calls a function after some seconds of the event loop's clock."""
    return asyncio.get_running_loop().call_later(seconds, callback).cancel


class _Pending:
    """A hedge of one job that may come, or has been matched and has not begun."""

    __slots__ = ("attempt", "cancel_timer", "matching")

    def __init__(self) -> None:
        self.cancel_timer: Callable[[], object] = lambda: None
        self.matching: asyncio.Task[None] | None = None
        self.attempt: Attempt | None = None


class Hedging:
    """See the module's docstring. `share`: the share of jobs that may be hedged, 0 to 1. `tick`: a monotonic clock in seconds."""

    def __init__(self, matchmaker: Matchmaker, share: float, tick: Callable[[], float], later: CallLater = call_later) -> None:
        self._matchmaker, self._tick, self._later = matchmaker, tick, later
        self.share, self.losses = HedgeShare(share), HedgeLosses()
        self.counts: Counter[str] = Counter()
        """Jobs that were hedged, that the second provider won, and that were not hedged, by the reason."""
        self._pending: dict[JobId, _Pending] = {}
        self.stopped = False
        """Whether no second attempt begins any more, because this process stops."""

    def arm(self, job: LiveJob) -> None:
        """Notes that an attempt was dispatched, and lets a second one follow if its output is late."""
        if len(job.attempts) == 1:
            self.share.add_job(job.payer)
        after = job.submission.hedge_after_ms
        if after is not None and not job.hedged and len(job.candidates) > len(job.attempts):
            pending = self._pending[job.id] = _Pending()
            pending.cancel_timer = self._later(after / 1_000, lambda: self._start(job, pending))

    def disarm(self, job: LiveJob) -> None:
        """Ends what was armed: no second attempt begins any more, and one that has not begun gives its slot back."""
        pending = self._pending.pop(job.id, None)
        if pending is None:
            return
        pending.cancel_timer()
        if pending.matching is not None:
            pending.matching.cancel()
        if pending.attempt is not None:
            self._matchmaker.release(pending.attempt)

    def take(self, job: LiveJob) -> Attempt | None:
        """Returns the second attempt if the job still needs it. Otherwise its slot is given back."""
        pending = self._pending.get(job.id)
        attempt = None if pending is None else pending.attempt
        if pending is None or attempt is None:
            return None
        if self.stopped or not job.undecided or job.cancelled:
            self.disarm(job)
            return None
        pending.attempt = None
        self.disarm(job)
        self.share.add_hedge(job.payer)
        self.counts[STARTED] += 1
        return attempt

    def _start(self, job: LiveJob, pending: _Pending) -> None:
        if self.stopped or not job.undecided or job.cancelled or self._pending.get(job.id) is not pending:
            return
        if not self.share.allows(job.payer):
            self._refuse(job, SHARE)
        elif not self.losses.allows(job.provider, self._tick()):
            self._refuse(job, LOSSES)
        else:
            pending.matching = asyncio.create_task(self._match(job, pending), name=f"hedge {job.id.hex()}")

    async def _match(self, job: LiveJob, pending: _Pending) -> None:
        try:
            attempt = await self._matchmaker.choose(job, free_slot=True)
        except SlotsBusy:
            self._refuse(job, NO_SLOT)
            return
        except TallyError:
            self._refuse(job, NOT_ADMITTED)
            return
        if self._pending.get(job.id) is not pending or not self.losses.allows(attempt.provider, self._tick()):
            self._matchmaker.release(attempt)
            self._refuse(job, LOSSES)
            return
        pending.attempt = attempt
        job.post(job.current, pack_link(BEGIN, job.id))

    def _refuse(self, job: LiveJob, why: str) -> None:
        log.info("job not hedged", job=job.id.hex(), reason=why)
        self.counts[why] += 1

    # What it cost

    def ended(self, job: LiveJob, winner: Attempt | None, receipt: Receipt | None) -> None:
        """Notes the end of a job: what its provider earned, and what each outrun attempt would have cost.

        The winner's usage stands for theirs. Without a receipt, the cap of their orders does.
        """
        tick = self._tick()
        if winner is not None and receipt is not None:
            self.losses.add_earned(winner.provider, receipt.cost, tick)
            if winner.hedged:
                self.counts[WON] += 1
        for attempt in job.attempts:
            if attempt.state is State.CANCELLED and attempt.outrun:
                terms = attempt.candidate.terms
                usage = None if receipt is None else Usage(receipt.input_tokens, 0, receipt.output_tokens)
                cost = terms.max_cost if usage is None else min(terms.max_cost, charge(terms, usage, Outcome.COMPLETED))
                self.losses.add_lost(attempt.provider, cost, tick)
