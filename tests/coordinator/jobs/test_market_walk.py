"""Random walks over what nodes, clients, clocks and the process may do: the invariants of jobs hold."""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random

import pytest

from coordinator.domain.limits import JobLimits
from coordinator.ports import JobRecord, KnownJob
from coordinator.storage.memory import MemoryStore
from tallystick.protocol.errors import Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.jobs import TERMINAL, State
from tallystick.protocol.messages import Outcome
from tallystick.protocol.types import Address, Amount, JobId
from tallystick.protocol.wire import Dispatch, Kind
from tests.coordinator.harness import LAST_CHUNK, PAYER, Client, FakeNode, World, hedged, person, quiet

STEPS = 150
FAILURES = (
    Unavailable(Code.ENGINE_UNAVAILABLE, "away", fault=Fault.ENGINE),
    Unavailable(Code.NODE_BUSY, "full", fault=Fault.PROVIDER),
    Refusal(Code.BAD_SEAL, "does not open"),
)


class _WatchedStore(MemoryStore):
    """A store that records every state of a job. Like a real one, its queue is sometimes too long."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        self.random, self.healthy = random, False
        self.ends: dict[JobId, set[State]] = {}
        self.refused: set[JobId] = set()

    def enqueue_job(self, record: JobRecord) -> None:
        if not self.healthy and self.random.random() < 0.02:
            self.refused.add(record.job)
            raise Unavailable(Code.DATABASE_UNAVAILABLE, "too slow")
        if record.state in TERMINAL:
            self.ends.setdefault(record.job, set()).add(record.state)
        super().enqueue_job(record)


class Walk:
    """A random walk over what nodes and clients may do, well-behaved and not."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.store = _WatchedStore(self.random)
        self.world = World(store=self.store, limits=JobLimits(total=300, hedge_share=1.0))
        self.world.funds.free[PAYER.address] = Amount(20_000)
        for number in range(4):
            self.world.node(f"node {number}", slots=number + 1, output_price=2_000_000 + number)
        self.gone: set[Address] = set()

    async def run(self) -> None:
        moves = (
            self.order,
            self.order,
            self.frame,
            self.frame,
            self.frame,
            self.receipt,
            self.link,
            self.cancel,
            self.read,
            self.wait,
        )
        for _ in range(STEPS):
            await self.random.choice(moves)()
            if self.random.random() < 0.5:
                await quiet()
        await self.wait_until_idle()

    # Events

    async def order(self) -> None:
        nodes = self.random.sample(self.world.nodes, self.random.randint(1, 4))
        payer = PAYER if self.random.random() < 0.9 else person("poor")
        submission = self.world.submission(*nodes, payer=payer)
        if self.random.random() < 0.7:
            submission = hedged(submission, self.random.choice([0.3, 2, 30]))
        try:
            self.world.read(await self.world.market.place_order(submission))
        except TallyError:
            return

    def _given(self) -> tuple[FakeNode, JobId] | None:
        """A node and a job that it was given at some time, more often one that it has now."""
        given = [(node, job) for node in self.world.nodes for kind, job, _ in node.sent if kind is Kind.DISPATCH]
        live = [(node, job) for node, job in given if node.has(job)]
        if live and self.random.random() < 0.7:
            given = live
        return self.random.choice(given) if given else None

    async def frame(self) -> None:
        given = self._given()
        if given is None:
            return
        node, job = given
        kind = self.random.choice([Kind.ACCEPT, Kind.CHUNK, Kind.CHUNK, Kind.CHUNK, Kind.FAIL])
        if kind is Kind.FAIL:
            node.fail(job, self.random.choice(FAILURES))
        elif kind is Kind.CHUNK and self.random.random() < 0.3:
            node.last_chunk(job)
        else:
            node.send(kind, job, node.address.encode())

    async def receipt(self) -> None:
        given = self._given()
        if given is None:
            return
        node, job = given
        changes = {"cost": Amount(7)} if self.random.random() < 0.1 else {}
        receipt = node.receipt(job, outcome=self.random.choice(list(Outcome)), **changes)
        if node.has(job):
            node.hand_in(job, receipt)
            return
        try:
            await node.hand_in_late(job, receipt)
        except TallyError:
            return

    async def link(self) -> None:
        node = self.random.choice(self.world.nodes)
        if node.address in self.gone:
            self.gone.remove(node.address)
            node.connect()
        elif self.random.random() < 0.3:
            self.gone.add(node.address)
            node.leave()

    async def cancel(self) -> None:
        if self.world.clients:
            self.world.market.cancel(self.random.choice(self.world.clients).job.id)

    async def read(self) -> None:
        if self.world.clients:
            client = self.random.choice(self.world.clients)
            if client.reads.is_set():
                client.reads.clear()
            else:
                client.reads.set()

    async def wait(self) -> None:
        await self.world.pass_time(self.random.choice([0.5, 1, 11, 61, 121]))

    # Invariants

    async def wait_until_idle(self) -> None:
        """Clients read on, the store recovers, and time passes: every job must then end."""
        self.store.healthy = True
        for client in self.world.clients:
            client.reads.set()
        for _ in range(12):
            await self.world.pass_time(61)
        await asyncio.wait_for(asyncio.gather(*(client.task for client in self.world.clients if client.task)), 60)

    async def check(self) -> None:
        self.world.assert_idle()
        for client in self.world.clients:
            await self._check_job(client)
        for node in self.world.nodes:
            requests = (job for kind, job, payload in node.sent if kind is Kind.DISPATCH and Dispatch.loads(payload).sealed)
            most = Counter(requests).most_common(1)  # an order may come again, without its request
            assert not most or most[0][1] == 1, "nothing is dispatched twice to one node"

    async def _check_job(self, client: Client) -> None:
        job = client.job.id
        if not client.job.attempts:  # it waited for a slot in vain, and nothing was to be stored
            assert client.kinds[-1] is Kind.FAIL
            assert set(client.kinds[:-1]) <= {Kind.BEAT}
            assert job not in self.store.ends
            return
        assert self.store.ends[job] == {await self.world.stored(client)}, "exactly one terminal state"
        ends = [kind for kind in client.kinds if kind in (Kind.RECEIPT, Kind.FAIL)]
        assert ends == client.kinds[-1:], "the client gets one end, as the last frame"
        if Kind.CHUNK in client.kinds:
            assert Kind.MATCH not in client.kinds[client.kinds.index(Kind.CHUNK) :], "no failover after output"
            assert Kind.HEDGE not in client.kinds[client.kinds.index(Kind.CHUNK) :], "no second attempt after output"
        assert client.kinds.count(Kind.MATCH) <= len(client.job.attempts)
        assert client.kinds.count(Kind.HEDGE) <= 1
        known = await self.store.job(job)
        assert known is not None
        self._check_attempts(client, known)
        for node in self.world.nodes:
            if node.got(Kind.RECEIPT_ACK, job):
                assert node.address in known.receipts, "what was acknowledged is stored"
        if client.kinds[-1] is Kind.RECEIPT and job not in self.store.refused:
            assert known.receipt is not None
            assert known.receipt.to_bytes() == client.frames[-1][1]

    def _check_attempts(self, client: Client, known: KnownJob) -> None:
        """One provider's output alone reaches the client, at most one charges, and who was outrun does not."""
        senders = {payload for kind, payload in client.frames if kind is Kind.CHUNK and payload != LAST_CHUNK}
        assert len(senders) <= 1, "output of two providers never mixes"
        outrun = {attempt.provider for attempt in known.record.attempts if attempt.outrun}
        assert not senders & {provider.encode() for provider in outrun}
        charges = {provider for provider, receipt in known.receipts.items() if receipt.message.cost}
        assert len(charges) <= 1, "one provider is paid"
        assert not charges & outrun, "an outrun provider charges nothing"
        credited = {node.address for node in self.world.nodes if node.got(Kind.CREDIT, client.job.id)}
        assert len(credited) <= 1, "one provider learns that it may charge"


@pytest.mark.parametrize("seed", range(40))
async def test_every_job_ends_once_and_holds_nothing(seed: int) -> None:
    """On a random walk each job ends in exactly one terminal state, no node gets it twice, acknowledged receipts are stored."""
    walk = Walk(seed)
    await walk.run()
    assert len(walk.world.clients) > 3
    await walk.check()


async def test_the_walks_meet_hedged_jobs() -> None:
    """Some of the walks' jobs run at two providers, and the first or the second one has output first."""
    outrun: Counter[bool] = Counter()
    for seed in range(12):
        walk = Walk(seed)
        await walk.run()
        attempts = (attempt for client in walk.world.clients for attempt in client.job.attempts)
        outrun += Counter(attempt.record.hedged for attempt in attempts if attempt.outrun)
    assert outrun[True] > 0
    assert outrun[False] > 0


@pytest.mark.parametrize("seed", range(100, 110))
async def test_a_crash_in_the_middle_leaves_no_open_job(seed: int) -> None:
    """If the process dies anywhere on the walk, the next one ends the open jobs and keeps what was acknowledged."""
    walk = Walk(seed)
    for _ in range(STEPS // 3):
        await walk.random.choice((walk.order, walk.frame, walk.receipt, walk.wait))()
        await quiet()
    acknowledged = [(node.address, job) for node in walk.world.nodes for kind, job, _ in node.sent if kind is Kind.RECEIPT_ACK]
    for client in walk.world.clients:
        if client.task is not None:
            client.task.cancel()  # simulates the death of the process; its later writes are undone below
    jobs = dict(walk.store.jobs)
    await asyncio.gather(*(client.task for client in walk.world.clients if client.task), return_exceptions=True)
    walk.store.jobs = jobs
    await walk.world.restart()
    assert all(record.state in TERMINAL for record in walk.store.jobs.values())
    for provider, job in acknowledged:
        assert provider in walk.store.receipts[job]
    totals = (await walk.store.load_state(0, 0)).totals
    for (payer, provider), total in totals.items():
        tab = walk.world.market.exposure.known(payer, provider)
        assert (tab.cumulative if tab else 0) == total
