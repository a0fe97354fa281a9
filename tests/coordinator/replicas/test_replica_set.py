"""What a replica tells the others, and what it does with what they tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest

from coordinator.jobs.market_load import REPEAT_SECONDS, Load, MarketLoad
from coordinator.jobs.payer_totals import HINT_SECONDS, RELOAD_SECONDS
from coordinator.replicas.membership import Membership
from coordinator.replicas.notices import CancelNotice, MembersNotice, Notice, TabNotice, pack_notice, read_notice
from coordinator.replicas.replica_set import START_SECONDS, ReplicaSet
from tallystick.protocol.errors import Refusal
from tallystick.protocol.health import Health
from tallystick.protocol.jobs import State
from tallystick.protocol.types import Address, Amount, JobId
from tests.coordinator.harness import COST, PAYER, World, person
from tests.coordinator.replicas.test_membership import Table

ANN, OTHER = person("ann"), person("other")


class FakeBus:
    """A bus that keeps what was published. `get` delivers a notice of another replica."""

    def __init__(self) -> None:
        self.connected, self.dropped, self.sent = True, dict[str, int](), list[Notice]()
        self.on_message: Callable[[str, bytes], None] = lambda *_: None
        self.on_connected: Callable[[], None] = lambda: None

    async def round_trip(self) -> float | None:
        return 0.0025 if self.connected else None

    def publish(self, topic: str, payload: bytes) -> None:
        sender, notice = read_notice(topic, payload)
        assert sender == "here"
        self.sent.append(notice)

    def get(self, notice: Notice, sender: str = "there") -> None:
        self.on_message(*pack_notice(notice, sender))

    async def run(self) -> None:
        raise NotImplementedError


@dataclass
class Here:
    """A replica with its market, another one on the list, and the tabs that the database has."""

    world: World
    bus: FakeBus
    replicas: ReplicaSet
    membership: Membership
    table: Table
    stored: dict[Address, list[tuple[Address, Amount, Amount]]]
    reads: list[Address]
    jobs: MarketLoad


@pytest.fixture
async def here() -> Here:
    """Two replicas, of which the test is one."""
    world, bus = World(), FakeBus()
    table, stored, reads = Table(world.clock), dict[Address, list[tuple[Address, Amount, Amount]]](), list[Address]()

    async def load(payer: Address) -> Iterable[tuple[Address, Amount, Amount]]:
        reads.append(payer)
        return stored.get(payer, [])

    membership = Membership("here", table, world.clock.tick)
    jobs = MarketLoad(world.market, world.market.matchmaker.queue, world.clock.tick)
    replicas = ReplicaSet(membership, bus, world.market, load, world.clock.tick, load=jobs)
    await Membership("there", table, world.clock.tick).join("http://there")
    await replicas.join("http://here")
    bus.sent.clear()
    return Here(world, bus, replicas, membership, table, stored, reads, jobs)


# What it tells


async def test_joining_and_leaving_are_told(here: Here) -> None:
    """The others hear of it at once; a replica that left is on no list."""
    await here.replicas.leave()
    assert here.bus.sent == [MembersNotice()]
    assert [replica.id for replica in here.replicas.listed] == ["there"]
    here.bus.sent.clear()
    await here.replicas.join("http://here")
    assert here.bus.sent == [MembersNotice()]


async def test_a_stored_receipt_is_told(here: Here) -> None:
    """The total of a tab is told after its receipt is stored, with what the payer signed for as the limit."""
    node = here.world.node("ann")
    client = await here.world.started(node)
    node.complete(client.job.id)
    assert client.task is not None
    await client.task
    assert here.bus.sent == [TabNotice(PAYER.address, node.address, Amount(COST))]


async def test_its_load_is_told_when_it_changes_and_now_and_then(here: Here) -> None:
    """Others add it to their own, for the pages of the market."""
    here.replicas.tell_load()
    assert here.bus.sent == [Load("", 0, 0)]
    await here.world.started(here.world.node("ann"))
    here.bus.sent.clear()
    for _ in range(3):
        here.replicas.tell_load()
    assert here.bus.sent == [Load("", 1, 0)]
    here.world.clock.seconds += REPEAT_SECONDS
    here.replicas.tell_load()
    assert here.bus.sent == [Load("", 1, 0)] * 2


async def test_the_load_of_others_counts(here: Here) -> None:
    """That of replicas on the list; what others say, on whose behalf ever, does not."""
    here.bus.get(Load("", 3, 2))
    here.bus.get(Load("m", 0, 2))
    here.bus.get(Load("", 9, 9), "nobody")
    assert (here.jobs.jobs, here.jobs.waiting, here.jobs.waiting_for("m"), here.jobs.waiting_for("n")) == (3, 2, 2, 0)
    await here.table.remove("there")
    await here.membership.beat()
    assert (here.jobs.jobs, here.jobs.waiting, here.jobs.waiting_for("m")) == (0, 0, 0)


async def test_a_lone_replica_tells_nobody(here: Here) -> None:
    """Without another replica on the list there is nobody to tell, but of cancels: one that the list misses may run the job."""
    await here.table.remove("there")
    await here.membership.beat()
    node = here.world.node("ann")
    client = await here.world.started(node)
    node.complete(client.job.id)
    assert client.task is not None
    await client.task
    assert here.bus.sent == []
    here.replicas.cancel(client.job.id, PAYER.address)
    assert here.bus.sent == [CancelNotice(client.job.id, PAYER.address)]


# What it hears


async def test_a_cancel_from_another_replica(here: Here) -> None:
    """It cancels the payer's live job, and nobody else's."""
    node = here.world.node("ann")
    client = await here.world.started(node)
    for job, payer in ((client.job.id, OTHER.address), (JobId(bytes(16)), PAYER.address)):
        here.bus.get(CancelNotice(job, payer))
        assert not client.job.cancelled
    here.bus.get(CancelNotice(client.job.id, PAYER.address))
    assert client.job.cancelled
    here.bus.get(CancelNotice(client.job.id, PAYER.address))


async def test_a_total_from_another_replica(here: Here) -> None:
    """It has the payer's totals read from the database before its next job; a payer that is not here is read when it comes."""
    node = here.world.node("bob", slots=9)
    await here.world.started(node)
    here.stored[PAYER.address] = [(ANN.address, Amount(100_000), Amount(0))]
    here.bus.get(TabNotice(OTHER.address, ANN.address, Amount(5)))
    here.bus.get(TabNotice(PAYER.address, ANN.address, Amount(100_000)))
    assert here.reads == [PAYER.address]
    here.world.clock.seconds += HINT_SECONDS
    with pytest.raises(Refusal, match="what is owed"):
        await here.world.place(node)
    assert here.reads == [PAYER.address] * 2


async def test_a_forged_total_changes_nothing(here: Here) -> None:
    """Whoever can reach NATS can have a payer's totals read once in HINT_SECONDS; the payer's jobs go on as before."""
    exposure, node = here.world.market.exposure, here.world.node("bob", slots=99)
    client = await here.world.started(node)
    node.complete(client.job.id)
    assert client.task is not None
    await client.task
    before = exposure._uncovered[PAYER.address]
    for _ in range(3):
        for provider in (node.address, ANN.address):
            for _ in range(100):
                here.bus.get(TabNotice(PAYER.address, provider, Amount(2**96 - 1)))
            await here.world.started(node)
        here.world.clock.seconds += HINT_SECONDS
    assert len(here.reads) == 3
    tab = exposure.known(PAYER.address, node.address)
    assert tab is not None
    assert (tab.cumulative, exposure.known(PAYER.address, ANN.address)) == (Amount(COST), None)
    assert exposure._uncovered[PAYER.address] == before + 6_000


async def test_a_total_that_is_known_is_not_read(here: Here) -> None:
    """The notice of a total that is counted here already, or is lower, causes no read."""
    node = here.world.node("bob", slots=9)
    client = await here.world.started(node)
    node.complete(client.job.id)
    assert client.task is not None
    await client.task
    for total in (COST, COST - 1):
        here.bus.get(TabNotice(PAYER.address, node.address, Amount(total)))
    here.world.clock.seconds += HINT_SECONDS
    await here.world.started(node)
    assert len(here.reads) == 1


async def test_what_it_sent_itself_and_what_is_malformed_change_nothing(here: Here) -> None:
    """An echo is ignored; a malformed or unknown message is counted and dropped."""
    node = here.world.node("ann")
    client = await here.world.started(node)
    here.bus.get(CancelNotice(client.job.id, PAYER.address), sender="here")
    for topic, payload in (("cancel", b"{"), ("tab", b"{}"), ("lunch", b'{"v":1,"from":"x"}'), ("", b"")):
        here.bus.on_message(topic, payload)
    assert not client.job.cancelled
    assert here.replicas.dropped == {"malformed": 4}
    here.bus.dropped["full"] = 2
    assert here.replicas.dropped == {"malformed": 4, "full": 2}


async def test_a_change_of_the_list_is_read_at_once(here: Here) -> None:
    """A notice that the list changed wakes the membership, as a new connection does."""
    here.membership._changed.clear()
    here.bus.get(MembersNotice())
    assert here.membership._changed.is_set()
    here.membership._changed.clear()
    here.bus.on_connected()
    assert here.membership._changed.is_set()


# Totals of payers that come here


async def test_a_payers_totals_are_read_when_it_comes(here: Here) -> None:
    """What it owes by jobs at another replica counts before its first job here, less what the chain has paid of it."""
    here.stored[PAYER.address] = [(ANN.address, Amount(70_000), Amount(10_000)), (OTHER.address, Amount(5_000), Amount(0))]
    node = here.world.node("bob")
    client = await here.world.started(node)
    assert here.world.market.exposure._uncovered[PAYER.address] == 65_000 + 1_000
    assert here.reads == [PAYER.address]
    node.complete(client.job.id)
    assert client.task is not None
    await client.task


async def test_a_payer_that_owes_too_much_elsewhere_is_refused(here: Here) -> None:
    """The replica does not place a job that its payer cannot pay beside what it owes from other replicas."""
    here.stored[PAYER.address] = [(ANN.address, Amount(100_000), Amount(0))]
    client = here.world.place(here.world.node("bob"))
    with pytest.raises(Refusal, match="what is owed"):
        await client
    here.world.assert_idle()


async def test_totals_are_read_again(here: Here) -> None:
    """They are read again after RELOAD_SECONDS, and after the bus was away; a stranger without a purse is never looked up."""
    node = here.world.node("bob", slots=9)
    await here.world.started(node)
    await here.world.started(node)
    assert here.reads == [PAYER.address]
    here.world.clock.seconds += RELOAD_SECONDS
    await here.world.started(node)
    assert len(here.reads) == 2
    here.bus.on_connected()
    await here.world.started(node)
    assert len(here.reads) == 3
    with pytest.raises(Refusal, match="no purse"):
        await here.world.place(node, payer=OTHER)
    assert len(here.reads) == 3


# Health


async def test_the_state_of_the_bus_and_of_the_list(here: Here) -> None:
    """Both are warnings that say what does not work: jobs go on without either."""
    bus = (await here.replicas.check_bus())["bus"]
    assert (bus.status, bus.value, bus.unit, here.replicas.bus_seconds) == (Health.PASS, 2.5, "ms", 0.0025)
    assert (await here.replicas.check_replicas())["replicas"].value == 2
    here.bus.connected = False
    assert (await here.replicas.check_bus())["bus"].status is Health.PASS, "it has just begun"
    here.world.clock.seconds += START_SECONDS
    lost = (await here.replicas.check_bus())["bus"]
    assert (lost.status, "jobs go on" in lost.output, "`bus`" in lost.remedy) == (Health.WARN, True, True)
    here.table.down = True
    await here.membership.beat()
    lost = (await here.replicas.check_replicas())["replicas"]
    assert (lost.status, "last known one stays" in lost.output) == (Health.WARN, True)
    here.table.down = False
    await Membership("twin", here.table, here.world.clock.tick).join("http://here")
    await here.membership.beat()
    lost = (await here.replicas.check_replicas())["replicas"]
    assert (lost.status, "`replica_url`" in lost.remedy) == (Health.WARN, True)


async def test_jobs_end_as_before(here: Here) -> None:
    """A job at a replica ends in its receipt and leaves nothing behind."""
    node = here.world.node("ann")
    client = await here.world.started(node)
    node.complete(client.job.id)
    assert client.task is not None
    await client.task
    assert client.job.state is State.COMPLETED
    here.world.assert_idle()
