from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from coordinator.domain.exposure import Exposure, TabExposure
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.types import Address, Amount
from tests.coordinator.harness import person

PAYER = person("payer").address
A, B = person("a").address, person("b").address
amounts = st.integers(0, 1_000).map(Amount)


def _make(**tab: int) -> Exposure:
    """A payer with one tab, with provider A."""
    exposure = Exposure()
    exposure.record_receipt(PAYER, A, Amount(tab.get("cumulative", 0)), Amount(10**9))
    exposure.observe(PAYER, A, settled=Amount(tab.get("settled", 0)), reserved=Amount(tab.get("reserved", 0)))
    return exposure


def _admits(exposure: Exposure, provider: Address, cap: int, free: int) -> bool:
    try:
        exposure.admit(PAYER, provider, Amount(cap), Amount(free))
    except Refusal:
        return False
    return True


def test_the_worst_case_must_be_covered() -> None:
    """A job is admitted up to the free balance, and not for one base unit more."""
    assert _admits(_make(), A, 100, 100)
    assert not _admits(_make(), A, 101, 100)


def test_jobs_in_flight_count() -> None:
    """The cap of a job in flight is not available to the next job, on any tab, until the job ends."""
    exposure = _make()
    assert _admits(exposure, A, 60, 100)
    assert not _admits(exposure, B, 60, 100)
    exposure.release(PAYER, A, Amount(60))
    assert _admits(exposure, B, 60, 100)


def test_a_reservation_covers_its_own_tab_only() -> None:
    """A reservation for a provider covers jobs with it, and no others."""
    assert _admits(_make(reserved=100), A, 100, 0)
    assert not _admits(_make(reserved=100), B, 100, 0)


def test_what_is_owed_counts_until_the_chain_paid() -> None:
    """Totals that are not settled use up the purse; settled ones do not."""
    assert not _admits(_make(cumulative=80), B, 30, 100)
    assert _admits(_make(cumulative=80, settled=80), B, 30, 100)
    exposure = _make(cumulative=80)
    exposure.settle(PAYER, A, Amount(80))
    assert _admits(exposure, B, 30, 100)


def test_settlements_never_shrink() -> None:
    """An older settled total does not replace a newer one."""
    exposure = _make(settled=80)
    exposure.observe(PAYER, A, settled=Amount(10), reserved=Amount(5))
    exposure.settle(PAYER, A, Amount(20))
    tab = exposure.known(PAYER, A)
    assert tab is not None
    assert (tab.settled, tab.reserved) == (80, 5)


def test_a_total_counts_as_far_as_it_was_signed_for() -> None:
    """A provider that claims a total above every ceiling cannot use up a payer's purse."""
    exposure = Exposure()
    assert exposure.record_receipt(PAYER, A, Amount(10**20), Amount(70)) == 70
    assert _admits(exposure, B, 30, 100)
    assert exposure.record_receipt(PAYER, A, Amount(90), Amount(200)) == 90
    assert exposure.record_receipt(PAYER, A, Amount(150), Amount(100)) == 150, "a later order was finished first"


def test_totals_never_shrink() -> None:
    """Receipts that arrive out of order leave the highest total."""
    exposure = _make(cumulative=90)
    assert exposure.record_receipt(PAYER, A, Amount(40), Amount(10**9)) == 90


def test_strangers_are_not_remembered() -> None:
    """Orders of empty purses, and settlements of pairs that never traded here, leave no trace."""
    exposure = Exposure()
    for number in range(50):
        stranger = person(f"stranger {number}").address
        exposure.observe(stranger, A, settled=Amount(0), reserved=Amount(0))
        with pytest.raises(Refusal):
            exposure.admit(stranger, A, Amount(1), Amount(0))
        exposure.settle(stranger, A, Amount(5))
    assert exposure.size == 0
    assert exposure._tabs == {}, "nor an empty entry for each"


def test_a_refusal_says_what_is_missing() -> None:
    """The refusal names both sums in decimal form, and what to do."""
    with pytest.raises(Refusal, match=r"has 1\.5 dollars free.* may cost 2\.25.*tally deposit") as caught:
        _make().admit(PAYER, A, Amount(2_250_000), Amount(1_500_000))
    assert caught.value.code is Code.INSUFFICIENT_FUNDS


@given(amounts, amounts, amounts, amounts, amounts)
def test_uncovered_is_never_negative(total: Amount, settled: Amount, reserved: Amount, flight: Amount, cap: Amount) -> None:
    """A reservation above what is owed is not available elsewhere, and a higher cap never needs less."""
    tab = TabExposure(cumulative=total, settled=settled, reserved=reserved, in_flight=flight)
    assert 0 <= tab.uncovered() <= tab.uncovered(cap) <= max(0, total - settled) + flight + cap


class ExposureMachine(RuleBasedStateMachine):
    """Jobs of one payer with two providers begin and end in any order, while the chain settles and reserves."""

    def __init__(self) -> None:
        super().__init__()
        self.exposure = Exposure()
        self.jobs: list[tuple[Address, Amount]] = []

    @rule(provider=st.sampled_from([A, B]), cap=amounts, free=amounts, reserved=amounts, settled=amounts)
    def order(self, provider: Address, cap: Amount, free: Amount, reserved: Amount, settled: Amount) -> None:
        self.exposure.observe(PAYER, provider, settled=settled, reserved=reserved)
        try:
            self.exposure.admit(PAYER, provider, cap, free)
        except Refusal:
            return
        self.jobs.append((provider, cap))
        tabs = [tab for each in (A, B) if (tab := self.exposure.known(PAYER, each)) is not None]
        owed = sum(max(0, tab.cumulative - tab.settled) + tab.in_flight for tab in tabs)
        assert owed <= free + sum(tab.reserved for tab in tabs), "never admits above free + reserved"

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), cost=amounts)
    def end(self, data: st.DataObject, cost: Amount) -> None:
        provider, cap = self.jobs.pop(data.draw(st.integers(0, len(self.jobs) - 1)))
        tab = self.exposure.known(PAYER, provider)
        before = tab.cumulative if tab is not None else Amount(0)  # an empty tab need not be stored
        self.exposure.record_receipt(PAYER, provider, before + min(cost, cap), Amount(10**9))
        self.exposure.release(PAYER, provider, cap)

    @rule(provider=st.sampled_from([A, B]), settled=amounts)
    def settle(self, provider: Address, settled: Amount) -> None:
        self.exposure.settle(PAYER, provider, settled)

    @rule(provider=st.sampled_from([A, B]))
    def unreserve(self, provider: Address) -> None:
        self.exposure.unreserve(PAYER, provider)

    @rule()
    def forget_settled(self) -> None:
        self.exposure.forget_settled()

    @invariant()
    def the_sum_is_that_of_all_tabs(self) -> None:
        sums = {payer: sum(tab.uncovered() for tab in tabs.values()) for payer, tabs in self.exposure._tabs.items()}
        assert self.exposure._uncovered == sums

    @invariant()
    def in_flight_is_the_sum_of_the_caps(self) -> None:
        assert self.exposure.in_flight == sum(cap for _, cap in self.jobs)

    def teardown(self) -> None:
        for provider, cap in self.jobs:
            self.exposure.release(PAYER, provider, cap)
        assert self.exposure.in_flight == 0


TestExposureMachine = ExposureMachine.TestCase
TestExposureMachine.__doc__ = "What is in flight is the sum of the caps of the jobs in flight, and returns to 0."


def test_a_payer_with_many_tabs_costs_no_more() -> None:
    """Admitting a job looks at the tab of its own pair alone, so a payer with many providers holds up nobody."""
    looked_at = list[TabExposure]()

    class Watched(TabExposure):
        def uncovered(self, cap: int = 0) -> int:
            looked_at.append(self)
            return super().uncovered(cap)

    exposure = Exposure()
    exposure._tabs[PAYER] = {person(f"{number}").address: Watched(cumulative=Amount(2)) for number in range(50)}
    exposure._uncovered[PAYER] = 100
    assert _admits(exposure, A, 10, 110)
    assert not _admits(exposure, A, 1, 110)
    assert looked_at == []


def test_a_receipt_at_no_cost_leaves_no_tab() -> None:
    """Receipts that leave a tab at zero are not remembered, so they fill no memory."""
    exposure = Exposure()
    assert exposure.record_receipt(PAYER, A, Amount(0), Amount(1_000)) == 0
    assert exposure.size == 0
    exposure.admit(PAYER, A, Amount(5), Amount(5))
    assert exposure.record_receipt(PAYER, A, Amount(0), Amount(1_000)) == 0
    assert exposure.in_flight == 5


def test_a_released_reservation_covers_nothing() -> None:
    """After a release, what the tab owes needs free balance again; no new pair is remembered."""
    exposure = Exposure()
    exposure.record_receipt(PAYER, A, Amount(7), Amount(7))
    exposure.observe(PAYER, A, settled=Amount(0), reserved=Amount(7))
    exposure.admit(PAYER, B, Amount(1), Amount(1))
    exposure.unreserve(PAYER, A)
    with pytest.raises(Refusal):
        exposure.admit(PAYER, B, Amount(1), Amount(8))
    exposure.admit(PAYER, B, Amount(1), Amount(9))
    exposure.unreserve(person("stranger").address, A)
    exposure.settle(person("stranger").address, A, Amount(5))
    assert exposure.size == 2
