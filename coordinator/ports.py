"""What the market needs of the world, as narrow protocols. Adapters implement them; `memory.py` holds their twins for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from coordinator.domain.reputation import ProviderRecord
from tallystick.protocol.eip712 import Signed, Verified
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.protocol.jobs import State
from tallystick.protocol.link import ClaimRequest, LateReceipt
from tallystick.protocol.messages import Order, Receipt, Terms
from tallystick.protocol.types import Address, Amount, JobId


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One provider's try at a job: what was ordered of it, how far it came, and why it ended if it failed.

    `delivered`: the last chunk of its answer was relayed. `cancelled`: its node was told that the client cancelled. `unseen`: no
    process of this coordinator saw its end, so the other two say nothing.
    """

    order: Signed[Order]
    terms: Terms
    state: State
    reason: str = ""
    delivered: bool = False
    cancelled: bool = False
    unseen: bool = False
    raw: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    """The candidate that it was read from, as JSON: what a store need not write again."""

    @property
    def provider(self) -> Address:
        """Whose try it was."""
        return self.order.message.provider


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as it is stored: where it stands, and its attempts so far, at least one and each with another provider."""

    job: JobId
    payer: Address
    state: State
    created_at: int
    finished_at: int | None
    attempts: tuple[AttemptRecord, ...]

    @property
    def last(self) -> AttemptRecord:
        """The attempt in force."""
        return self.attempts[-1]

    def attempt_of(self, provider: Address) -> AttemptRecord | None:
        """This provider's attempt, if it had one."""
        return next((attempt for attempt in self.attempts if attempt.provider == provider), None)


@dataclass(frozen=True, slots=True)
class KnownJob:
    """A job as the store knows it, with the receipts of its attempts by provider."""

    record: JobRecord
    receipts: Mapping[Address, Signed[Receipt]]

    @property
    def receipt(self) -> Signed[Receipt] | None:
        """The receipt of the attempt in force."""
        return self.receipts.get(self.record.last.provider)


@dataclass(frozen=True, slots=True)
class StoredState:
    """What a process starts from: jobs that must not be placed again, what each tab (payer, provider) came to, and what
    providers are known for.
    """

    jobs: tuple[JobId, ...]
    totals: Mapping[tuple[Address, Address], Amount]
    records: Mapping[Address, ProviderRecord] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Settlement:
    """What the chain settled for a tab, last."""

    payer: Address
    provider: Address
    settled: Amount
    tx: str
    block: int


@dataclass(frozen=True, slots=True)
class Backing:
    """What stands on chain for one payer with one provider, in base units. What is on its way out is in neither `free` nor
    `reserved`. `opened`: whether the payer has a purse at all.
    """

    free: Amount
    reserved: Amount
    settled: Amount
    opened: bool = True


Handler = Callable[[bytes], None]


def node_subject(provider: Address) -> str:
    """Where frames for a node go."""
    return f"node.{provider}"


def job_subject(job: JobId) -> str:
    """Where a node's frames for a job go."""
    return f"job.{job.hex()}"


class Bus(Protocol):
    """Frames on their way; see bus.py."""

    def attach(self, subject: str, handler: Handler) -> None:
        """Registers the subject's handler."""

    def detach(self, subject: str, handler: Handler) -> None:
        """Unregisters it."""

    def send(self, subject: str, frame: bytes) -> bool:
        """Delivers, or answers False where nobody listens."""
        ...


class JobStore(Protocol):
    """Where jobs and receipts are kept. What a coroutine returned from is durable. A terminal state is never replaced."""

    def enqueue_job(self, record: JobRecord) -> None:
        """Stores a job, or its newer state, before anything stored later. Raises Unavailable if it is too far behind."""

    async def put_receipt(self, job: JobId, receipt: Verified[Receipt], total: Amount, record: JobRecord | None = None) -> None:
        """Stores a receipt of a job, what its tab comes to, and the job's final state if given, together.

        The first receipt of an attempt stays, whatever comes later. Raises Unavailable.
        """

    async def job(self, job: JobId) -> KnownJob | None:
        """A job with all that was noted of it, if it is known. Raises Unavailable."""

    async def load_state(self, now: int, since: int) -> StoredState:
        """At the start of a process: ends jobs that a former one left open as failed, their last attempts as unseen, and gives
        back what must be remembered: the jobs created at or after `since`, the highest total of each tab, and the records of
        providers. Raises Unavailable.
        """
        ...

    def enqueue_provider_records(self, records: Mapping[Address, ProviderRecord]) -> None:
        """Stores what these providers are known for, instead of what was stored before. Raises Unavailable."""


class Funds(Protocol):
    """What the chain says of a payer, and of who stands behind an ask."""

    async def backing(self, payer: Address, provider: Address, *, fresh: bool = False) -> Backing:
        """Free balance, reservation and settled total, perhaps some seconds old unless `fresh` is asked for.

        Raises Unavailable if the chain does not answer, and either it never did or a fresh answer is wanted.
        """
        ...

    async def stake(self, provider: Address) -> Amount:
        """What a provider has staked and is not taking out, perhaps a minute old. Raises Unavailable if the chain is silent."""
        ...


WAITING_CLAIMS = 128
"""Claims of one provider that may wait at once."""


def too_many_claims(provider: Address) -> Unavailable:
    """Why a claim is not stored now."""
    text = f"{WAITING_CLAIMS} claims of {provider} wait already, which is all that one provider may have waiting"
    return Unavailable(Code.RATE_LIMITED, text, fault=Fault.PROVIDER)


@dataclass(frozen=True, slots=True)
class PendingClaim:
    """A claim that is stored and waits for the chain."""

    id: int
    request: ClaimRequest


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far the chain's events were read: `block` is the first that was not, `tip` the hash of the one before it."""

    block: int
    tip: str = ""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """All frames of an ended job, sealed as they came, for who posts the same bytes again. `fingerprint`: of those bytes."""

    job: JobId
    fingerprint: bytes
    frames: bytes
    ended_at: int
    payer: str = ""


class ResponseStore(Protocol):
    """Answers that outlive a process."""

    async def put_response(self, kept: StoredResponse, *, since: int, max_bytes: int) -> None:
        """Durable on return. Those that ended before `since` are forgotten; where all take more than `room` bytes, now or some
        answers later, the oldest of the payer whose answers take most. Raises Unavailable.
        """
        ...

    async def response(self, job: JobId, since: int) -> StoredResponse | None:
        """The answer of a job that ended at `since` or later. Raises Unavailable."""
        ...


class TabStore(Protocol):
    """What a provider or a payer may have lost."""

    async def last_receipts(self, provider: Address, after: str, limit: int) -> list[LateReceipt]:
        """The last receipt of each of a provider's tabs with payers after this one, in their order. Raises Unavailable."""
        ...

    async def receipts_of(self, payer: Address, provider: Address, limit: int) -> list[LateReceipt]:
        """The receipts of one tab, highest total first. Raises Unavailable."""
        ...


class ClaimStore(Protocol):
    """Where claims wait, and what came of them."""

    async def put_claim(self, request: ClaimRequest, now: int) -> None:
        """Stores a claim to be settled. One that was stored before is not stored twice, but waits again. Its provider's claims
        that were closed without a transaction are forgotten. Raises Unavailable where WAITING_CLAIMS of its provider wait.
        """

    async def pending_claims(self, limit: int, passing: Iterable[Address] = ()) -> list[PendingClaim]:
        """Claims that wait: the oldest of each provider, then the second of each, and so on; none of the providers in
        `passing`.
        """
        ...

    async def close_claims(self, ids: list[int], tx: str) -> None:
        """These were submitted in that transaction and are done with."""

    async def cursor(self) -> Cursor | None:
        """How far events were taken in, if any were."""
        ...

    async def put_settlements(self, settlements: list[Settlement], cursor: Cursor) -> None:
        """Stores what the chain settled, and how far its events were read, together. Repeating it changes nothing."""

    async def forget_settlements(self) -> None:
        """The chain took back what was final: no settlement is known, no event read, and claims that were sent wait again."""

    async def settlement(self, payer: Address, provider: Address) -> Settlement | None:
        """The latest settlement of a tab."""
        ...
