"""The life of a job: its two tables, and their consequences."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.jobs import CHARGES, ENDS, TERMINAL, TRANSITIONS, Charge, Event, IllegalTransition, State, step
from tallystick.protocol.messages import Outcome
from tests.protocol.strategies import many

ENDINGS = {Event.FINISH, Event.CANCEL, Event.FAIL, Event.EXPIRE}


def _reachable(start: State) -> set[State]:
    seen, open_ = {start}, [start]
    while open_:
        reached = open_.pop()
        for (state, _), to in TRANSITIONS.items():
            if state is reached and to not in seen:
                seen.add(to)
                open_.append(to)
    return seen


def test_every_state_is_reached_from_the_first() -> None:
    """Every state is reachable."""
    assert _reachable(State.QUEUED) == set(State)


@pytest.mark.parametrize("state", sorted(TERMINAL))
@pytest.mark.parametrize("event", Event)
def test_there_is_no_way_out_of_the_end(state: State, event: Event) -> None:
    """A terminal state accepts no event."""
    with pytest.raises(IllegalTransition, match=f"{event.value} in state {state.value}"):
        step(state, event)


@pytest.mark.parametrize("state", sorted(set(State) - TERMINAL))
def test_every_live_job_can_end(state: State) -> None:
    """From every other state, a job can be cancelled, fail or expire, so no job is ever stuck."""
    for event, end in ((Event.CANCEL, State.CANCELLED), (Event.FAIL, State.FAILED), (Event.EXPIRE, State.EXPIRED)):
        assert step(state, event) is end
    assert _reachable(state) & TERMINAL == TERMINAL


def test_the_ends_are_exactly_the_states_without_events() -> None:
    """TERMINAL and the table agree, and only ending events lead to terminal states."""
    assert {state for state, _ in TRANSITIONS} == set(State) - TERMINAL
    for (_, event), to in TRANSITIONS.items():
        assert (to in TERMINAL) == (event in ENDINGS)


def test_every_event_happens_somewhere() -> None:
    """Every event occurs in some state."""
    assert {event for _, event in TRANSITIONS} == set(Event)


def test_a_failed_attempt_is_retried_only_before_the_first_output() -> None:
    """Before any output, a failed attempt returns to the queue; afterwards the job fails with it."""
    assert step(State.MATCHED, Event.ATTEMPT_FAILED) is State.QUEUED
    assert step(State.RUNNING, Event.ATTEMPT_FAILED) is State.QUEUED
    with pytest.raises(IllegalTransition):
        step(State.STREAMING, Event.ATTEMPT_FAILED)


@pytest.mark.parametrize("state", [State.MATCHED, State.RUNNING])
def test_output_begins_the_stream(state: State) -> None:
    """The first output starts the stream of a matched job, whether or not the provider accepted the job explicitly."""
    assert step(state, Event.OUTPUT) is State.STREAMING


def test_a_second_attempt_changes_no_state() -> None:
    """A job at a node may be given to a second one until its first output, and keeps its state."""
    allowed = {state for state in State if (state, Event.HEDGE) in TRANSITIONS}
    assert allowed == {State.MATCHED, State.RUNNING}
    assert all(step(state, Event.HEDGE) is state for state in allowed)


def test_every_outcome_has_a_charge_and_an_ending_event() -> None:
    """Both tables cover all outcomes, and a matched job accepts each receipt's event."""
    assert CHARGES.keys() == ENDS.keys() == set(Outcome)
    for outcome in Outcome:
        assert ENDS[outcome] in ENDINGS
        for state in (State.MATCHED, State.RUNNING, State.STREAMING):
            assert step(state, ENDS[outcome]) in TERMINAL


def test_an_answer_that_broke_costs_nothing() -> None:
    """Only an answer that ended by itself, or was cancelled by the payer, may be charged."""
    charged = {outcome for outcome, charge in CHARGES.items() if charge is Charge.USAGE}
    assert charged == {Outcome.COMPLETED, Outcome.LENGTH, Outcome.CLIENT_CANCELLED}
    assert {ENDS[outcome] for outcome in charged} == {Event.FINISH, Event.CANCEL}


@given(st.lists(st.sampled_from(Event), max_size=60))
@many
def test_any_walk_ends_in_at_most_one_terminal_state(events: list[Event]) -> None:
    """In any sequence of events, illegal ones change nothing, and the job ends at most once."""
    state, ended = State.QUEUED, 0
    for event in events:
        try:
            after = step(state, event)
        except IllegalTransition:
            assert (state, event) not in TRANSITIONS
            continue
        assert state not in TERMINAL
        ended += after in TERMINAL
        state = after
    assert ended == (state in TERMINAL)


@given(st.lists(st.sampled_from(Event), max_size=60))
@many
def test_each_attempt_is_matched_before_it_runs(events: list[Event]) -> None:
    """Each attempt was matched first, and a stream begins only after a match."""
    state, matches, failures = State.QUEUED, 0, 0
    for event in events:
        if (state, event) not in TRANSITIONS:
            continue
        state = step(state, event)
        matches += event is Event.MATCH
        failures += event is Event.ATTEMPT_FAILED
        assert 0 <= matches - failures <= 1
        assert (matches - failures == 1) or state in TERMINAL or state is State.QUEUED
