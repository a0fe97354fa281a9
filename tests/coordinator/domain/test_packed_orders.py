from __future__ import annotations

import os

import pytest

from coordinator.domain.packed_orders import OrderFacts, PackedOrders
from tallystick.protocol.criteria import MAX_CANDIDATES
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import MAX_WRAPPED, Candidate, Submission
from tests.coordinator.harness import START, make_ask, make_submission, person

_U64 = 2**64 - 1


def _candidates(number: int, **changes: object) -> tuple[Candidate, ...]:
    """Candidates as a coordinator reads them."""
    asks = [make_ask(person(str(i)), input_price=i, output_price=_U64 - i) for i in range(number)]
    written = make_submission(*asks, job=JobId(os.urandom(16)), **changes)  # type: ignore[arg-type]
    return Submission.loads(written.dumps()).candidates


@pytest.mark.parametrize("number", [1, MAX_CANDIDATES])
def test_candidates_come_back_as_they_were_read(number: int) -> None:
    """In order, with their signatures, wrapped keys and wire form, whichever fields were decoded before."""
    for decoded in (False, True):
        candidates = _candidates(number)
        for candidate in candidates:
            if decoded:
                candidate.order.message.decode()
                candidate.terms.decode()
        unpacked = PackedOrders(candidates).unpack()
        assert unpacked == candidates
        assert [candidate.to_bytes() for candidate in unpacked] == [candidate.to_bytes() for candidate in candidates]


def test_the_facts_are_those_of_the_orders() -> None:
    """At the bounds of their numbers too."""
    candidates = _candidates(3, now=START - 600 - START)
    facts = list(PackedOrders(candidates).facts())
    assert facts == [OrderFacts.of(candidate) for candidate in candidates]
    assert [fact.provider for fact in facts] == [person(str(i)).address for i in range(3)]
    assert [(fact.input_price, fact.output_price, fact.deadline) for fact in facts] == [(i, _U64 - i, 0) for i in range(3)]
    assert [fact.ask for fact in facts] == [candidate.terms.ask for candidate in candidates]


def test_the_longest_wrapped_keys_fit() -> None:
    """A client may post candidates of the largest size that is accepted, with names and keys that do not compress."""
    candidate = _candidates(1)[0]
    raw = candidate.to_bytes()
    raw = raw[: len(raw) - len(candidate.wrapped_key)] + os.urandom(MAX_WRAPPED)
    large = Candidate.from_bytes(raw)
    assert PackedOrders([large] * MAX_CANDIDATES).unpack() == (large,) * MAX_CANDIDATES
