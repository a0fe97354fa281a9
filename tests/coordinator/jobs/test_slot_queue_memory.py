"""What a waiting job takes in memory, counted in bytes."""

from __future__ import annotations

import gc
import tracemalloc

from coordinator.domain.limits import JobLimits
from tallystick.protocol.types import Amount
from tallystick.protocol.wire import Submission
from tests.coordinator.harness import CAP, PAYER, World, quiet

JOBS = 400
MOST = 7_500
"""Bytes, half as many again as were measured. The test's own reader takes some."""


async def test_a_waiting_job_is_small() -> None:
    """A job with a small request, read from its bytes as the route reads it, and the task that reads its frames."""
    world = World(limits=JobLimits(jobs_per_payer=2 * JOBS))
    world.funds.free[PAYER.address] = Amount(10 * JOBS * CAP)
    nodes = [world.node(name, slots=1) for name in ("ann", "bob", "carl")]
    for _ in range(len(nodes) + 20):
        await world.started(*nodes)
    bodies = [world.submission(*nodes).dumps() for _ in range(JOBS)]
    gc.collect()
    tracemalloc.start()
    try:
        for body in bodies:
            world.read(await world.market.place_order(Submission.loads(bytes(bytearray(body)))))
        await quiet()
        gc.collect()
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert world.market.waiting == JOBS + 20
    assert size / JOBS < MOST, f"{size / JOBS:.0f} bytes a job"
    for client in world.clients:
        world.market.cancel(client.job.id)
    await quiet()
