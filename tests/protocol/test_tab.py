"""Both sides of a tab, and the check of a receipt."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tallystick.protocol.codecs import keccak
from tallystick.protocol.eip712 import Domain, Signer, Verified
from tallystick.protocol.errors import BadReceipt, Code, Refusal
from tallystick.protocol.jobs import CHARGES, Charge
from tallystick.protocol.messages import Order, Outcome, Receipt, Terms
from tallystick.protocol.pricing import Usage, charge
from tallystick.protocol.tab import PayerTab, ProviderTab, Security, check_receipt
from tallystick.protocol.types import ZERO_HASH, Address, Amount, Hash
from tests.builders import build_order, build_terms, receipt_for
from tests.protocol.strategies import addresses, amounts, few, hashes, many, some

PAYER, PROVIDER = Signer(keccak(b"payer")), Signer(keccak(b"provider"))
DOMAIN = Domain(1, Address("0x" + "5f" * 20))
RICH = Security(Amount(0), Amount(0), Amount(2**96))


def order_of(ceiling: int, terms_hash: Hash = ZERO_HASH) -> Order:
    """An order between the two parties, with this ceiling."""
    return build_order(PAYER.address, PROVIDER.address, ceiling, terms_hash=terms_hash)


# The provider's side


@given(amounts(10**9), amounts(10**9), amounts(10**9), amounts(10**9), amounts(10**9))
@many
def test_a_job_is_admitted_exactly_if_it_is_authorised(
    cumulative: Amount, in_flight: Amount, known: Amount, signed: Amount, cap: Amount
) -> None:
    """Total, jobs in flight and the new job must fit the highest signed ceiling, of the new order or an older one."""
    tab = ProviderTab(seq=3, cumulative=cumulative, ceiling=known, in_flight=in_flight)
    if cumulative + in_flight + cap <= max(known, signed):
        after = tab.admit(order_of(signed), cap, RICH)
        assert after == ProviderTab(3, cumulative, Amount(max(known, signed)), in_flight + cap)
    else:
        with pytest.raises(Refusal) as caught:
            tab.admit(order_of(signed), cap, RICH)
        assert caught.value.code is Code.UNAUTHORISED_TAB
        least = f"at least {cumulative + in_flight + cap} base units (the tab's total {cumulative} plus {in_flight + cap} for"
        assert least in str(caught.value)


@given(amounts(10**9), amounts(10**9), amounts(10**9), st.builds(Security, *[amounts(10**9)] * 3))
@many
def test_a_job_is_admitted_exactly_if_it_is_secured(
    cumulative: Amount, in_flight: Amount, cap: Amount, security: Security
) -> None:
    """The debt beyond what the chain has paid must fit the reservation and the provider's own credit limit."""
    tab = ProviderTab(cumulative=cumulative, in_flight=in_flight)
    if cumulative + in_flight + cap - security.settled <= security.reserved + security.unsecured_limit:
        assert tab.admit(order_of(2**96 - 1), cap, security).in_flight == in_flight + cap
    else:
        with pytest.raises(Refusal) as caught:
            tab.admit(order_of(2**96 - 1), cap, security)
        assert caught.value.code is Code.UNSECURED


def test_a_fresh_tab_is_empty_and_tabs_are_values() -> None:
    """A new tab is empty; a tab is immutable."""
    assert PayerTab().ceiling_for(Amount(7)) == 7
    assert ProviderTab() == ProviderTab(0, Amount(0), Amount(0), Amount(0))
    for tab, member in ((PayerTab(), "accepted"), (ProviderTab(), "seq"), (RICH, "settled")):
        with pytest.raises(AttributeError):
            setattr(tab, member, 1)


def test_the_limits_themselves_are_allowed() -> None:
    """A cost equal to the ceiling and the security is allowed; one base unit more is not."""
    tab = ProviderTab(cumulative=Amount(10), in_flight=Amount(5))
    security = Security(Amount(4), Amount(8), Amount(3))
    assert tab.admit(order_of(15), Amount(0), security).ceiling == 15
    assert ProviderTab(cumulative=Amount(10)).admit(order_of(15), Amount(5), security).in_flight == 5
    with pytest.raises(Refusal, match="expected at least 16 base units"):
        ProviderTab(cumulative=Amount(10)).admit(order_of(15), Amount(6), security)
    with pytest.raises(Refusal, match=r"would owe 0\.000012 dollars, but only 0\.000008 is reserved"):
        ProviderTab(cumulative=Amount(10)).admit(order_of(16), Amount(6), security)


class ProviderTabMachine(RuleBasedStateMachine):
    """A provider's tab with any sequence of orders, receipts and lost jobs."""

    def __init__(self) -> None:
        super().__init__()
        self.tab = ProviderTab()
        self.flying: list[Amount] = []
        self.receipts: list[Amount] = []
        self.highest = 0
        self.settled = self.reserved = Amount(0)
        self.trust = Amount(500)

    @rule(cap=amounts(1_000), slack=st.integers(-50, 400))
    def order(self, cap: Amount, slack: int) -> None:
        """A new order with a ceiling near its need is admitted if it fits, and refused without any change if not."""
        need = sum(self.receipts) + sum(self.flying) + cap
        ceiling = max(0, need + slack)
        security = Security(self.settled, self.reserved, self.trust)
        fits = need <= max(self.highest, ceiling) and need - self.settled <= self.reserved + self.trust
        before = self.tab
        try:
            self.tab = self.tab.admit(order_of(ceiling), cap, security)
        except Refusal:
            assert not fits
            assert self.tab is before
            return
        assert fits
        self.flying.append(cap)
        self.highest = max(self.highest, ceiling)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """Any job in flight ends with a receipt of at most its cap: seq rises by one, and the total by the cost."""
        cap = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        paid = Amount(data.draw(st.integers(0, cap)))
        before, self.tab = self.tab, self.tab.record(paid, cap)
        self.receipts.append(paid)
        assert self.tab.seq == before.seq + 1
        assert self.tab.cumulative == before.cumulative + paid

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """Any job in flight ends without a receipt: only the worst case changes."""
        cap = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        before, self.tab = self.tab, self.tab.drop(cap)
        assert self.tab._replace(in_flight=before.in_flight) == before

    @rule(reserved=amounts(2_000))
    def settle(self, reserved: Amount) -> None:
        """The chain pays the debt and reserves again."""
        self.settled, self.reserved = self.tab.cumulative, reserved

    @invariant()
    def tab_equals_model(self) -> None:
        """The tab is the sum of its receipts, its jobs in flight are those of the model, and all stay below the highest
        ceiling.
        """
        assert self.tab.seq == len(self.receipts)
        assert self.tab.cumulative == sum(self.receipts)
        assert self.tab.in_flight == sum(self.flying)
        assert self.tab.ceiling == self.highest
        assert self.tab.cumulative + self.tab.in_flight <= self.tab.ceiling
        assert all(type(value) is Amount for value in (self.tab.cumulative, self.tab.ceiling, self.tab.in_flight))

    def teardown(self) -> None:
        """After the last job has ended, nothing is in flight."""
        while self.flying:
            self.tab = self.tab.drop(self.flying.pop())
        assert self.tab.in_flight == 0


class HonestPairMachine(RuleBasedStateMachine):
    """An honest payer and an honest provider, whose orders and receipts overtake each other on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.accepted = Amount(0)
        self.open: list[tuple[Amount, Order]] = []
        self.running: list[Amount] = []
        self.on_the_way: list[tuple[Amount, Amount]] = []
        self.closing: list[Amount] = []
        self.signed = Amount(0)
        self.tab = ProviderTab()

    def _caps(self) -> Amount:
        waiting = [cap for cap, _ in self.open] + self.running + self.closing + [cap for _, cap in self.on_the_way]
        return Amount(sum(waiting))

    @rule(cap=amounts(1_000))
    def sign(self, cap: Amount) -> None:
        """The payer signs an order, whose ceiling covers everything open."""
        payer = PayerTab(self.accepted, self._caps())
        ceiling = payer.ceiling_for(cap)
        assert ceiling == self.accepted + self._caps() + cap
        self.signed = Amount(max(self.signed, ceiling))
        self.open.append((cap, order_of(ceiling)))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        """Any of the open orders arrives and is always authorised."""
        cap, order = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.tab = self.tab.admit(order, cap, RICH)
        self.running.append(cap)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def never_arrive(self, data: st.DataObject) -> None:
        """A shortlist's order that was not chosen ends at the payer."""
        self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """A job ends; its receipt is on the way."""
        cap = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        paid = Amount(data.draw(st.integers(0, cap)))
        self.tab = self.tab.record(paid, cap)
        self.on_the_way.append((paid, cap))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """A job ends without a receipt; the payer learns of it later."""
        cap = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.tab = self.tab.drop(cap)
        self.closing.append(cap)

    @precondition(lambda self: self.closing)
    @rule()
    def learn(self) -> None:
        """The payer learns that a job failed."""
        self.closing.pop()

    @precondition(lambda self: self.on_the_way)
    @rule(data=st.data())
    def receive(self, data: st.DataObject) -> None:
        """Any receipt arrives and is accepted."""
        paid, _ = self.on_the_way.pop(data.draw(st.integers(0, len(self.on_the_way) - 1)))
        self.accepted += paid

    @invariant()
    def claims_stay_within_the_signed_ceiling(self) -> None:
        """The provider's claim is the sum of receipts and never exceeds the highest signed ceiling."""
        assert self.tab.cumulative == self.accepted + sum(paid for paid, _ in self.on_the_way)
        assert self.tab.cumulative + self.tab.in_flight <= self.tab.ceiling <= self.signed


ProviderTabMachine.TestCase.settings = few
HonestPairMachine.TestCase.settings = few
TestProviderTab = ProviderTabMachine.TestCase
TestHonestPair = HonestPairMachine.TestCase


# Receipts


@st.composite
def cases(draw: st.DrawFn) -> tuple[Verified[Order], Terms, Receipt]:
    """An order, its terms and an honest receipt for it."""
    terms = build_terms(
        input_price=draw(st.integers(1, 10**9)),
        cached_input_price=draw(st.integers(1, 10**9)),
        output_price=draw(st.integers(1, 10**9)),
        max_cost=draw(amounts(10**12)),
        max_output_tokens=draw(st.integers(0, 10**5)),
    )
    order = PAYER.sign(order_of(draw(amounts()), terms.struct_hash()), DOMAIN)
    taken = draw(st.integers(0, 10**5))
    usage = Usage(taken, draw(st.integers(0, taken)), draw(st.integers(0, terms.max_output_tokens)))
    outcome = draw(st.sampled_from(Outcome))
    receipt = receipt_for(
        order,
        terms,
        usage,
        outcome,
        (draw(st.integers(0, 2**64 - 2)), draw(amounts(10**12))),
        result_commitment=draw(hashes),
        finished_at=draw(st.integers(0, 2**64 - 1)),
        evidence_root=draw(hashes),
    )
    return order, terms, receipt


Case = tuple[Verified[Order], Terms, Receipt]


@given(cases())
@many
def test_an_honest_receipt_is_accepted(case: Case) -> None:
    """For any prices, usage and outcome, a receipt with the resulting charge passes."""
    check_receipt(*case)


@given(cases(), st.data())
@many
def test_every_alteration_of_a_receipt_that_matters_is_refused(case: Case, data: st.DataObject) -> None:
    """Wrong parties or order, an unknown outcome, another cost, a total below the cost and too much output are refused."""
    order, terms, receipt = case
    mask = (1 << 64) - 1
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("the payer and the provider", {"payer": data.draw(addresses.filter(lambda a: a != receipt.payer))}),
        ("the payer and the provider", {"provider": data.draw(addresses.filter(lambda a: a != receipt.provider))}),
        ("the payer and the provider", {"payer": receipt.provider, "provider": receipt.payer}),
        ("orderHash", {"order_hash": data.draw(hashes.filter(lambda h: h != receipt.order_hash))}),
        ("outcome", {"outcome": data.draw(st.integers(len(Outcome), 255))}),
        ("cost", {"cost": receipt.cost + data.draw(st.integers(1, mask)), "cumulative_cost": Amount(2**95)}),
        ("outputTokens", {"output_tokens": terms.max_output_tokens + data.draw(st.integers(1, 1000))}),
        ("usage", {"cached_input_tokens": receipt.input_tokens + data.draw(st.integers(1, 1000))}),
    ]
    if receipt.cost:
        wrong.append(("cost", {"cost": receipt.cost - data.draw(st.integers(1, receipt.cost))}))
        wrong.append(("cumulativeCost", {"cumulative_cost": Amount(data.draw(st.integers(0, receipt.cost - 1)))}))
    for named, change in wrong:
        with pytest.raises(BadReceipt, match=named):
            check_receipt(order, terms, altered(receipt, **change))


@given(cases(), st.data())
@many
def test_a_receipt_with_other_usage_or_outcome_passes_only_at_its_right_price(case: Case, data: st.DataObject) -> None:
    """With any valid counts and outcome, the cost must match them to the base unit."""
    order, terms, receipt = case
    taken = data.draw(st.integers(0, 2**32 - 1))
    usage = Usage(taken, data.draw(st.integers(0, taken)), data.draw(st.integers(0, terms.max_output_tokens)))
    outcome = data.draw(st.sampled_from(Outcome))
    other = altered(
        receipt,
        input_tokens=usage.input,
        cached_input_tokens=usage.cached,
        output_tokens=usage.output,
        outcome=outcome,
        cumulative_cost=Amount(2**95),
    )
    if charge(terms, usage, outcome) == receipt.cost:
        check_receipt(order, terms, other)
    else:
        with pytest.raises(BadReceipt, match=r"receipt\.cost"):
            check_receipt(order, terms, other)


@given(cases())
@some
def test_a_broken_answer_cannot_be_charged(case: Case) -> None:
    """A receipt that charges for the provider's own failure is refused, whatever the usage."""
    order, terms, receipt = case
    assume(receipt.cost > 0)
    for outcome in Outcome:
        if CHARGES[outcome] is Charge.NOTHING:
            with pytest.raises(BadReceipt, match="expected 0 base units from usage and prices"):
                check_receipt(order, terms, altered(receipt, outcome=outcome))


@given(cases())
@some
def test_the_total_may_lie_above_the_orders_own_ceiling(case: Case) -> None:
    """A later order of the tab may finish first, so the total is checked against the payer's highest ceiling, not here."""
    order, terms, receipt = case
    check_receipt(order, terms, altered(receipt, cumulative_cost=Amount(2**96 - 1)))


def altered(receipt: Receipt, **changes: Any) -> Receipt:
    """Returns a receipt with some fields changed."""
    return Receipt(**({name: getattr(receipt, name) for name in Receipt.SCHEMA.fields} | changes))
