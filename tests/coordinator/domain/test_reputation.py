from __future__ import annotations

from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.domain import reputation as module
from coordinator.domain.reputation import NEWCOMER_JOBS, UNCHANGED, ProviderRecord, RecordChange, Reputation
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.messages import Outcome
from tests.coordinator.harness import PAYER, World, person, quiet

PROVIDER = PAYER.address


def _after(*outcomes: Outcome) -> float:
    reputation = Reputation()
    for outcome in outcomes:
        reputation.record(PROVIDER, outcome)
    return reputation.score(PROVIDER)


def test_a_newcomer_starts_low() -> None:
    """An unknown provider has a quarter of the full score."""
    assert _after() == 0.25


@pytest.mark.parametrize("outcome", [Outcome.COMPLETED, Outcome.LENGTH])
def test_good_work_raises_it(outcome: Outcome) -> None:
    """Good jobs raise a score: above 90 % after 27, above 99 % after 500, and never above 1."""
    assert 0.25 < _after(outcome) < _after(*[outcome] * 26) < 0.9 < _after(*[outcome] * 27)
    assert 0.99 < _after(*[outcome] * 500) < 1


@pytest.mark.parametrize("outcome", [Outcome.UPSTREAM_ERROR, Outcome.CLIENT_CANCELLED, Outcome.REFUSED])
def test_faults_of_others_cost_no_reputation(outcome: Outcome) -> None:
    """Requests that an engine or a node refused, and clients that leave, do not change a score."""
    assert _after(outcome) == _after()
    assert _after(Outcome.TIMED_OUT, outcome) == _after(Outcome.TIMED_OUT), "nor do they raise it"


@pytest.mark.parametrize("outcome", [Outcome.PROVIDER_ERROR, Outcome.TIMED_OUT])
def test_failures_lower_it_and_work_mends_it(outcome: Outcome) -> None:
    """A failure lowers the score, good jobs raise it again, and it stays between 0 and 1."""
    assert _after(outcome) < _after() < _after(outcome, Outcome.COMPLETED)
    assert 0 < _after(*[outcome] * 500) < 0.01


def test_old_jobs_fade() -> None:
    """A provider is judged by its recent jobs: 500 failures count twice as much as what came before."""
    assert 0.3 < _after(*[Outcome.COMPLETED] * 5_000, *[Outcome.TIMED_OUT] * 500) < 0.55


def test_nobody_stays_a_newcomer_by_refusing() -> None:
    """A provider is a newcomer for its first jobs alone, however they end."""
    reputation = Reputation()
    for _ in range(NEWCOMER_JOBS):
        assert reputation.newcomer(PROVIDER)
        reputation.record(PROVIDER, Outcome.REFUSED)
    assert not reputation.newcomer(PROVIDER)


def test_memory_does_not_grow_with_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the providers with the latest jobs are remembered."""
    monkeypatch.setattr(module, "MAX_REMEMBERED", 3)
    reputation = Reputation()
    for number in range(10):
        reputation.record(person(str(number)).address, Outcome.COMPLETED)
    assert len(reputation._records) == 3
    assert reputation.score(person("9").address) > reputation.score(person("0").address) == 0.25
    assert set(reputation.take_changed()) == {person(str(number)).address for number in (7, 8, 9)}


async def test_a_restart_does_not_clear_a_reputation() -> None:
    """Reputation survives a restart, even if the store could not write it at once."""
    world = World()
    node = world.node("ann")
    client = await world.started(node)
    node.fail(client.job.id, Unavailable(Code.TIMED_OUT, "slow"))
    await quiet()
    client = await world.started(node)
    node.chunk(client.job.id)
    node.leave()
    await quiet()
    score = world.market.reputation.score(node.address)
    assert score < 0.25
    world.market.reputation.mark_unsaved(world.market.reputation.take_changed())
    await world.pass_time(1)
    await world.restart()
    assert world.market.reputation.score(node.address) == score


def test_a_record_is_what_it_counts() -> None:
    """Good, bad and all jobs are counted separately."""
    record = ProviderRecord().after(Outcome.COMPLETED).after(Outcome.PROVIDER_ERROR).after(Outcome.REFUSED)
    assert (round(record.good, 2), record.bad, record.jobs) == (1.0, 1.0, 3)


_OUTCOMES = (Outcome.COMPLETED, Outcome.PROVIDER_ERROR, Outcome.REFUSED, Outcome.TIMED_OUT, Outcome.CLIENT_CANCELLED)


@given(st.lists(st.sampled_from(_OUTCOMES), max_size=30), st.integers(0, 30), st.integers(0, 30))
def test_changes_make_the_record_that_the_jobs_make(outcomes: list[Outcome], first: int, second: int) -> None:
    """Wherever the jobs are cut into changes: stored one after the other, or joined because a write failed."""
    expected = ProviderRecord(3.0, 1.5, 7)
    for outcome in outcomes:
        expected = expected.after(outcome)
    cuts = sorted((min(first, len(outcomes)), min(second, len(outcomes))))
    parts = [outcomes[: cuts[0]], outcomes[cuts[0] : cuts[1]], outcomes[cuts[1] :]]
    changes = [reduce(RecordChange.after, part, UNCHANGED) for part in parts]
    stored = ProviderRecord(3.0, 1.5, 7)
    for change in changes:
        stored = change.of(stored)
    for record in (stored, reduce(RecordChange.then, changes).of(ProviderRecord(3.0, 1.5, 7))):
        assert [record.good, record.bad] == pytest.approx([expected.good, expected.bad])
        assert record.jobs == expected.jobs


def test_jobs_at_two_processes_are_all_counted() -> None:
    """Each stores what changed, and takes the record that results; what it has not stored yet is added to that."""
    ann, stored = person("ann").address, ProviderRecord()
    one, two = Reputation(), Reputation()
    for reputation in (one, two):
        reputation.record(ann, Outcome.COMPLETED)
        reputation.record(ann, Outcome.REFUSED)
        stored = reputation.take_changes()[ann].of(stored)
        reputation.record(ann, Outcome.PROVIDER_ERROR)
        reputation.adopt({ann: stored})
    assert (stored.jobs, round(stored.good, 2), stored.bad) == (4, 2.0, 0)
    assert two.score(ann) == RecordChange().after(Outcome.PROVIDER_ERROR).of(stored).score
    lost = two.take_changes()
    two.record(ann, Outcome.COMPLETED)
    two.put_back(lost)
    assert two.take_changes()[ann].jobs == 2
    assert two.take_changes() == {}
