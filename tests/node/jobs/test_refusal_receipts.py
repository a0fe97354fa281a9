"""Orders that are refused: each is used up and released by a receipt at no cost, within bounds."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from node.domain.tabs import CreditLimits, Funds, Tabs
from node.jobs.deadlines import Deadlines
from node.jobs.receipt_signer import ReceiptSigner
from node.jobs.refusal_receipts import BURST, MAX_CONCURRENT, PAYER_SHARE, RATE, releases
from node.ports import ResponseEnd, ResponsePart, ResponseStart
from node.testing.memory import MemoryChain, ScriptedEngine
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.messages import Outcome
from tallystick.protocol.types import Address, Amount, Hash
from tallystick.protocol.usage_reports import ReportedUsage
from tallystick.protocol.wire import Failure, Kind
from tests.builders import check_continuity
from tests.node.harness import COORDINATOR, DOMAIN, NOW, PROVIDER, Client, PlacedJob, RunnerHarness, admitted, signer

HEAD = ResponseStart(200, "text/event-stream")
ONE = ResponsePart(b"one.", has_output=True, text_bytes=4)
END = ResponseEnd(b"done", usage=ReportedUsage(20, 5, 10))
SPOILT: dict[str, dict[str, Any]] = {
    "order_terms": {"terms_with": {"ask": Hash(bytes(32))}},
    "unknown_model": {"terms_with": {"model": "another"}},
    "order_expired": {"order_with": {"deadline": NOW + 1}},
    "unauthorised_tab": {"order_with": {"ceiling": Amount(1)}},
    "cost_above_cap": {"terms_with": {"max_cost": Amount(1)}},
}


async def refused(harness: RunnerHarness, placed: PlacedJob) -> Failure:
    """Returns how a job failed."""
    return Failure.loads(await harness.link.until(Kind.FAIL, placed.job))


@pytest.mark.parametrize("code", SPOILT)
async def test_a_refused_order_is_released(code: str) -> None:
    """For any refusal of an order on this node, the FAIL frame carries a receipt at no cost that continues the tab."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END))
    harness.now = NOW + 2
    placed = harness.dispatch(None, **SPOILT[code])
    receipt = await harness.refusal_receipt(placed)
    assert (await harness.failure(placed))["code"] == code
    assert (receipt.outcome, receipt.seq, receipt.cumulative_cost) == (Outcome.REFUSED, 1, 0)
    following = await harness.receipt(harness.dispatch())
    check_continuity(receipt, following)


@pytest.mark.parametrize("code", SPOILT)
async def test_a_released_order_never_runs(code: str) -> None:
    """An order whose cap was released is consumed: dispatched again, even after a restart, it is refused without a receipt."""
    harness = RunnerHarness(engine := ScriptedEngine(HEAD, ONE, END))
    harness.now = NOW + 2
    placed = harness.dispatch(None, **SPOILT[code])
    await harness.refusal_receipt(placed)
    harness.dispatch_again(placed)
    again = Failure.loads(await harness.link.until(Kind.FAIL, placed.job, 2))
    assert (again.error.code, again.receipt) == (Code.ORDER_REPLAYED, None)
    later = RunnerHarness(engine, store=harness.store)
    later.now = harness.now
    later.dispatch_again(placed)
    assert (await refused(later, placed)).receipt is None
    assert not engine.requests


@pytest.mark.parametrize(
    "spoilt",
    [
        {"match_with": {"provider": signer("another").address}},
        {"order_with": {"provider": signer("another").address}},
        {"order_with": {"coordinator": signer("another").address}},
        {"terms_with": {"job": bytes(16)}},
    ],
)
async def test_orders_on_other_nodes_get_no_receipt(spoilt: dict[str, Any]) -> None:
    """No party can make this node use up receipt numbers with orders that are not addressed to it."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END))
    placed = harness.dispatch(None, **spoilt)
    assert (await refused(harness, placed)).receipt is None
    assert not harness.store.receipt_records


async def test_a_payer_with_an_empty_purse_gets_no_receipt() -> None:
    """Nothing can be collected from a purse known to be empty, so nothing needs a release; an unknown purse counts."""
    chain = MemoryChain(Funds(known=True))
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END), chain=chain, credit=CreditLimits(per_payer=Amount(0)))
    placed = harness.dispatch()
    failure = await refused(harness, placed)
    assert (failure.error.code, failure.receipt) == (Code.UNSECURED, None)
    chain.cached.clear()
    for funds in (Funds(), Funds(thawing=Amount(1), known=True), Funds(reserved=Amount(1), known=True)):
        chain.default = funds
        harness.client = Client(signer(repr(funds)))
        assert (await harness.refusal_receipt(harness.dispatch())).outcome == Outcome.REFUSED


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
def test_when_a_receipt_releases_anything(claim_by: int, funds: Funds, cumulative: int, expected: bool) -> None:
    """Only a claimable order of a payer that may have funds, on a tab whose record is complete, gets a receipt."""
    assert releases(claim_by, funds, Amount(cumulative), NOW) is expected


async def test_no_receipt_on_a_stale_tab() -> None:
    """If the chain paid more than this node recorded, its state was lost, and a receipt would use a number twice."""
    chain = MemoryChain(Funds(settled=Amount(1), free=Amount(10**9), known=True))
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END), chain=chain)
    failure = await refused(harness, harness.dispatch())
    assert (failure.error.code, failure.receipt) == (Code.PROVIDER_FAILED, None)


async def test_no_receipt_before_state_recovery() -> None:
    """On a link whose coordinator has not returned the earlier receipts, a dispatch leads to no receipt."""
    harness = RunnerHarness(engine := ScriptedEngine(HEAD, ONE, END))
    harness.runner._may_take_jobs = lambda _link: False
    failure = await refused(harness, harness.dispatch())
    assert (failure.error.code, failure.receipt) == (Code.NODE_BUSY, None)
    assert not engine.requests
    assert not harness.store.receipt_records


async def _refuse(harness: RunnerHarness, count: int) -> int:
    """Returns how many of `count` refusals of one client had a receipt."""
    placed = [harness.dispatch(None, **SPOILT["order_terms"]) for _ in range(count)]
    return sum([(await refused(harness, placed_job)).receipt is not None for placed_job in placed])


async def test_refusal_receipts_are_rate_limited() -> None:
    """A coordinator gets a burst of receipts for refused orders and then a rate; further refusals have none."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END))
    made = 0
    for number in range(2 * PAYER_SHARE):
        harness.client = Client(signer(f"payer {number}"))
        made += await _refuse(harness, 32) + await _refuse(harness, 8)
    assert made == BURST
    harness.now += 10
    assert await _refuse(harness, 32) == 10 * RATE


async def test_one_payer_gets_a_share_of_the_receipts() -> None:
    """A payer whose orders are all refused gets a quarter of the receipts; another payer's order is still released."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END))
    assert await _refuse(harness, 32) + await _refuse(harness, 50) == BURST // PAYER_SHARE
    rude, harness.client = harness.client, Client(signer("another payer"))
    assert await _refuse(harness, 10) == 10
    harness.now += 40
    harness.client = rude
    assert await _refuse(harness, 32) == 40 * RATE // PAYER_SHARE


async def test_concurrent_refusals_are_limited() -> None:
    """While the chain is slow, a limited number of refusals wait for it; the others are answered at once."""
    chain = MemoryChain()
    opening = asyncio.Event()
    funds = chain.funds

    async def slow(payer: Address) -> Funds:
        await opening.wait()
        return await funds(payer)

    chain.funds = slow  # type: ignore[method-assign]
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END), chain=chain, slots=100)
    placed = [harness.dispatch(None, **SPOILT["order_terms"]) for _ in range(MAX_CONCURRENT + 5)]
    for _ in range(20):
        await asyncio.sleep(0)
    assert sum(bool(harness.link.payloads(placed_job.job, Kind.FAIL)) for placed_job in placed) == 5
    opening.set()
    assert sum([(await refused(harness, placed_job)).receipt is not None for placed_job in placed]) == MAX_CONCURRENT


async def test_a_refusal_does_not_wait_for_a_silent_chain() -> None:
    """A refusal leaves within about a second even if the chain does not respond, since the next provider waits for it."""
    chain = MemoryChain()

    async def never(_payer: Address) -> Funds:
        await asyncio.Event().wait()
        raise AssertionError

    chain.funds = never  # type: ignore[method-assign, assignment]
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END), chain=chain)
    async with asyncio.timeout(60):
        assert (await harness.refusal_receipt(harness.dispatch(None, **SPOILT["order_terms"]))).outcome == Outcome.REFUSED


async def test_a_full_disk_refuses_without_a_receipt() -> None:
    """A receipt that is not on disk does not leave; the next receipt gets its number."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END))
    harness.store.fault = Unavailable(Code.PROVIDER_FAILED, "disk full")
    assert (await refused(harness, harness.dispatch(None, **SPOILT["order_terms"]))).receipt is None
    harness.store.fault = None
    assert (await harness.receipt(harness.dispatch())).seq == 1


async def test_a_second_dispatch_does_not_release_a_running_order() -> None:
    """Of one order dispatched twice while the chain is asked, one runs; the other's refusal has no receipt."""
    chain = MemoryChain()
    opening = asyncio.Event()
    funds = chain.funds

    async def slow(payer: Address) -> Funds:
        await opening.wait()
        return await funds(payer)

    chain.funds = slow  # type: ignore[method-assign]
    harness = RunnerHarness(engine := ScriptedEngine(HEAD, ONE, END), chain=chain)
    placed = harness.dispatch()
    harness.dispatch_again(placed)
    await asyncio.sleep(0)
    opening.set()
    assert (await refused(harness, placed)).receipt is None
    await harness.receipt(placed)
    assert (len(engine.requests), len(harness.store.receipt_records)) == (1, 1)


async def test_all_receipts_of_one_tab_are_numbered_in_order() -> None:
    """Jobs, refusals and failures of one payer at once: every receipt has the number after the previous one."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END), slots=16, deadlines=Deadlines(queue=5))
    kinds: list[tuple[Kind, dict[str, Any]]] = [
        (Kind.RECEIPT, {}),
        (Kind.FAIL, SPOILT["order_terms"]),
        (Kind.FAIL, SPOILT["cost_above_cap"]),
    ]
    placed = [(kind, harness.dispatch(None, **spoilt)) for kind, spoilt in kinds * 8]
    for kind, placed_job in placed:
        await harness.link.until(kind, placed_job.job)
    await harness.ended()
    made = [booking.receipt.message for booking in harness.store.receipt_records]
    assert len(made) == len(placed)
    for before, after in itertools.pairwise(made):
        check_continuity(before, after)
    assert harness.tabs.account(harness.client.payer.address).tab.in_flight == 0


async def test_unfinished_orders_are_closed_once() -> None:
    """Orders without a receipt get one at no cost with the tab's next number; those of a stale tab get none."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END))
    first = await harness.receipt(harness.dispatch())
    begun = harness.client.order(harness.asks.current[0])
    lost = Client(signer("lost")).order(harness.asks.current[0])
    for placed in (begun, lost):
        await harness.store.begin(admitted(placed), NOW)
    tabs = Tabs(CreditLimits(), await harness.store.tabs(NOW))
    tabs.admit(lost.order.message, lost.terms.max_cost, Funds(free=Amount(10**9), known=True), NOW)
    tabs.observe(lost.order.message.payer, Funds(settled=Amount(1), known=True))
    books = ReceiptSigner(
        signer=PROVIDER,
        domain=DOMAIN,
        tabs=tabs,
        store=harness.store,
        unfinished=await harness.store.unfinished_orders(NOW),
        now=lambda: NOW,
    )
    assert await books.close_unfinished() == 1
    assert await books.close_unfinished() == 0
    made = harness.store.receipt_records[-1].receipt.message
    assert (made.outcome, made.order_hash) == (Outcome.PROVIDER_ERROR, begun.order.digest)
    check_continuity(first, made)
    assert begun.job in {entry.job for entry in await harness.store.unacknowledged(COORDINATOR.address, NOW + 1, 0, 10)}
