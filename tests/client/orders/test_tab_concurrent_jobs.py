"""A simulation of a payer and an honest provider with concurrent jobs: neither side loses."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.orders.tab import Tab
from tallystick.client.receipts.price_check import check_against_order
from tallystick.client.receipts.sequence_check import AdjacentReceipts, check_sequence
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.pricing import Usage, charge
from tallystick.protocol.tab import ProviderTab, Security
from tallystick.protocol.types import Amount
from tests.client.parties import bill, place


def adjacent_receipts(held: list[Receipt], receipt: Receipt) -> AdjacentReceipts:
    """The adjacent receipts among those held."""
    below = [r for r in held if r.seq < receipt.seq]
    above = [r for r in held if r.seq > receipt.seq]
    return AdjacentReceipts(
        same_seq=next((r for r in held if r.seq == receipt.seq), None),
        below=max(below, key=lambda r: r.seq, default=None),
        above=min(above, key=lambda r: r.seq, default=None),
    )


@dataclass
class Running:
    """A simulated job: its order, and its receipt once the provider wrote it."""

    placed: PlacedOrder
    receipt: Receipt | None = None


@dataclass
class PayerModel:
    """The ledger's rules, in memory."""

    held: list[Receipt] = field(default_factory=list)
    open: list[PlacedOrder] = field(default_factory=list)
    expired: list[PlacedOrder] = field(default_factory=list)
    ceiling: Amount = Amount(0)
    seq: int = 0
    mark: int = 0

    @property
    def tab(self) -> Tab:
        early = [p for p in self.open if p.order.message.seq <= self.mark]
        return Tab(
            accepted=Amount(sum(r.cost for r in self.held)),
            total=Amount(max((r.cumulative_cost for r in self.held), default=0)),
            open_caps=Amount(sum(p.terms.max_cost for p in self.open)),
            early_caps=Amount(sum(p.terms.max_cost for p in early)),
            ceiling=self.ceiling,
            order_seq=self.seq,
            expired_caps=Amount(sum(p.terms.max_cost for p in self.expired)),
        )


class Trade(RuleBasedStateMachine):
    """A payer and an honest provider: jobs run concurrently, and receipts come late, out of order, or never."""

    running: Bundle[Running] = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.payer = PayerModel()
        self.provider = ProviderTab()
        self.clean = True

    @rule(target=running, output=st.integers(0, 2_000))
    def order(self, output: int) -> Running:
        """The payer orders; unless something was lost, an honest node can always take the job."""
        tab = self.payer.tab
        placed = place(tab, output=output)
        message = placed.order.message
        assert message.ceiling <= tab.total + tab.open_caps + placed.terms.max_cost
        if self.clean:
            assert message.ceiling == tab.accepted + tab.open_caps + placed.terms.max_cost
            self.provider = self.provider.admit(message, placed.terms.max_cost, Security(Amount(0), Amount(10**15), Amount(0)))
        else:
            self.provider = self.provider._replace(
                ceiling=Amount(max(self.provider.ceiling, message.ceiling)),
                in_flight=self.provider.in_flight + placed.terms.max_cost,
            )
        self.payer.open.append(placed)
        self.payer.seq, self.payer.ceiling = message.seq, Amount(max(self.payer.ceiling, message.ceiling))
        return Running(placed)

    @rule(job=running, spent=st.integers(0, 2_000))
    def write(self, job: Running, spent: int) -> None:
        """The provider ends the job and signs its receipt if a ceiling covers it."""
        if job.receipt is not None:
            return
        terms = job.placed.terms
        usage = Usage(min(spent, 100), 0, min(spent, terms.max_output_tokens))
        due = charge(terms, usage, Outcome.COMPLETED)
        if self.provider.cumulative + due > self.provider.ceiling:
            return
        self.provider = self.provider.record(due, terms.max_cost)
        job.receipt = bill(job.placed, usage, seq=self.provider.seq, cumulative_cost=self.provider.cumulative)

    @rule(job=consumes(running))
    def deliver(self, job: Running) -> None:
        """The receipt arrives, or the job ends without one."""
        self.payer.open.remove(job.placed)
        if job.receipt is None:
            self.provider = self.provider.drop(job.placed.terms.max_cost)
            return
        check_against_order(job.placed, job.receipt, None)
        check_sequence(job.receipt, adjacent_receipts(self.payer.held, job.receipt))
        assert job.receipt.cumulative_cost <= self.payer.ceiling
        if job.receipt.cumulative_cost >= self.payer.tab.total:
            self.payer.mark = self.payer.seq
        self.payer.held.append(job.receipt)

    @rule(job=consumes(running))
    def lose(self, job: Running) -> None:
        """A receipt never reaches the payer, so its order expires."""
        self.payer.open.remove(job.placed)
        self.payer.expired.append(job.placed)
        if job.receipt is None:
            self.provider = self.provider.drop(job.placed.terms.max_cost)
        elif job.receipt.cost:
            self.clean = False

    @invariant()
    def claims_and_receipts_stay_within_ceilings(self) -> None:
        """What the provider can claim, and what the payer accepted, stay within the highest signed ceiling."""
        tab = self.payer.tab
        assert self.provider.cumulative <= self.payer.ceiling
        assert tab.accepted <= tab.total <= self.payer.ceiling

    @invariant()
    def node_takes_the_next_order(self) -> None:
        """After a later receipt has revealed a lost one and no order is open, the node can take the next order."""
        tab = self.payer.tab
        if not self.payer.open and tab.total == self.provider.cumulative:
            placed = place(tab)
            self.provider.admit(placed.order.message, placed.terms.max_cost, Security(Amount(0), Amount(10**15), Amount(0)))


Trade.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTrade = Trade.TestCase
