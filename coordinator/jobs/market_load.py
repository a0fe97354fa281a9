"""How many jobs run and wait in the whole market: at this process, and at the other replicas as they said last.

Replicas tell each other once a second what changed, and everything every REPEAT_SECONDS. What a replica said counts for
STALE_SECONDS, and only while it is on the list. These numbers are for people: nothing is decided by them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import NamedTuple, Protocol

from coordinator.domain.job_queue import JobQueue

REPEAT_SECONDS, STALE_SECONDS = 5.0, 12.0
MAX_MODELS = 64
"""Models with waiting jobs of which a replica tells the others, those with most jobs first."""

MAX_NAME = 400
"""Bytes of a model's name; of those with a longer one nothing is told."""


class Load(NamedTuple):
    """Jobs of one replica: all that it has, and of these the ones that wait for a free slot of a model; "" for all models."""

    model: str
    jobs: int
    waiting: int


class OwnMarket(Protocol):
    """The market of this process."""

    @property
    def live(self) -> int:
        """The number of jobs between order and terminal state."""
        ...

    @property
    def waiting(self) -> int:
        """The number of jobs that wait for a free slot."""
        ...


class MarketLoad:
    """See the module's docstring. `tick` is a monotonic clock in seconds."""

    def __init__(self, market: OwnMarket, queue: JobQueue, tick: Callable[[], float]) -> None:
        self._market, self._queue, self._tick = market, queue, tick
        self.members: Callable[[], Collection[str]] = tuple
        """Returns the ids of the other replicas that live."""
        self._told: dict[str, Load] = {}
        self._told_at = float("-inf")
        self._others: dict[str, dict[str, tuple[float, Load]]] = {}

    @property
    def jobs(self) -> int:
        """The jobs of all replicas between order and terminal state."""
        return self._market.live + sum(load.jobs for load in self._of_others(""))

    @property
    def waiting(self) -> int:
        """The jobs that wait for a free slot at any replica."""
        return self._market.waiting + sum(load.waiting for load in self._of_others(""))

    def waiting_for(self, model: str) -> int:
        """The jobs that wait for a free slot of a model at any replica."""
        return self._queue.count_waiting(model) + sum(load.waiting for load in self._of_others(model))

    def _of_others(self, model: str) -> list[Load]:
        since, members = self._tick() - STALE_SECONDS, self.members()
        entries = (self._others[member].get(model) for member in members if member in self._others)
        return [load for entry in entries if entry is not None for at, load in (entry,) if at >= since]

    def note(self, replica: str, load: Load) -> None:
        """Takes what another replica said. Of one that is not on the list, nothing is kept."""
        members = self.members()
        self._others = {member: told for member, told in self._others.items() if member in members}
        if replica not in members:
            return
        since = self._tick() - STALE_SECONDS
        told = {model: entry for model, entry in self._others.get(replica, {}).items() if entry[0] >= since}
        told.pop(load.model, None)
        if (load.jobs or load.waiting) and len(told) <= MAX_MODELS:
            told[load.model] = self._tick(), load
        self._others[replica] = told

    def news(self) -> list[Load]:
        """Returns what the other replicas are to be told now."""
        models = [model for model in self._queue.models if 0 < len(model.encode()) <= MAX_NAME]
        counts = Counter({model: self._queue.count_waiting(model) for model in models})
        current = {model: Load(model, 0, count) for model, count in counts.most_common(MAX_MODELS) if count}
        current[""] = Load("", self._market.live, self._market.waiting)
        repeats = self._tick() - self._told_at >= REPEAT_SECONDS
        gone = [Load(model, 0, 0) for model in self._told if model not in current]
        told, self._told = self._told, current
        if repeats:
            self._told_at = self._tick()
        return [*gone, *(load for model, load in current.items() if repeats or told.get(model) != load)]
