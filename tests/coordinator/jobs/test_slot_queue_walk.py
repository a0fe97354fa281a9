"""Random walks over a busy market: no slot stays free while a job waits for it, and nothing is left when all jobs have ended."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from random import Random

import pytest

from coordinator.jobs.live_job import LiveJob
from coordinator.ports import Backing
from coordinator.storage.memory import MemoryFunds
from tallystick.protocol.errors import Code, TallyError, Unavailable
from tallystick.protocol.link import Capacity
from tallystick.protocol.types import Address, Amount
from tallystick.protocol.wire import Kind, Submission
from tallystick.runtime.lean_event import LeanEvent
from tests.coordinator.harness import CAP, MODEL, Client, World, person, quiet

STEPS = 1_000
PAYERS = [person(f"payer {number}") for number in range(5)]


@dataclass
class FlakyFunds(MemoryFunds):
    """Answers after a while, and sometimes fails."""

    random: Random = field(default_factory=Random)

    async def backing(self, payer: Address, provider: Address, *, fresh: bool = False) -> Backing:
        for _ in range(self.random.randrange(4)):
            await asyncio.sleep(0)
        if self.random.random() < 0.05:
            raise Unavailable(Code.CHAIN_UNAVAILABLE, "the chain does not answer")
        return await super().backing(payer, provider, fresh=fresh)


class Walk:
    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.world = World(funds=FlakyFunds(random=self.random))
        for payer in PAYERS:
            self.world.funds.free[payer.address] = Amount(self.random.choice((CAP // 2, CAP, 3 * CAP, 10_000 * CAP)))
        for number in range(5):
            model = self.random.choice((MODEL, MODEL, "other"))
            self.world.node(f"node {number}", slots=self.random.randrange(1, 4), output_price=2_000_000 + number % 3, model=model)
        self.drivers: list[asyncio.Task[None]] = []
        self.jobs: list[LiveJob] = []
        self.reads = [LeanEvent(), LeanEvent()]
        """Half of the clients read only while the first event is set."""
        self.reads[1].set()

    async def run(self) -> None:
        moves = (
            self.place,
            self.place,
            self.place,
            self.end_attempt,
            self.flap,
            self.report,
            self.cancel,
            self.leave,
            self.pause,
        )
        for _ in range(STEPS):
            self.random.choice(moves)()
            for _ in range(self.random.randrange(4)):
                await asyncio.sleep(0)
            self.assert_no_slot_is_idle()
        self.reads[0].set()
        while self.world.market.live:
            await self.world.pass_time(5)
        results = await asyncio.gather(*self.drivers, return_exceptions=True)
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)

    def place(self) -> None:
        model = self.random.choice((MODEL, "other"))
        nodes = [node for node in self.world.nodes if node.ask.message.model == model]
        if nodes:
            chosen = self.random.sample(nodes, self.random.randrange(1, len(nodes) + 1))
            deadline = int(self.world.clock.now()) + self.random.choice((3, 30, 600))
            submission = self.world.submission(*chosen, payer=self.random.choice(PAYERS), deadline=deadline)
            self.drivers.append(asyncio.create_task(self.drive(replace(submission, wait=self.random.choice((0, 5, 60, None))))))

    async def drive(self, submission: Submission) -> None:
        """Drives a job as the route does: in one task, which may be cancelled at any point."""
        try:
            job = await self.world.market.place_order(submission)
        except TallyError:
            return
        self.jobs.append(job)
        await self.world.market.run(job, Client(job, reads=self.reads[len(self.jobs) % 2]))

    def end_attempt(self) -> None:
        for job in self.jobs:
            node = next((node for node in self.world.nodes if job.at_node and node.got(Kind.DISPATCH, job.id)), None)
            if node is not None and node.address == job.provider and self.random.random() < 0.15:
                (node.complete if self.random.random() < 0.7 else node.fail)(job.id)

    def flap(self) -> None:
        node = self.random.choice(self.world.nodes)
        if self.world.market.book.node(node.address) is None:
            node.connect()
        else:
            node.leave()

    def report(self) -> None:
        free, slots, speed = (self.random.randrange(5) for _ in range(3))
        node = self.random.choice(self.world.nodes)
        self.world.market.matchmaker.set_capacity(node.address, Capacity(free, slots, speed, speed))

    def cancel(self) -> None:
        if self.jobs:
            self.world.market.cancel(self.random.choice(self.jobs).id)

    def leave(self) -> None:
        if self.drivers and self.random.random() < 0.3:
            self.random.choice(self.drivers).cancel()

    def pause(self) -> None:
        (self.reads[0].set if self.random.random() < 0.7 else self.reads[0].clear)()
        self.world.clock.seconds += self.random.randrange(4)
        self.world.market.sweep()

    def assert_no_slot_is_idle(self) -> None:
        """Whatever happened, a free slot that a job waits for is granted."""
        queue = self.world.market.matchmaker.queue
        for node in self.world.nodes:
            for group in self.world.market.book.groups_of((node.address, None)):
                if queue.waiting_for(group):
                    assert group.places <= sum(job.granted == group.key for job in queue.granted_jobs)


@pytest.mark.parametrize("seed", range(8))
async def test_no_slot_is_idle_and_nothing_leaks(seed: int) -> None:
    """Nodes flap and lie, payers run out of money, clients stall and leave, the chain fails: the queue's invariants hold."""
    walk = Walk(seed)
    await walk.run()
    await quiet()
    walk.world.assert_idle()
    queue = walk.world.market.matchmaker.queue
    assert (len(queue), queue.granted_jobs, queue._models, queue._by_group, queue._granted) == (0, set(), {}, {}, {})
    assert walk.world.market.admission.jobs_by_payer == {}
