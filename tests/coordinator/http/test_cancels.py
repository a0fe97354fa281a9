"""A cancel that arrives at a replica which does not run the job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from coordinator.http.cancels import cancel_job
from coordinator.http.replica_view import Alone
from coordinator.ports import KnownJob
from tallystick.protocol.errors import Code, Refusal, Unavailable
from tallystick.protocol.replicas import Replica
from tallystick.protocol.types import Address, JobId
from tests.coordinator.harness import PAYER, World, person

OTHER, UNKNOWN = person("other").address, JobId(bytes(16))


class Two:
    """Two replicas; what was passed on to the other one."""

    def __init__(self) -> None:
        self.listed = (Replica("a", "http://a"), Replica("b", "http://b"))
        self.alone, self.bus_connected, self.dropped = False, True, dict[str, int]()
        self.bus_seconds: float | None = 0.001
        self.passed: list[tuple[JobId, Address]] = []

    def cancel(self, job: JobId, payer: Address) -> None:
        self.passed.append((job, payer))


@pytest.fixture
def elsewhere(world: World) -> World:
    """Another replica on the same store."""
    return World(store=world.store, log_store=world.log_store, report_store=world.report_store)


async def test_a_job_of_this_replica_is_not_passed_on(world: World) -> None:
    """It is cancelled here, by its payer alone."""
    replicas, client = Two(), await world.started(world.node("ann"))
    with pytest.raises(Refusal, match="not the payer") as caught:
        await cancel_job(world.market, world.store, replicas, client.job.id, OTHER)
    assert caught.value.code is Code.UNAUTHENTICATED
    assert await cancel_job(world.market, world.store, replicas, client.job.id, PAYER.address)
    assert client.job.cancelled
    assert replicas.passed == []


async def test_a_job_of_another_replica(world: World, elsewhere: World) -> None:
    """The cancel is passed on, and only its payer may do that. After the job's end nothing runs, and the caller learns it."""
    node = world.node("ann")
    replicas, client = Two(), await world.started(node)
    with pytest.raises(Refusal, match="not the payer"):
        await cancel_job(elsewhere.market, world.store, replicas, client.job.id, OTHER)
    assert replicas.passed == []
    assert await cancel_job(elsewhere.market, world.store, replicas, client.job.id, PAYER.address)
    assert replicas.passed == [(client.job.id, PAYER.address)]
    node.complete(client.job.id)
    assert client.task is not None
    await client.task
    assert not await cancel_job(elsewhere.market, world.store, replicas, client.job.id, PAYER.address)


async def test_a_job_that_waits_at_another_replica(elsewhere: World) -> None:
    """No database has it, so the cancel is passed on with the caller, whom the other replica compares with the payer."""
    replicas = Two()
    assert not await cancel_job(elsewhere.market, elsewhere.store, replicas, UNKNOWN, PAYER.address)
    assert replicas.passed == [(UNKNOWN, PAYER.address)]


async def test_a_lone_coordinator_asks_nobody(world: World) -> None:
    """Without other replicas an unknown job costs no read of the database."""

    class Unread:
        async def job(self, job: JobId) -> None:
            raise AssertionError(job)

    dropped: Mapping[str, int] = Alone().dropped
    assert dropped == {}
    assert not await cancel_job(world.market, Unread(), Alone(), UNKNOWN, PAYER.address)  # type: ignore[arg-type]  # a part of the port


async def test_a_job_of_a_replica_that_is_gone(world: World, elsewhere: World) -> None:
    """Its payer's cancel ends it, also if no other replica is left on the list.

    It is passed on all the same: a replica that lost only its connection to the database runs the job on.
    """
    client = await world.started(world.node("ann"))
    asked: list[tuple[JobId, str, bool]] = []

    class Shared:
        async def end_lost(self, job: JobId, replica: str, *, cancelled: bool = False) -> bool:
            asked.append((job, replica, cancelled))
            return cancelled

    class Stored:
        async def job(self, job: JobId) -> KnownJob | None:
            known = await world.store.job(job)
            return None if known is None else replace(known, replica="gone")

    elsewhere.market.shared = Shared()  # type: ignore[assignment]  # a part of the port
    replicas = Two()
    replicas.alone = True
    with pytest.raises(Refusal, match="not the payer"):
        await cancel_job(elsewhere.market, Stored(), replicas, client.job.id, OTHER)  # type: ignore[arg-type]  # a part of the port
    assert asked == []
    assert not await cancel_job(elsewhere.market, Stored(), replicas, client.job.id, PAYER.address)  # type: ignore[arg-type]
    assert asked == [(client.job.id, "gone", True)]
    assert replicas.passed == [(client.job.id, PAYER.address)]


async def test_a_cancel_while_the_database_is_away(world: World, elsewhere: World) -> None:
    """It reaches the replica that runs the job, which knows the payer; the caller learns that nothing more is known."""
    client = await world.started(world.node("ann"))

    class Away:
        async def job(self, job: JobId) -> None:
            raise Unavailable(Code.DATABASE_UNAVAILABLE, "away")

    replicas = Two()
    with pytest.raises(Unavailable, match="away"):
        await cancel_job(elsewhere.market, Away(), replicas, client.job.id, PAYER.address)  # type: ignore[arg-type]  # a part of the port
    assert replicas.passed == [(client.job.id, PAYER.address)]
