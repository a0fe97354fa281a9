"""Policies that are compared: how a client's shortlist is made, whether conversations stay, and the order of the queue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from random import Random

from coordinator.domain.job_queue import JobQueue
from coordinator.domain.listed_ask import ListedAsk
from scripts.simulation.replica import ArrivalQueue, Replica
from tallystick.protocol.criteria import Demand
from tallystick.protocol.errors import Code, Fault, Unavailable

Selection = Callable[[Replica, Demand], list[ListedAsk]]


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy. `selection` returns a new selection, given random numbers; None: the matchmaker's own shortlist and ranking."""

    name: str
    title: str
    selection: Callable[[Random], Selection] | None = None
    affinity: bool = False
    queue: Callable[[], JobQueue] = JobQueue


def _found(listed: list[ListedAsk], demand: Demand) -> list[ListedAsk]:
    if not listed:
        raise Unavailable(Code.NO_PROVIDER, f"no provider of {demand.model!r} fits", fault=Fault.PROVIDER)
    return listed


def _cheapest(_random: Random) -> Selection:
    def select(replica: Replica, demand: Demand) -> list[ListedAsk]:
        free = list(islice(replica.fitting(demand, free=True), demand.limit))
        return _found(free or list(islice(replica.fitting(demand), demand.limit)), demand)

    return select


def _least_loaded(random: Random) -> Selection:
    def select(replica: Replica, demand: Demand) -> list[ListedAsk]:
        listed = list(replica.fitting(demand, free=True, among=random)) or list(replica.fitting(demand))
        return sorted(_found(listed, demand), key=lambda entry: (entry.slot_group.load, random.random()))[: demand.limit]

    return select


def _round_robin(_random: Random) -> Selection:
    turns: Counter[str] = Counter()
    last: dict[tuple[str, str], int] = {}

    def select(replica: Replica, demand: Demand) -> list[ListedAsk]:
        listed = list(replica.fitting(demand, free=True)) or list(replica.fitting(demand))
        chosen = sorted(_found(listed, demand), key=lambda entry: (last.get((demand.model, entry.provider), 0), entry.provider))
        turns[demand.model] += 1
        last[demand.model, chosen[0].provider] = turns[demand.model]
        return chosen[: demand.limit]

    return select


POLICIES = (
    Policy("as_shipped", "as shipped", affinity=True),
    Policy("cheapest", "cheapest only", _cheapest),
    Policy("least_loaded", "least loaded", _least_loaded),
    Policy("round_robin", "round robin", _round_robin),
    Policy("no_affinity", "as shipped, without affinity"),
    Policy("arrival_order", "as shipped, queue in order of arrival", affinity=True, queue=ArrivalQueue),
)
BY_NAME = {policy.name: policy for policy in POLICIES}
