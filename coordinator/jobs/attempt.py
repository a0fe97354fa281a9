"""An attempt at a job: what one provider was given, and what came of it. Only the relay changes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.domain.listed_ask import SlotGroup
from coordinator.jobs.match_log import MatchDraft
from coordinator.ports import AttemptRecord
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.jobs import State
from tallystick.protocol.messages import Order
from tallystick.protocol.types import Address
from tallystick.protocol.wire import Candidate

OUTRUN = "another provider that had the job too had output first"


@dataclass(slots=True, eq=False)
class Attempt:
    """The candidate, its verified order, and the slots of its node that it takes."""

    candidate: Candidate
    order: Verified[Order]
    slot_group: SlotGroup
    draft: MatchDraft | None = field(repr=False)
    """What the match log gets to know of the choice, until it does."""
    number: int = 0
    """Its number among the attempts of its job, from 0."""
    match: bytes = field(default=b"", repr=False)
    """The payload of the MATCH frame for the client; empty before the dispatch."""
    deadline: float = 0.0
    """Deadline of its current phase, on a monotonic clock."""
    overdue: bool = False
    """Whether its node was told that its deadline passed."""
    uncredited: int = 0
    """Chunks that were relayed since the node last got credit."""
    unread: int = 0
    """Its frames in the inbox of the job."""
    output_seen: bool = False
    """Whether output arrived, or no longer matters."""
    interrupted: bool = False
    """Whether a frame is queued that ends it."""
    reputation_counted: bool = False
    """Whether it was counted for its provider's reputation."""
    released: bool = False
    """Whether it holds no slot and no exposure any more."""
    sent_at: float = 0.0
    """When its node was sent the job, on a monotonic clock."""
    body_at: float = 0.0
    """When its second chunk arrived, the first one of the response's body."""
    last_at: float = 0.0
    """When its latest chunk arrived."""
    chunks: int = 0
    state: State = State.MATCHED
    reason: str = ""
    """Why it failed."""
    delivered: bool = False
    """Whether the last chunk of its response was relayed."""
    cancelled: bool = False
    """Whether its node was told that the client cancelled."""
    cut_off: bool = False
    """Whether this process ended its node's connection, so that nobody knows what the node had sent."""
    return_by: float | None = None
    """Until when the job waits for the rest of its answer, since its node's connection was lost; on a monotonic clock."""
    resuming: bool = False
    """Whether its node, back after that, was asked for the rest of its answer."""
    early_receipt: bytes = field(default=b"", repr=False)
    """A receipt that came before the rest of its answer, which it needs."""
    dismissed: bool = False
    """Whether its node was told to stop because this process stops."""
    hedged: bool = False
    """Whether it began beside another attempt."""
    outrun: bool = False
    """Whether the job goes on with another attempt beside this one, which must end without a charge."""
    provider: Address = field(init=False)
    """The provider that the order names."""

    def __post_init__(self) -> None:
        self.provider = self.order.message.provider

    @property
    def record(self) -> AttemptRecord:
        """The attempt as it is stored."""
        return AttemptRecord(
            self.order,
            self.candidate.terms,
            self.state,
            self.reason,
            delivered=self.delivered,
            cancelled=self.cancelled,
            unseen=self.cut_off and not self.delivered,
            hedged=self.hedged,
            outrun=self.outrun,
        )

    def chunk_arrived(self, tick: float) -> None:
        """Notes when a chunk of its response arrived."""
        self.chunks += 1
        self.last_at = tick
        self.return_by = None
        if self.chunks == 2:
            self.body_at = tick

    @property
    def awaits_rest(self) -> bool:
        """Whether the rest of its answer may still come, since its node's connection was lost."""
        return (self.return_by is not None or self.resuming) and not self.delivered

    def close(self, state: State, reason: str = "", *, outrun: bool = False) -> None:
        """Records how it ended. `outrun`: the job goes on with the attempt beside it."""
        self.state, self.reason, self.outrun = state, reason, outrun

    def mark_delivered(self) -> None:
        """Records that the last chunk of its response was relayed."""
        self.delivered = True

    def mark_cancelled(self) -> None:
        """Records that its node was told that the client cancelled."""
        self.cancelled = True

    def mark_outrun(self, deadline: float) -> None:
        """Records that another attempt had output first. Its node has until `deadline` to end it."""
        self.state, self.reason, self.outrun = State.CANCELLED, OUTRUN, True
        self.deadline, self.reputation_counted = deadline, True
