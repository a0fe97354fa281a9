from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from node.domain.tabs import CreditLimits, Funds
from node.jobs import runner
from node.jobs.delivery import CHUNK_BYTES
from node.jobs.job import Deadlines
from node.ports import ResponseEnd, ResponsePart, ResponseStart
from node.testing.memory import MemoryChain, ScriptedEngine
from tallystick.protocol.errors import BadMessage, Code, Fault, Unavailable
from tallystick.protocol.messages import Outcome
from tallystick.protocol.openai_wire import ReportedUsage
from tallystick.protocol.sealing import HYBRID, SealingKey
from tallystick.protocol.types import Amount
from tallystick.protocol.wire import INITIAL_CREDIT, CancelReason, Failure, Kind, ResponseHead
from tests.node.harness import NOW, PRICES, Client, Placed, Stage, signer

HEAD = ResponseStart(200, "text/event-stream")
ROLE = ResponsePart(b"role.", has_output=False)
ONE, TWO = ResponsePart(b"one.", has_output=True, text_bytes=4), ResponsePart(b"two.", has_output=True, text_bytes=4)
END = ResponseEnd(b"done", usage=ReportedUsage(20, 5, 10))
QUICK = Deadlines(queue=0.05, first_token=0.05, between_tokens=0.05, total=5.0, reader=0.05)
DOWN = Unavailable(Code.ENGINE_UNAVAILABLE, "the engine is down", fault=Fault.ENGINE)


def for_ever() -> Awaitable[object]:
    """What an engine that hangs does."""
    return asyncio.Event().wait()


def nothing_is_owed(stage: Stage, placed: Placed) -> bool:
    """Whether the payer's tab is as high as if the job had never been, and its receipts say so."""
    tab = stage.tabs.account(placed.order.message.payer).tab
    costs = [booking.receipt.message.cost for booking in stage.store.receipt_records]
    return (tab.seq, tab.cumulative, tab.in_flight) == (len(costs), 0, 0) and not any(costs)


async def test_a_job_that_completes() -> None:
    """ACCEPT, sealed chunks, the receipt: head first, the role with the first output, the end last, the engine's count billed."""
    stage = Stage(ScriptedEngine(HEAD, ROLE, ONE, TWO, END))
    placed = stage.dispatch()
    receipt = await stage.receipt(placed)
    assert stage.answer(placed)[:2] == (ResponseHead(200, "text/event-stream"), b"role.one.two.done")
    assert [kind for kind, _, _ in stage.link.frames] == [Kind.ACCEPT, *[Kind.CHUNK] * 4, Kind.RECEIPT]
    assert (receipt.outcome, receipt.input_tokens, receipt.cached_input_tokens, receipt.output_tokens) == (
        Outcome.COMPLETED,
        20,
        5,
        10,
    )
    assert (receipt.seq, receipt.cost, receipt.finished_at) == (1, 6, NOW)
    await stage.ended()
    assert stage.tabs.account(receipt.payer).tab.cumulative == receipt.cost
    assert stage.tabs.account(receipt.payer).tab.in_flight == 0
    assert stage.reports.reports[0].outcome is Outcome.COMPLETED


async def test_nothing_leaves_before_the_receipt_is_durable() -> None:
    """The last chunk and the receipt are sent only after the store has taken the receipt."""
    stage = Stage(ScriptedEngine(HEAD, ONE, END))
    seen: list[int] = []
    book = stage.store.record_receipt

    async def watched(booking: object) -> None:
        seen.append(len(stage.link.payloads(placed.job, Kind.CHUNK)))
        await book(booking)  # type: ignore[arg-type]
        seen.append(len(stage.link.payloads(placed.job, Kind.CHUNK)))

    stage.store.record_receipt = watched  # type: ignore[method-assign]
    placed = stage.dispatch()
    await stage.receipt(placed)
    assert seen == [2, 2]
    assert len(stage.link.payloads(placed.job, Kind.CHUNK)) == 3


async def test_no_output_leaves_before_the_order_is_remembered() -> None:
    """The first chunk waits for the write that keeps the order from running again after a crash."""
    stage = Stage(ScriptedEngine(HEAD, ONE, END))
    gate = asyncio.Event()
    begin = stage.store.begin

    async def slow(*arguments: object) -> None:
        await gate.wait()
        await begin(*arguments)  # type: ignore[arg-type]

    stage.store.begin = slow  # type: ignore[method-assign, assignment]
    placed = stage.dispatch()
    await stage.link.until(Kind.ACCEPT, placed.job)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not stage.link.payloads(placed.job, Kind.CHUNK)
    gate.set()
    await stage.receipt(placed)


async def test_an_answer_cut_at_the_limit() -> None:
    """An answer that ended at the output limit is charged as one, and says so."""
    stage = Stage(ScriptedEngine(HEAD, ONE, ResponseEnd(truncated=True, usage=ReportedUsage(1, 0, 1))))
    assert (await stage.receipt(stage.dispatch())).outcome == Outcome.LENGTH


async def test_an_answer_in_one_piece() -> None:
    """A response that was not streamed comes as head and one last chunk."""
    stage = Stage(ScriptedEngine(ResponseStart(200, "application/json"), ResponseEnd(b'{"a": 1}', 4, ReportedUsage(3, 0, 4))))
    placed = stage.dispatch(b'{"messages": []}')
    assert (await stage.receipt(placed)).output_tokens == 4
    assert stage.answer(placed)[:2] == (ResponseHead(200, "application/json"), b'{"a": 1}')
    assert len(stage.link.payloads(placed.job, Kind.CHUNK)) == 2


async def test_a_deterministic_no_of_the_engine_goes_to_the_client() -> None:
    """A 4xx that any provider would give is passed through sealed, with its status; it costs nothing and is final."""
    stage = Stage(ScriptedEngine(ResponseStart(400, "application/json"), ResponseEnd(b'{"error": {"message": "too long"}}')))
    placed = stage.dispatch()
    receipt = await stage.receipt(placed)
    assert (receipt.outcome, receipt.cost, receipt.input_tokens, receipt.output_tokens) == (Outcome.UPSTREAM_ERROR, 0, 0, 0)
    assert stage.answer(placed)[:2] == (ResponseHead(400, "application/json"), b'{"error": {"message": "too long"}}')


@pytest.mark.parametrize(
    "steps",
    [
        (DOWN,),
        (HEAD, DOWN),
        (HEAD, ROLE, DOWN),
        (HEAD, ROLE),
    ],
)
async def test_a_failure_before_output_is_for_the_next_provider(
    steps: tuple[ResponseStart | ResponsePart | Unavailable, ...],
) -> None:
    """An engine that fails before a user would see anything leaves no chunk and no charge, and the error says: try again."""
    stage = Stage(ScriptedEngine(*steps))
    placed = stage.dispatch()
    error = await stage.failure(placed)
    assert (error["code"], error["fault"], error["retry"]) == ("engine_unavailable", "engine", True)
    await stage.ended()
    assert not stage.link.payloads(placed.job, Kind.CHUNK)
    assert nothing_is_owed(stage, placed)
    assert (await stage.void(placed)).outcome == Outcome.PROVIDER_ERROR
    assert stage.reports.reports[0].outcome is Outcome.PROVIDER_ERROR
    assert stage.reports.reports[0].engine_fault


async def test_a_failed_order_does_not_run_again() -> None:
    """An order of which nothing left has its receipt at no cost, and is used up: dispatched again, it is refused without one."""
    engine = ScriptedEngine(HEAD, DOWN)
    stage = Stage(engine)
    placed = stage.dispatch()
    assert (await stage.void(placed)).seq == 1
    await stage.ended()
    engine.steps = (HEAD, ONE, END)
    stage.hand_over(placed)
    second = Failure.loads(await stage.link.until(Kind.FAIL, placed.job, 2))
    assert (second.error.code, second.receipt) == (Code.ORDER_REPLAYED, None)
    assert (len(engine.calls), len(stage.store.receipt_records)) == (1, 1)


async def test_a_failure_after_output_costs_nothing() -> None:
    """An answer that broke is closed in order, with a receipt that charges nothing and says who failed."""
    stage = Stage(ScriptedEngine(HEAD, ONE, DOWN))
    placed = stage.dispatch()
    receipt = await stage.receipt(placed)
    assert (receipt.outcome, receipt.cost, receipt.seq) == (Outcome.PROVIDER_ERROR, 0, 1)
    assert stage.answer(placed)[1] == b"one."


async def test_an_engine_that_says_nothing() -> None:
    """Without a first output in time, the job goes to the next provider and the engine is stopped."""
    stage = Stage(engine := ScriptedEngine(HEAD, ROLE, for_ever), deadlines=QUICK)
    placed = stage.dispatch()
    error = await stage.failure(placed)
    assert (error["code"], error["retry"]) == ("timed_out", True)
    await stage.ended()
    assert engine.stopped == 1
    assert nothing_is_owed(stage, placed)
    assert (await stage.void(placed)).outcome == Outcome.TIMED_OUT


async def test_an_engine_that_falls_silent() -> None:
    """Silence in mid-answer ends the job as timed out, without a charge."""
    stage = Stage(ScriptedEngine(HEAD, ONE, for_ever), deadlines=QUICK)
    receipt = await stage.receipt(stage.dispatch())
    assert (receipt.outcome, receipt.cost) == (Outcome.TIMED_OUT, 0)


async def test_the_whole_job_has_a_deadline() -> None:
    """An engine that always writes a little more is stopped when the whole job took too long."""
    wait: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(0.01)  # noqa: E731
    steps = [step for _ in range(200) for step in (ONE, wait)]
    stage = Stage(ScriptedEngine(HEAD, *steps), deadlines=Deadlines(total=0.1, between_tokens=5))
    assert (await stage.receipt(stage.dispatch())).outcome == Outcome.TIMED_OUT


async def test_an_answer_in_one_piece_may_take_its_time() -> None:
    """The deadline of a first token is for streams: what is not streamed has until its total deadline."""
    stage = Stage(ScriptedEngine(lambda: asyncio.sleep(0.1), HEAD, END), deadlines=QUICK)
    assert (await stage.receipt(stage.dispatch(b"{}"))).outcome == Outcome.COMPLETED


async def test_cancel_in_mid_answer() -> None:
    """CANCEL stops the engine at once; what was delivered is charged by the stated rule, and nothing of what was not."""
    stage = Stage(engine := ScriptedEngine(HEAD, ONE, TWO, for_ever))
    placed = stage.dispatch()
    await stage.link.until(Kind.CHUNK, placed.job, 3)
    stage.runner.cancel(stage.link, placed.job)
    receipt = await stage.receipt(placed)
    assert (receipt.outcome, receipt.output_tokens) == (Outcome.CLIENT_CANCELLED, 2)
    assert receipt.input_tokens == -(-len(placed.body) // 4)
    assert receipt.cost > 0
    assert engine.stopped == 1
    assert stage.answer(placed)[1] == b"one.two."


@pytest.mark.parametrize(
    ("reason", "outcome"), [(CancelReason.TIMED_OUT, Outcome.TIMED_OUT), (CancelReason.COORDINATOR, Outcome.PROVIDER_ERROR)]
)
async def test_a_stop_that_the_client_did_not_ask_for(reason: CancelReason, outcome: Outcome) -> None:
    """What the coordinator stopped by itself says so in its receipt, and charges nothing."""
    stage = Stage(engine := ScriptedEngine(HEAD, ONE, TWO, for_ever))
    placed = stage.dispatch()
    await stage.link.until(Kind.CHUNK, placed.job, 3)
    stage.runner.cancel(stage.link, placed.job, reason)
    receipt = await stage.receipt(placed)
    assert (receipt.outcome, receipt.cost) == (outcome, 0)
    assert engine.stopped == 1


@pytest.mark.parametrize("counted", [None, ReportedUsage(20, 5, 0)], ids=["by the estimate", "by the engine's count"])
async def test_cancel_before_any_output(counted: ReportedUsage | None) -> None:
    """Cancelled once the engine had the request: a closed, empty response, and a receipt over the input, none of it as cached."""
    role = ResponsePart(b"role.", has_output=False, usage=counted)
    stage = Stage(engine := ScriptedEngine(HEAD, role, for_ever))
    placed = stage.dispatch()
    await engine.called.wait()
    await asyncio.sleep(0.01)
    stage.runner.cancel(stage.link, placed.job)
    receipt = await stage.receipt(placed)
    tokens = counted.input if counted else -(-len(placed.body) // 4)
    assert (receipt.outcome, receipt.input_tokens, receipt.cached_input_tokens) == (Outcome.CLIENT_CANCELLED, tokens, 0)
    assert (receipt.output_tokens, receipt.cost) == (0, -(-tokens * PRICES.input // 1_000_000))
    assert stage.answer(placed)[:2] == (ResponseHead(499, "application/json"), b"")


async def test_a_cancelled_input_is_not_charged_unless_the_coordinator_confirms() -> None:
    """The head of the empty response leaves before the receipt is made; without the coordinator's word for it nothing is due."""
    stage = Stage(engine := ScriptedEngine(HEAD, for_ever), deadlines=Deadlines(first_credit=0.02))
    stage.link.on_first_chunk = lambda _job: None
    placed = stage.dispatch()
    await engine.called.wait()
    stage.runner.cancel(stage.link, placed.job)
    receipt = await stage.receipt(placed)
    assert (receipt.outcome, receipt.cost) == (Outcome.PROVIDER_ERROR, 0)
    assert len(stage.link.payloads(placed.job, Kind.CHUNK)) == 1


async def test_an_input_that_no_engine_had_is_not_charged() -> None:
    """Cancelled while the engine was being reached, or while the job waited for a slot, a job costs nothing."""
    stage = Stage(engine := ScriptedEngine(for_ever), slots=1)
    engine.receives_request = False
    first, second = stage.dispatch(), stage.dispatch()
    await engine.called.wait()
    for placed in (second, first):
        stage.runner.cancel(stage.link, placed.job)
        receipt = await stage.receipt(placed)
        assert (receipt.outcome, receipt.cost, receipt.input_tokens) == (Outcome.CLIENT_CANCELLED, 0, 0)
    assert len(engine.calls) == 1


async def test_cancel_while_still_being_admitted() -> None:
    """A cancellation that overtakes the admission is not lost: the engine is never asked."""
    chain = MemoryChain()
    asked, go_on = asyncio.Event(), asyncio.Event()
    funds = chain.funds

    async def slow(payer: object) -> Funds:
        asked.set()
        await go_on.wait()
        return await funds(payer)  # type: ignore[arg-type]

    chain.funds = slow  # type: ignore[method-assign]
    stage = Stage(engine := ScriptedEngine(HEAD, ONE, END), chain=chain)
    placed = stage.dispatch()
    await asked.wait()
    stage.runner.cancel(stage.link, placed.job)
    go_on.set()
    assert (await stage.failure(placed))["code"] == "cancelled"
    assert (await stage.void(placed)).outcome == Outcome.REFUSED
    assert not engine.calls


async def test_cancel_of_another_link_changes_nothing() -> None:
    """Only the coordinator that has the job can stop it or grant it credit."""
    stage = Stage(ScriptedEngine(HEAD, ONE, lambda: asyncio.sleep(0.01), END))
    placed = stage.dispatch()
    await stage.link.until(Kind.CHUNK, placed.job)
    other = type(stage.link)(stage.link.coordinator)
    stage.runner.cancel(other, placed.job)
    stage.runner.grant_credit(other, placed.job, bytes(4))
    assert (await stage.receipt(placed)).outcome == Outcome.COMPLETED


async def test_chunks_wait_for_credit() -> None:
    """Without credit the node stops sending, one chunk short of the limit, and goes on when it is granted more."""
    stage = Stage(ScriptedEngine(HEAD, *[ONE] * 200, END))
    placed = stage.dispatch()
    await stage.link.until(Kind.CHUNK, placed.job, INITIAL_CREDIT - 1)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(stage.link.payloads(placed.job, Kind.CHUNK)) == INITIAL_CREDIT - 1
    stage.runner.grant_credit(stage.link, placed.job, (1_000).to_bytes(4, "big"))
    assert (await stage.receipt(placed)).outcome == Outcome.COMPLETED
    assert stage.answer(placed)[1] == b"one." * 200 + b"done"


async def test_credit_makes_sense_or_is_refused() -> None:
    """A CREDIT frame of another length is the coordinator's error."""
    stage = Stage(ScriptedEngine())
    with pytest.raises(BadMessage):
        stage.runner.grant_credit(stage.link, Client().order(stage.book.current[0]).job, b"\1")


async def test_large_answers_are_cut() -> None:
    """Pieces and ends above the chunk size are cut into several chunks that add up, under credit."""
    big = bytes(range(256)) * (3 * CHUNK_BYTES // 256)
    stage = Stage(ScriptedEngine(HEAD, ResponsePart(big, has_output=True, text_bytes=9), ResponseEnd(big)))
    placed = stage.dispatch()
    await stage.receipt(placed)
    assert stage.answer(placed)[1] == big + big
    assert len(stage.link.payloads(placed.job, Kind.CHUNK)) == 1 + (1 + 3) + 3


async def test_a_lost_link_before_output_leaves_a_receipt() -> None:
    """If the link goes before anything left, the engine is stopped, and a receipt at no cost is stored, to be sent later."""
    stage = Stage(engine := ScriptedEngine(HEAD, for_ever))
    placed = stage.dispatch()
    await engine.called.wait()
    stage.link.disconnect()
    stage.runner.link_lost(stage.link)
    await stage.ended()
    assert engine.stopped == 1
    assert nothing_is_owed(stage, placed)
    (late,) = await stage.store.unacknowledged(stage.link.coordinator, NOW + 1, 0, 10)
    assert (late.job, late.late_receipt.receipt.message.outcome) == (placed.job, Outcome.PROVIDER_ERROR)


async def test_a_lost_link_after_output_leaves_a_receipt() -> None:
    """If the link goes in mid-answer, a receipt that charges nothing is stored, to be sent when it is back."""
    stage = Stage(ScriptedEngine(HEAD, ONE, for_ever))
    placed = stage.dispatch()
    await stage.link.until(Kind.CHUNK, placed.job, 2)
    stage.link.disconnect()
    stage.runner.link_lost(stage.link)
    await stage.ended()
    receipt = stage.store.receipt_records[0].receipt.message
    assert (receipt.outcome, receipt.cost) == (Outcome.PROVIDER_ERROR, 0)
    assert not stage.link.payloads(placed.job, Kind.RECEIPT)


@pytest.mark.parametrize("lost", [True, False], ids=["the link is lost", "no word comes"])
async def test_an_answer_that_the_coordinator_never_had_is_not_charged(lost: bool) -> None:
    """All of it was generated and posted, but without the coordinator's word the job may have gone elsewhere: no charge."""
    stage = Stage(ScriptedEngine(HEAD, ONE, TWO, END), deadlines=Deadlines(first_credit=30 if lost else 0.02))
    stage.link.on_first_chunk = lambda _job: None
    placed = stage.dispatch()
    await stage.link.until(Kind.CHUNK, placed.job)
    if lost:
        await asyncio.sleep(0)
        stage.runner.link_lost(stage.link)
    await stage.ended()
    receipt = stage.store.receipt_records[0].receipt.message
    assert (receipt.outcome, receipt.cost) == (Outcome.PROVIDER_ERROR, 0)


async def test_a_full_link_slows_the_engine_down() -> None:
    """A link with no room keeps the answer waiting; when it is lost, the job ends."""
    stage = Stage(ScriptedEngine(HEAD, ONE, TWO, END))
    stage.link.fill()
    placed = stage.dispatch()
    await stage.link.until(Kind.ACCEPT, placed.job)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not stage.link.payloads(placed.job, Kind.CHUNK)
    stage.link.disconnect()
    stage.runner.link_lost(stage.link)
    await stage.ended()
    assert nothing_is_owed(stage, placed)


async def test_a_receipt_that_can_not_be_stored_is_not_charged() -> None:
    """With a full disk the answer is not closed and no receipt leaves; the tab stays where it was, and the next job goes on."""
    stage = Stage(ScriptedEngine(HEAD, ONE, for_ever))
    placed = stage.dispatch()
    await stage.link.until(Kind.CHUNK, placed.job, 2)
    stage.store.fault = Unavailable(Code.PROVIDER_FAILED, "disk full")
    stage.runner.cancel(stage.link, placed.job)
    await stage.failure(placed)
    await stage.ended()
    assert nothing_is_owed(stage, placed)
    assert not stage.link.payloads(placed.job, Kind.RECEIPT)
    stage.store.fault = None
    stage.pool.engine = ScriptedEngine(HEAD, ONE, END)
    assert (await stage.receipt(stage.dispatch())).seq == 1


async def test_an_order_that_can_not_be_remembered_does_not_run() -> None:
    """With a full disk no output leaves at all: the job goes to the next provider."""
    stage = Stage(ScriptedEngine(HEAD, ONE, END))
    stage.store.fault = Unavailable(Code.PROVIDER_FAILED, "disk full")
    placed = stage.dispatch()
    assert (await stage.failure(placed))["retry"] is True
    assert not stage.link.payloads(placed.job, Kind.CHUNK)


async def test_a_bug_in_one_job_stays_there() -> None:
    """An error that nobody foresaw ends its job without a charge; the node goes on."""
    stage = Stage(engine := ScriptedEngine(HEAD, ONE, ZeroDivisionError()))
    assert (await stage.receipt(stage.dispatch())).outcome == Outcome.PROVIDER_ERROR
    engine.steps = (ZeroDivisionError(),)
    assert (await stage.failure(stage.dispatch()))["code"] == "provider_failed"
    engine.steps = (HEAD, ONE, END)
    assert (await stage.receipt(stage.dispatch())).outcome == Outcome.COMPLETED


async def test_jobs_beyond_the_slots_wait_their_turn() -> None:
    """With one slot, a second job waits for the first; the free capacity says so all the while."""
    gate = asyncio.Event()
    stage = Stage(engine := ScriptedEngine(HEAD, gate.wait, ONE, END), slots=1)
    first, second = stage.dispatch(), stage.dispatch()
    await stage.link.until(Kind.ACCEPT, second.job)
    assert len(engine.calls) <= 1
    assert stage.runner.capacity().free == 0
    gate.set()
    await stage.receipt(first)
    await stage.receipt(second)
    await stage.ended()
    assert (stage.runner.capacity().free, stage.runner.capacity().slots) == (1, 1)


async def test_no_slot_in_time() -> None:
    """A job that finds no slot before its deadline goes to the next provider."""
    stage = Stage(ScriptedEngine(HEAD, ONE, for_ever), slots=1, deadlines=Deadlines(queue=0.05))
    stage.dispatch()
    error = await stage.failure(stage.dispatch())
    assert (error["code"], error["retry"]) == ("node_busy", True)
    assert stage.store.receipt_records[-1].receipt.message.outcome == Outcome.REFUSED
    await stage.runner.drain(0)


async def test_no_slot_before_the_orders_deadline() -> None:
    """However long the node would wait for a slot, no job starts after its order's deadline."""
    stage = Stage(ScriptedEngine(HEAD, ONE, for_ever), slots=1, deadlines=Deadlines(queue=3_600))
    stage.dispatch()
    late = stage.dispatch(None, order_with={"deadline": NOW + 1})
    assert (await stage.failure(late))["code"] == "node_busy"
    await stage.runner.drain(0)


async def test_a_flood_is_turned_away() -> None:
    """Beyond a bounded number of waiting jobs the rest are refused, with receipts up to another bound; what was taken ends."""
    stage = Stage(ScriptedEngine(HEAD, ONE, END), slots=1)
    placed = [stage.dispatch() for _ in range(200)]
    plain = [one for one in placed if stage.link.payloads(one.job, Kind.FAIL)]
    assert len(plain) == 200 - (4 + 64) - 64
    taken, turned_away = placed[: 4 + 64], placed[4 + 64 : 4 + 64 + 64]
    for one in turned_away:
        assert (await stage.void(one)).outcome == Outcome.REFUSED
        assert (await stage.failure(one))["code"] == "node_busy"
    for one in taken:
        await stage.receipt(one)
    assert all(Failure.loads(stage.link.payloads(one.job, Kind.FAIL)[0]).receipt is None for one in plain)


async def test_waiting_requests_have_a_size_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their number, requests that wait and run hold a bounded number of bytes; room comes back as they end."""
    stage = Stage(engine := ScriptedEngine(HEAD, ONE, for_ever), slots=8)
    body = b'{"messages": [], "x": "%s"}' % (b"x" * 10_000)
    monkeypatch.setattr(runner, "MAX_HELD_BYTES", 60_000)
    placed = [stage.dispatch(body) for _ in range(4)]
    assert (await stage.failure(placed[3]))["message"] == "this node has too large requests waiting"
    assert (await stage.void(placed[3])).outcome == Outcome.REFUSED
    for one in placed[:3]:
        await stage.link.until(Kind.CHUNK, one.job)
        stage.runner.cancel(stage.link, one.job)
        await stage.receipt(one)
    await stage.ended()
    engine.steps = (HEAD, ONE, END)
    await stage.receipt(stage.dispatch(body))


async def test_receipts_of_one_payer_follow_each_other() -> None:
    """Many jobs at once: every receipt has its own seq, and each total is the one before plus its cost."""
    stage = Stage(ScriptedEngine(HEAD, ONE, lambda: asyncio.sleep(0), END), slots=8)
    receipts = await asyncio.gather(*(stage.receipt(stage.dispatch()) for _ in range(20)))
    receipts.sort(key=lambda receipt: receipt.seq)
    assert [receipt.seq for receipt in receipts] == list(range(1, 21))
    assert [receipt.cumulative_cost for receipt in receipts] == [5 * n for n in range(1, 21)]


async def test_a_replayed_order_runs_once() -> None:
    """The same dispatch twice at once leads to one run of the engine and one receipt."""
    stage = Stage(engine := ScriptedEngine(HEAD, ONE, END))
    placed = stage.dispatch()
    stage.hand_over(placed)
    assert (await stage.failure(placed))["code"] == "order_replayed"
    await stage.receipt(placed)
    assert len(engine.calls) == 1


async def test_orders_of_a_former_life_do_not_run_again() -> None:
    """A node that is started on what the store remembers refuses an order that it had before."""
    stage = Stage(ScriptedEngine(HEAD, ONE, END))
    placed = stage.dispatch()
    await stage.receipt(placed)
    later = Stage(ScriptedEngine(HEAD, ONE, END))
    later.runner._consumed_orders.update(await stage.store.consumed_orders(NOW))
    later.hand_over(placed)
    assert (await later.failure(placed))["code"] == "order_replayed"


async def test_lack_of_funds_is_looked_at_twice() -> None:
    """Before a payer is refused for lack of money the chain is asked again; if it still says no, it is final."""
    chain = MemoryChain(Funds(known=True))
    stage = Stage(ScriptedEngine(HEAD, ONE, END), chain=chain, exposure=CreditLimits(per_payer=Amount(0)))
    refused = stage.dispatch()
    error = await stage.failure(refused)
    assert (error["code"], error["retry"]) == ("unsecured", False)
    chain.fresh[stage.client.payer.address] = Funds(reserved=Amount(10**9), known=True)
    await stage.receipt(stage.dispatch())


async def test_each_refusal_names_its_reason() -> None:
    """A forged, expired, misdirected or unpayable order, and a request that breaks a rule, get their own code, and no charge."""
    stage = Stage(ScriptedEngine(HEAD, ONE, END))
    spoilt: dict[str, dict[str, Any]] = {
        "order_expired": {"order_with": {"deadline": NOW}},
        "order_misdirected": {"matched_by": signer("stranger")},
        "unauthorised_tab": {"order_with": {"ceiling": Amount(1)}},
        "cost_above_cap": {"terms_with": {"max_cost": Amount(1)}},
    }
    for code, how in spoilt.items():
        stage.client = Client(signer(code))
        error = await stage.failure(stage.dispatch(None, **how))
        assert (error["code"], error["retry"]) == (code, False)
    stage.client = Client(signer("honest"))
    assert (await stage.failure(stage.dispatch(b"not json")))["code"] == "bad_message"
    await stage.ended()
    assert stage.tabs.account(stage.client.payer.address).tab.in_flight == 0
    assert not any(booking.receipt.message.cost for booking in stage.store.receipt_records)


async def test_a_seal_for_another_node_does_not_open() -> None:
    """A key wrapped for somebody else is refused as a bad seal."""
    stage = Stage(ScriptedEngine(HEAD, ONE, END))
    placed, other = stage.client.order(stage.book.current[0]), stage.client.order(stage.book.current[0])
    object.__setattr__(placed.dispatch.candidate, "wrapped_key", other.dispatch.candidate.wrapped_key)
    stage.hand_over(placed)
    assert (await stage.failure(placed))["code"] == "bad_seal"


async def test_garbage_is_answered() -> None:
    """A dispatch that does not parse is answered with an error, and nothing else happens."""
    stage = Stage(ScriptedEngine())
    job = Client().order(stage.book.current[0]).job
    stage.runner.dispatch(stage.link, job, b"\0\0\0\xffgarbage")
    await stage.link.until(Kind.FAIL, job)
    assert stage.runner.running == 0


async def test_draining_lets_jobs_finish() -> None:
    """A node that is told to stop takes nothing new, offers no slot, and finishes what runs."""
    gate = asyncio.Event()
    stage = Stage(ScriptedEngine(HEAD, ONE, gate.wait, END))
    running = stage.dispatch()
    await stage.link.until(Kind.CHUNK, running.job)
    draining = asyncio.create_task(stage.runner.drain(30))
    await asyncio.sleep(0)
    assert stage.runner.capacity().free == 0
    assert (await stage.failure(stage.dispatch()))["code"] == "node_busy"
    gate.set()
    await draining
    assert (await stage.receipt(running)).outcome == Outcome.COMPLETED


async def test_draining_stops_what_takes_too_long() -> None:
    """After its grace a stopping node closes what still runs: unpaid where output left, to the next provider where not."""
    stage = Stage(engine := ScriptedEngine(HEAD, ONE, for_ever))
    first = stage.dispatch()
    await stage.link.until(Kind.CHUNK, first.job, 2)
    engine.steps = (HEAD, for_ever)
    second = stage.dispatch()
    await stage.link.until(Kind.ACCEPT, second.job)
    await stage.runner.drain(0)
    assert (await stage.receipt(first)).outcome == Outcome.PROVIDER_ERROR
    assert (await stage.failure(second))["retry"] is True


async def test_the_hybrid_seal() -> None:
    """A node may ask for the post-quantum hybrid suite; jobs work the same."""
    secret = bytes(range(SealingKey.secret_bytes(HYBRID)))
    stage = Stage(ScriptedEngine(HEAD, ONE, END), sealing=SealingKey(HYBRID, secret))
    assert (await stage.receipt(stage.dispatch())).outcome == Outcome.COMPLETED


async def test_wrong_usage_is_clamped() -> None:
    """An engine that reports a billion tokens is billed what can be true."""
    stage = Stage(ScriptedEngine(HEAD, ONE, ResponseEnd(usage=ReportedUsage(10**9, 0, 10**9))))
    receipt = await stage.receipt(stage.dispatch())
    assert receipt.output_tokens == 4


async def test_capacity_leaves_out_engines_that_are_down() -> None:
    """Slots of an engine that does not answer are not offered."""
    stage = Stage(ScriptedEngine(HEAD, ONE, END))
    stage.pool.up = False
    assert (stage.runner.capacity().free, stage.runner.capacity().slots) == (0, 0)
