from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tallystick.client.receipts.checks import (
    MAX_CAP,
    OUTPUT_ALLOWANCE,
    AdjacentReceipts,
    Delivery,
    PlacedOrder,
    Tab,
    check_against_order,
    check_cap,
    check_sequence,
)
from tallystick.protocol.errors import BadReceipt, Code, Fault, Refusal
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.pricing import TEMPLATE_ALLOWANCE, Usage, charge, cost, prices_of
from tallystick.protocol.tab import MAX_SEQ, ProviderTab, Security
from tallystick.protocol.types import ZERO_HASH, Amount, Hash
from tests.client.parties import ALICE, COORDINATOR, DOMAIN, NOW, bill, place

AMOUNTS = st.integers(0, 10**12).map(Amount)
SEEN = Delivery(request_bytes=200, response_bytes=50, commitment=ZERO_HASH, finished=True)


@given(AMOUNTS, st.tuples(AMOUNTS, AMOUNTS), st.tuples(AMOUNTS, AMOUNTS), AMOUNTS, st.integers(0, 4_000))
@settings(deadline=None)
def test_ceiling(
    accepted: Amount, opened: tuple[Amount, Amount], known: tuple[Amount, Amount], missing: Amount, output: int
) -> None:
    """A ceiling is accepted plus open plus cap, where a total that no open order explains counts as accepted, as far as expired
    orders and what was recovered explain it; never more.
    """
    open_caps, early = opened[0], Amount(min(opened))
    expired, recovered = known
    tab = Tab(
        accepted=accepted,
        total=accepted + missing,
        open_caps=open_caps,
        early_caps=early,
        expired_caps=expired,
        recovered=recovered,
    )
    placed = place(tab, output=output)
    cap = placed.terms.max_cost
    lost = min(max(0, missing - early), expired + recovered)
    assert placed.order.message.ceiling == accepted + lost + open_caps + cap
    assert tab.explained_total == accepted + min(missing, expired + recovered + open_caps)
    assert placed.order.message.ceiling <= tab.explained_total + open_caps + cap


@given(st.integers(0, 2**62), st.integers(1, 2**62))
@settings(deadline=None)
def test_seq_grows(last: int, now_ns: int) -> None:
    """An order's seq is above the last one whatever the clock does, and follows the clock where that leads."""
    seq = place(Tab(order_seq=last), now_ns=now_ns).order.message.seq
    assert seq > last
    assert seq >= now_ns


def test_order_says_what_the_policy_says() -> None:
    """Deadline, claim time, reservation and fee come from the policy, and the terms are bound by their hash."""
    placed = place()
    order = placed.order.message
    seconds = NOW // 10**9
    assert (order.deadline, order.claim_by) == (seconds + 60, seconds + 86_400)
    assert (order.max_fee_bps, order.coordinator) == (100, COORDINATOR)
    assert order.terms_hash == placed.terms.struct_hash()
    assert placed.terms.ask == ALICE.ask.digest
    assert placed.order.verify(DOMAIN)


@given(st.integers(0, 1_000), st.integers(0, 1_000), st.integers(0, 1_000), st.integers(0, 8_000))
@settings(deadline=None)
def test_cap_covers_every_honest_bill(body: int, more: int, cached: int, output: int) -> None:
    """No usage that the bounds allow costs more than the cap that was signed."""
    placed = place(output=output, body=body)
    used = min(body + TEMPLATE_ALLOWANCE, body + more)
    assert cost(Usage(used, min(cached, used), output), prices_of(placed.terms)) <= placed.terms.max_cost


def test_cap_limits() -> None:
    """A job whose worst case is above what one may cost is refused, and nothing may cost a billion dollars."""
    terms = place().terms
    check_cap(terms, terms.max_cost)
    check_cap(terms, None)
    for dear, limit in ((terms, Amount(terms.max_cost - 1)), (replace(terms, max_cost=MAX_CAP + 1), None)):
        with pytest.raises(Refusal) as caught:
            check_cap(dear, limit)
        assert caught.value.code is Code.COST_ABOVE_CAP


def test_honest_receipts_pass() -> None:
    """Honest receipts of every outcome are accepted."""
    placed = place()
    for outcome in Outcome:
        check_against_order(placed, bill(placed, outcome=outcome), replace(SEEN, cancelled=outcome is Outcome.CLIENT_CANCELLED))
    check_against_order(placed, bill(placed), None)


@pytest.mark.parametrize(
    ("changes", "delivered", "text"),
    [
        ({"cost": Amount(4), "cumulative_cost": Amount(4)}, SEEN, "receipt.cost"),
        ({"cost": Amount(2)}, None, "receipt.cost"),
        ({"cumulative_cost": Amount(2)}, SEEN, "cumulativeCost"),
        ({"outcome": 77}, SEEN, "outcome"),
        ({"outcome": Outcome.PROVIDER_ERROR}, SEEN, "receipt.cost"),
        ({"cached_input_tokens": 11}, SEEN, "cached"),
        ({"output_tokens": 101}, SEEN, "outputTokens"),
        ({"seq": 0}, SEEN, "seq"),
        ({"seq": MAX_SEQ + 1}, SEEN, "seq"),
        ({"result_commitment": Hash(b"\1" * 32)}, SEEN, "resultCommitment"),
        ({}, replace(SEEN, finished=False), "last chunk"),
    ],
)
def test_dishonest_receipts(changes: dict[str, Any], delivered: Delivery | None, text: str) -> None:
    """Each way in which a receipt contradicts its order or the answer is named, as the provider's fault."""
    placed = place()
    with pytest.raises(BadReceipt, match=text) as caught:
        check_against_order(placed, replace(bill(placed), **changes), delivered)
    assert caught.value.fault is Fault.PROVIDER


@pytest.mark.parametrize("changes", [{"payer": COORDINATOR}, {"provider": COORDINATOR}, {"order_hash": ZERO_HASH}])
def test_misdirected_receipts(changes: dict[str, Any]) -> None:
    """A receipt of other parties or another order is the coordinator's fault, not evidence against the provider."""
    placed = place()
    with pytest.raises(BadReceipt) as caught:
        check_against_order(placed, bill(placed, **changes), SEEN)
    assert caught.value.fault is Fault.COORDINATOR


def test_usage_bounds() -> None:
    """Tokens can't exceed bytes plus the stated allowances; requests with images are not bounded by bytes."""
    placed = place(output=8_000, body=50_000)
    most_in, most_out = 200 + TEMPLATE_ALLOWANCE, 50 + OUTPUT_ALLOWANCE
    check_against_order(placed, bill(placed, Usage(most_in, 0, most_out)), SEEN)
    for usage in (Usage(most_in + 1, 0, 0), Usage(0, 0, most_out + 1)):
        with pytest.raises(BadReceipt, match="bytes"):
            check_against_order(placed, bill(placed, usage), SEEN)
        check_against_order(placed, bill(placed, usage), replace(SEEN, bounded=False))


def test_cut_off_answers_are_not_held_against_the_provider() -> None:
    """Where not all chunks arrived the transcript can't be compared, and the receipt stands on its arithmetic."""
    placed = place()
    partial = replace(SEEN, commitment=Hash(b"\1" * 32), finished=False, cancelled=True)
    check_against_order(placed, bill(placed, outcome=Outcome.CLIENT_CANCELLED), partial)


def chain(*costs: int) -> list[Receipt]:
    """Consecutive receipts of one tab."""
    placed, found, total = place(), [], 0
    for seq, each in enumerate(costs, 1):
        total += each
        found.append(bill(placed, seq=seq, cost=Amount(each), cumulative_cost=Amount(total)))
    return found


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.data())
@settings(deadline=None)
def test_any_order_of_arrival_is_fine(costs: list[int], data: st.DataObject) -> None:
    """The receipts of an honest tab are accepted in whatever order they come, and whichever are missing."""
    receipts = chain(*costs)
    arriving = data.draw(st.permutations(receipts))[: data.draw(st.integers(1, len(receipts)))]
    held: list[Receipt] = []
    for receipt in arriving:
        check_sequence(receipt, around(held, receipt))
        held.append(receipt)


def around(held: list[Receipt], receipt: Receipt) -> AdjacentReceipts:
    """The neighbours of a receipt among those held."""
    below = [r for r in held if r.seq < receipt.seq]
    above = [r for r in held if r.seq > receipt.seq]
    return AdjacentReceipts(
        same_seq=next((r for r in held if r.seq == receipt.seq), None),
        below=max(below, key=lambda r: r.seq, default=None),
        above=min(above, key=lambda r: r.seq, default=None),
    )


def test_broken_continuity() -> None:
    """Totals that do not add up, seqs used twice, and second receipts for one order are refused."""
    first, second, third = chain(10, 20, 30)
    cases = [
        (replace(second, cumulative_cost=Amount(31)), AdjacentReceipts(below=first)),
        (replace(second, cumulative_cost=Amount(29)), AdjacentReceipts(below=first)),
        (replace(third, cumulative_cost=Amount(39)), AdjacentReceipts(below=first)),
        (replace(second, cumulative_cost=Amount(31)), AdjacentReceipts(above=third)),
        (replace(first, cumulative_cost=Amount(11)), AdjacentReceipts()),
        (second, AdjacentReceipts(same_seq=replace(second, finished_at=1))),
        (second, AdjacentReceipts(below=first, same_order=first)),
    ]
    for receipt, near in cases:
        with pytest.raises(BadReceipt):
            check_sequence(receipt, near)


@dataclass
class Running:
    """A job in the simulation: its order, and its receipt once the provider wrote it."""

    placed: PlacedOrder
    receipt: Receipt | None = None


@dataclass
class PayerModel:
    """The ledger's rules in memory."""

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
    """A payer and an honest provider: jobs run at the same time, receipts come late, out of order, or never."""

    running: Bundle[Running] = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.payer = PayerModel()
        self.provider = ProviderTab()
        self.clean = True

    @rule(target=running, output=st.integers(0, 2_000))
    def order(self, output: int) -> Running:
        """The payer orders; where nothing was lost, an honest node can always take the job."""
        tab = self.payer.tab
        placed = place(tab, output=output)
        message = placed.order.message
        assert message.ceiling <= tab.total + tab.open_caps + placed.terms.max_cost
        if self.clean:
            assert message.ceiling == tab.accepted + tab.open_caps + placed.terms.max_cost
            self.provider = self.provider.admit(message, placed.terms.max_cost, Security(Amount(0), Amount(10**15), Amount(0)))
        else:
            self.provider = replace(
                self.provider,
                ceiling=Amount(max(self.provider.ceiling, message.ceiling)),
                in_flight=self.provider.in_flight + placed.terms.max_cost,
            )
        self.payer.open.append(placed)
        self.payer.seq, self.payer.ceiling = message.seq, Amount(max(self.payer.ceiling, message.ceiling))
        return Running(placed)

    @rule(job=running, spent=st.integers(0, 2_000))
    def write(self, job: Running, spent: int) -> None:
        """The provider ends the job and signs its receipt, as far as a ceiling covers it."""
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
        """The receipt arrives; or the job ended without one that the payer ever sees."""
        self.payer.open.remove(job.placed)
        if job.receipt is None:
            self.provider = self.provider.drop(job.placed.terms.max_cost)
            return
        check_against_order(job.placed, job.receipt, None)
        check_sequence(job.receipt, around(self.payer.held, job.receipt))
        assert job.receipt.cumulative_cost <= self.payer.ceiling
        if job.receipt.cumulative_cost >= self.payer.tab.total:
            self.payer.mark = self.payer.seq
        self.payer.held.append(job.receipt)

    @rule(job=consumes(running))
    def lose(self, job: Running) -> None:
        """A written receipt never reaches the payer, for which the order expires in the end."""
        self.payer.open.remove(job.placed)
        self.payer.expired.append(job.placed)
        if job.receipt is None:
            self.provider = self.provider.drop(job.placed.terms.max_cost)
        elif job.receipt.cost:
            self.clean = False

    @invariant()
    def never_above_what_was_signed(self) -> None:
        """What the provider can claim, and what the payer accepted, stay within the highest signed ceiling."""
        tab = self.payer.tab
        assert self.provider.cumulative <= self.payer.ceiling
        assert tab.accepted <= tab.total <= self.payer.ceiling

    @invariant()
    def recovers(self) -> None:
        """Once a later receipt has told of a lost one and nothing is open, the next order is one that the node can take."""
        tab = self.payer.tab
        if not self.payer.open and tab.total == self.provider.cumulative:
            placed = place(tab)
            self.provider.admit(placed.order.message, placed.terms.max_cost, Security(Amount(0), Amount(10**15), Amount(0)))


Trade.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTrade = Trade.TestCase
