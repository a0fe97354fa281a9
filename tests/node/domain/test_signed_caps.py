"""The signed caps of one payer: which are kept, and which can be claimed when."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.domain.signed_caps import MAX_CAPS, SignedCap, SignedCaps, add, after, highest
from tallystick.protocol.types import Amount


def test_the_number_of_caps_is_limited() -> None:
    """Of ever lower caps that last ever longer, only MAX_CAPS are kept; the lowest are dropped."""
    caps: SignedCaps = ()
    for number in range(MAX_CAPS + 5):
        caps = add(caps, SignedCap(Amount(1_000 - number), 10 + number))
    assert [cap.amount for cap in caps] == list(range(1_000, 1_000 - MAX_CAPS, -1))


def test_equal_caps_are_kept_once_and_zero_caps_never() -> None:
    """Adding an equal cap or a cap of 0 changes nothing, and a cap is gone at its claimBy."""
    (cap,) = caps = add((), SignedCap(Amount(5), 10))
    assert add(caps, cap) == caps
    assert add((), SignedCap(Amount(0), 10)) == ()
    assert add(caps, SignedCap(Amount(5), 11)) == (SignedCap(Amount(5), 11),)
    assert add(caps, SignedCap(Amount(6), 10)) == (SignedCap(Amount(6), 10),)
    assert add(caps, SignedCap(Amount(5), 9)) == caps
    assert (after(caps, 9), after(caps, 10)) == (caps, ())
    assert (highest(caps, 9), highest(caps, 10)) == (cap, None)


pairs = st.tuples(st.integers(0, 6), st.integers(0, 6))


@given(st.lists(pairs, max_size=12), st.integers(0, 7))
def test_the_kept_caps_are_equivalent_to_all(signed: list[tuple[int, int]], time: int) -> None:
    """At any time the highest kept cap is the highest of all, no kept cap is redundant, and they are in order."""
    caps: SignedCaps = ()
    for amount, claim_by in signed:
        caps = add(caps, SignedCap(Amount(amount), claim_by))
    best = highest(caps, time)
    assert (best.amount if best else 0) == max((amount for amount, claim_by in signed if claim_by > time), default=0)
    amounts, times = [cap.amount for cap in caps], [cap.claim_by for cap in caps]
    assert amounts == sorted(set(amounts), reverse=True)
    assert times == sorted(set(times))
    assert after(caps, time) == tuple(cap for cap in caps if cap.claim_by > time)
