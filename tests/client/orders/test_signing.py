"""Orders: seqs, caps, reservations, and the policy behind them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tallystick.client.orders.signing import MAX_CAP, RESERVE_MULTIPLE, check_cap, reserve_for
from tallystick.client.orders.tab import Tab
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.pricing import TEMPLATE_ALLOWANCE, Usage, cost, prices_of
from tallystick.protocol.types import Amount
from tests.client.parties import ALICE, COORDINATOR, DOMAIN, NOW, place


@given(st.integers(0, 2**62), st.integers(1, 2**62))
@settings(deadline=None)
def test_seq_grows(last: int, now_ns: int) -> None:
    """An order's seq is above the last one even if the clock goes back, and otherwise follows the clock."""
    seq = place(Tab(order_seq=last), now_ns=now_ns).order.message.seq
    assert seq > last
    assert seq >= now_ns


def test_an_order_follows_the_policy() -> None:
    """Deadline, claim time, reservation and fee come from the policy, and the order commits to the terms by their hash."""
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
    """No usage within the bounds costs more than the signed cap."""
    placed = place(output=output, body=body)
    used = min(body + TEMPLATE_ALLOWANCE, body + more)
    assert cost(Usage(used, min(cached, used), output), prices_of(placed.terms)) <= placed.terms.max_cost


def test_cap_limits() -> None:
    """A job that may cost more than the limit is refused; no job may cost a billion dollars."""
    terms = place().terms
    check_cap(terms, terms.max_cost)
    check_cap(terms, None)
    for dear, limit in ((terms, Amount(terms.max_cost - 1)), (replace(terms, max_cost=MAX_CAP + 1), None)):
        with pytest.raises(Refusal) as caught:
            check_cap(dear, limit)
        assert caught.value.code is Code.COST_ABOVE_CAP


@pytest.mark.parametrize("accepted", [0, 1, 24, 25, 26, 10**9])
def test_nothing_is_reserved_in_advance(accepted: int) -> None:
    """Nothing is reserved for a provider without paid receipts; then the reservation grows in proportion, up to the setting."""
    most = 100
    assert reserve_for(Tab(accepted=Amount(accepted)), Amount(most)) == min(most, RESERVE_MULTIPLE * accepted)
    assert reserve_for(Tab(total=Amount(accepted), open_caps=Amount(accepted)), Amount(most)) == 0
