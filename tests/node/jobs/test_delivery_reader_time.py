"""Whose time a wait is: the engine's has deadlines and blame, the reader's an allowance of its own."""

from __future__ import annotations

import asyncio

import pytest

from node.domain.slot_limiter import SlotLimiter
from node.jobs.deadlines import Deadlines
from node.jobs.delivery import FIRST_BYTES, ReaderTimeout, ReaderTimer
from node.ports import ResponseEnd, ResponsePart, ResponseStart
from node.testing.memory import MemoryLink, ScriptedEngine
from tallystick.protocol.errors import Fault
from tallystick.protocol.messages import Outcome
from tallystick.protocol.usage_reports import ReportedUsage
from tallystick.protocol.wire import INITIAL_CREDIT, CancelReason, Kind
from tests.node.harness import PlacedJob, RunnerHarness

HEAD = ResponseStart(200, "text/event-stream")
ONE = ResponsePart(b"one.", has_output=True, text_bytes=4)
END = ResponseEnd(b"done", usage=ReportedUsage(20, 5, 10))


async def settle() -> None:
    """Lets all ready tasks run."""
    for _ in range(30):
        await asyncio.sleep(0)


async def test_a_slow_reader_is_not_the_engines_delay() -> None:
    """A client that reads after the total deadline gets its whole response, which is paid; the wait counts neither against the
    engine nor as its time.
    """
    harness = RunnerHarness(ScriptedEngine(HEAD, *[ONE] * 200, END), deadlines=Deadlines(total=0.1, reader=30))
    placed = harness.dispatch()
    await harness.link.until(Kind.CHUNK, placed.job, INITIAL_CREDIT - 1)
    await asyncio.sleep(0.3)
    harness.runner.grant_credit(harness.link, placed.job, (1_000).to_bytes(4, "big"))
    receipt = await harness.receipt(placed)
    assert (receipt.outcome, receipt.cost) == (Outcome.COMPLETED, 6)
    await harness.ended()
    assert not harness.observer.reports[0].engine_fault
    assert harness.observer.reports[0].total_seconds < 0.2


async def test_a_full_link_is_not_the_engines_delay() -> None:
    """Waiting for room on the link counts as the reader's time too."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END), deadlines=Deadlines(total=0.1, reader=30))
    harness.link.fill()
    placed = harness.dispatch()
    await asyncio.sleep(0.3)
    harness.link._room.set()
    assert (await harness.receipt(placed)).outcome == Outcome.COMPLETED


async def test_the_engines_time_goes_on_after_a_wait() -> None:
    """After a wait for the reader, the rest of the total deadline remains, and no more."""
    steps = [step for _ in range(300) for step in (ONE, lambda: asyncio.sleep(0.005))]
    harness = RunnerHarness(
        ScriptedEngine(HEAD, *[ONE] * 70, *steps), deadlines=Deadlines(total=0.3, between_tokens=5, reader=30)
    )
    placed = harness.dispatch()
    await harness.link.until(Kind.CHUNK, placed.job, INITIAL_CREDIT - 1)
    await asyncio.sleep(0.4)
    harness.runner.grant_credit(harness.link, placed.job, (1_000).to_bytes(4, "big"))
    receipt = await harness.receipt(placed)
    assert (receipt.outcome, receipt.cost) == (Outcome.TIMED_OUT, 0)
    await harness.ended()
    assert harness.observer.reports[0].engine_fault
    assert harness.coordinator_credit.totals(harness.link.endpoint)[1] == 0, "the engine's own delay is nobody else's"


async def test_reader_timeout_without_a_cancellation() -> None:
    """When the reader's time is used up, nothing is charged, no last chunk leaves, and the delivered part counts as unpaid."""
    harness = RunnerHarness(ScriptedEngine(HEAD, *[ONE] * 200, END), deadlines=Deadlines(reader=0.05))
    placed = harness.dispatch()
    receipt = await harness.receipt(placed)
    assert (receipt.outcome, receipt.cost) == (Outcome.TIMED_OUT, 0)
    assert len(harness.link.payloads(placed.job, Kind.CHUNK)) == INITIAL_CREDIT - 1
    await harness.ended()
    assert harness.coordinator_credit.totals(harness.link.endpoint) == (0, harness.observer.reports[0].written_off)
    assert harness.observer.reports[0].written_off > 0
    assert not harness.observer.reports[0].engine_fault


async def test_a_cancellation_while_waiting_for_credit_is_charged() -> None:
    """A coordinator that cancels for its client while the node waits for credit gets a receipt over the delivered part."""
    harness = RunnerHarness(ScriptedEngine(HEAD, *[ONE] * 200, END))
    placed = harness.dispatch()
    await harness.link.until(Kind.CHUNK, placed.job, INITIAL_CREDIT - 1)
    await settle()
    harness.runner.cancel(harness.link, placed.job, CancelReason.CLIENT)
    receipt = await harness.receipt(placed)
    assert receipt.outcome == Outcome.CLIENT_CANCELLED
    assert receipt.cost > 0
    assert len(harness.link.payloads(placed.job, Kind.CHUNK)) == INITIAL_CREDIT


async def test_slow_readers_do_not_lower_the_slot_limit() -> None:
    """Slow readers and the jobs that wait for their slots do not lower the learned limit."""
    harness = RunnerHarness(ScriptedEngine(HEAD, *[ONE] * 70, END), deadlines=Deadlines(queue=10))
    harness.engine.slot_limiter = SlotLimiter(2, 4)
    placed: list[PlacedJob] = [harness.dispatch() for _ in range(2)]
    for placed_job in placed:
        await harness.link.until(Kind.CHUNK, placed_job.job, INITIAL_CREDIT - 1)
    placed += [harness.dispatch() for _ in range(2)]
    await asyncio.sleep(0.2)
    for placed_job in placed:
        harness.runner.grant_credit(harness.link, placed_job.job, (1_000).to_bytes(4, "big"))
        await harness.link.until(Kind.CHUNK, placed_job.job, INITIAL_CREDIT - 1)
        harness.runner.grant_credit(harness.link, placed_job.job, (1_000).to_bytes(4, "big"))
        await harness.receipt(placed_job)
    await harness.ended()
    assert harness.engine.slots >= 2


async def test_all_waits_share_one_allowance() -> None:
    """Many short waits use up the reader's time as one long wait does."""
    time = ReaderTimer(0.1)

    async def wait_often() -> None:
        for _ in range(20):
            async with time.wait():
                await asyncio.sleep(0.02)

    with pytest.raises(ReaderTimeout):
        await wait_often()
    assert 0.1 <= time.spent < 0.3


@pytest.mark.parametrize(
    "steps",
    [
        (HEAD, ONE, ONE, END),
        (HEAD, ResponsePart(b"x" * 100_000, has_output=True, text_bytes=9), END),
        (HEAD, ResponseEnd(b"y" * 300_000)),
    ],
    ids=["a stream", "a large first piece", "an answer in one piece"],
)
async def test_without_first_credit_no_response_is_delivered(
    steps: tuple[ResponseStart | ResponsePart | ResponseEnd, ...],
) -> None:
    """The head and FIRST_BYTES leave; then the node waits, ends the job uncharged, and counts it against the coordinator."""
    harness = RunnerHarness(ScriptedEngine(*steps), deadlines=Deadlines(first_credit=0.05))
    harness.link.on_first_chunk = lambda _job: None
    placed = harness.dispatch()
    receipt = await harness.receipt(placed)
    assert (receipt.outcome, receipt.cost) == (Outcome.PROVIDER_ERROR, 0)
    _, body, _, finished = harness.answer(placed)
    assert len(harness.link.payloads(placed.job, Kind.CHUNK)) <= 2
    assert len(body) <= FIRST_BYTES
    assert not finished
    await harness.ended()
    assert harness.coordinator_credit.totals(harness.link.endpoint)[1] > 0


async def test_small_responses_wait_for_credit_too() -> None:
    """A response that fits into the first chunks keeps its last chunk back until the coordinator has confirmed."""
    harness = RunnerHarness(
        ScriptedEngine(HEAD, ResponseEnd(b"{}", usage=ReportedUsage(5, 0, 2))), deadlines=Deadlines(first_credit=0.05)
    )
    harness.link.on_first_chunk = lambda _job: None
    placed = harness.dispatch()
    assert (await harness.receipt(placed)).cost == 0
    assert harness.answer(placed)[1] == b""


async def test_a_reader_timeout_is_the_coordinators_fault() -> None:
    """The error of a job whose reader took no data names the coordinator, not the engine or the provider."""
    harness = RunnerHarness(ScriptedEngine(HEAD, *[ONE] * 200, END), deadlines=Deadlines(reader=0.02))
    await harness.receipt(harness.dispatch())
    await harness.ended()
    assert "did not cancel the job" in harness.observer.reports[0].reason
    assert Fault.ENGINE.value not in harness.observer.reports[0].reason


async def test_credit_from_another_link_does_not_count() -> None:
    """Only the link that has the job ends its wait."""
    harness = RunnerHarness(ScriptedEngine(HEAD, *[ONE] * 200, END), deadlines=Deadlines(reader=0.1))
    placed = harness.dispatch()
    await harness.link.until(Kind.CHUNK, placed.job, INITIAL_CREDIT - 1)
    harness.runner.grant_credit(MemoryLink(harness.link.coordinator), placed.job, (1_000).to_bytes(4, "big"))
    assert (await harness.receipt(placed)).outcome == Outcome.TIMED_OUT


async def test_jobs_without_output_send_keepalives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until there is output the node reports every half minute that the job is running; then it stops."""
    monkeypatch.setattr("node.jobs.job.KEEPALIVE_SECONDS", 0.02)
    silent = [lambda: asyncio.sleep(0.02)] * 5
    harness = RunnerHarness(ScriptedEngine(*silent, HEAD, ONE, *silent, END))
    placed = harness.dispatch()
    await harness.link.until(Kind.CHUNK, placed.job)
    count = len(harness.link.payloads(placed.job, Kind.ACCEPT))
    assert 3 <= count <= 8
    assert (await harness.receipt(placed)).outcome == Outcome.COMPLETED
    assert len(harness.link.payloads(placed.job, Kind.ACCEPT)) == count
