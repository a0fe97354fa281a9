"""Ports: the protocols through which the coordinator reaches its database, the chain and the nodes, and the records they carry.

`storage/memory.py` has in-memory implementations for tests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from coordinator.domain.reputation import ProviderRecord
from coordinator.domain.speeds import Key, SpeedRecord
from tallystick.protocol.eip712 import Signed, Verified
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.protocol.jobs import TERMINAL, State
from tallystick.protocol.link import ClaimRequest, LateReceipt
from tallystick.protocol.messages import LogHead, Order, Receipt, Terms
from tallystick.protocol.types import Address, Amount, JobId
from tallystick.protocol.wire import Kind


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One provider's attempt at a job: its order, its state, and the reason if it failed.

    `delivered`: the last chunk of the response was relayed. `cancelled`: the node was told that the client cancelled. `unseen`:
    no process of this coordinator saw the attempt's end, so `delivered` and `cancelled` are unknown. `hedged`: it began beside
    another attempt. `outrun`: the job was at two providers and went on with the other one.
    """

    order: Signed[Order]
    terms: Terms
    state: State
    reason: str = ""
    delivered: bool = False
    cancelled: bool = False
    unseen: bool = False
    hedged: bool = False
    outrun: bool = False

    @property
    def provider(self) -> Address:
        """The provider of the attempt."""
        return self.order.message.provider


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as it is stored: its state, and its attempts so far. There is at least one, and each has another provider."""

    job: JobId
    payer: Address
    state: State
    created_at: int
    finished_at: int | None
    attempts: tuple[AttemptRecord, ...]

    @property
    def last(self) -> AttemptRecord:
        """The attempt with which the job ended or goes on: the latest that no other one outran."""
        return next((attempt for attempt in reversed(self.attempts) if not attempt.outrun), self.attempts[-1])

    def open_attempts(self) -> tuple[AttemptRecord, ...]:
        """Returns the attempts that have not ended: at most two."""
        return tuple(attempt for attempt in self.attempts if attempt.state not in TERMINAL)

    def unseen_attempts(self) -> tuple[AttemptRecord, ...]:
        """Returns the attempts that were ended as failed since nobody saw their ends; none if the job's end is known."""
        return tuple(a for a in self.attempts if a.unseen and a.state is self.state is State.FAILED)

    def is_corrected_by(self, later: JobRecord | None) -> bool:
        """Whether a later record says how this job ended, which nobody saw: it ended otherwise than as failed."""
        ends = () if later is None else (later.attempt_of(attempt.provider) for attempt in self.unseen_attempts())
        return any(end is not None and end.state in TERMINAL - {State.FAILED} for end in ends)

    def attempt_of(self, provider: Address) -> AttemptRecord | None:
        """Returns this provider's attempt, or None."""
        return next((attempt for attempt in self.attempts if attempt.provider == provider), None)


@dataclass(frozen=True, slots=True)
class KnownJob:
    """A stored job, with the receipts of its attempts by provider."""

    record: JobRecord
    receipts: Mapping[Address, Signed[Receipt]]
    replica: str = ""
    """The other replica of this coordinator that runs the job, or ran it until now; empty if there is none."""

    @property
    def receipt(self) -> Signed[Receipt] | None:
        """The receipt of the latest attempt, or None."""
        return self.receipts.get(self.record.last.provider)


@dataclass(frozen=True, slots=True)
class StoredState:
    """What a process starts from: jobs that must not be placed again, the total of each tab (payer, provider), and the
    reputation records and speeds of providers. `follows`: whether other processes ran before, so that nodes may come back.
    """

    jobs: tuple[JobId, ...]
    totals: Mapping[tuple[Address, Address], Amount]
    records: Mapping[Address, ProviderRecord] = field(default_factory=dict)
    speeds: Mapping[Key, SpeedRecord] = field(default_factory=dict)
    follows: bool = False


@dataclass(frozen=True, slots=True)
class Settlement:
    """The latest settlement of a tab on chain."""

    payer: Address
    provider: Address
    settled: Amount
    tx: str
    block: int


@dataclass(frozen=True, slots=True)
class Backing:
    """A payer's funds on chain for one provider, in base units. Funds that are being withdrawn are in neither `free` nor
    `reserved`. `opened`: whether the payer has a purse at all.
    """

    free: Amount
    reserved: Amount
    settled: Amount
    opened: bool = True


Handler = Callable[[bytes], None]


class FrameSink(Protocol):
    """Takes the frames of a job on their way to its client."""

    def take_chunk(self, payload: bytes) -> bool:
        """Takes a chunk if that leaves room for another, so that nobody needs to wait. Returns whether it was taken."""
        ...

    def put(self, kind: Kind, payload: bytes, *, more: bool = False) -> bool:
        """Takes a frame. Returns whether the job must `wait` before the next one. `more`: the next frame is there already."""
        ...

    def put_last(self, kind: Kind, payload: bytes) -> bool:
        """Takes the last frame and ends, while the job goes on. Returns False if it cannot: then `put` it at the job's end."""
        ...

    async def wait(self) -> None:
        """Waits until there is room for another frame."""


def node_subject(provider: Address) -> str:
    """Returns the bus subject of frames for a node."""
    return f"node.{provider}"


class Bus(Protocol):
    """Delivers frames to nodes; see bus.py."""

    def attach(self, subject: str, handler: Handler) -> None:
        """Registers the handler of a subject."""

    def detach(self, subject: str, handler: Handler) -> None:
        """Unregisters the handler of a subject."""

    def send(self, subject: str, frame: bytes) -> bool:
        """Delivers a frame. Returns False if the subject has no handler."""
        ...


class JobStore(Protocol):
    """Stores jobs and receipts. Writes survive the process when their coroutine returns. A terminal state is never replaced."""

    def enqueue_job(self, record: JobRecord) -> None:
        """Queues a job, or its newer state. It is stored soon, and before any later write of the same job.

        Raises Unavailable if the queue is too long.
        """

    async def put_receipt(self, job: JobId, receipt: Verified[Receipt], total: Amount, record: JobRecord | None = None) -> None:
        """Stores a receipt, the total of its tab, and the job's final state if given, in one transaction.

        The first receipt of an attempt is never replaced; a final state only if `is_corrected_by`. Raises Unavailable, also
        if the job is not stored and none is given.
        """

    async def job(self, job: JobId) -> KnownJob | None:
        """Returns a job after all queued writes, or None. Raises Unavailable."""

    async def load_state(self, now: int, since: int) -> StoredState:
        """Loads what a process starts from: jobs created at or after `since`, the highest total of each tab, and reputation.

        Jobs that a former process left open are ended as failed at `now`, with their last attempts unseen. Raises Unavailable.
        """
        ...

    async def forget_jobs(self, before: int) -> bool:
        """Deletes some jobs that ended before `before`, with their receipts. Returns whether there may be more.

        Of each tab, the receipts with the highest seq and with the highest total are kept. Raises Unavailable.
        """
        ...

    def enqueue_provider_records(
        self, records: Mapping[Address, ProviderRecord], speeds: Mapping[Key, SpeedRecord] = MappingProxyType({})
    ) -> None:
        """Queues the reputation records of these providers, and these speeds, replacing earlier ones. Raises Unavailable."""


@dataclass(frozen=True, slots=True)
class LogRow:
    """One leaf of the match log, as it is stored. `hashes`: its hash and those of the complete subtrees that end with it, each of
    32 bytes, the smallest first. `leaf`: its contents; None once they were deleted. `at`: Unix seconds.
    """

    number: int
    at: int
    hashes: bytes
    leaf: bytes | None


@dataclass(frozen=True, slots=True)
class StoredLog:
    """What a process's match log starts from: the number of leaves, the time of the last one, and the newest head."""

    size: int
    last_at: int
    head: Signed[LogHead] | None


class LogStore(Protocol):
    """Stores the match log. It has no gap, and at most one head of each size."""

    def enqueue_leaves(self, rows: Sequence[LogRow]) -> asyncio.Future[None]:
        """Queues leaves that follow the stored ones; the future is done when they are committed.

        Those that are stored already are skipped. Raises Unavailable.
        """
        ...

    async def put_head(self, head: Signed[LogHead]) -> None:
        """Stores a head of more leaves than all earlier ones. It and its leaves are synced on return. Raises Unavailable."""

    def enqueue_decisions(self, count: int, doc: bytes) -> None:
        """Queues a batch of decisions, `count` of them, and deletes batches that are older than the last MAX_DECISIONS.

        Raises Unavailable.
        """

    async def decisions(self) -> list[bytes]:
        """Returns the batches of decisions, oldest first. Raises Unavailable."""
        ...

    async def load_log(self) -> StoredLog:
        """Raises Unavailable."""
        ...

    async def log_rows(self, numbers: Sequence[int]) -> list[LogRow]:
        """Returns the leaves with these numbers. Raises Unavailable."""
        ...

    async def log_entries(self, start: int, end: int) -> list[LogRow]:
        """Returns the leaves from `start` to before `end`. Raises Unavailable."""
        ...

    async def log_hashes(self, start: int, end: int) -> list[bytes]:
        """Returns the hashes of the leaves from `start` to before `end`. Raises Unavailable."""
        ...

    async def forget_leaves(self, before: int) -> bool:
        """Deletes the contents of some leaves that are older than `before`. Returns whether there may be more.

        Raises Unavailable.
        """
        ...


class Funds(Protocol):
    """Funds of payers and stakes of providers on chain."""

    async def backing(self, payer: Address, provider: Address, *, fresh: bool = False) -> Backing:
        """Returns free balance, reservation and settled total. They may be some seconds old unless `fresh`.

        Raises Unavailable if the chain does not answer, and there is no earlier answer or `fresh` is set.
        """
        ...

    async def stake(self, provider: Address) -> Amount:
        """Returns a provider's stake that is not being withdrawn, up to a minute old. Raises Unavailable."""
        ...


WAITING_CLAIMS = 128
"""Claims of one provider that may be pending."""


def too_many_claims(provider: Address) -> Unavailable:
    """Returns the error for a provider that has WAITING_CLAIMS pending claims."""
    text = f"{WAITING_CLAIMS} claims of {provider} are pending, the maximum; send more after some were settled"
    return Unavailable(Code.RATE_LIMITED, text, fault=Fault.PROVIDER)


@dataclass(frozen=True, slots=True)
class PendingClaim:
    """A stored claim that is not settled yet."""

    id: int
    request: ClaimRequest


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far the chain's events were read: `block` is the first unread block, `tip` the hash of the block before it."""

    block: int
    tip: str = ""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """The sealed frames of an ended job, for a client that posts the same bytes again. `fingerprint`: of those bytes."""

    job: JobId
    fingerprint: bytes
    frames: bytes
    ended_at: int
    payer: str = ""


class ResponseStore(Protocol):
    """Stores responses beyond the process."""

    async def put_response(self, stored: StoredResponse, *, since: int, max_bytes: int) -> None:
        """Stores a response, which survives the process on return, and deletes those that ended before `since`.

        If all responses take more than `max_bytes`, now or some responses later, the oldest ones of the payer that holds most
        are deleted. Raises Unavailable.
        """
        ...

    async def response(self, job: JobId, since: int) -> StoredResponse | None:
        """Returns the response of a job that ended at `since` or later, or None. Raises Unavailable."""
        ...


class TabStore(Protocol):
    """Receipts of tabs, for a provider or a payer that lost its state."""

    async def last_receipts(self, provider: Address, after: str, limit: int) -> list[LateReceipt]:
        """Returns the last receipt of each of a provider's tabs, by payer, for payers after `after`. Raises Unavailable."""
        ...

    async def receipts_of(self, payer: Address, provider: Address, limit: int) -> list[LateReceipt]:
        """Returns the receipts of one tab, highest total first. Raises Unavailable."""
        ...


class ClaimStore(Protocol):
    """Stores pending claims and settlements."""

    async def put_claim(self, request: ClaimRequest, now: int) -> None:
        """Stores a pending claim. A claim that was stored before becomes pending again.

        Claims of the same provider that were closed without a transaction are deleted. Raises Unavailable if WAITING_CLAIMS
        claims of the provider are pending.
        """

    async def pending_claims(self, limit: int, skipped: Iterable[Address] = ()) -> list[PendingClaim]:
        """Returns pending claims: the oldest of each provider, then the second of each, and so on. Skips the providers in
        `skipped`.
        """
        ...

    async def close_claims(self, ids: list[int], tx: str) -> None:
        """Closes claims: `tx` is the transaction that settled them, or the reason why none did."""

    async def cursor(self) -> Cursor | None:
        """Returns how far events were read, or None if none were."""
        ...

    async def put_settlements(self, settlements: list[Settlement], cursor: Cursor) -> None:
        """Stores settlements and the cursor in one transaction. Idempotent."""

    async def forget_settlements(self) -> None:
        """Deletes settlements and cursor after a deep reorganisation; claims that were sent become pending again."""

    async def settlement(self, payer: Address, provider: Address) -> Settlement | None:
        """Returns the latest settlement of a tab, or None."""
        ...
