"""The list of replicas, on a table and a clock that the test moves."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from structlog.testing import capture_logs

from coordinator.replicas.membership import GONE_SECONDS, JOIN_ATTEMPTS, READY_SECONDS, Membership
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.replicas import MAX_REPLICAS, Replica
from tests.coordinator.harness import Clock

SECONDS = 120


@dataclass
class Table:
    """The table of replicas, on the test's clock. `down`: whether the database is away."""

    clock: Clock
    beats: dict[str, tuple[tuple[Replica, bool], float]] = field(default_factory=dict)
    down: bool = False
    read: asyncio.Event = field(default_factory=asyncio.Event)

    async def beat(self, own: tuple[Replica, bool], gone_seconds: float) -> list[tuple[Replica, bool]]:
        self._check()
        self.beats[own[0].id] = own, self.clock.seconds
        self.read.set()
        live = [(at, row) for row, at in self.beats.values() if self.clock.seconds - at <= gone_seconds]
        return [row for _, row in sorted(live, key=lambda pair: pair[0])]

    async def remove(self, replica: str) -> None:
        self._check()
        self.beats.pop(replica, None)

    def _check(self) -> None:
        if self.down:
            raise Unavailable(Code.DATABASE_UNAVAILABLE, "the database is away")


@pytest.fixture
def clock() -> Clock:
    """The clock of database and replicas."""
    return Clock()


@pytest.fixture
def table(clock: Clock) -> Table:
    """The table that all share."""
    return Table(clock)


def _member(table: Table, name: str, changes: list[list[str]] | None = None) -> Membership:
    member = Membership(name, table, table.clock.tick)
    if changes is not None:
        member.on_change = lambda listed: changes.append([replica.id for replica in listed])
    return member


def _ids(member: Membership) -> list[str]:
    return [replica.id for replica in member.known]


async def test_replicas_find_each_other(table: Table) -> None:
    """Whoever joins is on everybody's list after a beat, in the order of the ids; each change is told once."""
    changes: list[list[str]] = []
    bob, ann = _member(table, "bob", changes), _member(table, "ann")
    assert bob.known == ()
    await bob.join("http://bob")
    await ann.join("http://ann")
    assert ann.known == (Replica("ann", "http://ann"), Replica("bob", "http://bob"))
    for _ in range(2):
        await bob.beat()
    assert _ids(bob) == ["ann", "bob"]
    assert changes == [["bob"], ["ann", "bob"]]


async def test_a_silent_replica_is_gone(table: Table, clock: Clock) -> None:
    """A replica is on the list until its last beat is more than GONE_SECONDS old."""
    ann, bob = _member(table, "ann"), _member(table, "bob")
    await bob.join("http://bob")
    await ann.join("http://ann")
    clock.seconds += GONE_SECONDS
    await ann.beat()
    assert _ids(ann) == ["ann", "bob"]
    clock.seconds += 0.1
    await ann.beat()
    assert _ids(ann) == ["ann"]


async def test_a_replica_that_leaves(table: Table) -> None:
    """It is off its own list and the others' at once, and no late beat puts it back."""
    changes: list[list[str]] = []
    ann, bob = _member(table, "ann", changes), _member(table, "bob")
    await bob.join("http://bob")
    await ann.join("http://ann")
    await ann.leave()
    await ann.beat()
    await bob.beat()
    assert (_ids(ann), _ids(bob)) == (["bob"], ["bob"])
    assert changes == [["ann", "bob"], ["bob"]]


async def test_a_beat_that_meets_the_leave(table: Table) -> None:
    """A beat that was under way when the replica left leaves no row."""
    ann = _member(table, "ann")
    await ann.join("http://ann")

    class Slow(Table):
        async def beat(self, own: tuple[Replica, bool], gone_seconds: float) -> list[tuple[Replica, bool]]:
            live = await table.beat(own, gone_seconds)
            await ann.leave()
            table.beats[own[0].id] = own, 0.0
            return live

        async def remove(self, replica: str) -> None:
            await table.remove(replica)

    ann._store = Slow(table.clock)
    await ann.beat()
    assert table.beats == {}


async def test_the_list_outlives_the_database(table: Table, clock: Clock) -> None:
    """While the database is away the list stays, and for GONE_SECONDS after it is back: the others beat when they can."""
    ann, bob = _member(table, "ann"), _member(table, "bob")
    await bob.join("http://bob")
    await ann.join("http://ann")
    table.down = True
    clock.seconds += 60
    with capture_logs() as logs:
        for _ in range(3):
            await ann.beat()
    assert (_ids(ann), ann.answered) == (["ann", "bob"], False)
    assert len([entry for entry in logs if entry["log_level"] == "warning"]) == 1
    table.down = False
    await ann.beat()
    assert (_ids(ann), ann.answered) == (["ann", "bob"], True)
    clock.seconds += GONE_SECONDS - 0.1
    await ann.beat()
    assert _ids(ann) == ["ann", "bob"]
    clock.seconds += 0.1
    await ann.beat()
    assert _ids(ann) == ["ann"], "bob never came back"


async def test_a_newcomer_is_listed_even_right_after_an_outage(table: Table, clock: Clock) -> None:
    """Only removals wait."""
    ann, carl = _member(table, "ann"), _member(table, "carl")
    await ann.join("http://ann")
    table.down = True
    await ann.beat()
    table.down = False
    await carl.join("http://carl")
    await ann.beat()
    assert _ids(ann) == ["ann", "carl"]


async def test_a_restart_takes_the_place_of_the_former_process(table: Table) -> None:
    """Two rows with one URL, of which one process was killed, are one replica: the one that beats last."""
    ann = _member(table, "ann")
    await ann.join("http://ann")
    await _member(table, "bob-1").join("http://bob")
    table.clock.seconds += 1
    await _member(table, "bob-2").join("http://bob")
    await ann.beat()
    assert _ids(ann) == ["ann", "bob-2"]


async def test_two_replicas_with_one_url_are_noticed(table: Table) -> None:
    """Each lists itself under the URL, and knows of the clash until the other one is gone."""
    ann, twin = _member(table, "ann"), _member(table, "twin")
    await ann.join("http://same")
    await twin.join("http://same")
    await ann.beat()
    assert (_ids(ann), ann.clash) == (["ann"], "twin")
    assert (_ids(twin), twin.clash) == (["twin"], "ann")
    await twin.leave()
    await ann.beat()
    assert ann.clash is None


async def test_clients_learn_of_a_replica_when_nodes_had_time(table: Table, clock: Clock) -> None:
    """The first replica is for clients at once. A further one is for nodes at once, and for clients READY_SECONDS later."""
    ann, bob = _member(table, "ann"), _member(table, "bob")
    await ann.join("http://ann")
    assert ann.listed == ann.known
    await bob.join("http://bob")
    for member in (ann, bob):
        await member.beat()
        assert [replica.id for replica in member.known] == ["ann", "bob"]
        assert [replica.id for replica in member.listed] == ["ann"]
    clock.seconds += 2
    await ann.beat()
    await bob.beat()
    clock.seconds += READY_SECONDS - 2
    await bob.beat()
    await ann.beat()
    assert ann.listed == bob.listed == ann.known
    await ann.beat()


async def test_a_new_replica_takes_over_when_it_is_alone(table: Table, clock: Clock) -> None:
    """If no other replica is ready any more, clients may use the new one at once."""
    ann, bob = _member(table, "ann"), _member(table, "bob")
    await ann.join("http://ann")
    await bob.join("http://bob")
    assert [replica.id for replica in bob.listed] == ["ann"]
    await ann.leave()
    await bob.beat()
    assert [replica.id for replica in bob.listed] == ["bob"]
    assert bob._changed.is_set(), "its next beat says so at once"
    await bob.beat()
    await ann.join("http://ann")
    assert [replica.id for replica in ann.listed] == ["bob"], "and the one that comes back waits"


async def test_the_list_is_bounded(table: Table) -> None:
    """However many rows the table has, at most MAX_REPLICAS are listed."""
    for number in range(MAX_REPLICAS + 5):
        await _member(table, f"{number:03}").join(f"http://r{number}")
    last = _member(table, "zzz")
    await last.join("http://last")
    assert len(last.known) == MAX_REPLICAS


async def test_join_needs_the_database(table: Table) -> None:
    """A replica that cannot be listed does not serve, and says why."""
    table.down = True
    ann = _member(table, "ann")
    with pytest.raises(Unavailable, match="away"):
        await ann.join("http://ann")
    assert ann.known == ()


async def test_a_start_has_several_attempts_to_join(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first beat opens a connection, for which a busy machine may need longer than a beat may take."""
    ann, check, attempts = _member(table, "ann"), table._check, iter(range(JOIN_ATTEMPTS - 1))

    def late() -> None:
        if next(attempts, None) is not None:
            raise Unavailable(Code.DATABASE_UNAVAILABLE, "no answer in time")
        check()

    monkeypatch.setattr(table, "_check", late)
    await ann.join("http://ann")
    assert [replica.url for replica in ann.known] == ["http://ann"]


async def test_leaving_without_the_database(table: Table) -> None:
    """A stop does not fail because the database is away; the row ages out."""
    ann = _member(table, "ann")
    await ann.join("http://ann")
    table.down = True
    await ann.leave()
    assert ann.known == ann.listed == ()


async def test_the_loop_beats_and_looks_when_told(table: Table) -> None:
    """It beats by itself, and a notice makes it read the list at once."""
    ann, bob = _member(table, "ann"), _member(table, "bob")
    changed = asyncio.Event()
    await ann.join("http://ann")
    ann.on_change = lambda _: changed.set()
    loop = asyncio.create_task(ann.run())
    try:
        async with asyncio.timeout(SECONDS):
            table.read.clear()
            await table.read.wait()
            await bob.join("http://bob")
            ann.look()
            await changed.wait()
        assert _ids(ann) == ["ann", "bob"]
    finally:
        loop.cancel()
