"""Integrity and availability are apart: who serves something else is not less available, and who fails is not less honest."""

from __future__ import annotations

from coordinator.domain.integrity_records import UNAUDITED
from tallystick.protocol.audit_reports import AuditVerdict
from tests.coordinator.harness import FakeNode, World, quiet
from tests.coordinator.jobs.test_audit_reports import paid_job, request, standing


async def fail(world: World, node: FakeNode) -> None:
    """A job that the provider's engine fails."""
    client = await world.place(node)
    await quiet()
    node.accept(client.job.id)
    node.fail(client.job.id)
    await quiet()
    assert client.ended


async def test_availability_and_integrity_move_apart(world: World) -> None:
    """One provider always delivers, and serves another model; the other's engine always fails, and serves what it sells."""
    await world.market.start()
    cheater, failing = world.node("ann"), world.node("bob")
    reports = world.market.audit_reports
    for _ in range(12):
        await reports.accept(request(await paid_job(world, cheater), AuditVerdict.SUSPECT, seals=True))
        await reports.accept(request(await paid_job(world, failing), AuditVerdict.PASS, seals=True))
    before = scores(world, cheater), scores(world, failing)
    for _ in range(24):
        await paid_job(world, cheater)
        await fail(world, failing)
    (cheating_before, _), (failing_before, failing_integrity) = before
    (cheating, cheating_integrity), (broken, still_honest) = scores(world, cheater), scores(world, failing)
    assert cheating > cheating_before, "it delivers"
    assert cheating_integrity < UNAUDITED.integrity, "what it delivers is not what it sells"
    assert broken < 0.6 * failing_before, "its engine fails"
    assert still_honest == failing_integrity > UNAUDITED.integrity, "what it does deliver is what it sells"
    await world.restart()
    assert [standing(world, node).integrity for node in (cheater, failing)] == [cheating_integrity, still_honest]


def scores(world: World, node: FakeNode) -> tuple[float, int]:
    """The availability of a provider, from 0 to 1, and the integrity of its product, in thousandths."""
    return world.market.reputation.score(node.address), standing(world, node).integrity
