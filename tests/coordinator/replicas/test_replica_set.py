"""What a replica tells the others, and what it does with what they tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest

from coordinator.replicas.membership import Membership
from coordinator.replicas.notices import CancelNotice, MembersNotice, Notice, TabNotice, pack_notice, read_notice
from coordinator.replicas.replica_set import ReplicaSet
from tallystick.protocol.health import Health
from tallystick.protocol.jobs import State
from tallystick.protocol.types import Address, Amount, JobId
from tests.coordinator.harness import COST, PAYER, FakeNode, World, make_submission, person
from tests.coordinator.replicas.test_membership import Table

ANN, OTHER = person("ann"), person("other")


@dataclass
class FakeBus:
    """A bus that keeps what was published. `get` delivers a notice of another replica."""

    connected: bool = True
    dropped: dict[str, int] = field(default_factory=dict)
    sent: list[Notice] = field(default_factory=list)
    on_message: Callable[[str, bytes], None] = lambda *_: None
    on_connected: Callable[[], None] = lambda: None

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


@pytest.fixture
async def here() -> Here:
    """Two replicas, of which the test is one."""
    world, bus = World(), FakeBus()
    table, stored, reads = Table(world.clock), dict[Address, list[tuple[Address, Amount, Amount]]](), list[Address]()

    async def load(payer: Address) -> Iterable[tuple[Address, Amount, Amount]]:
        reads.append(payer)
        return stored.get(payer, [])

    membership = Membership("here", table, world.clock.tick)
    replicas = ReplicaSet(membership, bus, world.market, load)
    await Membership("there", table, world.clock.tick).join("http://there")
    await replicas.join("http://here")
    bus.sent.clear()
    return Here(world, bus, replicas, membership, table, stored, reads)
