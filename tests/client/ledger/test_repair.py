"""Repair of a ledger: from orders and chain data that it lacks, from payments without proof, and by unblocking."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.order_writes import NewJob
from tallystick.client.ledger.receipt_writes import IncomingReceipt
from tallystick.client.ledger.repair import OrderEvidence, PaidOrder, RecoveryResult
from tallystick.client.ledger.schema import JobState, deployment_id, tabs
from tallystick.client.ledger.spending import SpendingRow
from tallystick.client.orders.signing import PlacedOrder, sign_order
from tallystick.client.orders.tab import Tab
from tallystick.client.receipts.delivery_check import QUARTERS_UNDELIVERED, Delivery
from tallystick.client.receipts.token_audit import AuditFinding
from tallystick.protocol.eip712 import Domain
from tallystick.protocol.messages import Outcome, Terms
from tallystick.protocol.pricing import Usage
from tallystick.protocol.types import ZERO_HASH, Address, Amount, Hash, JobId
from tests.client.parties import ALICE, BOB, COORDINATOR, DOMAIN, NOW, NOW_S, PAYER, POLICY, bill, place, take

FINE = Delivery(200, 50, ZERO_HASH, finished=True)
NOTHING_USED = Usage(0, 0, 0)


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    """An empty ledger."""
    ledger = await Ledger.open(tmp_path / "state.db", PAYER.address)
    yield ledger
    await ledger.close()


def _paid(ceiling: int, seq: int = NOW, transaction: str = "0xtx") -> PaidOrder:
    """An order of this key that the ledger lacks, as found in a settling transaction."""
    order = replace(place().order.message, ceiling=Amount(ceiling), seq=seq)
    return PaidOrder(PAYER.sign(order, DOMAIN), transaction)


def _evidence(ceiling: int, total: int, seq: int = NOW) -> OrderEvidence:
    """An order of this key that the ledger lacks, and a receipt for it."""
    placed = replace(place(), order=_paid(ceiling, seq).order)
    return OrderEvidence(placed.order, ALICE.signer.sign(bill(placed, seq=9, cumulative_cost=Amount(total)), DOMAIN))


async def _tab(ledger: Ledger) -> Tab:
    return await ledger.tab(DOMAIN, ALICE.address, NOW_S)


async def _recorded(ledger: Ledger) -> PlacedOrder:
    """Alice's first job, which cost 3."""
    job, (placed,) = await take(ledger)
    assert (
        await ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, ALICE.signer.sign(bill(placed), DOMAIN), None, NOW_S))
        is None
    )
    return placed


async def _merge_payment(
    ledger: Ledger, settled: int, *, now: int = NOW_S, paid: list[PaidOrder] | None = None
) -> RecoveryResult:
    return await ledger.merge_proven(DOMAIN, ALICE.address, [], Amount(settled), now, paid=paid)


async def test_refused_orders_prove_nothing(ledger: Ledger) -> None:
    """Orders that the ledger knows, which the provider may have refused, do not raise the recovered total."""
    _, (own,) = await take(ledger)
    huge = ALICE.signer.sign(bill(own, seq=9, cumulative_cost=Amount(10**12)), DOMAIN)
    assert (
        await ledger.merge_proven(DOMAIN, ALICE.address, [OrderEvidence(own.order, huge)], Amount(0), NOW_S) == RecoveryResult()
    )
    assert (await ledger.tab(DOMAIN, ALICE.address, NOW_S)).total == 0


async def test_payments_with_orders_raise_the_tab(ledger: Ledger) -> None:
    """A settled total counts up to the ceiling of the order that allowed it; it never lowers a tab."""
    result = await ledger.merge_proven(DOMAIN, ALICE.address, [], Amount(70), NOW_S, paid=[_paid(100)])
    assert (result.raised, result.unexplained, result.blocked_reason) == (70, 0, "")
    assert (await ledger.merge_proven(DOMAIN, ALICE.address, [], Amount(30), NOW_S)).raised == 0
    _, (placed,) = await take(ledger)
    assert placed.order.message.ceiling == 70 + placed.terms.max_cost


@pytest.mark.parametrize("settled", [1, 9_000_000_000])
@pytest.mark.parametrize("known", [False, True])
async def test_no_number_of_a_chain_raises_a_ceiling(ledger: Ledger, settled: int, known: bool) -> None:
    """A settled total without an order of this key raises nothing; the user is asked and told what to do."""
    most = 0
    if known:
        job, (placed,) = await take(ledger)
        assert (
            await ledger.record_receipt(
                IncomingReceipt(DOMAIN, job, placed, ALICE.signer.sign(bill(placed), DOMAIN), None, NOW_S)
            )
            is None
        )
        most, settled = placed.order.message.ceiling, settled + 3
    before = await ledger.tab(DOMAIN, ALICE.address, NOW_S)
    result = await ledger.merge_proven(DOMAIN, ALICE.address, [], Amount(settled), NOW_S, paid=[])
    after = await ledger.tab(DOMAIN, ALICE.address, NOW_S)
    assert (result.raised, after.total, after.ceiling) == (0, before.total, most)
    assert "tally receipt unblock" in result.blocked_reason == after.blocked_reason
    assert (await take(ledger))[1] == [], "no order is signed for it"
    assert await ledger.unblock(ALICE.address, NOW_S)
    _, (placed,) = await take(ledger)
    assert placed.order.message.ceiling <= max(most, 0) + placed.terms.max_cost
    assert (await ledger.merge_proven(DOMAIN, ALICE.address, [], Amount(settled), NOW_S, paid=[])).blocked_reason == "", (
        "the person has answered"
    )


async def test_a_chain_that_cannot_be_searched_blocks_nobody(ledger: Ledger) -> None:
    """If the settling transactions cannot be read, a payment above all known ceilings neither raises nor blocks a tab."""
    result = await ledger.merge_proven(DOMAIN, ALICE.address, [], Amount(70), NOW_S, paid=None)
    assert (result.raised, result.unexplained, result.blocked_reason) == (0, 70, "")


async def test_an_order_below_the_payment_proves_no_more_than_itself(ledger: Ledger) -> None:
    """A settling order of this key raises a tab to its own ceiling, and the user is asked about the rest of the payment."""
    result = await ledger.merge_proven(DOMAIN, ALICE.address, [], Amount(71), NOW_S, paid=[_paid(70)])
    tab = await ledger.tab(DOMAIN, ALICE.address, NOW_S)
    assert (result.raised, tab.total, tab.ceiling) == (70, 70, 70)
    assert tab.blocked_reason == result.blocked_reason
    assert "(transactions: 0xtx)" in result.blocked_reason


async def test_collected_caps_of_refused_jobs(ledger: Ledger) -> None:
    """A provider that fails jobs, gives no receipts and collects their caps does not raise its tab. While orders explain the
    payment, it counts as not delivered; the unexplained part blocks the provider.
    """
    job, (placed,) = await take(ledger)
    cap = placed.terms.max_cost
    await ledger.end_job(job, JobState.FAILED, "refused", NOW_S, matched=[placed.order.digest])
    made_up = ALICE.signer.sign(bill(placed, seq=1, cumulative_cost=cap), DOMAIN)
    for shown in ([], [OrderEvidence(placed.order, made_up)]):
        result = await ledger.merge_proven(DOMAIN, ALICE.address, shown, cap, NOW_S)
        assert (result.raised, result.unexplained, result.blocked_reason) == (0, cap, "")
    tab = await ledger.tab(DOMAIN, ALICE.address, NOW_S)
    assert (tab.undelivered_quarters, tab.open_caps, tab.blocked_reason) == (QUARTERS_UNDELIVERED, cap, ""), "counted once"
    _, (second,) = await take(ledger)
    assert second.order.message.ceiling == 2 * cap
    assert (await ledger.merge_proven(DOMAIN, ALICE.address, [], cap, second.order.message.claim_by)).blocked_reason


async def test_a_tab_with_receipts_needs_them(ledger: Ledger) -> None:
    """If a job was released at no cost and still paid on chain, its provider is blocked at once."""
    job, (placed,) = await take(ledger)
    receipt = ALICE.signer.sign(bill(placed), DOMAIN)
    assert await ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, receipt, None, NOW_S)) is None
    job, (placed,) = await take(ledger)
    void = ALICE.signer.sign(bill(placed, Usage(0, 0, 0), Outcome.REFUSED, seq=2, cumulative_cost=Amount(3)), DOMAIN)
    assert await ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, void, None, NOW_S, final=False)) is None
    await ledger.end_job(job, JobState.FAILED, "refused", NOW_S)
    assert not (await ledger.merge_proven(DOMAIN, ALICE.address, [], Amount(3), NOW_S)).blocked_reason
    result = await ledger.merge_proven(DOMAIN, ALICE.address, [], Amount(4), NOW_S)
    assert (result.raised, result.unexplained) == (0, 1)
    assert "tally receipt report" in result.blocked_reason


async def test_the_highest_evidence_counts(ledger: Ledger) -> None:
    """Of several orders and receipts, the highest ceiling, total and seq count; lower ones than the known lower nothing."""
    shown = [_evidence(500, 80, 7), _evidence(900, 60, 9), _evidence(700, 70, 8)]
    result = await ledger.merge_proven(DOMAIN, ALICE.address, shown, Amount(0), NOW_S)
    tab = await _tab(ledger)
    assert (result.raised, tab.total, tab.ceiling, tab.order_seq) == (80, 80, 900, 9)
    result = await _merge_payment(ledger, 95, paid=[_paid(90), _paid(100), _paid(85)])
    assert (result.raised, result.unexplained) == (15, 0)
    assert await ledger.merge_proven(DOMAIN, ALICE.address, [_evidence(60, 50, 5)], Amount(95), NOW_S) == RecoveryResult()
    tab = await _tab(ledger)
    assert (tab.total, tab.ceiling, tab.order_seq) == (95, 900, NOW)


async def test_an_order_raises_the_ceiling_where_its_receipt_raises_nothing(ledger: Ledger) -> None:
    """An order signed elsewhere counts as signed, also on a new tab and on a tab that has its total already."""
    free = _evidence(40, 0)
    free = OrderEvidence(
        free.order, ALICE.signer.sign(replace(free.receipt.message, cost=Amount(0), cumulative_cost=Amount(0)), DOMAIN)
    )
    assert (await ledger.merge_proven(DOMAIN, ALICE.address, [free], Amount(0), NOW_S)).raised == 0
    assert ((await _tab(ledger)).total, (await _tab(ledger)).ceiling) == (0, 40)
    await ledger.merge_proven(DOMAIN, ALICE.address, [_evidence(60, 0)], Amount(0), NOW_S)
    assert ((await _tab(ledger)).total, (await _tab(ledger)).ceiling) == (0, 60)


async def test_nothing_shown_makes_no_tab(ledger: Ledger) -> None:
    """Recovering nothing creates no tab for a provider."""
    assert await _merge_payment(ledger, 0) == RecoveryResult()
    assert await ledger.providers_with_tab(DOMAIN, [ALICE.address]) == set()


async def test_open_orders_may_explain_a_total_that_was_learnt(ledger: Ledger) -> None:
    """Open orders older than a higher total may explain it. If the total does not rise, later orders do not join them."""
    _, (placed,) = await take(ledger)
    cap = placed.terms.max_cost
    await ledger.merge_proven(DOMAIN, ALICE.address, [_evidence(50, 0)], Amount(0), NOW_S)
    assert (await _tab(ledger)).early_caps == 0
    await ledger.merge_proven(DOMAIN, ALICE.address, [_evidence(60, 55)], Amount(0), NOW_S)
    assert ((await _tab(ledger)).total, (await _tab(ledger)).early_caps) == (55, cap)
    await take(ledger)
    await ledger.merge_proven(DOMAIN, ALICE.address, [_evidence(70, 55)], Amount(0), NOW_S)
    assert (await _tab(ledger)).early_caps == cap


async def test_when_an_order_was_signed_elsewhere(ledger: Ledger) -> None:
    """The newest missing order gives the time, unless all are older than the ledger; other deployments do not count."""
    await take(ledger, domain=Domain(1, Address("0x" + "11" * 20)))
    second = 10**9
    assert (
        await ledger.merge_proven(DOMAIN, ALICE.address, [_evidence(9, 5, NOW + 9 * second)], Amount(0), NOW_S)
    ).elsewhere == 0
    _, (own,) = await take(ledger, BOB)
    first = own.order.message.seq
    for seqs, elsewhere in (
        ((first - 1, first - second), 0),
        ((first,), first // second),
        ((first - second, first + 5 * second, first + second), first // second + 5),
    ):
        shown = [_evidence(20, 5, seq) for seq in seqs]
        assert (await ledger.merge_proven(DOMAIN, ALICE.address, shown, Amount(0), NOW_S)).elsewhere == elsewhere
    assert (await _merge_payment(ledger, 0)).elsewhere == 0


async def test_payment_of_a_known_order_proves_nothing(ledger: Ledger) -> None:
    """An order of this ledger in a settling transaction, beside a missing one, does not raise the tab by either ceiling alone."""
    _, (own,) = await take(ledger)
    known = PaidOrder(own.order, "0xold")
    result = await _merge_payment(ledger, own.terms.max_cost, paid=[known])
    assert (result.raised, result.unexplained, result.blocked_reason) == (0, own.terms.max_cost, "")
    result = await _merge_payment(ledger, own.terms.max_cost, paid=[known, _paid(10)])
    assert (result.raised, result.unexplained) == (10, own.terms.max_cost - 10)


async def test_open_orders_explain_a_payment_to_the_unit(ledger: Ledger) -> None:
    """A payment within receipts plus open caps blocks nobody and counts as nothing; one unit more is questioned."""
    placed = await _recorded(ledger)
    _, (second,) = await take(ledger)
    most = 3 + second.terms.max_cost
    assert second.order.message.ceiling == most
    result = await _merge_payment(ledger, most, paid=[])
    assert (result.raised, result.unexplained, result.blocked_reason) == (0, most - 3, "")
    assert (await _tab(ledger)).undelivered_quarters == 0
    assert (await _merge_payment(ledger, most + 1)).blocked_reason == "", "where the transactions cannot be had"
    result = await _merge_payment(ledger, most + 1, paid=[])
    assert "allowed it at most" in result.blocked_reason
    assert "(transactions: none was shown)" in result.blocked_reason
    assert placed.terms.max_cost == second.terms.max_cost


async def test_a_payment_at_the_ceiling_for_a_released_order_is_slashable(ledger: Ledger) -> None:
    """A payment within a signed ceiling that no open order explains is an overclaim, not a foreign signature."""
    job, (placed,) = await take(ledger)
    void = ALICE.signer.sign(bill(placed, NOTHING_USED, Outcome.REFUSED), DOMAIN)
    assert await ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, void, None, NOW_S)) is None
    result = await _merge_payment(
        ledger, placed.order.message.ceiling, paid=[_paid(1, transaction="0xa"), _paid(2, transaction="0xa")]
    )
    assert "tally receipt report" in result.blocked_reason
    assert "(transactions: 0xa)" in result.blocked_reason


async def test_a_payment_counts_as_undelivered_beyond_the_jobs_under_way(ledger: Ledger) -> None:
    """Running jobs may have earned a payment. The rest was taken for jobs that ended without a receipt, and counts once per
    rise.
    """
    job, (placed,) = await take(ledger)
    await ledger.end_job(job, JobState.FAILED, "gone", NOW_S, matched=[placed.order.digest])
    await take(ledger)
    cap = placed.terms.max_cost
    for settled, undelivered in ((cap, 0), (cap + 1, 4), (cap, 4), (cap + 1, 4), (cap + 2, 8)):
        assert (await _merge_payment(ledger, settled)).blocked_reason == ""
        assert (await _tab(ledger)).undelivered_quarters == undelivered


async def test_orders_that_ended_explain_nothing(ledger: Ledger) -> None:
    """From an order's `claim_by` on, it counts neither as open nor as one that ended without a receipt."""
    job, (early,) = await take(ledger)
    await ledger.end_job(job, JobState.FAILED, "gone", NOW_S, matched=[early.order.digest])

    def later(tab: Tab, provider: Address, terms: Terms) -> PlacedOrder:
        return sign_order(
            tab,
            terms,
            signer=PAYER,
            provider=provider,
            coordinator=COORDINATOR,
            domain=DOMAIN,
            policy=POLICY,
            now_ns=NOW + 100 * 10**9,
        )

    other = JobId(b"\7" * 16)
    new = NewJob(DOMAIN, PAYER.address, other, "model", "/v1/chat/completions", b"k" * 32, NOW_S)
    await ledger.sign_orders(new, [(ALICE.address, early.terms)], later)
    assert (await _merge_payment(ledger, early.terms.max_cost, now=early.order.message.claim_by)).blocked_reason == ""
    assert (await _tab(ledger)).undelivered_quarters == 0


# Unblocking


async def _block_for_another_payer(ledger: Ledger) -> None:
    row = {"total": 0, "total_order_seq": 0, "accepted": 0, "ceiling": 0, "order_seq": 0, "blocked_reason": "by another wallet"}
    row |= {"deployment_id": deployment_id(DOMAIN), "payer": BOB.address, "provider": ALICE.address}
    await ledger._database.write(lambda c: c.execute(tabs.insert(), [row]))


async def test_one_provider_is_unblocked(ledger: Ledger) -> None:
    """Unblocking affects only this payer and provider, and only if there was a block; other blocks stay."""
    await _block_for_another_payer(ledger)
    assert not await ledger.unblock(ALICE.address, NOW_S)
    for provider in (ALICE, BOB):
        job, (placed,) = await take(ledger, provider)
        lie = provider.signer.sign(bill(placed, result_commitment=Hash(b"\1" * 32)), DOMAIN)
        assert await ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, lie, FINE, NOW_S)) is not None
    assert await ledger.unblock(ALICE.address, NOW_S)
    assert not await ledger.unblock(ALICE.address, NOW_S)
    assert list(await ledger.blocked()) == [BOB.address]
    assert (await _tab(ledger)).accepted == 0, "a lie is forgiven, and not booked"
    block_reasons = [row.blocked_reason for row in await ledger._database.read(lambda c: c.execute(tabs.select()).all())]
    assert "by another wallet" in block_reasons


@pytest.mark.parametrize("seen", [FINE, None])
async def test_receipts_refused_by_the_audit_alone_are_recorded(ledger: Ledger, seen: Delivery | None) -> None:
    """Refused receipts are recorded once, however often their provider is unblocked; then both sides' tabs are equal."""
    job, (placed,) = await take(ledger)
    later, (other,) = await take(ledger)
    receipt, lie = bill(placed), bill(other, seq=2, result_commitment=Hash(b"\1" * 32))
    flagged = IncomingReceipt(
        DOMAIN, job, placed, ALICE.signer.sign(receipt, DOMAIN), seen, NOW_S, audit_finding=AuditFinding("much", refuse=True)
    )
    for arrival in (flagged, IncomingReceipt(DOMAIN, later, other, ALICE.signer.sign(lie, DOMAIN), FINE, NOW_S)):
        assert await ledger.record_receipt(arrival) is not None
        assert await ledger.unblock(ALICE.address, NOW_S)
        tab = await _tab(ledger)
        assert (tab.accepted, tab.total, tab.blocked_reason) == (3, 3, "")


async def test_a_payment_is_believed_up_to_the_ceiling(ledger: Ledger) -> None:
    """Unblocking counts the payment as spent up to the signed ceilings; orders that were open then may explain it."""
    await _recorded(ledger)
    _, (second,) = await take(ledger)
    most = second.order.message.ceiling
    assert (await _merge_payment(ledger, 9_000_000, paid=[])).blocked_reason
    assert await ledger.unblock(ALICE.address, NOW_S)
    tab = await _tab(ledger)
    assert (tab.total, tab.early_caps, tab.blocked_reason) == (most, second.terms.max_cost, "")
    unproven = [row for row in await ledger.spending(NOW_S, ("model",)) if row.group == ("",)]
    assert unproven == [SpendingRow(("",), 0, 0, Amount(most - 3), 0, 0, 0)]


async def test_a_payment_within_the_ceilings_is_believed_as_it_is(ledger: Ledger) -> None:
    """The total becomes at most what the chain paid."""
    job, (placed,) = await take(ledger)
    void = ALICE.signer.sign(bill(placed, NOTHING_USED, Outcome.REFUSED), DOMAIN)
    assert await ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, void, None, NOW_S)) is None
    assert (await _merge_payment(ledger, 5, paid=[])).blocked_reason
    assert await ledger.unblock(ALICE.address, NOW_S)
    assert (await _tab(ledger)).total == 5


async def test_unblocking_without_a_payment_spends_nothing(ledger: Ledger) -> None:
    """If the chain paid no more than the receipts, neither the spending nor the orders that may explain the total change."""
    await _recorded(ledger)
    job, (placed,) = await take(ledger)
    lie = ALICE.signer.sign(bill(placed, seq=2, result_commitment=Hash(b"\1" * 32)), DOMAIN)
    assert await ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, lie, FINE, NOW_S)) is not None
    assert await ledger.unblock(ALICE.address, NOW_S)
    tab = await _tab(ledger)
    assert (tab.total, tab.early_caps, tab.open_caps) == (3, 0, placed.terms.max_cost)
    assert [row.group for row in await ledger.spending(NOW_S, ("model",)) if row.group == ("",)] == []
