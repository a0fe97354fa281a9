"""A job while it lives: its state, its inbox and what it has cost the reader so far. Only the market moves it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from coordinator.book import Node
from coordinator.ports import AttemptRecord, JobRecord, job_subject
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import TallyError
from tallystick.protocol.jobs import TERMINAL, Event, State, step
from tallystick.protocol.messages import Order
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import INITIAL_CREDIT, LINK_HEAD, Candidate, Submission

INBOX = INITIAL_CREDIT + 16
"""Frames that may wait for a job: a node's whole credit, and the few frames that need none."""


class InboxOverrun(Exception):
    """A node sent more than its credit; the hub closes its link."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What a provider was given: the candidate, its order as it was checked, and the node as it was connected then."""

    candidate: Candidate
    order: Verified[Order]
    node: Node


@dataclass(slots=True)
class LiveJob:
    """One job, from its order to its terminal state. Times are seconds of a monotonic clock unless named `_at`.

    `deadline` is that of the current phase; `overdue`: the market has told the attempt that it passed.
    """

    submission: Submission
    created_at: int
    started: float
    heard: float
    state: State = State.QUEUED
    attempt: Attempt | None = None
    tried: set[Address] = field(default_factory=set)
    attempts: list[AttemptRecord] = field(default_factory=list)
    finished_at: int | None = None
    unread: int = 0
    deadline: float = 0.0
    overdue: bool = False
    cancelled: bool = False
    last_error: TallyError | None = None
    inbox: asyncio.Queue[bytes] = field(default_factory=lambda: asyncio.Queue(INBOX))
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
    def more_waits(self) -> bool:
        """Whether chunks are there to follow the one in hand at once. One frame alone may be a receipt, which takes a while."""
        return self.state is State.STREAMING and self.inbox.qsize() > 1

    def move(self, event: Event) -> None:
        """Follows the transition table. Raises IllegalTransition."""
        self.state = step(self.state, event)

    def deliver(self, frame: bytes) -> None:
        """Takes a link frame from the node that has the job. Raises InboxOverrun rather than wait."""
        try:
            self.inbox.put_nowait(frame)
        except asyncio.QueueFull:
            raise InboxOverrun(f"job {self.id.hex()}: more than {INBOX} frames unread") from None

    def interrupt(self, frame: bytes) -> None:
        """Delivers what must not be lost: where the inbox is full, it takes the place of all that waits there."""
        if self.inbox.full():
            self.inbox = asyncio.Queue(INBOX)
        self.inbox.put_nowait(frame)

    def begin(self, attempt: Attempt, deadline: float) -> None:
        """A new attempt, with an inbox of its own: late frames of a former attempt are not this one's."""
        self.attempt, self.deadline, self.overdue, self.unread = attempt, deadline, False, 0
        self.tried.add(self.provider)
        self.inbox = asyncio.Queue(INBOX)
        candidate = attempt.candidate
        self.attempts.append(AttemptRecord(attempt.order, candidate.terms, State.MATCHED, raw=candidate.raw))
        self.move(Event.MATCH)

    def close_attempt(self, state: State, reason: str = "") -> None:
        """Notes how the current attempt ended."""
        self.attempts[-1] = replace(self.attempts[-1], state=state, reason=reason)

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
