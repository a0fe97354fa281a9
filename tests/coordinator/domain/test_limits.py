from __future__ import annotations

from typing import Any

import pytest

from coordinator.domain.limits import JobLimits, check_order
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.types import Amount, JobId
from tests.coordinator.harness import CAP, COORDINATOR, PAYER, START, make_ask, make_order, make_terms, person

LIMITS = JobLimits(max_order_seconds=600, min_claim_window=3_600, fee_bps=50)
TERMS = make_terms(make_ask(person("ann")), JobId(bytes(16)))


def _check(**order: Any) -> None:
    made = make_order(TERMS, person("ann").address, **order).message
    check_order(made, TERMS, coordinator=COORDINATOR.address, limits=LIMITS, now=START)


def test_bounds_are_inside() -> None:
    """An order may use each limit exactly, to the second, basis point and base unit."""
    _check(deadline=START + 1, claim_by=START + 3_600, max_fee_bps=50, ceiling=Amount(CAP))
    _check(deadline=START + 600)


@pytest.mark.parametrize(
    ("order", "code", "says"),
    [
        ({"coordinator": PAYER.address}, Code.ORDER_MISDIRECTED, "order.coordinator"),
        ({"deadline": START}, Code.ORDER_EXPIRED, "passed 0 s ago"),
        ({"deadline": START + 601}, Code.ORDER_TERMS, "expected at most 600 s ahead, got 601 s"),
        ({"claim_by": START + 3_599}, Code.ORDER_TERMS, "order.claimBy"),
        ({"max_fee_bps": 49}, Code.ORDER_TERMS, "order.maxFeeBps"),
        ({"ceiling": Amount(CAP - 1)}, Code.UNAUTHORISED_TAB, "order.ceiling"),
    ],
)
def test_each_rule_is_named(order: dict[str, Any], code: Code, says: str) -> None:
    """An order that breaks a rule is refused for good; the error names the member."""
    with pytest.raises(Refusal, match=says) as caught:
        _check(**order)
    assert caught.value.code is code
    assert not caught.value.retry


def test_a_large_body_gives_its_node_time_to_receive_it() -> None:
    """A node's time to answer a dispatch grows with the body that must reach it first."""
    limits = JobLimits(accept=10)
    assert limits.accept_within(0) == 10
    assert limits.accept_within(32 << 20) == 10 + 128
