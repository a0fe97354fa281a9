"""Invitations: asks that a waiting job has no order on, and that could take it now. Its client may order on them.

A slot that is free, and that no waiting job has an order on, is offered to the first jobs that wait for its model, to one job a
slot. So is a slot that is free already when a job begins to wait, as in a burst of jobs that all ordered on the same providers.
What a job does not answer within ANSWER_SECONDS goes to the next one. A client says what it requires and needs of an ask
(ranking_hints.py), and is invited to no other; of one that does not, asks that have in common what its orders have in common come
first. Only half of a job's invitations go to asks that it may refuse.

A job that is about to be overtaken is invited too: it has no order on a busy slot that will go to a job behind it in the fair
order. Each slot that is freed invites one such job at most, so a long queue costs no more invitations than a short one. A job is
also told of the new ask of a provider that it waits for, if the ask that it ordered on is gone. The client judges each ask by its
own demand, which this coordinator does not know, and posts further orders for the same job, which keeps its place. Nothing is
matched without an order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from coordinator.domain.job_queue import QueuedJob
from coordinator.domain.listed_ask import ListedAsk, SlotGroup, SlotKey
from coordinator.domain.matching import likely_requirements
from coordinator.domain.packed_orders import OrderFacts
from coordinator.jobs.live_job import LiveJob
from coordinator.jobs.matchmaker import Matchmaker
from tallystick.protocol.criteria import Demand, is_batch_only
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.messages import Ask
from tallystick.protocol.payer_rules import STRANGER, is_for
from tallystick.protocol.queue_place import MAX_INVITATIONS
from tallystick.protocol.requirements import NO_REQUIREMENTS, Requirements
from tallystick.protocol.types import Address, Hash, JobId
from tallystick.protocol.wire import Candidate

T = TypeVar("T")
ANSWER_SECONDS = 5.0
"""How long a free slot is kept in mind for a client that was invited before the next one is."""
_MAX_SCANNED = 64
"""Waiting jobs that are looked at for one free slot."""
_MAX_OVERTAKEN = 8
"""Waiting jobs that are looked at for one busy slot."""
_MAX_SPARE = 64
"""Asks with a free slot that are looked at for one waiting job, of those that its client probably accepts, and of all."""
_MAX_DEARER = 4
"""Asks of one class of reliability that are dearer than all of the job's orders, after which the class is left."""
_MAX_SWEPT = 8
"""Waiting jobs of one model that are looked at in one sweep."""
_MAX_UNLIKELY = MAX_INVITATIONS // 2
"""Invitations that a job gets to busy slots and unlike asks: its client may refuse these asks, and later ones may fit."""


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
        self._turn = 0
        """Where the next sweep begins among the models and their jobs."""
        matchmaker.on_open = self._slot_freed

    def add(self, queued: QueuedJob, job: LiveJob) -> None:
        """Notes that a job waits from now on."""
        self._jobs[queued] = job

    def invite_to_spare(self, queued: QueuedJob, job: LiveJob) -> bool:
        """Invites a job that waits without a grant to the best slot that is free and that no other job was invited to.

        Returns whether there is one. The job is not woken.
        """
        if queued.granted is not None or queued.ended:
            return False
        orders, likely = job.orders, self._requirements(job)
        exclude = frozenset(job.tried) | {order.provider for order in orders}
        for require in dict.fromkeys((likely, _required(job))):
            demand = Demand(job.model, require=require, exclude=exclude, batch=job.submission.batch, payer=STRANGER)
            dearer = Counter[int]()
            for listed_ask in islice(self._matchmaker.spare_asks(demand), _MAX_SPARE):
                reliability = listed_ask.node.reliability
                if dearer[reliability] >= _MAX_DEARER:
                    continue
                if _is_dearer(listed_ask.message, orders):
                    dearer[reliability] += 1
                elif self._missing(listed_ask.slot_group) > 0 and self._invite(job, listed_ask, likely):
                    return True
        return False

    def _invite(self, job: LiveJob, listed_ask: ListedAsk, likely: Requirements) -> bool:
        """Invites a job to a free slot. Returns whether it may be invited to it. `likely`: see `_requirements`.

        If its client probably refuses, the slot is not kept in mind for it.
        """
        if likely.first_unmet(listed_ask.message) is not None:
            return self._add(job, listed_ask, _MAX_UNLIKELY)
        if not self._add(job, listed_ask):
            return False
        self._unanswered.setdefault(listed_ask.slot_group.key, {})[job.id] = self._tick()
        return True

    def _requirements(self, job: LiveJob) -> Requirements:
        """Returns what an ask meets that the job's client probably accepts: as it said, or else as its orders show."""
        said = None if job.submission.hints is None else job.submission.hints.likely
        if said is not None:
            return said
        asks = (self._matchmaker.book.find(order.ask) for order in job.orders)
        return likely_requirements(ask.message.spec for ask in asks if ask is not None)

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
                if job is not None and self._add(job, listed_ask, _MAX_UNLIKELY):
                    queued.wake()
                    return

    def invite(self, group: SlotGroup) -> None:
        """Invites the first jobs to a slot group that has more free slots than jobs wait for it: likely ones before others."""
        for listed_ask in group.node.asks:
            if listed_ask.slot_group is not group:
                continue
            others: list[tuple[QueuedJob, LiveJob]] = []
            for queued in islice(self._queue.waiting_of(listed_ask.message.model), _MAX_SCANNED):
                if self._missing(group) <= 0:
                    return
                job = self._jobs.get(queued)
                if job is None or _is_dearer(listed_ask.message, job.orders):
                    continue
                likely = self._requirements(job)
                if likely.first_unmet(listed_ask.message) is not None:
                    others.append((queued, job))
                elif self._invite(job, listed_ask, likely):
                    queued.wake()
            invitable = (queued for queued, job in others if self._add(job, listed_ask, _MAX_UNLIKELY))
            for queued in islice(invitable, max(self._missing(group), 0)):
                queued.wake()

    def _missing(self, group: SlotGroup) -> int:
        """Returns how many more jobs may be invited to a slot group: one for each slot that is free and that no job waits for."""
        return group.places - len(self._unanswered.get(group.key, ())) if self._queue.is_open(group, None) else 0

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
        self._invite_first()

    def _invite_first(self) -> None:
        """Invites some of the first jobs that wait for each model, without an invitation that their clients may still answer.

        However many models there are, few jobs are looked at; others are at the next times.
        """
        pending = {job_id for jobs in self._unanswered.values() for job_id in jobs}
        models, left = self._queue.models, _MAX_SCANNED
        for model in _from(models, self._turn):
            if not any(True for _ in self._matchmaker.spare_asks(Demand(model, batch=True))):
                continue
            first = list(islice(self._queue.waiting_of(model), _MAX_SCANNED))
            for queued in _from(first, self._turn)[: min(left, _MAX_SWEPT)]:
                left -= 1
                job = self._jobs.get(queued)
                if job is not None and job.id not in pending and self.invite_to_spare(queued, job):
                    queued.wake()
            if left <= 0:
                break
        self._turn += _MAX_SWEPT

    def take(self, job: LiveJob) -> list[ListedAsk]:
        """Returns the asks that the job's client is to be told of now, each once."""
        for order in job.orders:
            if not self._is_usable(order):
                for listed_ask in self._matchmaker.book.of_provider(order.provider):
                    self._add(job, listed_ask)
        invited = self._invited.get(job.id)
        if invited is None:
            return []
        untold, invited.untold = invited.untold, []
        return untold

    def may_use(self, job: LiveJob, provider: Address) -> bool:
        """Whether a job has an order that this provider could still take."""
        return any(order.provider == provider and self._is_usable(order) for order in job.orders)

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
        orders = job.orders
        if digest in invited.asks or len(invited.asks) >= most or ask.provider in job.tried:
            return False
        if ask.model != job.model or _is_dearer(ask, orders) or _required(job).first_unmet(ask) is not None:
            return False
        if not is_for(ask, STRANGER) or (is_batch_only(ask) and not job.submission.batch):
            return False
        if any(order.provider == ask.provider and self._is_usable(order) for order in orders):
            return False
        self._invited[job.id] = invited
        invited.asks.add(digest)
        invited.untold.append(listed_ask)
        return True

    def _is_usable(self, order: OrderFacts) -> bool:
        """Whether a provider that is connected could still take this order."""
        book = self._matchmaker.book
        return order.deadline > self._now() and (book.find(order.ask) is not None or book.node(order.provider) is None)


def _required(job: LiveJob) -> Requirements:
    """What a job's client requires, as far as it said so: it orders on no other ask."""
    hints = job.submission.hints
    return NO_REQUIREMENTS if hints is None or hints.require is None else hints.require


def _is_dearer(ask: Ask, orders: Iterable[OrderFacts]) -> bool:
    """Whether an ask is dearer than each of these orders, both for input and for output."""
    return all(ask.input_price > order.input_price and ask.output_price > order.output_price for order in orders)


def _from(entries: list[T], turn: int) -> list[T]:
    """Returns the entries from one on that `turn` decides, then those before."""
    begin = turn % len(entries) if entries else 0
    return entries[begin:] + entries[:begin]
