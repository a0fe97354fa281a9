from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.domain.credit_limits import DAY, SLICE, CreditLimits, DailyUnearnedCredit, UnearnedCredit
from node.domain.tabs import Funds, StoredTab, Tabs
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.tab import ProviderTab
from tallystick.protocol.types import Address, Amount
from tests.node.domain.test_tabs import order, refused
from tests.node.harness import NOW, Client
from tests.node.storage.test_store import ASK, receipt_record

FREE = Funds(free=Amount(10**9), known=True)
LIMITS = CreditLimits(
    per_payer=Amount(100),
    total=Amount(1_000),
    new_payer=Amount(50),
    percent_of_paid=50,
    new_payers_per_day=Amount(120),
    claim_margin=0,
)


def payer(number: int) -> Address:
    """Returns the address of a numbered payer."""
    return Address(f"0x{number:040x}")


def takes(tabs: Tabs, address: Address, amount: int, now: int, *, ceiling: int = 10**9, claim_by: int = NOW + 9 * DAY) -> bool:
    """Returns whether a job is admitted; it then costs its maximum."""
    funds = replace(FREE, settled=tabs.account(address).funds.settled)
    try:
        tabs.admit(order(ceiling, address, claim_by), Amount(amount), funds, now)
    except Refusal as refusal:
        if refusal.code is not Code.UNSECURED:
            raise
        return False
    tabs.record(address, Amount(amount), Amount(amount))
    return True


def default(tabs: Tabs, numbers: range, now: int, claim_by: int) -> int:
    """Lets payers order all that they get on credit and pay nothing; returns how many of them were admitted."""
    cap = CreditLimits().new_payer
    return sum(takes(tabs, payer(number), cap, now, ceiling=int(cap), claim_by=claim_by) for number in numbers)


# Disposable purses


@pytest.mark.parametrize("claim_by", [NOW + 3_600, NOW + DAY, NOW + 30 * DAY, (1 << 64) - 1])
def test_throw_away_purses_never_block_credit_for_ever(claim_by: int) -> None:
    """However long their orders stay claimable, new payers are served again the next day, and known payers always."""
    tabs = Tabs(CreditLimits())
    known = payer(10**6)
    tabs.admit(order(10**9, known), Amount(10), FREE, NOW)
    tabs.record(known, Amount(10), Amount(10))
    tabs.observe(known, replace(FREE, settled=Amount(10)))
    for day in range(20):
        now = NOW + day * (DAY + SLICE)
        until = claim_by if claim_by > NOW + DAY else now + 3_600
        assert default(tabs, range(1 + 40 * day, 41 + 40 * day), now, max(until, now + 3_600)) == 8
        assert tabs.unsecured < CreditLimits().total, "there is always room for those that reserve or have paid"
    assert takes(tabs, known, 5, NOW + 20 * (DAY + SLICE), claim_by=NOW + 99 * DAY)


def test_throw_away_purses_never_get_more_than_the_daily_credit() -> None:
    """In any 24 hours all of them together get `new_payers_per_day`, to the unit, with any number of keys."""
    tabs = Tabs(LIMITS)
    assert [takes(tabs, payer(number), 50, NOW) for number in range(1, 5)] == [True, True, False, False]
    assert not takes(tabs, payer(9), 21, NOW)
    assert takes(tabs, payer(9), 20, NOW)
    assert tabs.unearned_credit(NOW) == 120
    assert not takes(tabs, payer(10), 1, NOW + DAY - 1)
    assert takes(tabs, payer(10), 50, NOW + DAY + SLICE)


def test_a_restart_never_renews_the_daily_credit() -> None:
    """A restarted node knows the unearned credit of the last 24 hours, from the times of the payers' last receipts."""
    rows = [StoredTab(payer(n), 1, Amount(50), Amount(50), NOW + DAY, last_order_at=NOW - n * SLICE) for n in (1, 2)]
    tabs = Tabs(LIMITS, rows)
    tabs.expire(NOW)
    assert (tabs.unearned_credit(NOW), tabs.unsecured) == (100, 100)
    assert not takes(tabs, payer(9), 21, NOW)
    assert takes(tabs, payer(9), 20, NOW)
    later = Tabs(LIMITS, rows)
    assert takes(later, payer(9), 50, NOW + DAY + SLICE)


def test_unused_credit_becomes_available_again() -> None:
    """An unused maximum cost, a job without a receipt, and a paid debt leave room for other new payers."""
    tabs = Tabs(LIMITS)
    for number in (1, 2):
        tabs.admit(order(10**9, payer(number)), Amount(50), FREE, NOW)
    assert tabs.unearned_credit(NOW) == 100
    tabs.record(payer(1), Amount(10), Amount(50))
    tabs.drop(payer(2), Amount(50))
    assert tabs.unearned_credit(NOW) == 10
    tabs.observe(payer(1), replace(FREE, settled=Amount(10)))
    assert tabs.unearned_credit(NOW) == 0


def test_small_payments_do_not_make_credit_earned() -> None:
    """Credit beyond what a payer has earned counts as unearned, however often it has paid a little."""
    tabs = Tabs(LIMITS)
    for number in range(1, 8):
        assert takes(tabs, payer(number), 2, NOW)
        tabs.observe(payer(number), replace(FREE, settled=Amount(2)))
    assert [takes(tabs, payer(number), 51, NOW) for number in range(1, 8)] == [True, True, False, False, False, False, False]
    assert tabs.unearned_credit(NOW) == 100, "one unit each was earned by paying two"


# Earlier payments


def test_credit_grows_with_payments() -> None:
    """A payer gets the new payer's credit plus a share of its payments, up to the limit per payer."""
    tabs = Tabs(replace(LIMITS, new_payers_per_day=Amount(10**6)))
    for settled, trusted in ((0, 50), (1, 50), (2, 51), (99, 99), (100, 100), (10**6, 100)):
        address = payer(settled + 1)
        row = StoredTab(address, 1, Amount(settled), Amount(10**9), NOW + 9 * DAY, Amount(settled), last_order_at=NOW)
        tabs = Tabs(replace(LIMITS, new_payers_per_day=Amount(10**6)), [row])
        funds = replace(FREE, settled=Amount(settled))
        assert refused(tabs, order(10**9, address), trusted + 1, funds) is Code.UNSECURED
        tabs.admit(order(10**9, address), Amount(trusted), funds, NOW)


def test_a_reservation_counts_even_if_no_credit_is_left() -> None:
    """If all credit is used up, a payer is served for its reservation, and not a unit more."""
    tabs = Tabs(replace(LIMITS, total=Amount(100)))
    assert takes(tabs, payer(1), 50, NOW)
    assert takes(tabs, payer(2), 50, NOW)
    secured = Funds(reserved=Amount(70), free=Amount(70), known=True)
    assert refused(tabs, order(10**9, payer(3)), 71, secured) is Code.UNSECURED
    tabs.admit(order(10**9, payer(3)), Amount(70), secured, NOW)
    assert tabs.unsecured == 100


def test_a_payer_at_the_total_limit_counts_once() -> None:
    """A payer's own debt does not count among the others': alone, it may use the whole total."""
    tabs = Tabs(replace(LIMITS, total=Amount(50)))
    assert takes(tabs, payer(1), 30, NOW)
    assert not takes(tabs, payer(1), 21, NOW)
    assert takes(tabs, payer(1), 20, NOW)
    assert not takes(tabs, payer(2), 1, NOW)


def test_old_credit_is_not_granted_again() -> None:
    """A payer that still owes credit from days ago gets what is left of today's credit beyond that."""
    tabs = Tabs(replace(LIMITS, write_off_after=99 * DAY))
    later = NOW + 2 * DAY
    assert takes(tabs, payer(1), 40, NOW)
    assert takes(tabs, payer(2), 50, later)
    assert takes(tabs, payer(3), 50, later)
    assert takes(tabs, payer(4), 15, later)
    assert not takes(tabs, payer(1), 6, later)
    assert takes(tabs, payer(1), 5, later)
    assert tabs.unearned_credit(later) == 120


def test_a_payer_has_one_entry_in_the_write_off_queue() -> None:
    """However many jobs and orders a payer has, the node schedules one check of its account."""
    tabs = Tabs(LIMITS)
    assert takes(tabs, payer(1), 1, NOW, claim_by=NOW + DAY)
    for number in range(1, 50):
        assert takes(tabs, payer(1), 1, NOW + number, claim_by=NOW + DAY + number // 2)
    assert len(tabs._write_off_queue) == 1


# Releases, thaws and empty purses


@pytest.mark.parametrize("left", ["releasing", "thawing"])
def test_funds_being_withdrawn_are_no_security(left: str) -> None:
    """Releasing or thawing funds secure nothing and do not count as free."""
    tabs = Tabs(LIMITS)
    funds = Funds(known=True, **{left: Amount(10**6)})
    assert refused(tabs, order(10**9, payer(1)), 1, funds) is Code.INSUFFICIENT_FUNDS
    assert refused(tabs, order(10**9, payer(1)), 51, replace(funds, free=Amount(10**6))) is Code.UNSECURED
    tabs.admit(order(10**9, payer(1)), Amount(50), replace(funds, free=Amount(50)), NOW)
    assert tabs.unsecured == 50


def test_a_release_counts_at_once() -> None:
    """A secured debt needs credit as soon as the chain shows a release: the next job is refused."""
    tabs = Tabs(LIMITS)
    tabs.admit(order(10**9, payer(1)), Amount(500), Funds(reserved=Amount(1_000), known=True), NOW)
    assert tabs.unsecured == 0
    released = Funds(free=Amount(10**6), releasing=Amount(1_000), known=True)
    assert refused(tabs, order(10**9, payer(1)), 1, released) is Code.UNSECURED
    tabs.observe(payer(1), released)
    assert tabs.unsecured == 500
    assert released.payable == 10**6 + 1_000


# Write-offs


def test_a_debt_is_written_off_when_its_orders_expire() -> None:
    """All debt counts until the last order expires; then only the part that a longer-lived order covers. Its own payer owes it
    for ever.
    """
    tabs = Tabs(LIMITS)
    assert takes(tabs, payer(1), 20, NOW, ceiling=20, claim_by=NOW + 2_000)
    assert takes(tabs, payer(1), 30, NOW, ceiling=50, claim_by=NOW + 1_000)
    for now, counted, lost in ((999, 50, 0), (1_000, 20, 30), (1_999, 20, 30), (2_000, 0, 50), (10 * 365 * DAY, 0, 50)):
        tabs.expire(NOW + now)
        assert (tabs.unsecured, tabs.written_off) == (counted, lost), now
    assert not takes(tabs, payer(1), 1, NOW + 3_000, ceiling=51)
    assert refused(tabs, order(50, payer(1)), 1, FREE) is Code.UNAUTHORISED_TAB


def test_a_debt_is_written_off_after_its_payer_left() -> None:
    """An order that never expires holds credit for at most `write_off_after` after the payer's last job; reserved debt is not
    written off.
    """
    tabs = Tabs(LIMITS)
    assert takes(tabs, payer(1), 50, NOW, claim_by=1 << 63)
    tabs.observe(payer(1), Funds(reserved=Amount(20), known=True))
    tabs.expire(NOW + LIMITS.write_off_after - 1)
    assert (tabs.unsecured, tabs.written_off) == (30, 0)
    tabs.expire(NOW + LIMITS.write_off_after)
    assert (tabs.unsecured, tabs.written_off) == (0, 30)


def test_a_returning_payer_owes_the_written_off_debt() -> None:
    """An order that covers the old debt restores it, and only within the payer's own limit."""
    tabs = Tabs(LIMITS)
    assert takes(tabs, payer(1), 40, NOW, ceiling=40, claim_by=NOW + 10)
    tabs.expire(NOW + 10)
    assert tabs.written_off == 40
    assert refused_at(tabs, payer(1), 11, NOW + 20)
    assert takes(tabs, payer(1), 10, NOW + 20, claim_by=NOW + 9 * DAY)
    assert (tabs.unsecured, tabs.written_off) == (50, 0)


def refused_at(tabs: Tabs, address: Address, amount: int, now: int) -> bool:
    """Returns whether a job is refused for lack of credit at that time."""
    return not takes(tabs, address, amount, now)


def test_a_partly_paid_debt_is_written_off_in_part() -> None:
    """Settled amounts are never written off."""
    tabs = Tabs(LIMITS)
    assert takes(tabs, payer(1), 50, NOW, ceiling=50, claim_by=NOW + 10)
    tabs.observe(payer(1), Funds(settled=Amount(20), known=True))
    assert tabs.unsecured == 30
    tabs.expire(NOW + 10)
    assert (tabs.unsecured, tabs.written_off) == (0, 30)
    tabs.observe(payer(1), Funds(settled=Amount(50), known=True))
    assert tabs.written_off == 0


def test_old_tabs_count_nothing_after_a_restart() -> None:
    """Tabs whose orders have all expired are written off when a node restarts ten years later; all credit is available."""
    rows = [StoredTab(payer(n), 1, Amount(250_000), Amount(0), 0, last_order_at=NOW) for n in range(1, 41)]
    tabs = Tabs(CreditLimits(), rows)
    assert (tabs.unsecured, tabs.written_off) == (0, 10_000_000)
    assert takes(tabs, payer(99), 250_000, NOW + 3_650 * DAY, claim_by=NOW + 3_660 * DAY)


def test_a_recovered_receipt_of_an_expired_order_is_written_off() -> None:
    """Recovered debt counts against credit only if it is still claimable."""
    for left, counted in ((100, 40), (0, 0)):
        placed = Client().order(ASK, order_with={"claim_by": NOW + left})
        made = receipt_record(placed, ProviderTab())
        tabs = Tabs(LIMITS)
        tabs.expire(NOW)
        tabs.merge_recovered(made.receipt.message, placed.order.message)
        assert (tabs.unsecured, tabs.written_off, tabs.unearned_credit(NOW)) == (counted, 40 - counted, 40)
        tabs.merge_recovered(made.receipt.message, placed.order.message)
        account = tabs.account(placed.order.message.payer)
        assert (account.tab.seq, account.tab.cumulative, account.claim_by) == (1, 40, NOW + left)


# Ceilings


def test_a_high_cap_backs_no_jobs_beyond_its_expiry() -> None:
    """When an order with a high ceiling is about to expire, jobs rest on lower ceilings that last."""
    limits = replace(LIMITS, claim_margin=1_800)
    rich = Funds(reserved=Amount(10**9), known=True)
    tabs = Tabs(limits)
    address = payer(1)
    tabs.admit(order(10**6, address, NOW + 1_801), Amount(1), rich, NOW)
    assert (tabs.account(address).tab.ceiling, tabs.account(address).claim_by) == (10**6, NOW + 1_801)
    tabs.record(address, Amount(1), Amount(1))
    with pytest.raises(Refusal) as caught:
        tabs.admit(order(500, address, NOW + DAY), Amount(500), rich, NOW + 1)
    assert caught.value.code is Code.UNAUTHORISED_TAB
    tabs.admit(order(501, address, NOW + DAY), Amount(500), rich, NOW + 1)
    assert (tabs.account(address).tab.ceiling, tabs.account(address).claim_by) == (501, NOW + DAY)


def test_of_equal_caps_the_longest_lived_counts() -> None:
    """Of equal caps the one that expires last counts, in either order of arrival."""
    for times in ((100, 200), (200, 100)):
        tabs = Tabs(LIMITS)
        for time in times:
            tabs.admit(order(1_000, payer(1), NOW + time), Amount(1), FREE, NOW)
        assert tabs.account(payer(1)).claim_by == NOW + 200
        assert len(tabs.account(payer(1)).ceilings) == 1


# Credit by time


def test_growing_credit_counts_its_growth_as_new() -> None:
    """Credit granted more than a day ago stays old when more is added; the newest credit is returned first."""
    gifts = DailyUnearnedCredit()
    gift = gifts.update(UnearnedCredit(), 50, NOW)
    assert gifts.granted(NOW + DAY + SLICE) == 0
    grown = gifts.update(gift, 60, NOW + DAY + SLICE)
    assert grown == UnearnedCredit((NOW + DAY + SLICE) // SLICE, 10, 50)
    assert gifts.granted(NOW + DAY + SLICE) == 10
    less = gifts.update(grown, 55, NOW + DAY + SLICE)
    assert (less.recent, less.old) == (5, 50)
    later = gifts.update(less, 52, NOW + DAY + 3 * SLICE)
    assert (later.slice, later.recent, later.old) == (less.slice, 2, 50), "less is no new credit"
    assert gifts.update(later, 52, NOW + DAY + 5 * SLICE) == later, "nor is as much as before"
    gone = gifts.update(later, 20, NOW + DAY + SLICE)
    assert (gone.recent, gone.old) == (0, 20)


def test_credit_counts_for_24_hours_and_the_rest_of_its_slice() -> None:
    """Credit of a time slice counts until the whole slice is 24 hours old, to the second."""
    assert NOW % SLICE == 0
    for given_at in (NOW, NOW + SLICE - 1):
        gifts = DailyUnearnedCredit()
        gift = gifts.update(UnearnedCredit(old=7), 57, given_at)
        for now, counts in ((NOW + SLICE, 50), (NOW + DAY + SLICE - 1, 50), (NOW + DAY + SLICE, 0)):
            assert gifts.granted(now) == counts
            assert gifts.aged(gift) == (gift if counts else UnearnedCredit(old=57))


steps = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 60), st.sampled_from((0, 1, 2)), st.integers(0, DAY), st.integers(1, 3 * DAY)),
    max_size=40,
)


@given(steps)
@settings(deadline=None, max_examples=200)
def test_no_24_hours_cost_more_than_the_limits(steps: list[tuple[int, int, int, int, int]]) -> None:
    """Whatever jobs non-paying payers order, their debt grows by at most `new_payers_per_day` in any 24 hours, sums match
    the accounts, and no payer exceeds its limit.
    """
    tabs, now = Tabs(LIMITS), NOW
    grown: list[tuple[int, int]] = []
    payers = [payer(number) for number in range(1, 7)]
    for address, cap, part, passes, life in steps:
        now += passes
        before = tabs.account(payer(address)).unreserved
        try:
            tabs.admit(order(10**9, payer(address), now + life), Amount(cap), FREE, now)
        except Refusal as refusal:
            if refusal.code is not Code.UNSECURED:
                raise
            continue
        if part:
            tabs.record(payer(address), Amount(cap // part), Amount(cap))
        else:
            tabs.drop(payer(address), Amount(cap))
        grown.append((now, tabs.account(payer(address)).unreserved - before))
        assert sum(amount for at, amount in grown if at > now - DAY) <= LIMITS.new_payers_per_day
        accounts = [tabs.account(each) for each in payers]
        assert tabs.unsecured == sum(account.unsecured for account in accounts) <= LIMITS.total
        assert tabs.written_off == sum(account.written_off for account in accounts)
        assert all(account.unreserved <= LIMITS.new_payer for account in accounts)
