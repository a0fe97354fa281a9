"""A job while it lives: its state, its inbox and what it has cost the reader so far. Only the market moves it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from coordinator.domain.ask_book import ConnectedNode
from coordinator.domain.resource_bounds import INBOX_FRAMES
from coordinator.ports import AttemptRecord, JobRecord, job_subject
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import TallyError
from tallystick.protocol.jobs import TERMINAL, Event, State, step
from tallystick.protocol.messages import Order
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import LINK_HEAD, Candidate, Kind, Submission


class InboxOverrun(Exception):
    """A node sent more than its credit; the hub closes its link."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What a provider was given: the candidate, its order as it was checked, and the node as it was connected then."""

    candidate: Candidate
    order: Verified[Order]
    node: ConnectedNode


@dataclass(slots=True)
class LiveJob:
    """One job, from its order to its terminal state. Times are seconds of a monotonic clock unless named `_at`.

    `deadline` is that of the current phase; `overdue`: the market has told the attempt that it passed; `blamed`: the attempt was
    held against its provider; `answered`: output of the attempt came, or none counts any more. `reading`: since when its reader
    has had a frame and not asked for more; `waited`: the seconds for which it did so before. That is the reader's time, and never
    the provider's.
    """

    submission: Submission
    created_at: int
    started: float
    last_frame_at: float
    state: State = State.QUEUED
    attempt: Attempt | None = None
    tried: set[Address] = field(default_factory=set)
    attempts: list[AttemptRecord] = field(default_factory=list)
    finished_at: int | None = None
    unread: int = 0
    deadline: float = 0.0
    overdue: bool = False
    cancelled: bool = False
    reputation_counted: bool = False
    output_seen: bool = False
    reading: float | None = None
    waited: float = 0.0
    last_error: TallyError | None = None
    inbox: asyncio.Queue[bytes] = field(default_factory=lambda: asyncio.Queue(INBOX_FRAMES))
    subject: str = field(init=False)
    """Where its frames go."""

    def __post_init__(self) -> None:
        self.subject = job_subject(self.id)

    @property
    def id(self) -> JobId:
        """The job's id."""
        return self.submission.job

    @property
    def payer(self) -> Address:
        """Who ordered it."""
        return self.submission.candidates[0].order.message.payer

    @property
    def current(self) -> Attempt:
        """The latest attempt. An admitted job always has one."""
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
        """Whether a provider has it now."""
        return self.state in (State.MATCHED, State.RUNNING, State.STREAMING)

    @property
    def more_frames_queued(self) -> bool:
        """Whether chunks are there to follow the one in hand at once. One frame alone may be a receipt, which takes a while."""
        return self.state is State.STREAMING and self.inbox.qsize() > 1

    @property
    def delivered(self) -> bool:
        """Whether the last chunk of the current attempt's answer was relayed."""
        return self.attempts[-1].delivered

    def reader_seconds(self, tick: float) -> float:
        """How long its reader has kept it waiting so far."""
        return self.waited + (0.0 if self.reading is None else tick - self.reading)

    def due(self, tick: float) -> float:
        """When its node is late, as far as is known now. A node that was told to stop is not waiting for the reader."""
        return self.deadline if self.reading is None or self.cancelled else self.deadline + tick - self.reading

    def spent(self, tick: float) -> float:
        """How long it has taken so far, without its reader's time."""
        return tick - self.started - self.reader_seconds(tick)

    def extend(self, deadline: float) -> None:
        """A sign of life moves the deadline, but not that of a node that was told to stop."""
        if not self.cancelled:
            self.deadline = deadline

    def was_read(self, tick: float) -> None:
        """Its reader asks for more."""
        self.deadline, self.waited, self.reading = self.due(tick), self.reader_seconds(tick), None

    def move(self, event: Event) -> None:
        """Follows the transition table. Raises IllegalTransition."""
        self.state = step(self.state, event)

    def deliver(self, frame: bytes) -> bool:
        """Takes a link frame from the node that has the job. True for the first output of an attempt that nothing interrupted:
        whatever comes after it, no other attempt begins. Raises InboxOverrun rather than wait.
        """
        try:
            self.inbox.put_nowait(frame)
        except asyncio.QueueFull:
            raise InboxOverrun(f"job {self.id.hex()}: more than {INBOX_FRAMES} frames unread") from None
        first = frame[0] == Kind.CHUNK and not self.output_seen
        self.output_seen = self.output_seen or first
        return first

    def interrupt(self, frame: bytes) -> None:
        """Delivers what must not be lost: where the inbox is full, it takes the place of all that waits there."""
        self.output_seen = True
        if self.inbox.full():
            self.inbox = asyncio.Queue(INBOX_FRAMES)
        self.inbox.put_nowait(frame)

    def begin(self, attempt: Attempt, deadline: float) -> None:
        """A new attempt, with an inbox of its own: late frames of a former attempt are not this one's."""
        self.attempt, self.deadline, self.unread = attempt, deadline, 0
        self.overdue = self.reputation_counted = self.output_seen = False
        self.tried.add(self.provider)
        self.inbox = asyncio.Queue(INBOX_FRAMES)
        candidate = attempt.candidate
        self.attempts.append(AttemptRecord(attempt.order, candidate.terms, State.MATCHED, raw=candidate.raw))
        self.move(Event.MATCH)

    def close_attempt(self, state: State, reason: str = "") -> None:
        """Notes how the current attempt ended."""
        self.attempts[-1] = replace(self.attempts[-1], state=state, reason=reason)

    def mark_delivered(self) -> None:
        """Notes that the last chunk of the current attempt's answer was relayed."""
        self.attempts[-1] = replace(self.attempts[-1], delivered=True)

    def mark_cancelled(self) -> None:
        """Notes that the current attempt's node was told that the client cancelled."""
        self.attempts[-1] = replace(self.attempts[-1], cancelled=True)

    def record(self) -> JobRecord:
        """The job as it is stored."""
        return JobRecord(
            job=self.id,
            payer=self.payer,
            state=self.state,
            created_at=self.created_at,
            finished_at=self.finished_at,
            attempts=tuple(self.attempts),
        )


def link_payload(frame: bytes) -> bytes:
    """The payload of a link frame."""
    return frame[LINK_HEAD:]
