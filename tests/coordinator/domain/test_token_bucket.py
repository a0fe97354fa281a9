from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.domain import resource_bounds
from coordinator.domain.limits import Intake
from coordinator.domain.token_bucket import Budget, Manners
from tallystick.protocol.errors import BadMessage, BadSignature, Code, Refusal, TallyError, Unavailable
from tallystick.protocol.types import Address


def test_a_burst_and_then_a_pace() -> None:
    """So much at once, then so much a second, and no more saved up than the burst."""
    budget = Budget(rate=2, burst=3)
    assert [budget.spend("ann", 0) for _ in range(5)] == [True, True, True, False, False]
    assert budget.wait("ann", 0) == 0.5
    assert budget.spend("ann", 0.5)
    assert not budget.spend("ann", 0.5)
    assert [budget.spend("ann", 100) for _ in range(4)] == [True, True, True, False]


def test_parties_do_not_share() -> None:
    """One that spent everything takes nothing from another."""
    budget = Budget(rate=1, burst=1)
    assert budget.spend("ann", 0)
    assert not budget.spend("ann", 0)
    assert budget.wait("bob", 0) == 0
    assert budget.spend("bob", 0)


def test_memory_is_bounded() -> None:
    """However many strangers come, only the last are remembered."""
    budget = Budget(rate=1, burst=1)
    for number in range(20_000):
        budget.spend(str(number), 0)
    assert len(budget._left) == 10_000
    assert not budget.spend("19999", 0)


@given(st.lists(st.floats(0, 5), max_size=60), st.floats(0.1, 10), st.integers(1, 10))
def test_never_more_than_the_pace_allows(gaps: list[float], rate: float, burst: int) -> None:
    """Over any time, what was let through is at most the burst and the rate times that time."""
    budget, now, through = Budget(rate, burst), 0.0, 0
    for gap in gaps:
        now += gap
        through += budget.spend("ann", now)
        assert through <= burst + rate * now + 1e-6


def test_a_debt_is_paid_off() -> None:
    """What was taken beyond the budget is waited for, whoever of many takes it at once."""
    budget = Budget(rate=2, burst=3)
    assert budget.owe("ann", 0, 3) == 0
    assert budget.owe("ann", 0, 4) == 2
    assert budget.owe("ann", 0, 4) == 4
    assert budget.owe("ann", 4, 0) == 0


SIGNER = Address("0x" + "11" * 20)


@pytest.mark.parametrize(
    ("error", "costs", "signer_pays"),
    [
        (BadMessage("nonsense"), True, False),
        (BadSignature("forged"), True, False),
        (Refusal(Code.INSUFFICIENT_FUNDS, "poor"), True, True),
        (Refusal(Code.UNSECURED, "poor"), True, True),
        (Refusal(Code.ORDER_EXPIRED, "late"), True, False),
        (Refusal(Code.ORDER_REPLAYED, "again"), True, False),
        (Unavailable(Code.NO_PROVIDER, "busy"), False, False),
        (Unavailable(Code.COORDINATOR_UNAVAILABLE, "stopping"), False, False),
        (Refusal(Code.CANCELLED, "gone"), False, False),
    ],
)
def test_what_a_refusal_costs(error: TallyError, costs: bool, signer_pays: bool) -> None:
    """What is the client's fault and was looked at counts for its address; what the chain was asked for, for its signer too."""
    manners = Manners(Intake(bad_rate=0.001, bad_burst=2), lambda: 0.0)
    for _ in range(resource_bounds.LOOK_UPS_AT_ONCE):
        manners.note("10.0.0.1", error, SIGNER)
    manners.check("10.0.0.2")
    assert _refused(lambda: manners.check("10.0.0.1")) is costs
    assert _refused(lambda: manners.check_signer(SIGNER)) is signer_pays


def _refused(check: Callable[[], None]) -> bool:
    """Whether a check says that it is too much."""
    try:
        check()
    except Unavailable as error:
        return error.code is Code.RATE_LIMITED
    return False


def test_a_household_has_one_share() -> None:
    """All addresses of an IPv6 /64 are one; an IPv4 address inside IPv6 is the IPv4 address."""
    manners = Manners(Intake(bad_rate=0.001, bad_burst=2), lambda: 0.0)
    for host in ("2001:db8::1", "2001:db8::ffff:2"):
        manners.note(host, BadMessage("nonsense"))
    manners.note("::ffff:10.0.0.1", BadMessage("nonsense"))
    manners.note("10.0.0.1", BadMessage("nonsense"))
    for host in ("2001:db8::3", "2001:db8:0:0:9::", "10.0.0.1", "::ffff:10.0.0.1"):
        with pytest.raises(Unavailable):
            manners.check(host)
    manners.check("2001:db8:0:1::1")
