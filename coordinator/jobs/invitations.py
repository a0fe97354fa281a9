"""Invitations: asks that a waiting job has no order on, and that could take it now. Its client may order on them.

A slot that is free, and that no waiting job has an order on, is offered to the first jobs that wait for its model, to one job a
slot. What a job does not answer within ANSWER_SECONDS goes to the next one. A job that is about to be overtaken is invited too:
it has no order on a busy slot that will go to a job behind it in the fair order. Each slot that is freed invites one such job at
most, so a long queue costs no more invitations than a short one. A job is also told of the new ask of a provider that it waits
for, if the ask that it ordered on is gone. The client judges each ask by its own demand, which this coordinator does not know,
and posts further orders for the same job, which keeps its place. Nothing is matched without an order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from coordinator.domain.job_queue import QueuedJob
from coordinator.domain.listed_ask import ListedAsk, SlotGroup, SlotKey
from coordinator.jobs.live_job import LiveJob
from coordinator.jobs.matchmaker import Matchmaker
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.messages import Ask, Terms
from tallystick.protocol.queue_place import MAX_INVITATIONS
from tallystick.protocol.types import Address, Hash, JobId
from tallystick.protocol.wire import Candidate

ANSWER_SECONDS = 5.0
"""How long a free slot is kept in mind for a client that was invited before the next one is."""
_MAX_SCANNED = 64
"""Waiting jobs that are looked at for one free slot."""
_MAX_OVERTAKEN = 8
"""Waiting jobs that are looked at for one busy slot."""
_MAX_BUSY = MAX_INVITATIONS // 2
"""Invitations that a job gets to busy slots: its client may refuse these asks, and later ones may be free."""


@dataclass(slots=True)
class _Invited:
    """The asks that one job was invited to, and those of them that its client is still to be told of."""

    asks: set[Hash] = field(default_factory=set)
    untold: list[ListedAsk] = field(default_factory=list)


class Invitations:
    """See the module's docstring. `now` is Unix time, `tick` a monotonic clock, both in seconds."""

    def __init__(self, matchmaker: Matchmaker, now: Callable[[], float], tick: Callable[[], float]) -> None:
        self._matchmaker, self._queue, self._now, self._tick = matchmaker, matchmaker.queue, now, tick
        self._jobs: dict[QueuedJob, LiveJob] = {}
        self._invited: dict[JobId, _Invited] = {}
        self._unanswered: dict[SlotKey, dict[JobId, float]] = {}
        """When jobs were invited to each slot group, for those that have not ordered since."""
        matchmaker.on_open = self._slot_freed

    def add(self, queued: QueuedJob, job: LiveJob) -> None:
        """Notes that a job waits from now on."""
        self._jobs[queued] = job

    def discard(self, queued: QueuedJob, job: LiveJob) -> None:
        """Notes that a job waits no more."""
        self._jobs.pop(queued, None)
        self._invited.pop(job.id, None)

    def _slot_freed(self, group: SlotGroup) -> None:
        if not len(self._queue):  # nobody waits: as after most jobs
            return
        self._invite_overtaken(group)
        self.invite(group)

    def _invite_overtaken(self, group: SlotGroup) -> None:
        """Invites the first job that comes before the one that is next at this group, and has no order there."""
        following = self._queue.following(group)
        if following is None:
            return
        for listed_ask in group.node.asks:
            if listed_ask.slot_group is not group:
                continue
            for queued in islice(self._queue.waiting_of(listed_ask.message.model), _MAX_OVERTAKEN):
                if queued.precedence >= following.precedence:
                    break
                job = self._jobs.get(queued)
                if job is not None and self._add(job, listed_ask, _MAX_BUSY):
                    queued.wake()
                    return

    def invite(self, group: SlotGroup) -> None:
        """Invites the first jobs to a slot group that has more free slots than jobs wait for it."""
        waiting = self._unanswered.get(group.key, {})
        for listed_ask in group.node.asks:
            if listed_ask.slot_group is not group:
                continue
            for queued in islice(self._queue.waiting_of(listed_ask.message.model), _MAX_SCANNED):
                if len(waiting) >= group.places or not self._queue.is_open(group, None):
                    return
                job = self._jobs.get(queued)
                if job is not None and self._add(job, listed_ask):
                    waiting = self._unanswered.setdefault(group.key, waiting)
                    waiting[job.id] = self._tick()
                    queued.wake()

    def sweep(self) -> None:
        """Runs once a second: invites further jobs in place of those that did not answer."""
        overdue = self._tick() - ANSWER_SECONDS
        for key, jobs in list(self._unanswered.items()):
            for job_id in [job_id for job_id, at in jobs.items() if at <= overdue or job_id not in self._invited]:
                del jobs[job_id]
            if not jobs:
                del self._unanswered[key]
            for group in self._matchmaker.book.groups_of(key):
                self.invite(group)

    def take(self, job: LiveJob) -> list[ListedAsk]:
        """Returns the asks that the job's client is to be told of now, each once."""
        for candidate in job.submission.candidates:
            if not self._is_usable(candidate):
                for listed_ask in self._matchmaker.book.of_provider(candidate.order.message.provider):
                    self._add(job, listed_ask)
        invited = self._invited.get(job.id)
        if invited is None:
            return []
        untold, invited.untold = invited.untold, []
        return untold

    def may_use(self, job: LiveJob, provider: Address) -> bool:
        """Whether a job has an order that this provider could still take."""
        return any(
            candidate.order.message.provider == provider and self._is_usable(candidate) for candidate in job.submission.candidates
        )

    def check(self, job: LiveJob, candidate: Candidate) -> None:
        """Raises Refusal (order_terms) for an order on an ask that the job was not invited to."""
        invited = self._invited.get(job.id)
        if invited is None or candidate.terms.ask not in invited.asks:
            text = f"terms.ask: expected an ask that job {job.id.hex()} was invited to, got 0x{candidate.terms.ask.hex()}"
            raise Refusal(Code.ORDER_TERMS, text)

    def answered(self, job: LiveJob, key: SlotKey) -> None:
        """Notes that a job ordered on an ask that it was invited to."""
        self._unanswered.get(key, {}).pop(job.id, None)

    def _add(self, job: LiveJob, listed_ask: ListedAsk, most: int = MAX_INVITATIONS) -> bool:
        """Adds an ask that the job was not invited to before and may be ordered on, as one of `most`. Returns whether it did."""
        ask, digest = listed_ask.message, listed_ask.digest
        invited = self._invited.get(job.id) or _Invited()
        candidates = job.submission.candidates
        if digest in invited.asks or len(invited.asks) >= most or ask.provider in job.tried:
            return False
        if ask.model != candidates[0].terms.model or all(_is_dearer(ask, candidate.terms) for candidate in candidates):
            return False
        if any(candidate.order.message.provider == ask.provider and self._is_usable(candidate) for candidate in candidates):
            return False
        self._invited[job.id] = invited
        invited.asks.add(digest)
        invited.untold.append(listed_ask)
        return True

    def _is_usable(self, candidate: Candidate) -> bool:
        """Whether a provider that is connected could still take this order."""
        order, book = candidate.order.message, self._matchmaker.book
        return order.deadline > self._now() and (book.find(candidate.terms.ask) is not None or book.node(order.provider) is None)


def _is_dearer(ask: Ask, terms: Terms) -> bool:
    return ask.input_price > terms.input_price and ask.output_price > terms.output_price
