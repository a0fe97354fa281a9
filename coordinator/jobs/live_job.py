"""A live job: its state, its inbox, its attempts, and the time that its reader took. Only market and relay change its state."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from coordinator.domain.job_queue import QueuedJob
from coordinator.domain.packed_orders import OrderFacts, PackedOrders
from coordinator.domain.resource_bounds import INBOX_FRAMES
from coordinator.jobs.attempt import Attempt
from coordinator.jobs.job_trace import JobTrace
from coordinator.ports import FrameSink, JobRecord
from tallystick.protocol.errors import TallyError
from tallystick.protocol.jobs import TERMINAL, Event, State, step
from tallystick.protocol.sealing import is_last
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import LINK_HEAD, Candidate, Kind, Submission
from tallystick.runtime.lean_event import LeanEvent
from tallystick.runtime.lean_queue import LeanQueue

BeforeReceipt = Callable[[bytes], Awaitable[None]]
"""Takes the payload of the frame with the receipt."""


class InboxOverrun(Exception):
    """A node sent more frames than its credit allows; the hub closes its link."""


@dataclass(slots=True)
class LiveJob:
    """One job, from its order to its terminal state.

    Times are seconds of a monotonic clock, except `created_at` and `finished_at`, which are Unix seconds.
    """

    submission: Submission
    """What the client posted. While the job waits for a slot, its candidates are in `packed`. Once a chunk of its response went
    to the client, no other provider gets the job, so the request and the candidates are held no longer.
    """
    created_at: int
    started: float
    last_frame_at: float
    """When the client last got a chunk or a sign of life."""
    state: State = State.QUEUED
    attempt: Attempt | None = None
    """The attempt that the client knows as the current one."""
    attempts: list[Attempt] = field(default_factory=list)
    open_attempts: list[Attempt] = field(default_factory=list)
    """The attempts that hold a slot and exposure: at most two, and at most one that another one did not outrun has output."""
    finished_at: int | None = None
    cancelled: bool = False
    counted: bool = False
    """Whether it counts among the jobs that its payer runs."""
    reading_since: float | None = None
    """Since when the reader has had no room for the next frame. This is the reader's time, not the provider's."""
    reader_waits: float = 0.0
    """Seconds that the reader took before."""
    last_error: TallyError | None = None
    """Why the last attempt failed, or the job."""
    queued: QueuedJob | None = None
    """Its place in the queue, or the slot that it was granted."""
    served: QueuedJob | None = None
    """Its last place in the queue, to which it returns if an attempt fails: what it cost its payer's turn is counted once."""
    woken: LeanEvent = field(default_factory=LeanEvent)
    """Set when the job's wait for a slot ends or it is cancelled."""
    sink: FrameSink | None = field(default=None, repr=False)
    """Takes the job's frames: chunks at once while the job's task waits for a frame, all others from the task."""
    before_receipt: BeforeReceipt | None = field(default=None, repr=False)
    """What must be done before the receipt goes to the client."""
    frames: LeanQueue[tuple[Attempt, bytes]] | None = field(default=None, repr=False)
    """The inbox. A job that waits for its first slot has none, since there may be thousands of them."""

    packed: PackedOrders | None = field(default=None, repr=False)
    trace: JobTrace | None = field(default=None, repr=False)
    """Its spans, if this coordinator records them."""
    id: JobId = field(init=False)
    """The job's id."""
    payer: Address = field(init=False)
    """The payer that ordered the job."""
    model: str = field(init=False)

    def __post_init__(self) -> None:
        first = self.submission.candidates[0]
        self.id, self.payer, self.model = self.submission.job, first.order.message.payer, first.terms.model

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The candidates. Those of a job that waits are read anew each time, so `orders` is preferred where it says enough."""
        return self.submission.candidates if self.packed is None else self.packed.unpack()

    @property
    def orders(self) -> Sequence[OrderFacts]:
        """The facts of its orders."""
        return [*map(OrderFacts.of, self.submission.candidates)] if self.packed is None else [*self.packed.facts()]

    def replace_candidates(self, candidates: tuple[Candidate, ...]) -> None:
        """Replaces the candidates, which stay packed if they are."""
        if self.packed is None:
            self.submission = replace(self.submission, candidates=candidates)
        else:
            self.packed = PackedOrders(candidates)

    def pack(self) -> None:
        """Holds the submission in as little memory as can be, while the job waits."""
        if self.packed is None:
            self.packed, self.submission = PackedOrders(self.submission.candidates), self.submission.without_candidates()

    def unpack(self) -> None:
        """Holds the candidates at hand."""
        if self.packed is not None:
            self.submission, self.packed = replace(self.submission, candidates=self.packed.unpack()), None

    @property
    def tried(self) -> set[Address]:
        """The providers of its attempts."""
        return {attempt.provider for attempt in self.attempts}

    @property
    def inbox(self) -> LeanQueue[tuple[Attempt, bytes]]:
        """Frames, each with its attempt, of which an attempt may have INBOX_FRAMES."""
        if self.frames is None:
            self.frames = LeanQueue()
        return self.frames

    @property
    def current(self) -> Attempt:
        """The attempt that the client knows as the current one. Only a job that waits for its first slot has none."""
        if self.attempt is None:
            raise RuntimeError("the job was never matched")
        return self.attempt

    @property
    def provider(self) -> Address:
        """The provider of the current attempt."""
        return self.current.provider

    @property
    def rivals(self) -> Iterator[Attempt]:
        """The attempts under way that may still serve the job."""
        return (attempt for attempt in self.open_attempts if not attempt.outrun)

    @property
    def leader(self) -> Attempt:
        """The attempt that had output, or else the current one."""
        return self.current if not self.current.outrun else next(self.rivals)

    @property
    def undecided(self) -> bool:
        """Whether a provider has the job, and no output of it arrived yet."""
        return self.state in (State.MATCHED, State.RUNNING) and not any(attempt.output_seen for attempt in self.open_attempts)

    @property
    def hedged(self) -> bool:
        """Whether the job was given to a second provider beside the first."""
        return any(attempt.hedged for attempt in self.attempts)

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
        return self.state is State.STREAMING and len(self.inbox) > 1

    def reader_seconds(self, tick: float) -> float:
        """Returns how long the reader has kept the job waiting so far."""
        return self.reader_waits + (0.0 if self.reading_since is None else tick - self.reading_since)

    def due(self, attempt: Attempt, tick: float) -> float:
        """Returns a node's deadline, extended by the reader's time; a node that was told to stop gets no extension."""
        if self.reading_since is None or self.cancelled or attempt.outrun:
            return attempt.deadline
        return attempt.deadline + tick - self.reading_since

    def spent(self, tick: float) -> float:
        """Returns how long the job has taken so far, without its reader's time."""
        return tick - self.started - self.reader_seconds(tick)

    def note_chunk(self, attempt: Attempt, payload: bytes, tick: float, deadline: float) -> None:
        """Notes that a chunk of an attempt goes to the client. `deadline`: by when the next one must have arrived."""
        if self.state is not State.STREAMING:
            self.move(Event.OUTPUT)
            if self.attempt is attempt:  # its client knows the match
                attempt.match = b""
            self.submission = replace(self.submission, candidates=(), sealed=b"")
        if is_last(payload):
            attempt.mark_delivered()
        self.last_frame_at = tick
        if not self.cancelled:
            attempt.deadline = deadline

    def extend(self, attempt: Attempt, deadline: float) -> None:
        """Moves an attempt's deadline after a sign of life, unless its node was told to stop."""
        if not self.cancelled:
            attempt.deadline = deadline

    async def put(self, kind: Kind, payload: bytes, tick: Callable[[], float]) -> None:
        """Gives a frame to the reader, and waits until it has room for the next one."""
        if kind is Kind.RECEIPT and self.before_receipt is not None:
            await self.before_receipt(payload)
        if self.sink is not None and self.sink.put(kind, payload, more=self.more_frames_queued):
            self.reading_since = tick()
            await self.sink.wait()
            self._note_read(tick())

    def put_last(self, kind: Kind, payload: bytes) -> bool:
        """Gives the reader the frame that ends the job. Returns False if it must wait for the job's end: then `put` gives it."""
        return self.sink is not None and self.before_receipt is None and self.sink.put_last(kind, payload)

    def _note_read(self, tick: float) -> None:
        """Notes that the reader has room again."""
        if self.reading_since is None:
            return
        waited, self.reading_since = tick - self.reading_since, None
        self.reader_waits += waited
        if not self.cancelled:
            for attempt in self.open_attempts:
                if not attempt.outrun:
                    attempt.deadline += waited

    def move(self, event: Event) -> None:
        """Changes the state by the transition table. Raises IllegalTransition."""
        self.state = step(self.state, event)

    def deliver(self, attempt: Attempt, frame: bytes) -> bool:
        """Queues a link frame from the node of an attempt. Raises InboxOverrun if too many of its frames are unread.

        Returns True for the first output of an attempt that has not ended: from then on no other attempt begins.
        """
        if attempt.unread >= INBOX_FRAMES:
            raise InboxOverrun(f"job {self.id.hex()}: expected at most {INBOX_FRAMES} unread frames")
        self.post(attempt, frame)
        first = frame[0] == Kind.CHUNK and not attempt.output_seen
        attempt.output_seen = attempt.output_seen or first or frame[0] in (Kind.FAIL, Kind.RECEIPT)
        return first

    def interrupt(self, attempt: Attempt, frame: bytes) -> None:
        """Queues the frame that ends an attempt, even if its share of the inbox is full. Later ones say nothing new."""
        attempt.output_seen = True
        if not attempt.interrupted:
            attempt.interrupted = True
            self.post(attempt, frame)

    def post(self, attempt: Attempt, frame: bytes) -> None:
        """Queues a frame for an attempt."""
        attempt.unread += 1
        self.inbox.put_nowait((attempt, frame))

    async def next_frame(self) -> tuple[Attempt, bytes]:
        """Waits for a frame of an open attempt. Late frames of former attempts are not taken for a later one's."""
        inbox = self.inbox
        while True:
            attempt, frame = await inbox.get()
            attempt.unread -= 1
            if not attempt.released:
                return attempt, frame

    def begin(self, attempt: Attempt, deadline: float) -> None:
        """Begins an attempt after the former ones ended."""
        self.move(Event.MATCH)
        self.attempt = attempt
        self._add(attempt, deadline)

    def hedge(self, attempt: Attempt, deadline: float) -> None:
        """Begins a second attempt beside the current one."""
        self.move(Event.HEDGE)
        attempt.hedged = True
        self._add(attempt, deadline)

    def _add(self, attempt: Attempt, deadline: float) -> None:
        attempt.number, attempt.deadline = len(self.attempts), deadline
        self.attempts.append(attempt)
        self.open_attempts.append(attempt)

    def record(self) -> JobRecord:
        """Returns the job as it is stored."""
        return JobRecord(
            job=self.id,
            payer=self.payer,
            state=self.state,
            created_at=self.created_at,
            finished_at=self.finished_at,
            attempts=tuple(attempt.record for attempt in self.attempts),
        )


def link_payload(frame: bytes) -> bytes:
    """Returns the payload of a link frame."""
    return frame[LINK_HEAD:]
