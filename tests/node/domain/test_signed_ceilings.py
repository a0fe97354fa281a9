"""The signed ceilings of one payer: which are kept, and which can be claimed when."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.domain.signed_ceilings import MAX_CEILINGS, SignedCeiling, SignedCeilings, add, after, highest
from tallystick.protocol.types import Amount


def test_the_number_of_caps_is_limited() -> None:
    """Of ever lower ceilings that last ever longer, only MAX_CEILINGS are kept; the lowest are dropped."""
    ceilings: SignedCeilings = ()
    for number in range(MAX_CEILINGS + 5):
        ceilings = add(ceilings, SignedCeiling(Amount(1_000 - number), 10 + number))
    assert [ceiling.amount for ceiling in ceilings] == list(range(1_000, 1_000 - MAX_CEILINGS, -1))


def test_equal_caps_are_kept_once_and_zero_caps_never() -> None:
    """Adding an equal ceiling or a ceiling of 0 changes nothing, and a ceiling is gone at its claimBy."""
    (ceiling,) = ceilings = add((), SignedCeiling(Amount(5), 10))
    assert add(ceilings, ceiling) == ceilings
    assert add((), SignedCeiling(Amount(0), 10)) == ()
    assert add(ceilings, SignedCeiling(Amount(5), 11)) == (SignedCeiling(Amount(5), 11),)
    assert add(ceilings, SignedCeiling(Amount(6), 10)) == (SignedCeiling(Amount(6), 10),)
    assert add(ceilings, SignedCeiling(Amount(5), 9)) == ceilings
    assert (after(ceilings, 9), after(ceilings, 10)) == (ceilings, ())
    assert (highest(ceilings, 9), highest(ceilings, 10)) == (ceiling, None)


pairs = st.tuples(st.integers(0, 6), st.integers(0, 6))


@given(st.lists(pairs, max_size=12), st.integers(0, 7))
def test_the_kept_caps_are_equivalent_to_all(signed: list[tuple[int, int]], time: int) -> None:
    """At any time the highest kept ceiling is the highest of all, no kept ceiling is redundant, and they are in order."""
    ceilings: SignedCeilings = ()
    for amount, claim_by in signed:
        ceilings = add(ceilings, SignedCeiling(Amount(amount), claim_by))
    best = highest(ceilings, time)
    assert (best.amount if best else 0) == max((amount for amount, claim_by in signed if claim_by > time), default=0)
    amounts, times = [ceiling.amount for ceiling in ceilings], [ceiling.claim_by for ceiling in ceilings]
    assert amounts == sorted(set(amounts), reverse=True)
    assert times == sorted(set(times))
    assert after(ceilings, time) == tuple(ceiling for ceiling in ceilings if ceiling.claim_by > time)
