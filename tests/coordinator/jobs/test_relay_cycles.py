"""An ended job leaves no reference cycle: its memory is freed when it ends, without a run of the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable, Iterator

import pytest

from coordinator.jobs.attempt import Attempt
from coordinator.jobs.live_job import LiveJob
from tallystick.protocol.wire import Submission
from tests.coordinator.harness import World, quiet


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No collection of cycles while the test runs."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _kept() -> list[object]:
    return [kept for kept in gc.get_objects() if isinstance(kept, LiveJob | Attempt | Submission)]


async def _complete(world: World) -> None:
    node = world.node("ann")
    client = await world.started(node)
    job = client.job.id
    node.accept(job)
    node.chunk(job)
    node.complete(job)
    await quiet()
    assert client.ended


async def _fail_over(world: World) -> None:
    first, second = world.node("ann"), world.node("bob", output_price=9_000_000)
    client = await world.started(first, second)
    job = client.job.id
    first.leave()
    await quiet()
    second.accept(job)
    second.complete(job)
    await quiet()
    assert client.ended


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("run", [_complete, _fail_over])
async def test_an_ended_job_is_freed_at_once(run: Callable[[World], Awaitable[None]], world: World) -> None:
    """Neither the job, nor its attempts, nor what the client posted is left."""
    before = _kept()  # what other tests left
    await run(world)
    while world.clients:
        del world.clients.pop().job  # the test's own reader is the job's sink
    await quiet()
    known = {id(kept) for kept in before}
    assert [type(kept).__name__ for kept in _kept() if id(kept) not in known] == []
