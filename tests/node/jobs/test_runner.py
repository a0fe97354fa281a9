from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from node.domain.order_admission import AdmittedJob
from node.domain.tabs import CreditLimits, Funds
from node.jobs import runner
from node.jobs.deadlines import Deadlines
from node.jobs.delivery import CHUNK_BYTES
from node.ports import ReceiptRecord, ResponseEnd, ResponsePart, ResponseStart
from node.testing.memory import MemoryChain, ScriptedEngine
from tallystick.protocol.errors import BadMessage, Code, Fault, Unavailable
from tallystick.protocol.messages import Outcome
from tallystick.protocol.plaintext_heads import ResponseHead
from tallystick.protocol.sealing import HYBRID, SealingKey
from tallystick.protocol.types import Amount
from tallystick.protocol.usage_reports import ReportedUsage
from tallystick.protocol.wire import INITIAL_CREDIT, CancelReason, Failure, Kind
from tests.node.harness import CHAT, NOW, PRICES, Client, PlacedJob, RunnerHarness, signer

HEAD = ResponseStart(200, "text/event-stream")
ROLE = ResponsePart(b"role.", has_output=False)
ONE, TWO = ResponsePart(b"one.", has_output=True, text_bytes=4), ResponsePart(b"two.", has_output=True, text_bytes=4)
END = ResponseEnd(b"done", usage=ReportedUsage(20, 5, 10))
QUICK = Deadlines(queue=0.05, first_token=0.05, between_tokens=0.05, total=5.0, reader=0.05)
DOWN = Unavailable(Code.ENGINE_UNAVAILABLE, "the engine is down", fault=Fault.ENGINE)


def hang() -> Awaitable[object]:
    """Returns a step of an engine that never continues."""
    return asyncio.Event().wait()


def nothing_is_owed(harness: RunnerHarness, placed: PlacedJob) -> bool:
    """Returns whether the payer's tab and receipts are as if the job had cost nothing."""
    tab = harness.tabs.account(placed.order.message.payer).tab
    costs = [booking.receipt.message.cost for booking in harness.store.receipt_records]
    return (tab.seq, tab.cumulative, tab.in_flight) == (len(costs), 0, 0) and not any(costs)


async def test_a_job_that_completes() -> None:
    """ACCEPT, sealed chunks, receipt: the head comes first, the role with the first output, the end last; the reported usage is
    billed.
    """
    harness = RunnerHarness(ScriptedEngine(HEAD, ROLE, ONE, TWO, END))
    placed = harness.dispatch()
    receipt = await harness.receipt(placed)
    assert harness.answer(placed)[:2] == (ResponseHead(200, "text/event-stream"), b"role.one.two.done")
    assert [kind for kind, _, _ in harness.link.frames] == [Kind.ACCEPT, *[Kind.CHUNK] * 4, Kind.RECEIPT]
    assert (receipt.outcome, receipt.input_tokens, receipt.cached_input_tokens, receipt.output_tokens) == (
        Outcome.COMPLETED,
        20,
        5,
        10,
    )
    assert (receipt.seq, receipt.cost, receipt.finished_at) == (1, 6, NOW)
    await harness.ended()
    assert harness.tabs.account(receipt.payer).tab.cumulative == receipt.cost
    assert harness.tabs.account(receipt.payer).tab.in_flight == 0
    assert harness.observer.reports[0].outcome is Outcome.COMPLETED


async def test_the_last_chunk_waits_for_the_stored_receipt() -> None:
    """The last chunk and the receipt are sent only after the receipt is stored."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END))
    seen: list[int] = []
    record_receipt = harness.store.record_receipt

    async def watched(record: ReceiptRecord) -> None:
        seen.append(len(harness.link.payloads(placed.job, Kind.CHUNK)))
        await record_receipt(record)
        seen.append(len(harness.link.payloads(placed.job, Kind.CHUNK)))

    harness.store.record_receipt = lambda record: asyncio.ensure_future(watched(record))  # type: ignore[method-assign]
    placed = harness.dispatch()
    await harness.receipt(placed)
    assert seen == [2, 2]
    assert len(harness.link.payloads(placed.job, Kind.CHUNK)) == 3


async def test_no_output_leaves_before_the_order_is_stored() -> None:
    """The first chunk waits for the write that keeps the order from running again after a crash."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END))
    opening = asyncio.Event()
    begin = harness.store.begin

    async def slow(admitted: AdmittedJob, at: int) -> None:
        await opening.wait()
        await begin(admitted, at)

    harness.store.begin = lambda admitted, at: asyncio.ensure_future(slow(admitted, at))  # type: ignore[method-assign]
    placed = harness.dispatch()
    await harness.link.until(Kind.ACCEPT, placed.job)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not harness.link.payloads(placed.job, Kind.CHUNK)
    opening.set()
    await harness.receipt(placed)


async def test_a_response_cut_at_the_output_limit() -> None:
    """A response that ended at the output limit is charged and has that outcome."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, ResponseEnd(truncated=True, usage=ReportedUsage(1, 0, 1))))
    assert (await harness.receipt(harness.dispatch())).outcome == Outcome.LENGTH


async def test_a_response_in_one_piece() -> None:
    """A response that was not streamed comes as head and one last chunk."""
    harness = RunnerHarness(
        ScriptedEngine(ResponseStart(200, "application/json"), ResponseEnd(b'{"a": 1}', 4, ReportedUsage(3, 0, 4)))
    )
    placed = harness.dispatch(b'{"messages": []}')
    assert (await harness.receipt(placed)).output_tokens == 4
    assert harness.answer(placed)[:2] == (ResponseHead(200, "application/json"), b'{"a": 1}')
    assert len(harness.link.payloads(placed.job, Kind.CHUNK)) == 2


async def test_a_deterministic_refusal_of_the_engine_goes_to_the_client() -> None:
    """A 4xx that any provider would return is passed through sealed, with its status; it costs nothing and is final."""
    harness = RunnerHarness(
        ScriptedEngine(ResponseStart(400, "application/json"), ResponseEnd(b'{"error": {"message": "too long"}}'))
    )
    placed = harness.dispatch()
    receipt = await harness.receipt(placed)
    assert (receipt.outcome, receipt.cost, receipt.input_tokens, receipt.output_tokens) == (Outcome.UPSTREAM_ERROR, 0, 0, 0)
    assert harness.answer(placed)[:2] == (ResponseHead(400, "application/json"), b'{"error": {"message": "too long"}}')


@pytest.mark.parametrize(
    "steps",
    [
        (DOWN,),
        (HEAD, DOWN),
        (HEAD, ROLE, DOWN),
        (HEAD, ROLE),
    ],
)
async def test_a_failure_before_output_can_be_retried(
    steps: tuple[ResponseStart | ResponsePart | Unavailable, ...],
) -> None:
    """An engine that fails before any output leaves no chunk and no charge, and the error allows a retry."""
    harness = RunnerHarness(ScriptedEngine(*steps))
    placed = harness.dispatch()
    error = await harness.failure(placed)
    assert (error["code"], error["fault"], error["retry"]) == ("engine_unavailable", "engine", True)
    await harness.ended()
    assert not harness.link.payloads(placed.job, Kind.CHUNK)
    assert nothing_is_owed(harness, placed)
    assert (await harness.refusal_receipt(placed)).outcome == Outcome.PROVIDER_ERROR
    assert harness.observer.reports[0].outcome is Outcome.PROVIDER_ERROR
    assert harness.observer.reports[0].engine_fault


async def test_a_failed_order_does_not_run_again() -> None:
    """An order without output has its receipt at no cost and is consumed: dispatched again, it is refused without a receipt."""
    engine = ScriptedEngine(HEAD, DOWN)
    harness = RunnerHarness(engine)
    placed = harness.dispatch()
    assert (await harness.refusal_receipt(placed)).seq == 1
    await harness.ended()
    engine.steps = (HEAD, ONE, END)
    harness.dispatch_again(placed)
    second = Failure.loads(await harness.link.until(Kind.FAIL, placed.job, 2))
    assert (second.error.code, second.receipt) == (Code.ORDER_REPLAYED, None)
    assert (len(engine.requests), len(harness.store.receipt_records)) == (1, 1)


async def test_a_failure_after_output_costs_nothing() -> None:
    """A response that broke off is closed with a receipt that charges nothing and names the fault."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, DOWN))
    placed = harness.dispatch()
    receipt = await harness.receipt(placed)
    assert (receipt.outcome, receipt.cost, receipt.seq) == (Outcome.PROVIDER_ERROR, 0, 1)
    assert harness.answer(placed)[1] == b"one."


async def test_an_engine_without_first_output() -> None:
    """Without a first output in time, the job goes to the next provider and the engine is stopped."""
    harness = RunnerHarness(engine := ScriptedEngine(HEAD, ROLE, hang), deadlines=QUICK)
    placed = harness.dispatch()
    error = await harness.failure(placed)
    assert (error["code"], error["retry"]) == ("timed_out", True)
    await harness.ended()
    assert engine.stopped == 1
    assert nothing_is_owed(harness, placed)
    assert (await harness.refusal_receipt(placed)).outcome == Outcome.TIMED_OUT


async def test_an_engine_that_stalls() -> None:
    """A stall in mid-response ends the job as timed out, without a charge."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, hang), deadlines=QUICK)
    receipt = await harness.receipt(harness.dispatch())
    assert (receipt.outcome, receipt.cost) == (Outcome.TIMED_OUT, 0)


async def test_the_whole_job_has_a_deadline() -> None:
    """An engine that keeps writing is stopped at the total deadline."""
    wait: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(0.01)  # noqa: E731
    steps = [step for _ in range(200) for step in (ONE, wait)]
    harness = RunnerHarness(ScriptedEngine(HEAD, *steps), deadlines=Deadlines(total=0.1, between_tokens=5))
    assert (await harness.receipt(harness.dispatch())).outcome == Outcome.TIMED_OUT


async def test_the_first_token_deadline_is_for_streams() -> None:
    """A response that is not streamed has until its total deadline."""
    harness = RunnerHarness(ScriptedEngine(lambda: asyncio.sleep(0.1), HEAD, END), deadlines=QUICK)
    assert (await harness.receipt(harness.dispatch(b"{}"))).outcome == Outcome.COMPLETED


async def test_signs_of_life_extend_the_wait_for_the_first_token() -> None:
    """Comments and queue positions show that the engine works, up to the job's total time."""
    comment = ResponsePart(b": wait\n\n", has_output=False)
    alive = [step for _ in range(4) for step in (lambda: asyncio.sleep(0.1), comment)]
    limits = Deadlines(first_token=0.25, total=5)
    harness = RunnerHarness(ScriptedEngine(HEAD, *alive, ONE, END), deadlines=limits)
    assert (await harness.receipt(harness.dispatch())).outcome == Outcome.COMPLETED
    harness = RunnerHarness(ScriptedEngine(HEAD, *alive * 20, ONE, END), deadlines=Deadlines(first_token=0.25, total=0.5))
    assert (await harness.refusal_receipt(harness.dispatch())).outcome == Outcome.TIMED_OUT


def test_a_long_prompt_has_more_time() -> None:
    """The wait for the first token follows the size of the request."""
    assert Deadlines(first_token=60).first_token_for(16 << 10) == 60
    assert Deadlines(first_token=60).first_token_for((16 << 10) + 2_560) == 70


async def test_a_new_head_begins_the_response_anew() -> None:
    """An engine's own error after a beginning without output is delivered alone, and not charged."""
    role = ResponsePart(b"role.", has_output=False)
    refused = ResponseStart(400, "application/json")
    harness = RunnerHarness(ScriptedEngine(HEAD, role, refused, ResponseEnd(b'{"error":1}')))
    placed = harness.dispatch()
    receipt = await harness.receipt(placed)
    assert (receipt.outcome, receipt.cost) == (Outcome.UPSTREAM_ERROR, 0)
    assert harness.answer(placed)[:2] == (ResponseHead(400, "application/json"), b'{"error":1}')


async def test_cancel_in_mid_response() -> None:
    """CANCEL stops the engine at once; the delivered part is charged by the fallback rule, and nothing else."""
    harness = RunnerHarness(engine := ScriptedEngine(HEAD, ONE, TWO, hang))
    placed = harness.dispatch()
    await harness.link.until(Kind.CHUNK, placed.job, 3)
    harness.runner.cancel(harness.link, placed.job)
    receipt = await harness.receipt(placed)
    assert (receipt.outcome, receipt.output_tokens) == (Outcome.CLIENT_CANCELLED, 2)
    assert receipt.input_tokens == -(-len(placed.body) // 4)
    assert receipt.cost > 0
    assert engine.stopped == 1
    assert harness.answer(placed)[1] == b"one.two."


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        (CancelReason.TIMED_OUT, Outcome.TIMED_OUT),
        (CancelReason.COORDINATOR, Outcome.PROVIDER_ERROR),
        (CancelReason.HEDGED, Outcome.REFUSED),
    ],
)
async def test_a_stop_by_the_coordinator_is_not_charged(reason: CancelReason, outcome: Outcome) -> None:
    """The receipt of a job that the coordinator stopped says so and charges nothing."""
    harness = RunnerHarness(engine := ScriptedEngine(HEAD, ONE, TWO, hang))
    placed = harness.dispatch()
    await harness.link.until(Kind.CHUNK, placed.job, 3)
    harness.runner.cancel(harness.link, placed.job, reason)
    receipt = await harness.receipt(placed)
    assert (receipt.outcome, receipt.cost) == (outcome, 0)
    assert engine.stopped == 1


@pytest.mark.parametrize("counted", [None, ReportedUsage(20, 5, 0)], ids=["by the estimate", "by the engine's count"])
async def test_cancel_before_any_output(counted: ReportedUsage | None) -> None:
    """Cancelled once the engine has the request: a closed, empty response, and a receipt over the input, none of it cached."""
    role = ResponsePart(b"role.", has_output=False, usage=counted)
    harness = RunnerHarness(engine := ScriptedEngine(HEAD, role, hang))
    placed = harness.dispatch()
    await engine.called.wait()
    await asyncio.sleep(0.01)
    harness.runner.cancel(harness.link, placed.job)
    receipt = await harness.receipt(placed)
    tokens = (counted and counted.input) or -(-len(placed.body) // 4)
    assert (receipt.outcome, receipt.input_tokens, receipt.cached_input_tokens) == (Outcome.CLIENT_CANCELLED, tokens, 0)
    assert (receipt.output_tokens, receipt.cost) == (0, -(-tokens * PRICES.input // 1_000_000))
    assert harness.answer(placed)[:2] == (ResponseHead(499, "application/json"), b"")


async def test_a_cancelled_input_is_not_charged_unless_the_coordinator_confirms() -> None:
    """The head of the empty response leaves before the receipt is signed; without the coordinator's confirmation nothing is
    charged.
    """
    harness = RunnerHarness(engine := ScriptedEngine(HEAD, hang), deadlines=Deadlines(first_credit=0.02))
    harness.link.on_first_chunk = lambda _job: None
    placed = harness.dispatch()
    await engine.called.wait()
    harness.runner.cancel(harness.link, placed.job)
    receipt = await harness.receipt(placed)
    assert (receipt.outcome, receipt.cost) == (Outcome.PROVIDER_ERROR, 0)
    assert len(harness.link.payloads(placed.job, Kind.CHUNK)) == 1


async def test_an_input_that_no_engine_received_is_not_charged() -> None:
    """A job cancelled while connecting to the engine or waiting for a slot costs nothing."""
    harness = RunnerHarness(engine := ScriptedEngine(hang), slots=1)
    engine.receives_request = False
    first, second = harness.dispatch(), harness.dispatch()
    await engine.called.wait()
    for placed in (second, first):
        harness.runner.cancel(harness.link, placed.job)
        receipt = await harness.receipt(placed)
        assert (receipt.outcome, receipt.cost, receipt.input_tokens) == (Outcome.CLIENT_CANCELLED, 0, 0)
    assert len(engine.requests) == 1


async def test_cancel_during_admission() -> None:
    """A cancellation that overtakes the admission is not lost: the engine is never asked."""
    chain = MemoryChain()
    asked, go_on = asyncio.Event(), asyncio.Event()
    funds = chain.funds

    async def slow(payer: object) -> Funds:
        asked.set()
        await go_on.wait()
        return await funds(payer)  # type: ignore[arg-type]

    chain.funds = slow  # type: ignore[method-assign]
    harness = RunnerHarness(engine := ScriptedEngine(HEAD, ONE, END), chain=chain)
    placed = harness.dispatch()
    await asked.wait()
    harness.runner.cancel(harness.link, placed.job)
    go_on.set()
    assert (await harness.failure(placed))["code"] == "cancelled"
    assert (await harness.refusal_receipt(placed)).outcome == Outcome.REFUSED
    assert not engine.requests


async def test_cancel_of_another_link_changes_nothing() -> None:
    """Only the coordinator that has the job can stop it or grant it credit."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, lambda: asyncio.sleep(0.01), END))
    placed = harness.dispatch()
    await harness.link.until(Kind.CHUNK, placed.job)
    other = type(harness.link)(harness.link.coordinator)
    harness.runner.cancel(other, placed.job)
    harness.runner.grant_credit(other, placed.job, bytes(4))
    assert (await harness.receipt(placed)).outcome == Outcome.COMPLETED


async def test_chunks_wait_for_credit() -> None:
    """Without credit the node stops sending, one chunk short of the limit, and goes on when it is granted more."""
    harness = RunnerHarness(ScriptedEngine(HEAD, *[ONE] * 200, END))
    placed = harness.dispatch()
    await harness.link.until(Kind.CHUNK, placed.job, INITIAL_CREDIT - 1)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(harness.link.payloads(placed.job, Kind.CHUNK)) == INITIAL_CREDIT - 1
    harness.runner.grant_credit(harness.link, placed.job, (1_000).to_bytes(4, "big"))
    assert (await harness.receipt(placed)).outcome == Outcome.COMPLETED
    assert harness.answer(placed)[1] == b"one." * 200 + b"done"


async def test_malformed_credit_is_refused() -> None:
    """A CREDIT frame of another length is the coordinator's error."""
    harness = RunnerHarness(ScriptedEngine())
    with pytest.raises(BadMessage):
        harness.runner.grant_credit(harness.link, Client().order(harness.asks.current[0]).job, b"\1")


async def test_large_responses_are_split() -> None:
    """Parts and ends above the chunk size are split into several chunks that add up, within the credit."""
    big = bytes(range(256)) * (3 * CHUNK_BYTES // 256)
    harness = RunnerHarness(ScriptedEngine(HEAD, ResponsePart(big, has_output=True, text_bytes=9), ResponseEnd(big)))
    placed = harness.dispatch()
    await harness.receipt(placed)
    assert harness.answer(placed)[1] == big + big
    assert len(harness.link.payloads(placed.job, Kind.CHUNK)) == 1 + (1 + 3) + 3


async def test_a_lost_link_before_output_leaves_a_receipt() -> None:
    """If the link is lost before any output, the engine is stopped and a receipt at no cost is stored, to be sent later."""
    harness = RunnerHarness(engine := ScriptedEngine(HEAD, hang))
    placed = harness.dispatch()
    await engine.called.wait()
    harness.link.disconnect()
    harness.runner.link_lost(harness.link)
    await harness.ended()
    assert engine.stopped == 1
    assert harness.stranded == 1
    assert nothing_is_owed(harness, placed)
    (late,) = await harness.store.unacknowledged(harness.link.coordinator, NOW + 1, 0, 10)
    assert (late.job, late.late_receipt.receipt.message.outcome) == (placed.job, Outcome.PROVIDER_ERROR)


async def test_a_lost_link_after_output_leaves_a_receipt() -> None:
    """If the link is lost in mid-response, a receipt that charges nothing is stored, to be sent later."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, hang))
    placed = harness.dispatch()
    await harness.link.until(Kind.CHUNK, placed.job, 2)
    harness.link.disconnect()
    harness.runner.link_lost(harness.link)
    await harness.ended()
    receipt = harness.store.receipt_records[0].receipt.message
    assert (receipt.outcome, receipt.cost) == (Outcome.PROVIDER_ERROR, 0)
    assert not harness.link.payloads(placed.job, Kind.RECEIPT)
    assert harness.stranded == 1


async def test_receipts_strand_only_on_lost_links() -> None:
    """A receipt that left on its link is not told of as stranded; that of a refusal whose link was lost meanwhile is."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END))
    await harness.receipt(harness.dispatch())
    await harness.refusal_receipt(harness.dispatch(terms_with={"max_cost": Amount(1)}))
    assert harness.stranded == 0
    harness.dispatch(terms_with={"max_cost": Amount(1)})
    harness.link.disconnect()
    await asyncio.gather(*harness.runner._tasks)
    assert harness.stranded == 1


@pytest.mark.parametrize("lost", [True, False], ids=["the link is lost", "no word comes"])
async def test_an_unconfirmed_response_is_not_charged(lost: bool) -> None:
    """A complete response that the coordinator did not confirm may have gone elsewhere, so it is not charged."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, TWO, END), deadlines=Deadlines(first_credit=30 if lost else 0.02))
    harness.link.on_first_chunk = lambda _job: None
    placed = harness.dispatch()
    await harness.link.until(Kind.CHUNK, placed.job)
    if lost:
        await asyncio.sleep(0)
        harness.runner.link_lost(harness.link)
    await harness.ended()
    receipt = harness.store.receipt_records[0].receipt.message
    assert (receipt.outcome, receipt.cost) == (Outcome.PROVIDER_ERROR, 0)


async def test_a_full_link_slows_the_engine_down() -> None:
    """A link without room keeps the response waiting; when it is lost, the job ends."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, TWO, END))
    harness.link.fill()
    placed = harness.dispatch()
    await harness.link.until(Kind.ACCEPT, placed.job)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not harness.link.payloads(placed.job, Kind.CHUNK)
    harness.link.disconnect()
    harness.runner.link_lost(harness.link)
    await harness.ended()
    assert nothing_is_owed(harness, placed)


async def test_a_receipt_that_can_not_be_stored_is_not_charged() -> None:
    """With a full disk the response is not closed and no receipt leaves; the tab is unchanged, and the next job runs."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, hang))
    placed = harness.dispatch()
    await harness.link.until(Kind.CHUNK, placed.job, 2)
    harness.store.fault = Unavailable(Code.PROVIDER_FAILED, "disk full")
    harness.runner.cancel(harness.link, placed.job)
    await harness.failure(placed)
    await harness.ended()
    assert nothing_is_owed(harness, placed)
    assert not harness.link.payloads(placed.job, Kind.RECEIPT)
    harness.store.fault = None
    harness.engine.engine = ScriptedEngine(HEAD, ONE, END)
    assert (await harness.receipt(harness.dispatch())).seq == 1


async def test_an_order_that_cannot_be_stored_does_not_run() -> None:
    """With a full disk no output leaves: the job goes to the next provider."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END))
    harness.store.fault = Unavailable(Code.PROVIDER_FAILED, "disk full")
    placed = harness.dispatch()
    assert (await harness.failure(placed))["retry"] is True
    assert not harness.link.payloads(placed.job, Kind.CHUNK)


async def test_a_bug_in_one_job_does_not_affect_others() -> None:
    """An unexpected error ends its job without a charge; the node continues."""
    harness = RunnerHarness(engine := ScriptedEngine(HEAD, ONE, ZeroDivisionError()))
    assert (await harness.receipt(harness.dispatch())).outcome == Outcome.PROVIDER_ERROR
    engine.steps = (ZeroDivisionError(),)
    assert (await harness.failure(harness.dispatch()))["code"] == "provider_failed"
    engine.steps = (HEAD, ONE, END)
    assert (await harness.receipt(harness.dispatch())).outcome == Outcome.COMPLETED


async def test_jobs_beyond_the_slots_wait_their_turn() -> None:
    """With one slot, a second job waits for the first; the free capacity says so all the while."""
    opening = asyncio.Event()
    harness = RunnerHarness(engine := ScriptedEngine(HEAD, opening.wait, ONE, END), slots=1)
    first, second = harness.dispatch(), harness.dispatch()
    await harness.link.until(Kind.ACCEPT, second.job)
    assert len(engine.requests) <= 1
    assert harness.capacity().free == 0
    opening.set()
    await harness.receipt(first)
    await harness.receipt(second)
    await harness.ended()
    assert (harness.capacity().free, harness.capacity().slots) == (1, 1)


async def test_no_slot_in_time() -> None:
    """A job that finds no slot before its deadline goes to the next provider."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, hang), slots=1, deadlines=Deadlines(queue=0.05))
    harness.dispatch()
    error = await harness.failure(harness.dispatch())
    assert (error["code"], error["retry"]) == ("node_busy", True)
    assert harness.store.receipt_records[-1].receipt.message.outcome == Outcome.REFUSED
    await harness.runner.drain(0)


async def test_no_slot_before_the_orders_deadline() -> None:
    """However long the node would wait for a slot, no job starts after its order's deadline."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, hang), slots=1, deadlines=Deadlines(queue=3_600))
    harness.dispatch()
    late = harness.dispatch(None, order_with={"deadline": NOW + 1})
    assert (await harness.failure(late))["code"] == "node_busy"
    await harness.runner.drain(0)


async def test_excess_jobs_are_refused() -> None:
    """Beyond a limited number of waiting jobs the rest are refused, with receipts up to another limit; accepted jobs end."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END), slots=1)
    placed = [harness.dispatch() for _ in range(200)]
    plain = [placed_job for placed_job in placed if harness.link.payloads(placed_job.job, Kind.FAIL)]
    assert len(plain) == 200 - (4 + 64) - 64
    taken, turned_away = placed[: 4 + 64], placed[4 + 64 : 4 + 64 + 64]
    for placed_job in turned_away:
        assert (await harness.refusal_receipt(placed_job)).outcome == Outcome.REFUSED
        assert (await harness.failure(placed_job))["code"] == "node_busy"
    for placed_job in taken:
        await harness.receipt(placed_job)
    assert all(Failure.loads(harness.link.payloads(placed_job.job, Kind.FAIL)[0]).receipt is None for placed_job in plain)


async def test_the_size_of_waiting_requests_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that wait and run hold a limited number of bytes; room returns as they end."""
    harness = RunnerHarness(engine := ScriptedEngine(HEAD, ONE, hang), slots=8)
    body = b'{"messages": [], "x": "%s"}' % (b"x" * 10_000)
    monkeypatch.setattr(runner, "MAX_HELD_BYTES", 60_000)
    placed = [harness.dispatch(body) for _ in range(4)]
    assert (await harness.failure(placed[3]))["message"] == "this node has too many bytes of waiting requests"
    assert (await harness.refusal_receipt(placed[3])).outcome == Outcome.REFUSED
    for placed_job in placed[:3]:
        await harness.link.until(Kind.CHUNK, placed_job.job)
        harness.runner.cancel(harness.link, placed_job.job)
        await harness.receipt(placed_job)
    await harness.ended()
    engine.steps = (HEAD, ONE, END)
    await harness.receipt(harness.dispatch(body))


async def test_receipts_of_one_payer_follow_each_other() -> None:
    """Many jobs at once: every receipt has its own seq, and each total is the one before plus its cost."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, lambda: asyncio.sleep(0), END), slots=8)
    receipts = await asyncio.gather(*(harness.receipt(harness.dispatch()) for _ in range(20)))
    receipts.sort(key=lambda receipt: receipt.seq)
    assert [receipt.seq for receipt in receipts] == list(range(1, 21))
    assert [receipt.cumulative_cost for receipt in receipts] == [5 * n for n in range(1, 21)]


async def test_a_replayed_order_runs_once() -> None:
    """The same dispatch twice at once leads to one run of the engine and one receipt."""
    harness = RunnerHarness(engine := ScriptedEngine(HEAD, ONE, END))
    placed = harness.dispatch()
    harness.dispatch_again(placed)
    assert (await harness.failure(placed))["code"] == "order_replayed"
    await harness.receipt(placed)
    assert len(engine.requests) == 1


async def test_consumed_orders_do_not_run_again_after_a_restart() -> None:
    """A node that starts with the stored orders refuses an order that it had before."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END))
    placed = harness.dispatch()
    await harness.receipt(placed)
    later = RunnerHarness(ScriptedEngine(HEAD, ONE, END))
    later.runner._consumed_orders.update(await harness.store.consumed_orders(NOW))
    later.dispatch_again(placed)
    assert (await later.failure(placed))["code"] == "order_replayed"


async def test_lack_of_funds_asks_the_chain_again() -> None:
    """Before a payer is refused for lack of funds, the chain is asked again; its second answer is final."""
    chain = MemoryChain(Funds(known=True))
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END), chain=chain, credit=CreditLimits(per_payer=Amount(0)))
    refused = harness.dispatch()
    error = await harness.failure(refused)
    assert (error["code"], error["retry"]) == ("unsecured", False)
    chain.fresh[harness.client.payer.address] = Funds(reserved=Amount(10**9), known=True)
    await harness.receipt(harness.dispatch())


async def test_each_refusal_names_its_reason() -> None:
    """A forged, expired, misdirected or unpayable order, and a request that breaks a rule, get their own code, and no charge."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END))
    spoilt: dict[str, dict[str, Any]] = {
        "order_expired": {"order_with": {"deadline": NOW}},
        "order_misdirected": {"match_with": {"provider": signer("another").address}},
        "unauthorised_tab": {"order_with": {"ceiling": Amount(1)}},
        "cost_above_cap": {"terms_with": {"max_cost": Amount(1)}},
    }
    for code, how in spoilt.items():
        harness.client = Client(signer(code))
        error = await harness.failure(harness.dispatch(None, **how))
        assert (error["code"], error["retry"]) == (code, False)
    harness.client = Client(signer("honest"))
    assert (await harness.failure(harness.dispatch(b"not json")))["code"] == "bad_message"
    await harness.ended()
    assert harness.tabs.account(harness.client.payer.address).tab.in_flight == 0
    assert not any(booking.receipt.message.cost for booking in harness.store.receipt_records)


async def test_a_seal_for_another_node_does_not_open() -> None:
    """A key wrapped for somebody else is refused as a bad seal."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END))
    placed, other = harness.client.order(harness.asks.current[0]), harness.client.order(harness.asks.current[0])
    object.__setattr__(placed.dispatch.candidate, "wrapped_key", other.dispatch.candidate.wrapped_key)
    harness.dispatch_again(placed)
    assert (await harness.failure(placed))["code"] == "bad_seal"


async def test_a_malformed_dispatch_is_answered() -> None:
    """A dispatch that does not parse is answered with an error."""
    harness = RunnerHarness(ScriptedEngine())
    job = Client().order(harness.asks.current[0]).job
    harness.runner.dispatch(harness.link, job, b"\0\0\0\xffgarbage")
    await harness.link.until(Kind.FAIL, job)
    assert harness.runner.running == 0


async def test_draining_lets_jobs_finish() -> None:
    """A stopping node takes no new jobs, offers no slot, and finishes running jobs."""
    opening = asyncio.Event()
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, opening.wait, END))
    running = harness.dispatch()
    await harness.link.until(Kind.CHUNK, running.job)
    draining = asyncio.create_task(harness.runner.drain(30))
    await asyncio.sleep(0)
    assert harness.capacity().free == 0
    assert (await harness.failure(harness.dispatch()))["code"] == "node_busy"
    opening.set()
    await draining
    assert (await harness.receipt(running)).outcome == Outcome.COMPLETED


async def test_draining_stops_jobs_after_the_grace_period() -> None:
    """After its grace period a stopping node ends running jobs: uncharged after output, for the next provider before."""
    harness = RunnerHarness(engine := ScriptedEngine(HEAD, ONE, hang))
    first = harness.dispatch()
    await harness.link.until(Kind.CHUNK, first.job, 2)
    engine.steps = (HEAD, hang)
    second = harness.dispatch()
    await harness.link.until(Kind.ACCEPT, second.job)
    await harness.runner.drain(0)
    assert (await harness.receipt(first)).outcome == Outcome.PROVIDER_ERROR
    assert (await harness.failure(second))["retry"] is True


async def test_the_hybrid_seal() -> None:
    """A node may ask for the post-quantum hybrid suite; jobs work the same."""
    secret = bytes(range(SealingKey.secret_bytes(HYBRID)))
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END), sealing=SealingKey(HYBRID, secret))
    assert (await harness.receipt(harness.dispatch())).outcome == Outcome.COMPLETED


async def test_impossible_usage_is_clamped() -> None:
    """An engine that reports a billion tokens is billed what can be true."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, ResponseEnd(usage=ReportedUsage(10**9, 0, 10**9))))
    receipt = await harness.receipt(harness.dispatch())
    assert receipt.output_tokens == 4


async def test_capacity_leaves_out_engines_that_are_down() -> None:
    """Slots of an engine that does not respond are not offered."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END))
    harness.engine.up = False
    assert (harness.capacity().free, harness.capacity().slots) == (0, 0)


async def test_an_engines_words_travel_sealed() -> None:
    """A failure tells the client the engine's own reason; whoever relays it cannot read it."""
    down = Unavailable(Code.ENGINE_UNAVAILABLE, "the engine answered with the status 500", fault=Fault.ENGINE)
    down.private_reason = "CUDA out of memory"
    harness = RunnerHarness(ScriptedEngine(down))
    placed = harness.dispatch()
    error = await harness.failure(placed)
    assert "CUDA" not in str(error)
    assert placed.key.open_reason(placed.order.digest, error["sealed_reason"]) == "CUDA out of memory"
    harness = RunnerHarness(ScriptedEngine(DOWN))
    plain = await harness.failure(harness.dispatch())
    assert "sealed_reason" not in plain


async def test_the_clients_head_of_the_match_log_is_passed_on() -> None:
    """What a request says of the log goes to the watch once the job ended, whatever it is; a request without one passes none."""
    harness, passed_on = RunnerHarness(ScriptedEngine(HEAD, ONE, END)), list[tuple[object, bytes]]()
    harness.runner._on_client_head = lambda link, head: passed_on.append((link, head))
    for head in (CHAT, replace(CHAT, log_head=b"head")):
        await harness.receipt(harness.dispatch(head=head))
    await harness.ended()
    assert passed_on == [(harness.link, b"head")]
