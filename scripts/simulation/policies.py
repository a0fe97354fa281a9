"""Policies that are compared: how a client's shortlist is made, whether conversations stay, and the order of the queue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from coordinator.domain.ask_book import ListedAsk
from coordinator.domain.job_queue import JobQueue
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


def _ranked(key: Callable[[ListedAsk], object]) -> Selection:
    def select(replica: Replica, demand: Demand) -> list[ListedAsk]:
        listed = replica.free_asks(demand) or replica.busy_asks(demand)
        if not listed:
            raise Unavailable(Code.NO_PROVIDER, f"no provider of {demand.model!r} fits", fault=Fault.PROVIDER)
        return sorted(listed, key=key)[: demand.limit]  # type: ignore[arg-type,type-var]  # keys of one policy are alike

    return select


def _cheapest(_random: Random) -> Selection:
    return _ranked(lambda entry: entry.price_key)


def _least_loaded(random: Random) -> Selection:
    return _ranked(lambda entry: (entry.node.load, random.random()))


def _round_robin(_random: Random) -> Selection:
    turns: Counter[str] = Counter()
    last: dict[str, int] = {}

    def select(replica: Replica, demand: Demand) -> list[ListedAsk]:
        chosen = _ranked(lambda entry: (last.get(entry.provider, 0), entry.provider))(replica, demand)
        turns[demand.model] += 1
        last[chosen[0].provider] = turns[demand.model]
        return chosen

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
