"""A coordinator in a simulation: its own ask book, matcher, queue, exposure and reputation, under a virtual clock.

What is left out: signatures, sealing, sockets, databases and the chain. A payer's funds always cover its jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from random import Random

from coordinator.domain.job_queue import JobQueue, QueuedJob
from coordinator.domain.limits import JobLimits
from coordinator.domain.listed_ask import ListedAsk, SlotKey
from coordinator.jobs.live_job import LiveJob
from coordinator.jobs.matchmaker import Matchmaker
from coordinator.jobs.slot_queue import SlotQueue
from coordinator.ports import Backing
from scripts.simulation.clock import VirtualClock, sleep
from scripts.simulation.parties import NOW, Payer, SimulatedNode
from tallystick.protocol.criteria import Demand, Facts
from tallystick.protocol.eip712 import Domain, Signed, Verified
from tallystick.protocol.messages import Order, Spec
from tallystick.protocol.types import ZERO_ADDRESS, ZERO_HASH, Address, Amount

DOMAIN = Domain(1, ZERO_ADDRESS)
_PURSE = Amount(10**15)
SAMPLED = 64
"""Asks that a policy looks at which does not need all of them."""


class TrustedOrder(Signed[Order]):
    """An order whose signature nobody checks."""

    def verify(self, domain: Domain) -> Verified[Order]:
        """Returns the order at once."""
        del domain
        return Verified(self.message, self.signature, ZERO_HASH)


class SimulatedJob(LiveJob):
    """A job whose orders have no wire form."""

    def pack(self) -> None:
        """Keeps the candidates at hand."""


class _Funds:
    """What each payer has on chain. Everything is settled at once."""

    def __init__(self, reserved: dict[Address, int]) -> None:
        self._reserved = reserved

    async def backing(self, payer: Address, provider: Address, *, fresh: bool = False) -> Backing:
        del provider, fresh
        return Backing(_PURSE, Amount(self._reserved[payer]), Amount(0))

    async def stake(self, provider: Address) -> Amount:
        del provider
        return Amount(0)


class ArrivalQueue(JobQueue):
    """Serves jobs in the order in which they came, whoever pays, for comparison: each job counts as the first of a new payer."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = count()

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
        """Adds a job."""
        payer = Address(f"{payer}/{next(self._numbers)}")
        return super().enter(model, payer, groups, cost=cost, weight=weight, tick=tick, wake=wake, batch=batch, size=size)


class Replica:
    """See the module's docstring. `chance`: draws uniformly from 0 to 1."""

    def __init__(self, clock: VirtualClock, payers: Iterable[Payer], chance: Callable[[], float], queue: JobQueue) -> None:
        self.clock, self.limits = clock, JobLimits()
        self.matchmaker = Matchmaker(
            domain=DOMAIN,
            funds=_Funds({payer.address: payer.reserved for payer in payers}),
            limits=self.limits,
            now=self.unix_time,
            tick=clock.tick,
            chance=chance,
        )
        self.matchmaker.queue = queue
        self.book, self.reputation = self.matchmaker.book, self.matchmaker.reputation
        self.slot_queue = SlotQueue(self.matchmaker, self.limits, address=ZERO_ADDRESS, now=self.unix_time, tick=clock.tick)

    def unix_time(self) -> int:
        """Returns the Unix seconds of the virtual clock."""
        return NOW + int(self.clock.now)

    def connect(self, node: SimulatedNode) -> None:
        """Lists a node's asks."""
        self.book.replace(node.provider, node.asks, node.capacity, *self.matchmaker.quality(node.provider))

    async def sweep(self) -> None:
        """Does once a second what the coordinator does once a second."""
        while True:
            await sleep(1.0)
            self.slot_queue.sweep()

    def new_job(self, job: LiveJob) -> LiveJob:
        """Lets the coordinator's coroutines wait for this job on the virtual clock."""
        job.woken = self.clock.signal()
        return job

    def fitting(self, demand: Demand, *, free: bool = False, among: Random | None = None) -> Iterator[ListedAsk]:
        """Yields the asks that meet a demand, the cheapest first. `free`: only those whose node has a free slot. `among`: only of
        some that it draws, which is as good for a choice among equals.
        """
        facts, specs = Facts(self.unix_time()), dict[Spec, bool]()
        listed = self.book.of_model(demand.model)
        if among is not None and len(listed) > SAMPLED:
            listed = [listed[number] for number in sorted(among.sample(range(len(listed)), SAMPLED))]
        for entry in listed:
            ask = entry.message
            if (free and not entry.slot_group.free) or demand.offer_objection(ask, facts) is not None:
                continue
            if ask.spec not in specs:
                specs[ask.spec] = demand.spec_objection(ask) is None
            if specs[ask.spec]:
                yield entry

    def has_free(self, demand: Demand) -> bool:
        """Whether an ask that meets a demand has a free slot that no job was granted or waits for."""
        return any(self.matchmaker.queue.is_open(entry.slot_group, None) for entry in self.fitting(demand, free=True))

    def cheapest(self, demand: Demand) -> tuple[ListedAsk | None, ListedAsk | None]:
        """Returns the cheapest connected ask that would meet a demand with a free slot, and the cheapest that has one."""
        return next(self.fitting(demand), None), next(self.fitting(demand, free=True), None)
