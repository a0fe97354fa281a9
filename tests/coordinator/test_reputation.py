from __future__ import annotations

import pytest

from coordinator.reputation import Reputation
from tallystick.protocol.messages import Outcome
from tests.coordinator.world import PAYER

PROVIDER = PAYER.address


def _after(*outcomes: Outcome) -> float:
    reputation = Reputation()
    for outcome in outcomes:
        reputation.record(PROVIDER, outcome)
    return reputation.score(PROVIDER)


def test_a_newcomer_is_trusted() -> None:
    """A provider that nothing is known of has the full score."""
    assert _after() == 1


@pytest.mark.parametrize("outcome", [Outcome.COMPLETED, Outcome.LENGTH, Outcome.UPSTREAM_ERROR, Outcome.CLIENT_CANCELLED])
def test_what_is_not_its_fault_costs_nothing(outcome: Outcome) -> None:
    """Answers, refused requests and clients that leave do not lower a score."""
    assert _after(outcome) == 1


@pytest.mark.parametrize("outcome", [Outcome.PROVIDER_ERROR, Outcome.TIMED_OUT])
def test_failures_lower_it_and_work_mends_it(outcome: Outcome) -> None:
    """A failure lowers the score a little, answers bring it back, and it stays between 0 and 1."""
    fallen = _after(outcome)
    assert 0.9 < fallen < 1
    assert fallen < _after(outcome, Outcome.COMPLETED) < 1
    assert 0 < _after(*[outcome] * 500) < 0.01


def test_ignored_outcomes_do_not_mend() -> None:
    """A provider cannot launder its failures with jobs that count for nothing."""
    assert _after(Outcome.TIMED_OUT, Outcome.UPSTREAM_ERROR) == _after(Outcome.TIMED_OUT)
