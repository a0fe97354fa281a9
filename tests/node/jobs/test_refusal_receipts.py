"""Orders that are refused: each is used up and released by a receipt at no cost, within bounds."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from node.domain.tabs import CreditLimits, Funds, Tabs
from node.jobs.job import Deadlines
from node.jobs.receipt_signer import ReceiptSigner
from node.jobs.refusal_receipts import BURST, MAX_CONCURRENT, PAYER_SHARE, RATE, releases
from node.ports import ResponseEnd, ResponsePart, ResponseStart
from node.testing.memory import MemoryChain, ScriptedEngine
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.messages import Outcome
from tallystick.protocol.openai_wire import ReportedUsage
from tallystick.protocol.tab import check_continuity
from tallystick.protocol.types import Address, Amount, Hash
from tallystick.protocol.wire import Failure, Kind
from tests.node.harness import COORDINATOR, DOMAIN, NOW, PROVIDER, Client, Placed, Stage, admitted, signer

HEAD = ResponseStart(200, "text/event-stream")
ONE = ResponsePart(b"one.", has_output=True, text_bytes=4)
END = ResponseEnd(b"done", usage=ReportedUsage(20, 5, 10))
SPOILT: dict[str, dict[str, Any]] = {
    "order_terms": {"terms_with": {"ask": Hash(bytes(32))}},
    "unknown_model": {"terms_with": {"model": "another"}},
    "order_expired": {"order_with": {"deadline": NOW}},
    "unauthorised_tab": {"order_with": {"ceiling": Amount(1)}},
    "cost_above_cap": {"terms_with": {"max_cost": Amount(1)}},
}


async def refused(stage: Stage, placed: Placed) -> Failure:
    """How a job failed."""
    return Failure.loads(await stage.link.until(Kind.FAIL, placed.job))


@pytest.mark.parametrize("code", SPOILT)
async def test_a_refused_order_is_released(code: str) -> None:
    """Whatever this node does not bear in an order on it, the refusal carries a receipt at no cost that its tab goes on from."""
    stage = Stage(ScriptedEngine(HEAD, ONE, END))
    placed = stage.dispatch(None, **SPOILT[code])
    receipt = await stage.void(placed)
    assert (await stage.failure(placed))["code"] == code
    assert (receipt.outcome, receipt.seq, receipt.cumulative_cost) == (Outcome.REFUSED, 1, 0)
    following = await stage.receipt(stage.dispatch())
    check_continuity(receipt, following)


@pytest.mark.parametrize("code", SPOILT)
async def test_a_released_order_never_runs(code: str) -> None:
    """An order whose cap was released is used up: dispatched again, also after a restart, it is refused without a receipt."""
    stage = Stage(engine := ScriptedEngine(HEAD, ONE, END))
    placed = stage.dispatch(None, **SPOILT[code])
    await stage.void(placed)
    stage.hand_over(placed)
    again = Failure.loads(await stage.link.until(Kind.FAIL, placed.job, 2))
    assert (again.error.code, again.receipt) == (Code.ORDER_REPLAYED, None)
    later = Stage(engine, store=stage.store)
    later.hand_over(placed)
    assert (await refused(later, placed)).receipt is None
    assert not engine.calls


@pytest.mark.parametrize(
    "spoilt",
    [
        {"matched_by": signer("stranger")},
        {"order_with": {"provider": signer("another").address}},
        {"order_with": {"coordinator": signer("another").address}},
        {"terms_with": {"job": bytes(16)}},
    ],
)
async def test_what_is_no_order_on_this_node_gets_no_receipt(spoilt: dict[str, Any]) -> None:
    """Nobody can make this node number its receipts with what was not ordered of it here."""
    stage = Stage(ScriptedEngine(HEAD, ONE, END))
    placed = stage.dispatch(None, **spoilt)
    assert (await refused(stage, placed)).receipt is None
    assert not stage.store.receipt_records


async def test_a_payer_without_anything_gets_no_receipt() -> None:
    """Of a purse that is known to be empty nothing can be collected, so there is nothing to release; an unknown one counts."""
    chain = MemoryChain(Funds(known=True))
    stage = Stage(ScriptedEngine(HEAD, ONE, END), chain=chain, exposure=CreditLimits(per_payer=Amount(0)))
    placed = stage.dispatch()
    failure = await refused(stage, placed)
    assert (failure.error.code, failure.receipt) == (Code.UNSECURED, None)
    chain.cached.clear()
    for funds in (Funds(), Funds(thawing=Amount(1), known=True), Funds(reserved=Amount(1), known=True)):
        chain.default = funds
        stage.client = Client(signer(repr(funds)))
        assert (await stage.void(stage.dispatch())).outcome == Outcome.REFUSED


@pytest.mark.parametrize(
    ("claim_by", "funds", "cumulative", "expected"),
    [
        (NOW + 1, Funds(), 0, True),
        (NOW, Funds(), 0, False),
        (NOW + 1, Funds(known=True), 0, False),
        (NOW + 1, Funds(free=Amount(1), known=True), 0, True),
        (NOW + 1, Funds(settled=Amount(5), free=Amount(1), known=True), 5, True),
        (NOW + 1, Funds(settled=Amount(6), free=Amount(1), known=True), 5, False),
    ],
)
def test_what_a_receipt_releases(claim_by: int, funds: Funds, cumulative: int, expected: bool) -> None:
    """Only an order that can still be claimed on, of a payer that may have something, on a tab that this node knows."""
    assert releases(claim_by, funds, Amount(cumulative), NOW) is expected


async def test_a_tab_that_was_forgotten_is_not_signed_on() -> None:
    """Where the chain has paid more than this node knows of, its state was lost: a receipt would give a number twice."""
    chain = MemoryChain(Funds(settled=Amount(1), free=Amount(10**9), known=True))
    stage = Stage(ScriptedEngine(HEAD, ONE, END), chain=chain)
    failure = await refused(stage, stage.dispatch())
    assert (failure.error.code, failure.receipt) == (Code.PROVIDER_FAILED, None)


async def test_nothing_is_signed_before_it_is_known_what_was() -> None:
    """On a link whose coordinator has not told yet what was signed there, a dispatch leads to no receipt at all."""
    stage = Stage(engine := ScriptedEngine(HEAD, ONE, END))
    stage.runner._may_take_jobs = lambda _link: False
    failure = await refused(stage, stage.dispatch())
    assert (failure.error.code, failure.receipt) == (Code.NODE_BUSY, None)
    assert not engine.calls
    assert not stage.store.receipt_records


async def _refuse(stage: Stage, count: int) -> int:
    """How many of so many refusals of its client had a receipt."""
    placed = [stage.dispatch(None, **SPOILT["order_terms"]) for _ in range(count)]
    return sum([(await refused(stage, one)).receipt is not None for one in placed])


async def test_refusals_have_a_pace() -> None:
    """A coordinator gets a burst of receipts for refused orders and then so many a second; the rest is refused without one."""
    stage = Stage(ScriptedEngine(HEAD, ONE, END))
    made = 0
    for number in range(2 * PAYER_SHARE):
        stage.client = Client(signer(f"payer {number}"))
        made += await _refuse(stage, 32) + await _refuse(stage, 8)
    assert made == BURST
    stage.now += 10
    assert await _refuse(stage, 32) == 10 * RATE


async def test_one_payer_does_not_use_up_the_receipts_of_the_others() -> None:
    """Whoever orders only to be refused gets a quarter of the receipts; another's refused order is still released."""
    stage = Stage(ScriptedEngine(HEAD, ONE, END))
    assert await _refuse(stage, 32) + await _refuse(stage, 50) == BURST // PAYER_SHARE
    rude, stage.client = stage.client, Client(signer("another payer"))
    assert await _refuse(stage, 10) == 10
    stage.now += 40
    stage.client = rude
    assert await _refuse(stage, 32) == 40 * RATE // PAYER_SHARE


async def test_refusals_under_way_have_a_number() -> None:
    """While the chain is slow, only so many refusals wait for it; those beyond are answered at once."""
    chain = MemoryChain()
    gate = asyncio.Event()
    funds = chain.funds

    async def slow(payer: Address) -> Funds:
        await gate.wait()
        return await funds(payer)

    chain.funds = slow  # type: ignore[method-assign]
    stage = Stage(ScriptedEngine(HEAD, ONE, END), chain=chain, slots=100)
    placed = [stage.dispatch(None, **SPOILT["order_terms"]) for _ in range(MAX_CONCURRENT + 5)]
    for _ in range(20):
        await asyncio.sleep(0)
    assert sum(bool(stage.link.payloads(one.job, Kind.FAIL)) for one in placed) == 5
    gate.set()
    assert sum([(await refused(stage, one)).receipt is not None for one in placed]) == MAX_CONCURRENT


async def test_a_refusal_does_not_wait_for_a_silent_chain() -> None:
    """The next provider waits for the refusal, so it leaves within a second or so whatever the chain does."""
    chain = MemoryChain()

    async def never(_payer: Address) -> Funds:
        await asyncio.Event().wait()
        raise AssertionError

    chain.funds = never  # type: ignore[method-assign, assignment]
    stage = Stage(ScriptedEngine(HEAD, ONE, END), chain=chain)
    async with asyncio.timeout(5):
        assert (await stage.void(stage.dispatch(None, **SPOILT["order_terms"]))).outcome == Outcome.REFUSED


async def test_a_disk_that_is_full_refuses_without_a_receipt() -> None:
    """A receipt that is not on disk does not leave; its number is the next one's."""
    stage = Stage(ScriptedEngine(HEAD, ONE, END))
    stage.store.fault = Unavailable(Code.PROVIDER_FAILED, "disk full")
    assert (await refused(stage, stage.dispatch(None, **SPOILT["order_terms"]))).receipt is None
    stage.store.fault = None
    assert (await stage.receipt(stage.dispatch())).seq == 1


async def test_an_order_that_runs_is_not_released_by_a_second_dispatch() -> None:
    """Of one order dispatched twice while the chain is asked, one runs; the other's refusal has no receipt."""
    chain = MemoryChain()
    gate = asyncio.Event()
    funds = chain.funds

    async def slow(payer: Address) -> Funds:
        await gate.wait()
        return await funds(payer)

    chain.funds = slow  # type: ignore[method-assign]
    stage = Stage(engine := ScriptedEngine(HEAD, ONE, END), chain=chain)
    placed = stage.dispatch()
    stage.hand_over(placed)
    await asyncio.sleep(0)
    gate.set()
    assert (await refused(stage, placed)).receipt is None
    await stage.receipt(placed)
    assert (len(engine.calls), len(stage.store.receipt_records)) == (1, 1)


async def test_receipts_of_one_tab_follow_each_other_whatever_they_are() -> None:
    """Jobs, refusals and failures of one payer at once: every receipt has the number after the one before."""
    stage = Stage(ScriptedEngine(HEAD, ONE, END), slots=4, deadlines=Deadlines(queue=5))
    kinds: list[tuple[Kind, dict[str, Any]]] = [
        (Kind.RECEIPT, {}),
        (Kind.FAIL, SPOILT["order_terms"]),
        (Kind.FAIL, SPOILT["cost_above_cap"]),
    ]
    placed = [(kind, stage.dispatch(None, **spoilt)) for kind, spoilt in kinds * 8]
    for kind, one in placed:
        await stage.link.until(kind, one.job)
    await stage.ended()
    made = [booking.receipt.message for booking in stage.store.receipt_records]
    assert len(made) == len(placed)
    for before, after in itertools.pairwise(made):
        check_continuity(before, after)
    assert stage.tabs.account(stage.client.payer.address).tab.in_flight == 0


async def test_what_a_killed_process_began_is_closed_once() -> None:
    """Orders without a receipt get one at no cost, numbered after what the tab has; those of a tab that is not known get none."""
    stage = Stage(ScriptedEngine(HEAD, ONE, END))
    first = await stage.receipt(stage.dispatch())
    begun = stage.client.order(stage.book.current[0])
    lost = Client(signer("lost")).order(stage.book.current[0])
    for placed in (begun, lost):
        await stage.store.begin(admitted(placed), NOW)
    tabs = Tabs(CreditLimits(), await stage.store.tabs(NOW))
    tabs.admit(lost.order.message, lost.terms.max_cost, Funds(free=Amount(10**9), known=True), NOW)
    tabs.observe(lost.order.message.payer, Funds(settled=Amount(1), known=True))
    books = ReceiptSigner(
        signer=PROVIDER,
        domain=DOMAIN,
        tabs=tabs,
        store=stage.store,
        unfinished=await stage.store.unfinished_orders(NOW),
        now=lambda: NOW,
    )
    assert await books.close_unfinished() == 1
    assert await books.close_unfinished() == 0
    made = stage.store.receipt_records[-1].receipt.message
    assert (made.outcome, made.order_hash) == (Outcome.PROVIDER_ERROR, begun.order.digest)
    check_continuity(first, made)
    assert begun.job in {one.job for one in await stage.store.unacknowledged(COORDINATOR.address, NOW + 1, 0, 10)}
