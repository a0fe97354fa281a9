from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.domain.tabs import CreditLimits, Funds, StoredTab, Tabs
from tallystick.protocol.errors import Code, Fault, Refusal, Unavailable
from tallystick.protocol.messages import Order
from tallystick.protocol.tab import ProviderTab
from tallystick.protocol.types import Address, Amount
from tests.builders import build_order
from tests.node.harness import COORDINATOR, NOW, PAYER, PROVIDER, Client
from tests.node.storage.test_store import ASK, receipt_record

RICH = Funds(Amount(0), Amount(10**6), Amount(10**6), known=True)


def order(ceiling: int, payer: Address = PAYER.address, claim_by: int = NOW + 86_400) -> Order:
    """Returns an order with this cap."""
    return build_order(payer, PROVIDER.address, ceiling, deadline=NOW + 60, claim_by=claim_by, coordinator=COORDINATOR.address)


def refused(tabs: Tabs, order: Order, cap: int, funds: Funds) -> Code:
    """Returns the error code with which a job is not admitted."""
    with pytest.raises(Refusal) as caught:
        tabs.admit(order, Amount(cap), funds, NOW)
    return caught.value.code


def test_a_cap_limits_jobs_in_flight() -> None:
    """Jobs in flight, including the new one, never exceed the payer's highest cap; a job that ends makes room."""
    tabs = Tabs(CreditLimits())
    tabs.admit(order(100), Amount(60), RICH, NOW)
    assert refused(tabs, order(100), 60, RICH) is Code.UNAUTHORISED_TAB
    tabs.admit(order(120), Amount(60), RICH, NOW)
    tabs.drop(PAYER.address, Amount(60))
    tabs.admit(order(100), Amount(60), RICH, NOW)


def test_unreserved_debt_is_limited_per_payer() -> None:
    """Debt that no reservation covers is limited by the payer's credit."""
    tabs = Tabs(CreditLimits(per_payer=Amount(50)))
    funds = Funds(Amount(0), Amount(100), Amount(10**6), known=True)
    tabs.admit(order(1_000), Amount(150), funds, NOW)
    assert refused(tabs, order(1_000), 1, funds) is Code.UNSECURED
    assert tabs.unsecured == 50


def test_all_payers_together_have_a_limit() -> None:
    """Many payers, each within its own limit, cannot owe more than the total limit together."""
    tabs = Tabs(CreditLimits(per_payer=Amount(50), total=Amount(120)))
    funds = Funds(free=Amount(10**6), known=True)
    payers = [Address(f"0x{n:040x}") for n in range(1, 5)]
    for payer in payers[:2]:
        tabs.admit(order(1_000, payer), Amount(50), funds, NOW)
    assert refused(tabs, order(1_000, payers[2]), 50, funds) is Code.UNSECURED
    tabs.admit(order(1_000, payers[2]), Amount(20), funds, NOW)
    assert tabs.unsecured == 120
    assert sum(tabs.unsecured_by_payer().values()) == 120


def test_an_empty_purse_gets_no_credit() -> None:
    """Free and reserved funds must cover the largest possible debt."""
    tabs = Tabs(CreditLimits())
    funds = Funds(Amount(0), Amount(10), Amount(10), known=True)
    assert refused(tabs, order(1_000), 21, funds) is Code.INSUFFICIENT_FUNDS
    tabs.admit(order(1_000), Amount(20), funds, NOW)


def test_without_the_chain_jobs_need_credit() -> None:
    """If the chain does not respond, an unknown payer gets jobs within its credit limit, and no more."""
    tabs = Tabs(CreditLimits(per_payer=Amount(50)))
    assert refused(tabs, order(1_000), 51, Funds()) is Code.UNSECURED
    tabs.admit(order(1_000), Amount(50), Funds(), NOW)


def test_without_the_chain_reservations_do_not_count() -> None:
    """Settled amounts are remembered, also after a restart; reservations may be gone and do not count."""
    row = StoredTab(PAYER.address, 3, Amount(100), Amount(200), NOW + 86_400, settled=Amount(90), reserved=Amount(40))
    tabs = Tabs(CreditLimits(new_payer=Amount(0), percent_of_paid=50, per_payer=Amount(30)), [row])
    assert refused(tabs, order(200), 21, Funds()) is Code.UNSECURED
    tabs.admit(order(200), Amount(20), Funds(), NOW)
    tabs = Tabs(CreditLimits(new_payer=Amount(0), percent_of_paid=50, per_payer=Amount(30)), [row])
    tabs.admit(order(200), Amount(60), Funds(Amount(90), Amount(40), Amount(30), known=True), NOW)


def test_a_stale_state_is_detected() -> None:
    """If the chain paid more than this node recorded, it takes no job of that payer and does not blame the payer."""
    tabs = Tabs(CreditLimits())
    with pytest.raises(Unavailable) as caught:
        tabs.admit(order(1_000), Amount(1), replace(RICH, settled=Amount(5)), NOW)
    assert (caught.value.code, caught.value.fault) == (Code.PROVIDER_FAILED, Fault.PROVIDER)
    assert tabs.chain_ahead == {PAYER.address: 5}


def test_a_stale_state_is_reported_once_until_recovered() -> None:
    """The callback runs when the chain pays one unit beyond the record, not again for the same tab, and once a receipt closes the
    gap completely.
    """
    reported: list[dict[Address, int]] = []
    tabs = Tabs(CreditLimits(), [StoredTab(PAYER.address, 1, Amount(40), Amount(100), NOW + 86_400, last_order_at=NOW)])
    tabs.on_stale_state = lambda: reported.append(dict(tabs.chain_ahead))
    for settled in (40, 41, 42):
        tabs.observe(PAYER.address, Funds(settled=Amount(settled), known=True))
    assert reported == [{PAYER.address: 41}]
    placed = Client().order(ASK)
    for seq, total in ((2, 40), (3, 41)):
        receipt = replace(receipt_record(placed, ProviderTab()).receipt.message, seq=seq, cumulative_cost=Amount(total))
        tabs.merge_recovered(receipt, placed.order.message)
        assert reported == [{PAYER.address: 41}, {}][: 1 + (total == 41)]


def test_a_stale_state_is_detected_at_the_start() -> None:
    """A stored tab is stale if more than its record was paid or claimed, even by one unit."""
    row = StoredTab(PAYER.address, 3, Amount(100), Amount(200), NOW + 86_400)
    for settled, claimed, ahead in ((100, 100, 0), (101, 0, 101), (0, 101, 101), (0, 0, 0)):
        tabs = Tabs(CreditLimits(), [replace(row, settled=Amount(settled), claimed=Amount(claimed))])
        assert tabs.chain_ahead == ({PAYER.address: ahead} if ahead else {})


def test_a_claim_can_be_paid_from_all_funds() -> None:
    """Reserved, releasing, free and thawing funds all pay a claim until they are gone."""
    assert Funds(Amount(1_000), Amount(1), Amount(20), known=True, thawing=Amount(300), releasing=Amount(4_000)).payable == 4_321


def test_an_expired_cap_does_not_count() -> None:
    """A high cap whose order has expired authorises nothing; the new order's own cap does."""
    funds = replace(RICH, settled=Amount(100))
    for left, counts in ((600, False), (601, True)):
        row = StoredTab(PAYER.address, 1, Amount(100), Amount(10**6), NOW + left)
        tabs = Tabs(CreditLimits(claim_margin=600), [row])
        if counts:
            tabs.admit(order(120), Amount(30), funds, NOW)
        else:
            assert refused(tabs, order(120), 30, funds) is Code.UNAUTHORISED_TAB
            tabs.admit(order(130), Amount(30), funds, NOW)
        with pytest.raises(Refusal, match=r"more than 600 s from now, got 600 s") as caught:
            Tabs(CreditLimits(claim_margin=600)).admit(order(50, claim_by=NOW + 600), Amount(30), RICH, NOW)
        assert caught.value.code is Code.UNAUTHORISED_TAB
        Tabs(CreditLimits(claim_margin=600)).admit(order(50, claim_by=NOW + 601), Amount(30), RICH, NOW)


def test_observed_settlements_lower_the_debt() -> None:
    """A settlement that the collector saw lowers the unsecured debt; a settlement of an unknown payer changes nothing."""
    tabs = Tabs(CreditLimits())
    tabs.admit(order(100), Amount(100), Funds(), NOW)
    tabs.record(PAYER.address, Amount(80), Amount(100))
    assert tabs.unsecured == 80
    tabs.observe(PAYER.address, Funds(settled=Amount(80), known=True))
    tabs.observe(COORDINATOR.address, RICH)
    assert tabs.unsecured == 0
    assert tabs.chain_ahead == {}, "all that was earned was paid"
    tabs.observe(PAYER.address, Funds())
    assert tabs.account(PAYER.address).funds.settled == 80, "no answer is no news"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 2), st.integers(0, 40)), max_size=60))
@settings(deadline=None, max_examples=100)
def test_tabs_add_up(steps: list[tuple[int, int, int, int]]) -> None:
    """After any sequence of jobs, seq counts receipts, the total is the sum of costs, jobs in flight are those that have not
    ended, and no limit is exceeded.
    """
    exposure = CreditLimits(per_payer=Amount(60), total=Amount(150))
    tabs, funds = Tabs(exposure), Funds(free=Amount(10**6), known=True)
    payers = [Address(f"0x{n:040x}") for n in range(1, 5)]
    caps: dict[Address, list[int]] = {payer: [] for payer in payers}
    costs: dict[Address, list[int]] = {payer: [] for payer in payers}
    for payer_index, cap, end, cost in steps:
        payer = payers[payer_index]
        try:
            tabs.admit(order(100, payer), Amount(cap), funds, NOW)
            caps[payer].append(cap)
        except Refusal:
            pass
        if end and caps[payer]:
            ended = caps[payer].pop()
            if end == 1:
                costs[payer].append(min(cost, ended))
                tabs.record(payer, Amount(costs[payer][-1]), Amount(ended))
            else:
                tabs.drop(payer, Amount(ended))
        tab = tabs.account(payer).tab
        assert (tab.seq, tab.cumulative, tab.in_flight) == (len(costs[payer]), sum(costs[payer]), sum(caps[payer]))
        assert tab.cumulative + tab.in_flight <= 100
        assert tabs.unsecured == sum(tabs.account(each).unsecured for each in payers) <= exposure.total
        assert tabs.account(payer).unsecured <= exposure.per_payer


def test_a_tab_continues_from_a_stored_receipt_only_forward() -> None:
    """A stored receipt beyond the record moves seq and total and nothing else; one within the record moves nothing."""
    tabs = Tabs(CreditLimits())
    tabs.admit(order(1_000), Amount(100), RICH, NOW)
    tabs.continue_from(PAYER.address, 3, Amount(80))
    tab = tabs.account(PAYER.address).tab
    assert (tab.seq, tab.cumulative, tab.in_flight, tab.ceiling) == (3, 80, 100, 1_000)
    for seq in (0, 2, 3):
        tabs.continue_from(PAYER.address, seq, Amount(70))
        assert tabs.account(PAYER.address).tab == tab
    tabs.continue_from(PAYER.address, 4, Amount(81))
    assert (tabs.account(PAYER.address).tab.seq, tabs.account(PAYER.address).tab.cumulative) == (4, 81)


@pytest.mark.parametrize("replicas", [1, 2, 64])
def test_jobs_from_several_replicas_count_together(replicas: int) -> None:
    """A replica may count the whole purse; the node risks its credit for the payer, however many replicas send jobs."""
    purse, reserved, credit = 1_000, 300, 50
    tabs = Tabs(CreditLimits(per_payer=Amount(credit)))
    funds = Funds(Amount(0), Amount(reserved), Amount(purse), known=True)
    admitted = 0
    for _ in range(replicas):
        for cap in (purse, 100, 10, 1):  # of one replica, which admits up to the purse and the reservation
            for _ in range((purse + reserved) // cap):
                try:
                    tabs.admit(order(10**6), Amount(cap), funds, NOW)
                except Refusal as error:
                    assert error.code is Code.UNSECURED  # noqa: PT017 - most are admitted
                    break
                admitted += cap
    assert admitted == reserved + credit
    assert tabs.unsecured == credit
