"""What the market needs of the world, as narrow protocols. Adapters implement them; `memory.py` holds their twins for tests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from coordinator.bus import Handler
from tallystick.protocol.eip712 import Signed, Verified
from tallystick.protocol.jobs import State
from tallystick.protocol.messages import Order, Receipt, Terms
from tallystick.protocol.types import Address, Amount, JobId
from tallystick.protocol.wire import ClaimRequest


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One provider's try at a job, for the record."""

    attempt: int
    provider: Address
    state: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as it is stored: the order in force (the last one matched), its terms and where the job stands."""

    job: JobId
    payer: Address
    order: Signed[Order]
    terms: Terms
    state: State
    created_at: int
    finished_at: int | None
    attempts: tuple[AttemptRecord, ...]


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
    """What stands on chain for one payer with one provider, in base units."""

    free: Amount
    reserved: Amount
    settled: Amount


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
    """Where jobs and receipts are kept. What a coroutine returned from is durable."""

    def note_job(self, record: JobRecord) -> None:
        """Stores a job, or its newer state, before anything stored later. Raises Unavailable if it is too far behind."""

    async def put_receipt(self, record: JobRecord, receipt: Verified[Receipt]) -> None:
        """Stores a receipt together with the final state of its job."""

    async def job(self, job: JobId) -> tuple[JobRecord, Signed[Receipt] | None] | None:
        """A job and its receipt, if known."""

    async def recent(self, since: int) -> Iterable[JobId]:
        """Jobs created at or after a Unix time: the replay guard's memory."""
        ...

    async def totals(self) -> Iterable[tuple[Address, Address, Amount]]:
        """Payer, provider and the highest total of their receipts."""
        ...


class Funds(Protocol):
    """What the chain says of a payer."""

    async def backing(self, payer: Address, provider: Address, *, fresh: bool = False) -> Backing:
        """Free balance, reservation and settled total, perhaps some seconds old unless `fresh` is asked for.

        Raises Unavailable if it was never read and cannot be now.
        """
        ...


@dataclass(frozen=True, slots=True)
class PendingClaim:
    """A claim that is stored and waits for the chain."""

    id: int
    request: ClaimRequest


class ClaimStore(Protocol):
    """Where claims wait, and what came of them."""

    async def put_claim(self, request: ClaimRequest, now: int) -> None:
        """Stores a claim to be settled."""

    async def pending_claims(self, limit: int) -> list[PendingClaim]:
        """The oldest claims that wait."""
        ...

    async def close_claims(self, ids: list[int], tx: str) -> None:
        """These were submitted in that transaction and are done with."""

    async def cursor(self) -> int | None:
        """The first block whose events were not taken in yet, if any was."""
        ...

    async def put_settlements(self, settlements: list[Settlement], cursor: int) -> None:
        """Stores what the chain settled, and how far its events were read, together. Repeating it changes nothing."""

    async def settlement(self, payer: Address, provider: Address) -> Settlement | None:
        """The latest settlement of a tab."""
        ...
