from __future__ import annotations

import pytest

from coordinator.domain.listed_ask import ConnectedNode, SlotGroup
from coordinator.domain.resource_bounds import INBOX_FRAMES
from coordinator.domain.scoring import ANY_REQUEST
from coordinator.jobs.attempt import OUTRUN, Attempt
from coordinator.jobs.live_job import InboxOverrun, LiveJob, link_payload
from coordinator.jobs.match_log import MatchDraft
from tallystick.protocol.jobs import Event, IllegalTransition, State
from tallystick.protocol.link import Capacity
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import INITIAL_CREDIT, Kind, pack_link
from tests.coordinator.harness import DOMAIN, PAYER, START, make_ask, make_submission, person

DRAFT = MatchDraft("m", ANY_REQUEST, ranked=False, draw=0.0, considered=())
ANN, BOB = person("ann"), person("bob")
JOB = JobId(bytes(range(16)))


def _make_job() -> tuple[LiveJob, list[Attempt]]:
    submission = make_submission(make_ask(ANN), make_ask(BOB), job=JOB)
    attempts = [
        Attempt(candidate, order, SlotGroup(ConnectedNode(order.message.provider), 0, Capacity(1, 1)), DRAFT)
        for candidate in submission.candidates
        for order in [candidate.order.verify(DOMAIN)]
    ]
    return LiveJob(submission, created_at=START, started=0, last_frame_at=0), attempts


def test_a_new_job_waits() -> None:
    """Before its first match, a job has no provider."""
    job, _ = _make_job()
    assert (job.id, job.payer, job.state, job.at_node, job.ended) == (JOB, PAYER.address, State.QUEUED, False, False)
    with pytest.raises(RuntimeError, match="never matched"):
        _ = job.provider


def test_a_job_that_was_never_matched_has_no_inbox() -> None:
    """There may be thousands of jobs that wait. The inbox is made for the first frame."""
    job, (attempt, _) = _make_job()
    assert job.frames is None
    job.begin(attempt, deadline=5)
    job.deliver(attempt, pack_link(Kind.ACCEPT, JOB))
    assert len(job.inbox) == 1


def _begun() -> tuple[LiveJob, Attempt, Attempt]:
    job, (first, second) = _make_job()
    job.begin(first, deadline=5)
    return job, first, second


async def _frames(job: LiveJob) -> list[tuple[Attempt, bytes]]:
    return [await job.next_frame() for _ in range(len(job.inbox))]


def test_a_whole_credit_fits_the_inbox() -> None:
    """A node that keeps to its credit never overruns the inbox."""
    job, first, _ = _begun()
    for _ in range(INITIAL_CREDIT + 3):  # ACCEPT, RECEIPT and a FAIL need no credit
        job.deliver(first, b"frame")
    assert first.unread < INBOX_FRAMES


async def test_an_overrun_is_refused() -> None:
    """More frames than a node may send are refused rather than kept; the other node of the job has room of its own."""
    job, first, second = _begun()
    job.hedge(second, deadline=5)
    for _ in range(INBOX_FRAMES):
        job.deliver(first, b"frame")
    with pytest.raises(InboxOverrun, match=JOB.hex()):
        job.deliver(first, b"one more")
    job.deliver(second, b"frame")
    await job.next_frame()
    job.deliver(first, b"there is room again")


async def test_an_interrupt_reaches_a_full_inbox() -> None:
    """The loss of a node reaches a job whose inbox is full, after what the node sent before. Later ones are not queued."""
    job, first, _ = _begun()
    for _ in range(INBOX_FRAMES):
        job.deliver(first, b"frame")
    job.interrupt(first, b"gone")
    job.interrupt(first, b"gone again")
    assert (await _frames(job))[-1] == (first, b"gone")


def test_only_the_first_output_of_an_attempt_is_the_first() -> None:
    """The first chunk of an attempt is told from later ones, and none is after an interrupt."""
    job, first, second = _begun()
    job.hedge(second, deadline=5)
    chunk = pack_link(Kind.CHUNK, JOB, b"sealed")
    assert not job.deliver(first, pack_link(Kind.ACCEPT, JOB))
    assert job.undecided
    assert [job.deliver(first, chunk), job.deliver(first, chunk)] == [True, False]
    assert not job.undecided
    job.interrupt(second, b"gone")
    assert not job.deliver(second, chunk)


@pytest.mark.parametrize("end", [Kind.FAIL, Kind.RECEIPT])
def test_output_behind_the_end_of_an_attempt_is_none(end: Kind) -> None:
    """A node that sends output after its own end is not told that it may charge for it."""
    job, first, _ = _begun()
    job.deliver(first, pack_link(end, JOB))
    assert not job.deliver(first, pack_link(Kind.CHUNK, JOB, b"sealed"))


async def test_each_attempt_has_frames_of_its_own() -> None:
    """Late frames of a former attempt do not reach the next one, and its counters start again."""
    job, first, second = _begun()
    job.deliver(first, b"late")
    first.uncredited, first.overdue, first.released = 7, True, True
    job.open_attempts.remove(first)
    job.move(Event.ATTEMPT_FAILED)
    job.begin(second, deadline=9)
    job.deliver(second, b"frame")
    assert await job.next_frame() == (second, b"frame")
    current = job.current
    assert (job.provider, current.deadline, current.uncredited, current.overdue) == (BOB.address, 9, 0, False)
    assert job.tried == {ANN.address, BOB.address}


def test_the_record_contains_the_attempts() -> None:
    """The record of a job has each attempt's provider, order and end."""
    job, first, second = _begun()
    first.close(State.FAILED, "the engine is away")
    job.move(Event.ATTEMPT_FAILED)
    job.begin(second, deadline=5)
    record = job.record()
    assert record.state is State.MATCHED
    assert [(a.provider, a.state, a.reason) for a in record.attempts] == [
        (ANN.address, State.FAILED, "the engine is away"),
        (BOB.address, State.MATCHED, ""),
    ]
    assert record.last.order == second.order
    assert [attempt.provider for attempt in record.open_attempts()] == [BOB.address]
    known = record.attempt_of(ANN.address)
    assert known is not None
    assert known.order == first.order
    assert record.attempt_of(PAYER.address) is None


def test_a_hedged_job_is_decided_once() -> None:
    """A second attempt leaves the state and the current attempt alone; an outrun one is no rival, and not the last."""
    job, first, second = _begun()
    job.hedge(second, deadline=9)
    assert (job.state, job.provider, job.hedged, second.number) == (State.MATCHED, ANN.address, True, 1)
    assert list(job.rivals) == [first, second]
    assert job.leader is first
    first.mark_outrun(deadline=20)
    assert list(job.rivals) == [second]
    assert job.leader is second
    second.mark_outrun(deadline=20)
    first.close(State.COMPLETED)
    record = job.record()
    assert record.last.provider == ANN.address
    assert [(a.state, a.reason, a.outrun) for a in record.attempts] == [
        (State.COMPLETED, "", False),
        (State.CANCELLED, OUTRUN, True),
    ]


def test_a_job_moves_by_the_table_only() -> None:
    """A transition that the table does not have is a bug and raises."""
    job, _ = _make_job()
    with pytest.raises(IllegalTransition):
        job.move(Event.OUTPUT)


def test_a_link_frame_has_its_payload_behind_the_head() -> None:
    """The payload of a link frame follows its head."""
    assert link_payload(pack_link(Kind.CHUNK, JOB, b"payload")) == b"payload"
