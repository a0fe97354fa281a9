"""The ceilings of one payer: what is kept of them, and what can be claimed on when."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.domain.signed_caps import MAX_CAPS, SignedCap, SignedCaps, add, after, highest
from tallystick.protocol.types import Amount


def test_one_payer_never_fills_the_memory_with_ceilings() -> None:
    """Ever lower ceilings that last ever longer are kept up to a number; what is forgotten is the lowest."""
    held: SignedCaps = ()
    for number in range(MAX_CAPS + 5):
        held = add(held, SignedCap(Amount(1_000 - number), 10 + number))
    assert [one.amount for one in held] == list(range(1_000, 1_000 - MAX_CAPS, -1))


def test_equal_ceilings_are_kept_once_and_none_of_nothing() -> None:
    """The same again, or one of nothing, changes nothing; what ends at a time is not there after it."""
    (one,) = held = add((), SignedCap(Amount(5), 10))
    assert add(held, one) == held
    assert add((), SignedCap(Amount(0), 10)) == ()
    assert add(held, SignedCap(Amount(5), 11)) == (SignedCap(Amount(5), 11),)
    assert add(held, SignedCap(Amount(6), 10)) == (SignedCap(Amount(6), 10),)
    assert add(held, SignedCap(Amount(5), 9)) == held
    assert (after(held, 9), after(held, 10)) == (held, ())
    assert (highest(held, 9), highest(held, 10)) == (one, None)


pairs = st.tuples(st.integers(0, 6), st.integers(0, 6))


@given(st.lists(pairs, max_size=12), st.integers(0, 7))
def test_the_ceilings_kept_say_what_all_of_them_say(all_: list[tuple[int, int]], time: int) -> None:
    """At any time the highest of those kept is the highest of all; none of those kept is needless; their order is kept."""
    held: SignedCaps = ()
    for amount, claim_by in all_:
        held = add(held, SignedCap(Amount(amount), claim_by))
    best = highest(held, time)
    assert (best.amount if best else 0) == max((amount for amount, claim_by in all_ if claim_by > time), default=0)
    amounts, times = [one.amount for one in held], [one.claim_by for one in held]
    assert amounts == sorted(set(amounts), reverse=True)
    assert times == sorted(set(times))
    assert after(held, time) == tuple(one for one in held if one.claim_by > time)
