from __future__ import annotations

from collections.abc import Callable

import pytest

from coordinator.domain import resource_bounds
from coordinator.domain.limits import IntakeLimits
from coordinator.domain.rate_limiter import RateLimiter
from tallystick.protocol.errors import BadMessage, BadSignature, Code, Refusal, TallyError, Unavailable
from tallystick.protocol.types import Address

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
    """A client's fault counts against its address; a lack of funds, which costs chain reads, against the signer too."""
    rate_limiter = RateLimiter(IntakeLimits(refused_per_second=0.001, refused_burst=2), lambda: 0.0)
    for _ in range(resource_bounds.UNFUNDED_ORDERS_BURST):
        rate_limiter.count_refusal("10.0.0.1", error, SIGNER)
    rate_limiter.check_address("10.0.0.2")
    assert _refused(lambda: rate_limiter.check_address("10.0.0.1")) is costs
    assert _refused(lambda: rate_limiter.check_signer(SIGNER)) is signer_pays


def _refused(check: Callable[[], None]) -> bool:
    """Whether a check raises rate_limited."""
    try:
        check()
    except Unavailable as error:
        return error.code is Code.RATE_LIMITED
    return False


def test_a_network_has_one_share() -> None:
    """All addresses of an IPv6 /64 share one limit; an IPv4 address inside IPv6 counts as the IPv4 address."""
    rate_limiter = RateLimiter(IntakeLimits(refused_per_second=0.001, refused_burst=2), lambda: 0.0)
    for host in ("2001:db8::1", "2001:db8::ffff:2"):
        rate_limiter.count_refusal(host, BadMessage("nonsense"))
    rate_limiter.count_refusal("::ffff:10.0.0.1", BadMessage("nonsense"))
    rate_limiter.count_refusal("10.0.0.1", BadMessage("nonsense"))
    for host in ("2001:db8::3", "2001:db8:0:0:9::", "10.0.0.1", "::ffff:10.0.0.1"):
        with pytest.raises(Unavailable):
            rate_limiter.check_address(host)
    rate_limiter.check_address("2001:db8:0:1::1")


def test_sign_ins_count_apart() -> None:
    """An address that signs in too often may still send orders; one whose orders were refused may still sign in."""
    now = [0.0]
    rate_limiter = RateLimiter(IntakeLimits(refused_per_second=0.001, refused_burst=2), lambda: now[0])
    for _ in range(resource_bounds.SIGN_INS_BURST):
        rate_limiter.count_sign_in("10.0.0.1")
    assert _refused(lambda: rate_limiter.count_sign_in("10.0.0.1"))
    rate_limiter.count_sign_in("10.0.0.2")
    rate_limiter.check_address("10.0.0.1")
    rate_limiter.count_request("10.0.0.1")
    now[0] = 1 / resource_bounds.SIGN_INS_PER_SECOND
    rate_limiter.count_sign_in("10.0.0.1")
    for _ in range(2):
        rate_limiter.count_refusal("10.0.0.3", BadMessage("nonsense"))
    assert _refused(lambda: rate_limiter.check_address("10.0.0.3"))
    rate_limiter.count_sign_in("10.0.0.3")
