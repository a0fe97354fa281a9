"""A job while it lives: its state, its inbox and what it has cost the reader so far. Only the market moves it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from coordinator.ports import AttemptRecord, JobRecord
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


@dataclass(slots=True)
class LiveJob:
    """One job, from its order to its terminal state. Times are seconds of a monotonic clock unless named `_at`."""

    submission: Submission
    created_at: int
    started: float
    heard: float
    state: State = State.QUEUED
    matched: tuple[Candidate, Verified[Order]] | None = None
    tried: set[Address] = field(default_factory=set)
    attempts: list[AttemptRecord] = field(default_factory=list)
    finished_at: int | None = None
    unread: int = 0
    deadline: float = 0.0
    cancelled: bool = False
    last_error: TallyError | None = None
    inbox: asyncio.Queue[bytes] = field(default_factory=lambda: asyncio.Queue(INBOX))

    @property
    def id(self) -> JobId:
        """The job's id."""
        return self.submission.job

    @property
    def payer(self) -> Address:
        """Who ordered it."""
        return self.submission.candidates[0].order.message.payer

    @property
    def current(self) -> Candidate:
        """The candidate of the latest attempt; the first one before there is any."""
        return self.matched[0] if self.matched else self.submission.candidates[0]

    @property
    def order(self) -> Verified[Order]:
        """The order of the latest attempt. An admitted job always has one."""
        if self.matched is None:
            raise RuntimeError("the job was never matched")
        return self.matched[1]

    @property
    def provider(self) -> Address:
        """The provider of the latest attempt."""
        return self.current.order.message.provider

    @property
    def ended(self) -> bool:
        """Whether the state is terminal."""
        return self.state in TERMINAL

    def move(self, event: Event) -> None:
        """Follows the transition table. Raises IllegalTransition."""
        self.state = step(self.state, event)

    def deliver(self, frame: bytes) -> None:
        """Takes a link frame from the node that has the job. Raises InboxOverrun rather than wait."""
        try:
            self.inbox.put_nowait(frame)
        except asyncio.QueueFull:
            raise InboxOverrun(f"job {self.id.hex()}: more than {INBOX} frames unread") from None

    def begin(self, candidate: Candidate, order: Verified[Order]) -> None:
        """A new attempt, with an inbox of its own: late frames of a former attempt are not this one's."""
        self.matched = (candidate, order)
        self.tried.add(self.provider)
        self.inbox = asyncio.Queue(INBOX)
        self.unread = 0
        self.attempts.append(AttemptRecord(len(self.attempts), self.provider, State.MATCHED.value))
        self.move(Event.MATCH)

    def close_attempt(self, state: str, reason: str = "") -> None:
        """Notes how the current attempt ended."""
        last = self.attempts[-1]
        self.attempts[-1] = AttemptRecord(last.attempt, last.provider, state, reason)

    def record(self) -> JobRecord:
        """The job as it is stored."""
        return JobRecord(
            job=self.id,
            payer=self.payer,
            order=self.current.order,
            terms=self.current.terms,
            state=self.state,
            created_at=self.created_at,
            finished_at=self.finished_at,
            attempts=tuple(self.attempts),
        )


def link_payload(frame: bytes) -> bytes:
    """The payload of a link frame."""
    return frame[LINK_HEAD:]
