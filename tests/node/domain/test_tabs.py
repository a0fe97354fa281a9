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
from tests.node.storage.test_store import ASK, booking

RICH = Funds(Amount(0), Amount(10**6), Amount(10**6), known=True)


def order(ceiling: int, payer: Address = PAYER.address, claim_by: int = NOW + 86_400) -> Order:
    """An order with this ceiling."""
    return build_order(payer, PROVIDER.address, ceiling, deadline=NOW + 60, claim_by=claim_by, coordinator=COORDINATOR.address)


def refused(tabs: Tabs, order: Order, cap: int, funds: Funds) -> Code:
    """Why a job is not admitted."""
    with pytest.raises(Refusal) as caught:
        tabs.admit(order, Amount(cap), funds, NOW)
    return caught.value.code


def test_a_ceiling_bounds_what_runs_at_once() -> None:
    """Jobs in flight, this one included, never exceed the highest ceiling that the payer signed; what ends makes room."""
    tabs = Tabs(CreditLimits())
    tabs.admit(order(100), Amount(60), RICH, NOW)
    assert refused(tabs, order(100), 60, RICH) is Code.UNAUTHORISED_TAB
    tabs.admit(order(120), Amount(60), RICH, NOW)
    tabs.drop(PAYER.address, Amount(60))
    tabs.admit(order(100), Amount(60), RICH, NOW)


def test_beyond_the_reservation_there_is_the_payers_limit() -> None:
    """What no reservation covers is given on trust up to the per-payer limit, and no further."""
    tabs = Tabs(CreditLimits(per_payer=Amount(50)))
    funds = Funds(Amount(0), Amount(100), Amount(10**6), known=True)
    tabs.admit(order(1_000), Amount(150), funds, NOW)
    assert refused(tabs, order(1_000), 1, funds) is Code.UNSECURED
    assert tabs.unsecured == 50


def test_all_payers_together_have_a_limit() -> None:
    """Many payers, each within its own limit, can't owe more than the total limit together."""
    tabs = Tabs(CreditLimits(per_payer=Amount(50), total=Amount(120)))
    funds = Funds(free=Amount(10**6), known=True)
    payers = [Address(f"0x{n:040x}") for n in range(1, 5)]
    for payer in payers[:2]:
        tabs.admit(order(1_000, payer), Amount(50), funds, NOW)
    assert refused(tabs, order(1_000, payers[2]), 50, funds) is Code.UNSECURED
    tabs.admit(order(1_000, payers[2]), Amount(20), funds, NOW)
    assert tabs.unsecured == 120
    assert sum(tabs.unsecured_by_payer().values()) == 120


def test_a_purse_must_hold_what_could_be_owed() -> None:
    """Trust is not given to an empty purse: free and reserved money must cover the worst case."""
    tabs = Tabs(CreditLimits())
    funds = Funds(Amount(0), Amount(10), Amount(10), known=True)
    assert refused(tabs, order(1_000), 21, funds) is Code.INSUFFICIENT_FUNDS
    tabs.admit(order(1_000), Amount(20), funds, NOW)


def test_without_the_chain_only_trust_is_left() -> None:
    """Where the chain could not be asked, a stranger gets work within its unsecured limit, and no more."""
    tabs = Tabs(CreditLimits(per_payer=Amount(50)))
    assert refused(tabs, order(1_000), 51, Funds()) is Code.UNSECURED
    tabs.admit(order(1_000), Amount(50), Funds(), NOW)


def test_a_chain_that_can_not_be_asked_secures_nothing() -> None:
    """What was settled is remembered, also by a node that starts anew; what was reserved may be gone, and counts as nothing."""
    row = StoredTab(PAYER.address, 3, Amount(100), Amount(200), NOW + 86_400, settled=Amount(90), reserved=Amount(40))
    tabs = Tabs(CreditLimits(new_payer=Amount(0), percent_of_paid=50, per_payer=Amount(30)), [row])
    assert refused(tabs, order(200), 21, Funds()) is Code.UNSECURED
    tabs.admit(order(200), Amount(20), Funds(), NOW)
    tabs = Tabs(CreditLimits(new_payer=Amount(0), percent_of_paid=50, per_payer=Amount(30)), [row])
    tabs.admit(order(200), Amount(60), Funds(Amount(90), Amount(40), Amount(30), known=True), NOW)


def test_a_lost_state_is_noticed() -> None:
    """If the chain paid more than this node remembers to have earned, it takes no job of that payer and does not blame it."""
    tabs = Tabs(CreditLimits())
    with pytest.raises(Unavailable) as caught:
        tabs.admit(order(1_000), Amount(1), replace(RICH, settled=Amount(5)), NOW)
    assert (caught.value.code, caught.value.fault) == (Code.PROVIDER_FAILED, Fault.PROVIDER)
    assert tabs.chain_ahead == {PAYER.address: 5}


def test_a_lost_state_is_told_once_and_mended_to_the_unit() -> None:
    """Whoever asks is told when the chain pays one unit beyond the record, not again for the same tab, and when a receipt brings
    the record up to what was paid, not one that leaves a unit.
    """
    told: list[dict[Address, int]] = []
    tabs = Tabs(CreditLimits(), [StoredTab(PAYER.address, 1, Amount(40), Amount(100), NOW + 86_400, last_order_at=NOW)])
    tabs.on_stale_state = lambda: told.append(dict(tabs.chain_ahead))
    for settled in (40, 41, 42):
        tabs.observe(PAYER.address, Funds(settled=Amount(settled), known=True))
    assert told == [{PAYER.address: 41}]
    placed = Client().order(ASK)
    for seq, total in ((2, 40), (3, 41)):
        receipt = replace(booking(placed, ProviderTab()).receipt.message, seq=seq, cumulative_cost=Amount(total))
        tabs.merge_recovered(receipt, placed.order.message)
        assert told == [{PAYER.address: 41}, {}][: 1 + (total == 41)]


def test_a_state_that_was_lost_is_noticed_at_the_start() -> None:
    """So it is if a stored tab was paid, or claimed, for one unit more than its record; not if for all of it."""
    row = StoredTab(PAYER.address, 3, Amount(100), Amount(200), NOW + 86_400)
    for settled, claimed, ahead in ((100, 100, 0), (101, 0, 101), (0, 101, 101), (0, 0, 0)):
        tabs = Tabs(CreditLimits(), [replace(row, settled=Amount(settled), claimed=Amount(claimed))])
        assert tabs.chain_ahead == ({PAYER.address: ahead} if ahead else {})


def test_what_a_claim_can_be_paid_from_is_all_that_is_still_there() -> None:
    """Reserved, under release, free or thawing: until it is gone, the contract pays from it."""
    assert Funds(Amount(1_000), Amount(1), Amount(20), known=True, thawing=Amount(300), releasing=Amount(4_000)).payable == 4_321


def test_a_ceiling_that_can_not_be_claimed_on_does_not_count() -> None:
    """A high ceiling whose order can't be claimed on any more authorises nothing; the new order's own ceiling does."""
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


def test_the_chain_is_asked_again() -> None:
    """A settlement that the collector saw lowers what is exposed; one of a stranger changes nothing."""
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
def test_the_books_add_up(steps: list[tuple[int, int, int, int]]) -> None:
    """Whatever is admitted, booked and dropped, in whatever order: seq counts receipts, the total adds up their costs, in flight
    is what was admitted and has not ended, and no exposure is above its limit.
    """
    exposure = CreditLimits(per_payer=Amount(60), total=Amount(150))
    tabs, funds = Tabs(exposure), Funds(free=Amount(10**6), known=True)
    payers = [Address(f"0x{n:040x}") for n in range(1, 5)]
    caps: dict[Address, list[int]] = {payer: [] for payer in payers}
    costs: dict[Address, list[int]] = {payer: [] for payer in payers}
    for who, cap, end, cost in steps:
        payer = payers[who]
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
