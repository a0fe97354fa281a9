"""The queue of jobs that wait for a slot: fair between payers, bounded, with a place that each job can be told. Pure.

The order is start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), per model. Each job has a start tag: the finish tag of
its payer's last job, or the virtual time if that is later. Its finish tag is the start tag plus cost / weight. The virtual time
is the start tag of the job that was served last, and at most the lowest one that still waits: a job that is far behind may be
served early by a slot that nobody else waits for, which must not put newcomers at other slots behind jobs like it. The cost of a
job is its cap, the weight is what its payer reserved. So a payer who floods the queue delays its own jobs, and a payer with one
job waits for little more than the jobs under way. A job that leaves before it was granted a slot costs its payer nothing. The
slots of an engine have a clock too, the highest virtual time at which they were granted, at which jobs of all its models begin.

Interactive jobs go before batch jobs. Each class of each model has an order of its own. While batch jobs wait for a slot group,
at least one of BATCH_EVERY of its slots goes to them, so that they are never starved.

The queue is bounded in jobs and in the bytes of their requests. One model may take half of the bytes, and a bounded number of
jobs, of which batch jobs may be half: neither a model nor a class keeps the others out.

A job waits for the slot groups of all asks that it has orders on. A free slot, or a place in the engine's queue, goes to the
first job that waits for its group. Until that job is matched, the slot is granted to it and to no other.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter

from sortedcontainers import SortedKeyList

from coordinator.domain.listed_ask import SlotGroup, SlotKey
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.protocol.types import Address

MAX_WAITING = 10_000
"""Jobs that wait at one coordinator."""
MAX_PER_MODEL = 5_000
"""Jobs that wait for one model."""
MAX_BYTES = 256 << 20
"""Bytes of the requests of all jobs that wait."""
BATCH_EVERY = 8
MIN_WEIGHT = 100_000
"""Base units that a payer counts as having reserved at least: ten cents."""
_SCALE = 1_000_000
_REMEMBERED_GRANTS = 32
"""Grants of a model from which the time to the next ones is estimated."""
MAX_RETRY_SECONDS = 60
_MAX_CLOCKS = 20_000
"""Slot groups whose last tag is remembered: twice as many as nodes can be connected."""
GRANT_SECONDS = 15.0
"""How long a job may take to use a slot that it was granted. A client that does not read would keep it from others."""
_tag = attrgetter("tag")


@dataclass(slots=True, eq=False)
class QueuedJob:
    """A job that waits. `number` makes its tag unique."""

    model: str
    payer: Address
    groups: tuple[SlotKey, ...]
    start: int
    share: int
    """Its finish tag minus its start tag."""
    number: int
    batch: bool
    size: int
    """Bytes of its request."""
    wake: Callable[[], None]
    """Called when a slot is granted or the wait ends otherwise."""
    wake_at: float = 0.0
    """When the job is to be woken at the latest, in seconds of the same clock."""
    granted: SlotKey | None = None
    granted_at: float = 0.0
    kept_until: float = 0.0
    """Until when the job is not ended although no provider is left: its client may order on another ask."""
    using: bool = False
    """Whether the job was assigned to the slot that it was granted, and the group counts it."""
    ended: bool = False
    """Whether no provider is left that it could wait for, or its grant expired."""
    tag: tuple[int, int] = field(init=False)
    """Its place in the fair order."""

    def __post_init__(self) -> None:
        self.tag = self.start, self.number

    @property
    def queue(self) -> tuple[str, bool]:
        """Its model and its class."""
        return self.model, self.batch

    @property
    def precedence(self) -> tuple[bool, tuple[int, int]]:
        """Its place in the fair order of both classes; the turns of batch jobs are not counted."""
        return self.batch, self.tag


@dataclass(slots=True)
class _ModelQueue:
    """The waiting jobs of one class of a model, the virtual time, and the last grants. `granted`: jobs that have a grant."""

    virtual_time: int = 0
    granted: int = 0
    size: int = 0
    """Bytes of the requests of its jobs."""
    jobs: SortedKeyList[QueuedJob, tuple[int, int]] = field(default_factory=lambda: SortedKeyList(key=_tag))
    finish_tags: dict[Address, int] = field(default_factory=dict)
    """Per payer; those that are not above the virtual time mean nothing."""
    tidy_at: int = _REMEMBERED_GRANTS
    """The number of finish tags from which those that mean nothing are removed."""
    grants: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED_GRANTS))

    def seconds_per_grant(self, tick: float) -> float | None:
        """Returns the mean time between the last grants and now, or None without any."""
        return (tick - self.grants[0]) / len(self.grants) if self.grants else None

    def refund(self, job: QueuedJob) -> None:
        """Takes a job that was never granted a slot off its payer's finish tag."""
        tag = self.finish_tags.get(job.payer, 0) - job.share
        if tag > self.virtual_time:
            self.finish_tags[job.payer] = tag
        else:
            self.finish_tags.pop(job.payer, None)

    def serve(self, start: int, tick: float) -> None:
        """Notes that a job with this start tag, which waits no more, was granted a slot."""
        self.virtual_time = max(self.virtual_time, min(start, self.jobs[0].start) if self.jobs else start)
        self.granted += 1
        self.grants.append(tick)
        if len(self.finish_tags) > self.tidy_at:
            self.finish_tags = {payer: tag for payer, tag in self.finish_tags.items() if tag > self.virtual_time}
            self.tidy_at = 2 * len(self.finish_tags) + _REMEMBERED_GRANTS


def _keys(group: SlotGroup) -> tuple[SlotKey, SlotKey]:
    """Returns the keys of the jobs that may wait for a group: those of its asks, and those that came while its node was away."""
    return group.key, (group.provider, None)


class JobQueue:
    """All jobs that wait for a slot. `tick` arguments are seconds of a monotonic clock."""

    def __init__(self, max_waiting: int = MAX_WAITING, max_per_model: int = MAX_PER_MODEL, max_bytes: int = MAX_BYTES) -> None:
        self._max_waiting, self._max_per_model, self._max_bytes = max_waiting, max_per_model, max_bytes
        self._models: dict[tuple[str, bool], _ModelQueue] = {}
        self._by_group: dict[tuple[SlotKey, bool], SortedKeyList[QueuedJob, tuple[int, int]]] = {}
        self._granted: Counter[SlotKey] = Counter()
        """Grants of each group that are not used yet."""
        self._clocks: OrderedDict[tuple[SlotKey, bool], int] = OrderedDict()
        """The highest virtual time of each class at which each group was granted, for those with the latest grants."""
        self._since_batch: Counter[SlotKey] = Counter()
        """Slots of each group that interactive jobs were granted since a batch job was, while batch jobs waited."""
        self.granted_jobs: set[QueuedJob] = set()
        self._count = 0
        self._waiting = 0
        self._bytes = 0

    def __len__(self) -> int:
        return self._waiting

    def __iter__(self) -> Iterator[QueuedJob]:
        """Returns the jobs that wait without a grant."""
        return (job for queue in self._models.values() for job in queue.jobs)

    @property
    def models(self) -> list[str]:
        """The models for which jobs wait without a grant."""
        return list(dict.fromkeys(model for (model, _), queue in self._models.items() if queue.jobs))

    def waiting_of(self, model: str) -> Iterator[QueuedJob]:
        """Returns the jobs that wait for a model without a grant, in order, interactive ones first."""
        return chain.from_iterable(queue.jobs for queue in self._classes_of(model))

    def count_waiting(self, model: str) -> int:
        """Returns the number of jobs that wait for a model without a grant."""
        return sum(len(queue.jobs) for queue in self._classes_of(model))

    def _classes_of(self, model: str) -> list[_ModelQueue]:
        return [queue for queue in map(self._models.get, ((model, False), (model, True))) if queue is not None]

    @property
    def is_idle(self) -> bool:
        """Whether no job waits and no slot is granted, so that every free slot is open."""
        return not self._waiting and not self._granted

    def waiting_for(self, group: SlotGroup) -> int:
        """Returns the number of jobs that wait for this slot group."""
        if not self._waiting:
            return 0
        return sum(len(self._by_group.get((key, batch), ())) for key in _keys(group) for batch in (False, True))

    def is_open(self, group: SlotGroup, job: QueuedJob | None) -> bool:
        """Whether a job may take a slot of this group now: it was granted one, or one is free that nobody waits for."""
        if job is not None and job.granted == group.key and not job.using:
            return True
        return group.places > self._granted.get(group.key, 0) and not self.waiting_for(group)

    def use_grant(self, group: SlotGroup, job: QueuedJob | None) -> None:
        """Notes that a job is assigned to a group now. If it was granted this slot, the grant no longer counts beside it."""
        if job is not None and job.granted == group.key and not job.using:
            job.using = True
            self._uncount_grant(job)

    def enter(
        self,
        model: str,
        payer: Address,
        groups: Iterable[SlotKey],
        *,
        cost: int,
        weight: int,
        tick: float,
        wake: Callable[[], None],
        batch: bool = False,
        size: int = 0,
    ) -> QueuedJob:
        """Adds a job that may be served by any of these slot groups. `cost`, `weight`: base units; `size`: bytes of its request.

        Raises Unavailable (rate_limited) with the seconds after which there may be room if the queue is full.
        """
        self._check_room(model, size, tick, batch=batch)
        queue = self._models.setdefault((model, batch), _ModelQueue())
        groups = tuple(dict.fromkeys(groups))
        clocks = (self._clocks.get((key, batch), 0) for key in groups)
        start = max(queue.virtual_time, queue.finish_tags.get(payer, 0), *clocks)
        share = max(1, cost * _SCALE // max(weight, MIN_WEIGHT))
        queue.finish_tags[payer] = start + share
        self._count += 1
        job = QueuedJob(model, payer, groups, start, share, self._count, batch, size, wake)
        self._list(job)
        return job

    def _check_room(self, model: str, size: int, tick: float, *, batch: bool) -> None:
        queue, classes = self._models.get((model, batch)), self._classes_of(model)
        of_model, bytes_of_model = sum(len(each.jobs) for each in classes), sum(each.size for each in classes)
        of_class = 0 if queue is None else len(queue.jobs)
        if self._waiting >= self._max_waiting:
            text = f"this coordinator's queue is full: {self._waiting} jobs wait for a provider (max_waiting_jobs)"
        elif of_model >= self._max_per_model:
            text = f"the queue of {model!r} is full: {of_model} jobs wait for a provider (max_waiting_jobs_per_model)"
        elif batch and of_class >= max(1, self._max_per_model // 2):
            text = f"the queue of {model!r} is full for batch jobs: {of_class} of them wait (half of max_waiting_jobs_per_model)"
        elif self._bytes + size > self._max_bytes or bytes_of_model + size > max(1, self._max_bytes // 2):
            text = f"the requests that wait for {model!r} and for other models fill this coordinator's memory (max_waiting_mib)"
        else:
            return
        error = Unavailable(Code.RATE_LIMITED, f"{text}; send it again later", fault=Fault.COORDINATOR)
        error.retry_after = self.retry_after(model, tick, batch=batch)
        raise error

    def retry_after(self, model: str, tick: float, *, batch: bool) -> int:
        """Returns the seconds in which half of the jobs that wait in a class of a model are served, as far as was measured."""
        queue = self._models.get((model, batch))
        pace = None if queue is None else queue.seconds_per_grant(tick)
        return 1 if queue is None or pace is None else min(max(1, round(pace * len(queue.jobs) / 2)), MAX_RETRY_SECONDS)

    def enter_again(self, job: QueuedJob, groups: Iterable[SlotKey]) -> None:
        """Returns a job to its place, after it could not use the slot that it was granted. It waits for these groups."""
        self._end_grant(job)
        job.groups, job.ended = tuple(dict.fromkeys(groups)), False
        self._models.setdefault(job.queue, _ModelQueue(virtual_time=job.start))
        self._list(job)

    def join(self, job: QueuedJob, groups: Iterable[SlotKey]) -> None:
        """Lets a job that keeps its place wait for these slot groups too."""
        if job.granted is None and not job.ended:
            self._unlist(job)
            job.groups = tuple(dict.fromkeys((*job.groups, *groups)))
            self._list(job)

    def leave(self, job: QueuedJob) -> None:
        """Ends the wait of a job, or the grant that it has."""
        if job.granted is not None:
            self._end_grant(job)
        elif not job.ended:
            self._unlist(job)
            self._models[job.queue].refund(job)
        self._forget_if_idle(job.queue)

    def _forget_if_idle(self, key: tuple[str, bool]) -> None:
        queue = self._models.get(key)
        if queue is not None and not queue.jobs and not queue.granted:
            del self._models[key]

    def offer(self, group: SlotGroup, tick: float) -> None:
        """Grants the free slots and queue places of a group to the first jobs that wait for it, and wakes them."""
        if not self._waiting:
            self._since_batch.clear()
            return
        key = group.key
        while group.places > self._granted.get(key, 0):
            job = self._next(group)
            if job is None:
                return
            self._unlist(job)
            job.granted, job.granted_at, job.using = key, tick, False
            self._granted[key] += 1
            self.granted_jobs.add(job)
            queue, clock = self._models[job.queue], (key, job.batch)
            queue.serve(job.start, tick)
            self._clocks[clock] = max(self._clocks.get(clock, 0), queue.virtual_time)
            self._clocks.move_to_end(clock)
            if len(self._clocks) > _MAX_CLOCKS:
                self._clocks.popitem(last=False)
            job.wake()

    def _next(self, group: SlotGroup) -> QueuedJob | None:
        """Returns the job that gets the group's next slot: the first interactive one, unless it is the turn of a batch job."""
        interactive, batch = self._first(group, batch=False), self._first(group, batch=True)
        if interactive is None or batch is None:
            self._since_batch.pop(group.key, None)
            return interactive or batch
        if self._since_batch[group.key] >= BATCH_EVERY - 1:
            del self._since_batch[group.key]
            return batch
        if len(self._since_batch) >= _MAX_CLOCKS:
            self._since_batch.clear()
        self._since_batch[group.key] += 1
        return interactive

    def _first(self, group: SlotGroup, *, batch: bool) -> QueuedJob | None:
        queues = (self._by_group.get((key, batch)) for key in _keys(group))
        return min((jobs[0] for jobs in queues if jobs), key=_tag, default=None)

    def following(self, group: SlotGroup) -> QueuedJob | None:
        """Returns the first job that waits for a group, an interactive one if there is any."""
        if not self._waiting:
            return None
        return self._first(group, batch=False) or self._first(group, batch=True)

    def end_without(self, connected: Callable[[SlotKey], bool], tick: float = math.inf) -> None:
        """Ends and wakes the jobs that wait for slot groups which are all gone."""
        for job in [job for job in self if tick >= job.kept_until and not any(map(connected, job.groups))]:
            self._unlist(job)
            self._models[job.queue].refund(job)
            job.ended = True
            job.wake()

    def expire_grants(self, tick: float) -> list[SlotKey]:
        """Ends the grants of jobs that did not take their slot in time, whose clients do not read. Returns their groups."""
        expired = sorted((job for job in self.granted_jobs if tick - job.granted_at > GRANT_SECONDS), key=_tag)
        keys = [job.granted for job in expired if job.granted is not None]
        for job in expired:
            self._end_grant(job)
            job.ended = True
            job.wake()
        return keys

    def _end_grant(self, job: QueuedJob) -> None:
        if job.granted is None:
            return
        if not job.using:
            self._uncount_grant(job)
        self._models[job.queue].granted -= 1
        job.granted, job.using = None, False

    def _uncount_grant(self, job: QueuedJob) -> None:
        if job.granted is None:
            return
        self.granted_jobs.discard(job)
        self._granted[job.granted] -= 1
        if not self._granted[job.granted]:
            del self._granted[job.granted]

    def place(self, job: QueuedJob, tick: float) -> tuple[int, float | None]:
        """Returns the job's place, 1 for the next, and the expected wait in seconds; None if nothing was measured yet."""
        queue = self._models[job.queue]
        own = queue.jobs.bisect_key_left(job.tag) + 1
        first = self._models.get((job.model, False)) if job.batch else None
        pace = queue.seconds_per_grant(tick)
        return own + (0 if first is None else len(first.jobs)), None if pace is None else own * pace

    def _list(self, job: QueuedJob) -> None:
        self._count_waiting(job, 1)
        self._models[job.queue].jobs.add(job)
        for key in job.groups:
            if (key, job.batch) not in self._by_group:
                self._by_group[key, job.batch] = SortedKeyList(key=_tag)
            self._by_group[key, job.batch].add(job)

    def _unlist(self, job: QueuedJob) -> None:
        self._count_waiting(job, -1)
        self._models[job.queue].jobs.remove(job)
        for key in job.groups:
            self._by_group[key, job.batch].remove(job)
            if not self._by_group[key, job.batch]:
                del self._by_group[key, job.batch]

    def _count_waiting(self, job: QueuedJob, change: int) -> None:
        self._waiting += change
        self._bytes += change * job.size
        self._models[job.queue].size += change * job.size
