"""An ended job leaves no reference cycle: its memory is freed when it ends, without a run of the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable, Iterator

import pytest

from coordinator.jobs.attempt import Attempt
from coordinator.jobs.live_job import LiveJob
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import Submission
from tests.coordinator.harness import World, quiet


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No collection of cycles while the test runs."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def _complete(world: World) -> JobId:
    node = world.node("ann")
    client = await world.started(node)
    job = client.job.id
    node.accept(job)
    node.chunk(job)
    node.complete(job)
    await quiet()
    assert client.ended
    return job


async def _fail_over(world: World) -> JobId:
    first, second = world.node("ann"), world.node("bob", output_price=9_000_000)
    client = await world.started(first, second)
    job = client.job.id
    first.leave()
    await quiet()
    second.accept(job)
    second.complete(job)
    await quiet()
    assert client.ended
    return job


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("run", [_complete, _fail_over])
async def test_an_ended_job_is_freed_at_once(run: Callable[[World], Awaitable[JobId]], world: World) -> None:
    """Neither the job, nor its attempts, nor what the client posted is left."""
    job = await run(world)
    while world.clients:
        del world.clients.pop().job  # the test's own reader is the job's sink
    await quiet()
    left = [
        type(kept).__name__
        for kept in gc.get_objects()
        if (isinstance(kept, LiveJob) and kept.id == job)
        or (isinstance(kept, Attempt) and kept.candidate.terms.job == job)
        or (isinstance(kept, Submission) and kept.job == job)
    ]
    assert left == []
