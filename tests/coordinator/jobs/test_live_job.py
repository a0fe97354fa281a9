from __future__ import annotations

import pytest

from coordinator.domain.resource_bounds import INBOX_FRAMES
from coordinator.domain.slot_groups import ConnectedNode, SlotGroup
from coordinator.jobs.live_job import Attempt, InboxOverrun, LiveJob, link_payload
from tallystick.protocol.jobs import Event, IllegalTransition, State
from tallystick.protocol.link import Capacity
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import INITIAL_CREDIT, Kind, pack_link
from tests.coordinator.harness import DOMAIN, PAYER, START, make_ask, make_submission, person

ANN, BOB = person("ann"), person("bob")
JOB = JobId(bytes(range(16)))


def _make_job() -> tuple[LiveJob, list[Attempt]]:
    submission = make_submission(make_ask(ANN), make_ask(BOB), job=JOB)
    attempts = [
        Attempt(
            candidate,
            candidate.order.verify(DOMAIN),
            SlotGroup(ConnectedNode(candidate.order.message.provider), 0, Capacity(1, 1)),
        )
        for candidate in submission.candidates
    ]
    return LiveJob(submission, created_at=START, started=0, last_frame_at=0), attempts


def test_a_new_job_waits() -> None:
    """Before its first match, a job has no provider."""
    job, _ = _make_job()
    assert (job.id, job.payer, job.state, job.at_node, job.ended) == (JOB, PAYER.address, State.QUEUED, False, False)
    with pytest.raises(RuntimeError, match="never matched"):
        _ = job.provider


def test_a_whole_credit_fits_the_inbox() -> None:
    """A node that keeps to its credit never overruns the inbox."""
    job, _ = _make_job()
    for _ in range(INITIAL_CREDIT + 3):  # ACCEPT, RECEIPT and a FAIL need no credit
        job.deliver(b"frame")
    assert not job.inbox.full()


def test_an_overrun_is_refused() -> None:
    """More frames than a node may send are refused rather than kept."""
    job, _ = _make_job()
    for _ in range(INBOX_FRAMES):
        job.deliver(b"frame")
    with pytest.raises(InboxOverrun, match=JOB.hex()):
        job.deliver(b"one more")


def test_an_interrupt_replaces_a_full_inbox() -> None:
    """The loss of a node reaches a job whose inbox is full."""
    job, _ = _make_job()
    for _ in range(INBOX_FRAMES):
        job.deliver(b"frame")
    job.interrupt(b"gone")
    assert job.inbox.get_nowait() == b"gone"


def test_an_interrupt_follows_queued_frames() -> None:
    """If the inbox has room, frames that the node sent before it was lost still count."""
    job, _ = _make_job()
    job.deliver(b"frame")
    job.interrupt(b"gone")
    assert [job.inbox.get_nowait(), job.inbox.get_nowait()] == [b"frame", b"gone"]


def test_each_attempt_has_an_inbox_of_its_own() -> None:
    """Late frames of a former attempt do not reach the next one, and its counters start again."""
    job, attempts = _make_job()
    job.begin(attempts[0], deadline=5)
    job.deliver(b"late")
    job.uncredited, job.overdue = 7, True
    job.move(Event.ATTEMPT_FAILED)
    job.begin(attempts[1], deadline=9)
    assert job.inbox.empty()
    assert (job.provider, job.deadline, job.uncredited, job.overdue) == (BOB.address, 9, 0, False)
    assert job.tried == {ANN.address, BOB.address}


def test_the_record_contains_the_attempts() -> None:
    """The record of a job has each attempt's provider, order and end."""
    job, attempts = _make_job()
    job.begin(attempts[0], deadline=5)
    job.close_attempt(State.FAILED, "the engine is away")
    job.move(Event.ATTEMPT_FAILED)
    job.begin(attempts[1], deadline=5)
    record = job.record()
    assert record.state is State.MATCHED
    assert [(a.provider, a.state, a.reason) for a in record.attempts] == [
        (ANN.address, State.FAILED, "the engine is away"),
        (BOB.address, State.MATCHED, ""),
    ]
    assert record.last.order == attempts[1].order
    first = record.attempt_of(ANN.address)
    assert first is not None
    assert first.order == attempts[0].order
    assert record.attempt_of(PAYER.address) is None


def test_a_job_moves_by_the_table_only() -> None:
    """A transition that the table does not have is a bug and raises."""
    job, _ = _make_job()
    with pytest.raises(IllegalTransition):
        job.move(Event.OUTPUT)


def test_a_link_frame_has_its_payload_behind_the_head() -> None:
    """The payload of a link frame follows its head."""
    assert link_payload(pack_link(Kind.CHUNK, JOB, b"payload")) == b"payload"
