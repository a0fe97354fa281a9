"""A live job: its state, its inbox, its attempts, and the time that its reader took. Only the market changes its state."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from coordinator.domain.job_queue import QueuedJob
from coordinator.domain.resource_bounds import INBOX_FRAMES
from coordinator.domain.slot_groups import SlotGroup
from coordinator.ports import AttemptRecord, JobRecord, job_subject
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import TallyError
from tallystick.protocol.jobs import TERMINAL, Event, State, step
from tallystick.protocol.messages import Order
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import LINK_HEAD, Candidate, Kind, Submission


class InboxOverrun(Exception):
    """A node sent more frames than its credit allows; the hub closes its link."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What a provider was given: the candidate, its verified order, and the slots of its node that it takes."""

    candidate: Candidate
    order: Verified[Order]
    slot_group: SlotGroup


@dataclass(slots=True)
class LiveJob:
    """One job, from its order to its terminal state.

    Times are seconds of a monotonic clock, except `created_at` and `finished_at`, which are Unix seconds.
    """

    submission: Submission
    created_at: int
    started: float
    last_frame_at: float
    """When the client last got a chunk or a sign of life."""
    state: State = State.QUEUED
    attempt: Attempt | None = None
    tried: set[Address] = field(default_factory=set)
    attempts: list[AttemptRecord] = field(default_factory=list)
    finished_at: int | None = None
    uncredited: int = 0
    """Chunks that were relayed since the node last got credit."""
    deadline: float = 0.0
    """Deadline of the current phase."""
    overdue: bool = False
    """Whether the market told the attempt that its deadline passed."""
    cancelled: bool = False
    reputation_counted: bool = False
    """Whether the current attempt was counted for its provider's reputation."""
    output_seen: bool = False
    """Whether output of the current attempt arrived, or no longer matters."""
    reading_since: float | None = None
    """Since when the reader has had a frame without asking for the next one. This is the reader's time, not the provider's."""
    reader_waits: float = 0.0
    """Seconds that the reader took before."""
    last_error: TallyError | None = None
    queued: QueuedJob | None = None
    """Its place in the queue, or the slot that it was granted."""
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the job's wait for a slot ends or it is cancelled."""
    inbox: asyncio.Queue[bytes] = field(default_factory=lambda: asyncio.Queue(INBOX_FRAMES))
    subject: str = field(init=False)
    """The bus subject of the job's frames."""

    def __post_init__(self) -> None:
        self.subject = job_subject(self.id)

    @property
    def id(self) -> JobId:
        """The job's id."""
        return self.submission.job

    @property
    def payer(self) -> Address:
        """The payer that ordered the job."""
        return self.submission.candidates[0].order.message.payer

    @property
    def current(self) -> Attempt:
        """The latest attempt. Only a job that waits for its first slot has none."""
        if self.attempt is None:
            raise RuntimeError("the job was never matched")
        return self.attempt

    @property
    def provider(self) -> Address:
        """The provider of the latest attempt."""
        return self.current.order.message.provider

    @property
    def ended(self) -> bool:
        """Whether the state is terminal."""
        return self.state in TERMINAL

    @property
    def at_node(self) -> bool:
        """Whether a provider has the job now."""
        return self.state in (State.MATCHED, State.RUNNING, State.STREAMING)

    @property
    def more_frames_queued(self) -> bool:
        """Whether more chunks can be relayed at once. A single queued frame may be a receipt, which takes a while to store."""
        return self.state is State.STREAMING and self.inbox.qsize() > 1

    @property
    def delivered(self) -> bool:
        """Whether the last chunk of the current attempt's response was relayed."""
        return self.attempts[-1].delivered

    def reader_seconds(self, tick: float) -> float:
        """Returns how long the reader has kept the job waiting so far."""
        return self.reader_waits + (0.0 if self.reading_since is None else tick - self.reading_since)

    def due(self, tick: float) -> float:
        """Returns the node's deadline, extended by the reader's time; a node that was told to stop gets no extension."""
        if self.reading_since is None or self.cancelled:
            return self.deadline
        return self.deadline + tick - self.reading_since

    def spent(self, tick: float) -> float:
        """Returns how long the job has taken so far, without its reader's time."""
        return tick - self.started - self.reader_seconds(tick)

    def extend(self, deadline: float) -> None:
        """Moves the deadline after a sign of life, unless the node was told to stop."""
        if not self.cancelled:
            self.deadline = deadline

    def frame_taken(self, tick: float) -> None:
        """Notes that the reader took its frame and asks for the next one."""
        self.deadline, self.reader_waits, self.reading_since = self.due(tick), self.reader_seconds(tick), None

    def move(self, event: Event) -> None:
        """Changes the state by the transition table. Raises IllegalTransition."""
        self.state = step(self.state, event)

    def deliver(self, frame: bytes) -> bool:
        """Queues a link frame from the node that has the job. Raises InboxOverrun if the inbox is full.

        Returns True for the first output of an attempt that was not interrupted: from then on no other attempt begins.
        """
        try:
            self.inbox.put_nowait(frame)
        except asyncio.QueueFull:
            raise InboxOverrun(f"job {self.id.hex()}: expected at most {INBOX_FRAMES} unread frames") from None
        first = frame[0] == Kind.CHUNK and not self.output_seen
        self.output_seen = self.output_seen or first
        return first

    def interrupt(self, frame: bytes) -> None:
        """Queues a frame that must not be lost. If the inbox is full, the frame replaces everything in it."""
        self.output_seen = True
        if self.inbox.full():
            self.inbox = asyncio.Queue(INBOX_FRAMES)
        self.inbox.put_nowait(frame)

    def begin(self, attempt: Attempt, deadline: float) -> None:
        """Begins an attempt with an empty inbox, so late frames of a former attempt are not taken for this one's."""
        self.attempt, self.deadline, self.uncredited = attempt, deadline, 0
        self.overdue = self.reputation_counted = self.output_seen = False
        self.tried.add(self.provider)
        self.inbox = asyncio.Queue(INBOX_FRAMES)
        candidate = attempt.candidate
        self.attempts.append(AttemptRecord(attempt.order, candidate.terms, State.MATCHED, raw=candidate.raw))
        self.move(Event.MATCH)

    def close_attempt(self, state: State, reason: str = "") -> None:
        """Records how the current attempt ended."""
        self.attempts[-1] = replace(self.attempts[-1], state=state, reason=reason)

    def mark_delivered(self) -> None:
        """Records that the last chunk of the current attempt's response was relayed."""
        self.attempts[-1] = replace(self.attempts[-1], delivered=True)

    def mark_cancelled(self) -> None:
        """Records that the current attempt's node was told that the client cancelled."""
        self.attempts[-1] = replace(self.attempts[-1], cancelled=True)

    def record(self) -> JobRecord:
        """Returns the job as it is stored."""
        return JobRecord(
            job=self.id,
            payer=self.payer,
            state=self.state,
            created_at=self.created_at,
            finished_at=self.finished_at,
            attempts=tuple(self.attempts),
        )


def link_payload(frame: bytes) -> bytes:
    """Returns the payload of a link frame."""
    return frame[LINK_HEAD:]
