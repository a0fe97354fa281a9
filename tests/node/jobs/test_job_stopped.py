"""Jobs that are stopped run in the runner's task, which is cancelled for that, and settles them all the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from node.domain.slot_limiter import SlotLimiter
from node.jobs.runner import JobRunner
from node.ports import ResponseEnd, ResponsePart, ResponseStart
from node.testing.memory import ScriptedEngine, Step
from tallystick.protocol.messages import Outcome
from tallystick.protocol.types import JobId
from tallystick.protocol.usage_reports import ReportedUsage
from tallystick.protocol.wire import CancelReason, Kind
from tests.node.harness import PlacedJob, RunnerHarness

HEAD = ResponseStart(200, "text/event-stream")
PART = ResponsePart(b"one.", has_output=True, text_bytes=4)
END = ResponseEnd(b"done", usage=ReportedUsage(20, 5, 10))


def cancel(runner: JobRunner, harness: RunnerHarness, placed: PlacedJob) -> None:
    """The client cancels the job."""
    runner.cancel(harness.link, placed.job, CancelReason.CLIENT)


@pytest.mark.parametrize("steps", [(HEAD, PART, END), (HEAD, PART, PART, END), (HEAD, PART, ValueError("bug"))])
async def test_a_job_that_is_stopped_in_its_own_step(steps: tuple[Step, ...]) -> None:
    """A stop that comes while the job sends a chunk stops this job, and not the signing of its receipt."""
    harness = RunnerHarness(ScriptedEngine(*steps))

    post = harness.link.post

    def post_and_stop(kind: Kind, job: JobId, payload: bytes = b"") -> None:
        post(kind, job, payload)
        if kind is Kind.CHUNK and len(harness.link.payloads(job, Kind.CHUNK)) == 2:
            harness.runner.grant_credit(harness.link, job, bytes(4))
            cancel(harness.runner, harness, placed)

    harness.link.post = post_and_stop  # type: ignore[method-assign]
    placed = harness.dispatch()
    receipt = await harness.receipt(placed)
    assert receipt.outcome == Outcome.CLIENT_CANCELLED
    await harness.ended()
    assert harness.tabs.account(receipt.payer).tab.in_flight == 0
    assert harness.engine.assigned == harness.engine.slot_limiter.running == 0


@pytest.mark.parametrize("times", [1, 2])
async def test_a_stop_counts_once(times: int) -> None:
    """A job that is stopped again while it settles is settled once."""
    harness = RunnerHarness(ScriptedEngine(HEAD, PART, lambda: asyncio.Event().wait()))
    placed = harness.dispatch()
    await harness.link.until(Kind.CHUNK, placed.job, 2)
    for reason in [CancelReason.CLIENT] * times:
        harness.runner.cancel(harness.link, placed.job, reason)
    receipt = await harness.receipt(placed)
    assert receipt.outcome == Outcome.CLIENT_CANCELLED
    assert len(harness.link.payloads(placed.job, Kind.RECEIPT)) == 1


async def test_a_stop_while_waiting_for_a_slot() -> None:
    """The job leaves the queue, and its slot goes to others."""
    harness = RunnerHarness(ScriptedEngine(lambda: asyncio.Event().wait()))
    harness.engine.slot_limiter = SlotLimiter(1)
    first, second = harness.dispatch(), harness.dispatch()
    await harness.link.until(Kind.ACCEPT, second.job)
    cancel(harness.runner, harness, second)
    assert (await harness.receipt(second)).outcome == Outcome.CLIENT_CANCELLED
    assert harness.engine.slot_limiter.running == 1
    cancel(harness.runner, harness, first)
    await harness.ended()
    assert harness.engine.slot_limiter.running == 0


async def test_the_end_of_the_process_is_no_stop() -> None:
    """A task that is cancelled from outside ends, although its job could be settled: the loop is closing."""
    harness = RunnerHarness(engine := ScriptedEngine(HEAD, PART, lambda: asyncio.Event().wait()))
    placed = harness.dispatch()
    await harness.link.until(Kind.CHUNK, placed.job, 2)
    act: Callable[[], None] = lambda: cancel(harness.runner, harness, placed)  # noqa: E731
    (task,) = [task for task in asyncio.all_tasks() if task.get_name() == f"job {placed.job.hex()}"]
    act()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert engine.stopped == 1
    assert not harness.link.payloads(placed.job, Kind.RECEIPT)
