"""Whose time a wait is: the engine's has deadlines and blame, the reader's an allowance of its own."""

from __future__ import annotations

import asyncio

import pytest

from node.domain.slot_limiter import SlotLimiter
from node.jobs.delivery import FIRST_BYTES, ReaderTimeout, ReaderTimer
from node.jobs.job import Deadlines
from node.ports import ResponseEnd, ResponsePart, ResponseStart
from node.testing.memory import MemoryLink, ScriptedEngine
from tallystick.protocol.errors import Fault
from tallystick.protocol.messages import Outcome
from tallystick.protocol.openai_wire import ReportedUsage
from tallystick.protocol.wire import INITIAL_CREDIT, CancelReason, Kind
from tests.node.harness import Placed, Stage

HEAD = ResponseStart(200, "text/event-stream")
ONE = ResponsePart(b"one.", has_output=True, text_bytes=4)
END = ResponseEnd(b"done", usage=ReportedUsage(20, 5, 10))


async def settle() -> None:
    """Lets everything run that can."""
    for _ in range(30):
        await asyncio.sleep(0)


async def test_a_slow_reader_is_not_the_engines_delay() -> None:
    """A client that reads after the total deadline gets its whole answer, which is paid; the engine is not blamed, nor does the
    wait count as its time.
    """
    stage = Stage(ScriptedEngine(HEAD, *[ONE] * 200, END), deadlines=Deadlines(total=0.1, reader=30))
    placed = stage.dispatch()
    await stage.link.until(Kind.CHUNK, placed.job, INITIAL_CREDIT - 1)
    await asyncio.sleep(0.3)
    stage.runner.grant_credit(stage.link, placed.job, (1_000).to_bytes(4, "big"))
    receipt = await stage.receipt(placed)
    assert (receipt.outcome, receipt.cost) == (Outcome.COMPLETED, 6)
    await stage.ended()
    assert not stage.reports.reports[0].engine_fault
    assert stage.reports.reports[0].total_seconds < 0.2


async def test_a_full_link_is_not_the_engines_delay() -> None:
    """Waiting for room on the link counts as the reader's time too."""
    stage = Stage(ScriptedEngine(HEAD, ONE, END), deadlines=Deadlines(total=0.1, reader=30))
    stage.link.fill()
    placed = stage.dispatch()
    await asyncio.sleep(0.3)
    stage.link._room.set()
    assert (await stage.receipt(placed)).outcome == Outcome.COMPLETED


async def test_the_engines_time_goes_on_after_a_wait() -> None:
    """What is left of the total deadline when the reader comes back is left, and no more."""
    steps = [step for _ in range(300) for step in (ONE, lambda: asyncio.sleep(0.005))]
    stage = Stage(ScriptedEngine(HEAD, *[ONE] * 70, *steps), deadlines=Deadlines(total=0.3, between_tokens=5, reader=30))
    placed = stage.dispatch()
    await stage.link.until(Kind.CHUNK, placed.job, INITIAL_CREDIT - 1)
    await asyncio.sleep(0.4)
    stage.runner.grant_credit(stage.link, placed.job, (1_000).to_bytes(4, "big"))
    receipt = await stage.receipt(placed)
    assert (receipt.outcome, receipt.cost) == (Outcome.TIMED_OUT, 0)
    await stage.ended()
    assert stage.reports.reports[0].engine_fault
    assert stage.dealings.totals(stage.link.endpoint)[1] == 0, "the engine's own delay is nobody else's"


async def test_nobody_reads_and_nobody_cancels() -> None:
    """When the reader's time is used up without a cancellation, nothing is charged, no last chunk leaves, and what was delivered
    is written off.
    """
    stage = Stage(ScriptedEngine(HEAD, *[ONE] * 200, END), deadlines=Deadlines(reader=0.05))
    placed = stage.dispatch()
    receipt = await stage.receipt(placed)
    assert (receipt.outcome, receipt.cost) == (Outcome.TIMED_OUT, 0)
    assert len(stage.link.payloads(placed.job, Kind.CHUNK)) == INITIAL_CREDIT - 1
    await stage.ended()
    assert stage.dealings.totals(stage.link.endpoint) == (0, stage.reports.reports[0].written_off)
    assert stage.reports.reports[0].written_off > 0
    assert not stage.reports.reports[0].engine_fault


async def test_a_reader_that_was_cancelled_pays() -> None:
    """A coordinator that cancels for its client while the node waits for credit gets a receipt over what was delivered."""
    stage = Stage(ScriptedEngine(HEAD, *[ONE] * 200, END))
    placed = stage.dispatch()
    await stage.link.until(Kind.CHUNK, placed.job, INITIAL_CREDIT - 1)
    await settle()
    stage.runner.cancel(stage.link, placed.job, CancelReason.CLIENT)
    receipt = await stage.receipt(placed)
    assert receipt.outcome == Outcome.CLIENT_CANCELLED
    assert receipt.cost > 0
    assert len(stage.link.payloads(placed.job, Kind.CHUNK)) == INITIAL_CREDIT


async def test_slots_do_not_learn_from_readers() -> None:
    """Slow readers, and the jobs that wait for the slots which they hold, do not lower what an engine is trusted with."""
    stage = Stage(ScriptedEngine(HEAD, *[ONE] * 70, END), deadlines=Deadlines(queue=10))
    stage.pool.slot_limiter = SlotLimiter(2, 4)
    placed: list[Placed] = [stage.dispatch() for _ in range(2)]
    for one in placed:
        await stage.link.until(Kind.CHUNK, one.job, INITIAL_CREDIT - 1)
    placed += [stage.dispatch() for _ in range(2)]
    await asyncio.sleep(0.2)
    for one in placed:
        stage.runner.grant_credit(stage.link, one.job, (1_000).to_bytes(4, "big"))
        await stage.link.until(Kind.CHUNK, one.job, INITIAL_CREDIT - 1)
        stage.runner.grant_credit(stage.link, one.job, (1_000).to_bytes(4, "big"))
        await stage.receipt(one)
    await stage.ended()
    assert stage.pool.slots >= 2


async def test_all_waits_are_one_allowance() -> None:
    """Many short waits use up the reader's time as one long one does."""
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
async def test_without_its_first_credit_a_coordinator_gets_no_answer(
    steps: tuple[ResponseStart | ResponsePart | ResponseEnd, ...],
) -> None:
    """The head and a stated number of bytes leave; then the node waits, ends the job uncharged, and counts it against who
    granted no credit.
    """
    stage = Stage(ScriptedEngine(*steps), deadlines=Deadlines(first_credit=0.05))
    stage.link.on_first_chunk = lambda _job: None
    placed = stage.dispatch()
    receipt = await stage.receipt(placed)
    assert (receipt.outcome, receipt.cost) == (Outcome.PROVIDER_ERROR, 0)
    _, body, _, finished = stage.answer(placed)
    assert len(stage.link.payloads(placed.job, Kind.CHUNK)) <= 2
    assert len(body) <= FIRST_BYTES
    assert not finished
    await stage.ended()
    assert stage.dealings.totals(stage.link.endpoint)[1] > 0


async def test_small_answers_wait_for_credit_too() -> None:
    """An answer of which all would fit into the first chunks keeps its last chunk back until the coordinator has confirmed."""
    stage = Stage(ScriptedEngine(HEAD, ResponseEnd(b"{}", usage=ReportedUsage(5, 0, 2))), deadlines=Deadlines(first_credit=0.05))
    stage.link.on_first_chunk = lambda _job: None
    placed = stage.dispatch()
    assert (await stage.receipt(placed)).cost == 0
    assert stage.answer(placed)[1] == b""


async def test_a_reader_that_is_slow_is_told_apart_from_an_engine() -> None:
    """The error of a job whose reader took nothing names the coordinator, not the engine or the provider."""
    stage = Stage(ScriptedEngine(HEAD, *[ONE] * 200, END), deadlines=Deadlines(reader=0.02))
    await stage.receipt(stage.dispatch())
    await stage.ended()
    assert "did not cancel the job" in stage.reports.reports[0].reason
    assert Fault.ENGINE.value not in stage.reports.reports[0].reason


async def test_credit_on_another_link_is_none() -> None:
    """Only the link that has the job ends its wait."""
    stage = Stage(ScriptedEngine(HEAD, *[ONE] * 200, END), deadlines=Deadlines(reader=0.1))
    placed = stage.dispatch()
    await stage.link.until(Kind.CHUNK, placed.job, INITIAL_CREDIT - 1)
    stage.runner.grant_credit(MemoryLink(stage.link.coordinator), placed.job, (1_000).to_bytes(4, "big"))
    assert (await stage.receipt(placed)).outcome == Outcome.TIMED_OUT


async def test_long_work_without_output_is_said_to_be_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until there is output the coordinator hears every half minute that the job is under way; from then on it does not."""
    monkeypatch.setattr("node.jobs.job.KEEPALIVE_SECONDS", 0.02)
    silent = [lambda: asyncio.sleep(0.02)] * 5
    stage = Stage(ScriptedEngine(*silent, HEAD, ONE, *silent, END))
    placed = stage.dispatch()
    await stage.link.until(Kind.CHUNK, placed.job)
    told = len(stage.link.payloads(placed.job, Kind.ACCEPT))
    assert 3 <= told <= 8
    assert (await stage.receipt(placed)).outcome == Outcome.COMPLETED
    assert len(stage.link.payloads(placed.job, Kind.ACCEPT)) == told
