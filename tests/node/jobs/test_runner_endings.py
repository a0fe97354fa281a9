"""However jobs end: whatever engine, coordinator and client do, in whatever order, the money comes out the same way."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from node.jobs.deadlines import Deadlines
from node.jobs.delivery import FIRST_BYTES
from node.ports import ResponseEnd, ResponsePart, ResponseStart
from node.testing.memory import MemoryStore, ScriptedEngine, Step
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.protocol.jobs import CHARGES, Charge
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.tab import check_receipt
from tallystick.protocol.types import Amount, Hash
from tallystick.protocol.usage_reports import ReportedUsage
from tallystick.protocol.wire import CancelReason, Failure, Kind
from tests.builders import check_continuity
from tests.node.harness import PlacedJob, RunnerHarness


def hang() -> Awaitable[object]:
    """Returns a step of an engine that never continues."""
    return asyncio.Event().wait()


def short_pause() -> Awaitable[object]:
    """Returns a step of an engine that works for a moment."""
    return asyncio.sleep(0)


STEPS: dict[str, Step] = {
    "head": ResponseStart(200, "text/event-stream"),
    "no": ResponseStart(400, "application/json"),
    "role": ResponsePart(b"role.", has_output=False),
    "output": ResponsePart(b"one.", has_output=True, text_bytes=4, usage=ReportedUsage(9, 3, 1)),
    "much": ResponsePart(b"x" * 9_000, has_output=True, text_bytes=100),
    "busy": Unavailable(Code.NODE_BUSY, "busy", fault=Fault.ENGINE),
    "down": Unavailable(Code.ENGINE_UNAVAILABLE, "down", fault=Fault.ENGINE),
    "bug": ZeroDivisionError("told to"),
    "moment": short_pause,
    "hangs": hang,
    "end": ResponseEnd(b"done", usage=ReportedUsage(20, 5, 10)),
}
ENDS = {"busy", "down", "bug", "hangs", "end"}
ACTIONS = (
    *("credit", "cancel", "timed_out", "coordinator", "hedged", "lose", "again"),
    *("dispatch", "refused", "too cheap", "wait", "full disk"),
)


async def act(harness: RunnerHarness, action: str, placed: list[PlacedJob], job: PlacedJob) -> None:
    """Performs one external action."""
    runner, link = harness.runner, harness.link
    acts: dict[str, Callable[[], object]] = {
        "credit": lambda: runner.grant_credit(link, job.job, (100).to_bytes(4, "big")),
        "cancel": lambda: runner.cancel(link, job.job),
        "timed_out": lambda: runner.cancel(link, job.job, CancelReason.TIMED_OUT),
        "coordinator": lambda: runner.cancel(link, job.job, CancelReason.COORDINATOR),
        "hedged": lambda: runner.cancel(link, job.job, CancelReason.HEDGED),
        "lose": lambda: runner.link_lost(link),
        "again": lambda: harness.dispatch_again(job),
        "dispatch": lambda: placed.append(harness.dispatch()),
        "refused": lambda: placed.append(harness.dispatch(None, terms_with={"ask": Hash(bytes(32))})),
        "too cheap": lambda: placed.append(harness.dispatch(None, terms_with={"max_cost": Amount(1)})),
        "wait": lambda: None,
        "full disk": lambda: setattr(harness.store, "fault", Unavailable(Code.PROVIDER_FAILED, "disk full")),
    }
    acts[action]()
    for _ in range(3):
        await asyncio.sleep(0)
    harness.store.fault = None


def receipts(store: MemoryStore) -> dict[Hash, Receipt]:
    """Returns the stored receipts by order; each order has one."""
    receipts_by_order = [(booking.matched.order.digest, booking.receipt.message) for booking in store.receipt_records]
    assert len(dict(receipts_by_order)) == len(receipts_by_order), "one order, one receipt"
    return dict(receipts_by_order)


def check_sent(harness: RunnerHarness, placed_job: PlacedJob, receipt: Receipt | None, granted: bool) -> None:
    """Checks what left of a job against its receipt."""
    _, body, transcript, finished = harness.answer(placed_job)
    if not granted:
        assert len(body) <= FIRST_BYTES
        assert receipt is None or receipt.cost == 0, "a charge without the coordinator's word"
    if receipt is None:
        assert not finished, "a whole answer without a receipt"
        return
    check_receipt(placed_job.order, placed_job.terms, receipt)
    charges = CHARGES[Outcome(receipt.outcome)] is Charge.USAGE
    assert finished is (charges or receipt.outcome == Outcome.UPSTREAM_ERROR), "the last chunk and the charge go together"
    if receipt.outcome != Outcome.REFUSED:
        assert receipt.result_commitment == transcript.commitment
    sent = harness.link.payloads(placed_job.job, Kind.RECEIPT) or [
        failure for failure in harness.link.payloads(placed_job.job, Kind.FAIL) if Failure.loads(failure).receipt is not None
    ]
    assert len(sent) == 1, "a receipt leaves once with its job"


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.sampled_from(sorted(STEPS)), max_size=8),
    last=st.sampled_from(sorted(ENDS)),
    actions=st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 3)), max_size=12),
    granted=st.booleans(),
)
def test_every_job_end_leaves_consistent_tabs(
    *, steps: list[str], last: str, actions: list[tuple[str, int]], granted: bool
) -> None:
    """Every order ends once, its receipts are in sequence, a charge needs the coordinator's confirmation and a last chunk, a last
    chunk needs a receipt that may charge, and nothing stays in flight.
    """

    async def play() -> None:
        engine = ScriptedEngine(*(STEPS[name] for name in (*steps, last)))
        limits = Deadlines(queue=0.02, first_token=0.02, between_tokens=0.02, total=0.1, reader=0.02, first_credit=0.02)
        harness = RunnerHarness(engine, slots=1, deadlines=limits)
        heard = granted
        if not granted:
            harness.link.on_first_chunk = lambda _job: None
        placed = [harness.dispatch()]
        for action, which in actions:
            heard = heard or action == "credit"
            await act(harness, action, placed, placed[which % len(placed)])
        for placed_job in placed:
            ends = [asyncio.create_task(harness.link.until(kind, placed_job.job)) for kind in (Kind.RECEIPT, Kind.FAIL)]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in ends:
                task.cancel()
        await harness.ended()
        await asyncio.sleep(0)
        receipts_by_order = receipts(harness.store)
        made = [booking.receipt.message for booking in harness.store.receipt_records]
        for before, after in itertools.pairwise(made):
            check_continuity(before, after)
        for placed_job in placed:
            check_sent(harness, placed_job, receipts_by_order.get(placed_job.order.digest), heard)
        account = harness.tabs.account(harness.client.payer.address)
        assert (account.tab.in_flight, account.tab.cumulative) == (0, sum(receipt.cost for receipt in made))
        assert (harness.engine.assigned, harness.engine.slot_limiter.running, harness.runner._held_bytes) == (0, 0, 0)
        earned, lost = harness.coordinator_credit.totals(harness.link.endpoint)
        assert earned == account.tab.cumulative
        assert lost == sum(report.written_off for report in harness.observer.reports)

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await play()

    asyncio.run(bounded())
