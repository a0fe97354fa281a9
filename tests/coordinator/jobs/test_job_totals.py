"""What the market counts of the jobs that end: waits, failovers, chunks, and whose fault a failure was."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from coordinator.http.metrics import CoordinatorMetrics
from tallystick.protocol.errors import Code, Fault, Unavailable
from tests.coordinator.harness import World, quiet


def _scraped(world: World) -> dict[str, float]:
    metrics = CoordinatorMetrics(lambda: None)
    metrics.watch_jobs(world.market.job_totals)
    registry: CollectorRegistry = metrics.registry
    lines = (line.rsplit(" ", 1) for line in generate_latest(registry).decode().splitlines() if line[0] != "#")
    return {name.removeprefix("tallystick_coordinator_"): float(value) for name, value in lines}


async def test_a_job_that_fails_over_and_completes(world: World) -> None:
    """It counts once, with one failover and its chunks, and as nobody's failure."""
    ann, bob = world.node("ann", output_price=1_000_000), world.node("bob", output_price=9_000_000)
    client = await world.started(ann, bob)
    ann.accept(client.job.id)
    ann.fail(client.job.id)
    await quiet()
    bob.chunk(client.job.id)
    bob.complete(client.job.id)
    await quiet()
    counted = _scraped(world)
    assert (counted["failovers_total"], counted["chunks_total"]) == (1, 2)
    assert counted["queue_wait_seconds_count"] == 1
    assert not any(value for name, value in counted.items() if name.startswith("failed_jobs_total"))


async def test_whose_fault_a_failure_was(world: World) -> None:
    """A job that no provider could end counts by the party at fault of its last error; one that never got a slot has no wait."""
    ann = world.node("ann")
    client = await world.started(ann)
    ann.accept(client.job.id)
    ann.fail(client.job.id, Unavailable(Code.ENGINE_UNAVAILABLE, "no answer", fault=Fault.ENGINE))
    await quiet()
    counted = _scraped(world)
    failures = {name: value for name, value in counted.items() if name.startswith("failed_jobs_total")}
    assert sum(failures.values()) == 1
    assert failures['failed_jobs_total{fault="engine"}'] + failures['failed_jobs_total{fault="provider"}'] == 1
    assert counted["failovers_total"] == 0
