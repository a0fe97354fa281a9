"""A tab's total is only its provider's claim: it counts up to the amount that orders of this key explain."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tallystick.client.config import Budget, ClientConfig
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.receipt_writes import IncomingReceipt
from tallystick.client.ledger.repair import OrderEvidence, PaidOrder, RecoveryResult
from tallystick.client.ledger.schema import JobState, OrderState
from tallystick.client.orders.tab import MAX_AWAITING_RECEIPTS, Tab
from tallystick.client.receipts.delivery_check import QUARTERS_UNDELIVERED, Delivery
from tallystick.client.recovery import lost_state
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Fault, TallyError, Unavailable
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Outcome
from tallystick.protocol.pricing import Usage
from tallystick.protocol.types import ZERO_HASH, Amount, Hash, JobId, Seconds
from tests.client.fake_coordinator import FakeMarket, Session, eventually, run
from tests.client.parties import ALICE, DOMAIN, NOW_S, PAYER, Provider, bill, place, take

NONE = Usage(0, 0, 0)
BUSY = Unavailable(Code.NODE_BUSY, "busy", fault=Fault.PROVIDER)


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    """An empty ledger."""
    ledger = await Ledger.open(tmp_path / "state.db", PAYER.address)
    yield ledger
    await ledger.close()


@pytest.fixture
async def fake() -> AsyncIterator[FakeMarket]:
    """A market with one provider."""
    async with FakeMarket(Provider.make("mallory")).serve() as market:
        yield market


async def test_no_receipt_at_no_cost_bills_the_cap(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A provider that fails jobs at no cost, with receipts of ever higher totals, gets no higher ceiling. All its orders
    together allow one cap, within the budget.
    """

    async def climbs(session: Session) -> None:
        await session.match()
        number = len(fake.submissions)
        await session.void(seq=2 * number, cumulative_cost=session.order.message.ceiling)
        await session.fail(BUSY)

    fake.script = climbs
    bounded = replace(config, budgets=(Budget(per_day=Amount(250)),))
    async with Market(fake.url, wallet, bounded) as market:
        for _ in range(6):
            with pytest.raises(Unavailable, match="busy"):
                await run(market)
    assert max(order.ceiling for order in fake.orders()) == fake.submissions[0].candidates[0].terms.max_cost


async def test_orders_that_were_never_matched_explain_no_total(ledger: Ledger) -> None:
    """A total that fits while other orders are open is not believed after these ended without a charge."""
    others = [await take(ledger) for _ in range(3)]
    job, (placed,) = await take(ledger)
    cap = placed.terms.max_cost
    climbing = ALICE.signer.sign(bill(placed, seq=9, cumulative_cost=placed.order.message.ceiling), DOMAIN)
    assert await ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, climbing, None, NOW_S)) is None
    assert (await ledger.tab(DOMAIN, ALICE.address, NOW_S)).explained_total == 3 + 3 * cap
    for other, _ in others:
        await ledger.end_job(other, JobState.FAILED, "never matched", NOW_S)
    tab = await ledger.tab(DOMAIN, ALICE.address, NOW_S)
    assert (tab.explained_total, tab.protocol_tab.accepted) == (3, 3)
    _, (following,) = await take(ledger)
    assert following.order.message.ceiling == 3 + cap


async def test_no_total_hides_a_payment(ledger: Ledger) -> None:
    """A payment on chain beyond the receipts blocks a provider even if one of its own receipts states a total that high."""
    job, (placed,) = await take(ledger)
    cap = placed.terms.max_cost
    void = ALICE.signer.sign(bill(placed, NONE, Outcome.REFUSED, seq=2, cumulative_cost=cap), DOMAIN)
    assert await ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, void, None, NOW_S, final=False)) is None
    await ledger.end_job(job, JobState.FAILED, "refused", NOW_S)
    assert (await ledger.merge_proven(DOMAIN, ALICE.address, [], Amount(0), NOW_S, paid=[])).blocked_reason == ""
    result = await ledger.merge_proven(DOMAIN, ALICE.address, [], Amount(1), NOW_S, paid=[])
    assert (result.raised, result.unexplained) == (0, 1)
    assert "tally receipt report" in result.blocked_reason
    assert await ledger.unblock(ALICE.address, NOW_S)
    _, (following,) = await take(ledger)
    assert following.order.message.ceiling == 1 + cap, "what a person excused counts as spent"
    assert (await ledger.spending(NOW_S, ()))[0].cost == 1


async def test_an_order_that_only_reserves_proves_no_payment(ledger: Ledger) -> None:
    """A signed order on which nothing can be collected is public on chain; it does not explain a payment."""
    order = replace(place().order.message, ceiling=Amount(900), claim_by=Seconds(0), terms_hash=ZERO_HASH)
    shown = PaidOrder(PAYER.sign(order, DOMAIN), "0xtx")
    result = await ledger.merge_proven(DOMAIN, ALICE.address, [], Amount(900), NOW_S, paid=[shown])
    assert result.raised == 0
    assert result.blocked_reason


async def test_a_recovered_total_stays_known(ledger: Ledger) -> None:
    """A recovered tab counts from its proven total on; later receipts raise it only by their costs."""
    backing = place(Tab(accepted=Amount(400)))
    most = backing.order.message.ceiling
    receipt = ALICE.signer.sign(bill(backing, seq=7, cumulative_cost=most), DOMAIN)
    assert (
        await ledger.merge_proven(DOMAIN, ALICE.address, [OrderEvidence(backing.order, receipt)], Amount(0), NOW_S)
    ).raised == most
    for number in range(1, 4):
        job, (placed,) = await take(ledger)
        assert placed.order.message.ceiling == most + 3 * (number - 1) + placed.terms.max_cost
        receipt = ALICE.signer.sign(bill(placed, seq=7 + number, cumulative_cost=Amount(most + 3 * number)), DOMAIN)
        assert await ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, receipt, None, NOW_S)) is None
        assert (await ledger.tab(DOMAIN, ALICE.address, NOW_S)).explained_total == most + 3 * number


async def _record_and_take_another(ledger: Ledger) -> Amount:
    """Records a receipt of 3 and takes another order. Returns that order's cap."""
    job, (placed,) = await take(ledger)
    receipt = ALICE.signer.sign(bill(placed, seq=1), DOMAIN)
    assert await ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, receipt, None, NOW_S)) is None
    _, (running,) = await take(ledger)
    return running.terms.max_cost


async def _recover_receipt(ledger: Ledger, total: int) -> int:
    """Recovers a receipt with this total for an order that the ledger lacks. Returns the rise of the tab."""
    job = JobId(bytes([total % 251]) * 16)
    backing = place(Tab(accepted=Amount(2_000)), job=job, now_ns=10**9 * (NOW_S + total))
    receipt = ALICE.signer.sign(bill(backing, seq=50 + total, cumulative_cost=Amount(total)), DOMAIN)
    result = await ledger.merge_proven(DOMAIN, ALICE.address, [OrderEvidence(backing.order, receipt)], Amount(0), NOW_S, paid=[])
    return result.raised


async def test_a_total_that_open_orders_explain_is_not_recovered(ledger: Ledger) -> None:
    """Missing orders raise ceiling and seq. The total rises only by what they prove beyond the receipts and what it already
    had.
    """
    assert await ledger.merge_proven(DOMAIN, ALICE.address, [], Amount(0), NOW_S, paid=[]) == RecoveryResult()
    assert await ledger.providers_with_tab(DOMAIN, [ALICE.address]) == set()
    cap = await _record_and_take_another(ledger)
    before = await ledger.tab(DOMAIN, ALICE.address, NOW_S)
    assert await _recover_receipt(ledger, 3) == 0
    tab = await ledger.tab(DOMAIN, ALICE.address, NOW_S)
    assert (tab.explained_total, tab.recovered, tab.early_caps) == (3, 0, 0)
    assert tab.ceiling > before.ceiling
    assert tab.order_seq == 10**9 * (NOW_S + 3) > before.order_seq
    assert await _recover_receipt(ledger, 700) == 697
    tab = await ledger.tab(DOMAIN, ALICE.address, NOW_S)
    assert (tab.explained_total, tab.recovered, tab.early_caps, tab.protocol_tab.accepted) == (700, 697, cap, 700 - cap)
    assert await _recover_receipt(ledger, 600) == 0
    assert await ledger.tab(DOMAIN, ALICE.address, NOW_S) == tab


async def test_the_highest_order_that_was_paid_on_proves(ledger: Ledger) -> None:
    """Of several orders in the settling transactions, the one that allows most counts, at any position."""
    paid = [PaidOrder(PAYER.sign(replace(place().order.message, ceiling=Amount(most)), DOMAIN), "0xtx") for most in (50, 90, 70)]
    assert (await ledger.merge_proven(DOMAIN, ALICE.address, [], Amount(80), NOW_S, paid=paid)).raised == 80


async def test_a_payment_that_running_jobs_explain_blocks_nobody(ledger: Ledger) -> None:
    """A payment up to the cap of a running job blocks nobody; one unit more blocks its provider."""
    cap = await _record_and_take_another(ledger)
    assert not (await ledger.merge_proven(DOMAIN, ALICE.address, [], Amount(3 + cap), NOW_S, paid=[])).blocked_reason
    assert (await ledger.tab(DOMAIN, ALICE.address, NOW_S)).undelivered_quarters == 0
    assert (await ledger.merge_proven(DOMAIN, ALICE.address, [], Amount(4 + cap), NOW_S, paid=[])).blocked_reason


async def test_an_excluded_provider_is_asked_for_its_receipts(
    market: Market, fake: FakeMarket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider that is excluded because it owes receipts gets orders again soon after the coordinator has them, without a
    wait for each job's query.
    """
    monkeypatch.setattr(lost_state, "QUERY_INTERVAL_SECONDS", 0.0)

    async def fails(session: Session) -> None:
        await session.match()
        await session.fail(BUSY)

    fake.script, mallory = fails, fake.providers[0].address
    for _ in range(MAX_AWAITING_RECEIPTS):
        with suppress(Unavailable):
            await run(market)
    assert await market._ledger.excluded(DOMAIN, market._now())
    for session in fake.sessions.values():
        session.take(0)
        session.tried.clear()
        fake.shows.append(LateReceipt(session.release(), session.candidate.order, session.candidate.terms))
    market._reconciler.recovery.asked_at.pop(mallory, None)
    market._shortlists.forget()
    with pytest.raises(TallyError):
        await run(market)

    async def free() -> bool:
        return (await market.tab(mallory)).open_caps == 0

    await eventually(free)
    assert not await market._ledger.excluded(DOMAIN, market._now())


async def test_a_lost_job_is_queried_again(ledger: Ledger) -> None:
    """The orders of a job that its coordinator lost still count, so their receipts are queried."""
    job, (placed,) = await take(ledger)
    assert await ledger.jobs_awaiting_receipts(NOW_S + 60, 60) == []
    await ledger.end_job(job, JobState.FAILED, "never admitted", NOW_S, keep_orders_open=True)
    assert await ledger.jobs_awaiting_receipts(NOW_S + 60, 60) == [job]
    assert await ledger.jobs_awaiting_receipts(placed.order.message.claim_by, 60) == []
    known = await ledger.find_job(job)
    assert known is not None
    assert lost_state._awaits_receipt(known, known.orders[0])
    open_, (_,) = await take(ledger)
    running = await ledger.find_job(open_)
    assert running is not None
    assert not lost_state._awaits_receipt(running, running.orders[0]), "its reader books it"
    assert await ledger.jobs_awaiting_receipts(NOW_S + 60, 60) == [job]


async def test_a_charge_for_an_unmatched_order_counts(market: Market, fake: FakeMarket) -> None:
    """A charge for an order that the coordinator reported as never matched is not recorded. It counts against its provider,
    and the order's cap counts again.
    """

    async def none(session: Session) -> None:
        await session.fail(Unavailable(Code.NO_PROVIDER, "nobody is free", fault=Fault.PROVIDER))

    fake.script, mallory = none, fake.providers[0].address
    with pytest.raises(Unavailable):
        await run(market)
    session = fake.last
    assert (await market.tab(mallory)).open_caps == 0
    session.take(0)
    receipt = session.bill(Usage(10, 0, 100))
    session.receipt = None
    fake.shows = [LateReceipt(receipt, session.candidate.order, session.candidate.terms)]
    market._reconciler.recovery.asked_at.clear()
    await market._reconciler.recovery.recover([mallory], chain=False)
    tab = await market.tab(mallory)
    assert (tab.accepted, tab.undelivered_quarters, tab.open_caps) == (0, QUARTERS_UNDELIVERED, session.candidate.terms.max_cost)
    known = await market.find(session.job)
    assert known is not None
    assert known.orders[0].state is OrderState.DISPATCHED


async def test_unblocking_an_unpaid_total_spends_nothing(ledger: Ledger) -> None:
    """If the chain paid nothing beyond the ledger, unblocking changes neither the spending nor the tab."""
    job, (placed,) = await take(ledger)
    lie = ALICE.signer.sign(bill(placed, result_commitment=Hash(b"\1" * 32)), DOMAIN)
    seen = Delivery(200, 50, ZERO_HASH, finished=True)
    assert await ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, lie, seen, NOW_S)) is not None
    spent = await ledger.spending(NOW_S, ("provider",))
    assert await ledger.unblock(ALICE.address, NOW_S)
    assert await ledger.spending(NOW_S, ("provider",)) == spent
    assert (await ledger.tab(DOMAIN, ALICE.address, NOW_S)).recovered == 0


async def test_an_excused_payment_is_spent_once(ledger: Ledger) -> None:
    """Of an excused payment, the part with receipts was spent already; the rest is spent now and added to the tab."""
    cap = await _record_and_take_another(ledger)
    paid = Amount(3 + cap + 2)
    assert (await ledger.merge_proven(DOMAIN, ALICE.address, [], paid, NOW_S, paid=[])).blocked_reason
    assert await ledger.unblock(ALICE.address, NOW_S)
    tab = await ledger.tab(DOMAIN, ALICE.address, NOW_S)
    assert tab.ceiling == 3 + cap
    assert (tab.explained_total, tab.recovered, tab.protocol_tab.accepted) == (3 + cap, cap, 3)
    assert (await ledger.spending(NOW_S, ()))[0].cost == 3 + cap


async def test_an_order_that_proves_nothing_new_recovers_nothing(ledger: Ledger) -> None:
    """The part of a total that a running job explains is not recovered, whichever older orders are found."""
    await take(ledger)
    job, (placed,) = await take(ledger)
    receipt = ALICE.signer.sign(bill(placed, seq=2, cumulative_cost=Amount(13)), DOMAIN)
    assert await ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, receipt, None, NOW_S)) is None
    assert await _recover_receipt(ledger, 3) == 0
    tab = await ledger.tab(DOMAIN, ALICE.address, NOW_S)
    assert (tab.explained_total, tab.recovered) == (13, 0)
