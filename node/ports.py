"""What the core asks of the world: an engine, a store, a link, the chain.

Narrow, each with a twin in memory (`node.testing.memory`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from node.domain.order_admission import Admitted, Matched
from node.domain.requests import EngineRequest
from node.domain.tabs import Funds, StoredTab
from node.domain.upstream_models import UpstreamModel
from tallystick.protocol.eip712 import Signed, Verified
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Claim, Order, Outcome, Receipt
from tallystick.protocol.openai_wire import ReportedUsage
from tallystick.protocol.types import Address, Amount, Hash, JobId
from tallystick.protocol.wire import Kind

# Engine

CROWDED_KV = 0.95


@dataclass(frozen=True, slots=True)
class ResponseStart:
    """The engine took the request: its status and content type. A status from 400 is a deterministic no, meant for the client."""

    status: int
    content_type: str


@dataclass(frozen=True, slots=True)
class ResponsePart:
    """Some bytes of the answer's body. `output`: a user would see something of it; `text`: bytes of generated text in it."""

    data: bytes
    has_output: bool
    text_bytes: int = 0
    usage: ReportedUsage | None = None


@dataclass(frozen=True, slots=True)
class ResponseEnd:
    """The answer ended by itself. `tail`: its last bytes; `truncated`: it ended at the output limit."""

    tail: bytes = b""
    text_bytes: int = 0
    usage: ReportedUsage | None = None
    truncated: bool = False


EngineEvent = ResponseStart | ResponsePart | ResponseEnd


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine says of itself: requests that wait in it, and the share of its KV cache that is used, where it tells."""

    waiting: int
    kv_used: float | None = None

    @property
    def has_queue(self) -> bool:
        """Whether one more request would wait."""
        return self.waiting > 0 or (self.kv_used is not None and self.kv_used >= CROWDED_KV)


class Engine(Protocol):
    """One endpoint that answers requests."""

    def answer(self, call: EngineRequest) -> AsyncGenerator[EngineEvent, None]:
        """A Head, any number of Pieces, one End. Raises Unavailable (node_busy: try elsewhere now; engine_unavailable: it is
        down or its answer is broken). Closing the generator stops the engine at once.
        """
        ...

    async def models(self) -> tuple[UpstreamModel, ...]:
        """The models that it serves now; its health check. Raises Unavailable."""
        ...

    async def load(self) -> EngineLoad | None:
        """What it says of its own queue; None where it says nothing. Never raises."""
        ...


# Store


@dataclass(frozen=True, slots=True)
class ReceiptRecord:
    """What is stored when a job ends with a receipt, or when an order is refused with one."""

    matched: Matched
    receipt: Verified[Receipt]


@dataclass(frozen=True, slots=True)
class UnacknowledgedReceipt:
    """A receipt that its coordinator has not confirmed, and what it is for."""

    job: JobId
    late_receipt: LateReceipt


@dataclass(frozen=True, slots=True)
class ClaimableTab:
    """A tab on which the chain owes: its last receipt, the best order to claim on, and since when what is uncollected waits.

    `claimed_at` and `claimed` tell of the last claim that was handed in; times are Unix seconds.
    """

    payer: Address
    seq: int
    cumulative: Amount
    settled: Amount
    reserved: Amount
    order: Verified[Order]
    since: int
    claimed_at: int
    claimed: Amount

    @property
    def due(self) -> int:
        """What a claim would bring now, in base units."""
        return min(self.cumulative, self.order.message.ceiling) - self.settled


class JobStore(Protocol):
    """What the runner needs to remember."""

    async def begin(self, admitted: Admitted, at: int) -> None:
        """The order was taken: durable before the first output byte leaves, so that a restart never runs it again."""
        ...

    async def record_receipt(self, booking: ReceiptRecord) -> None:
        """Receipt, job and tab, in one transaction, durable on return. Raises Unavailable, with nothing written."""
        ...

    async def record_refusal(self, booking: ReceiptRecord) -> None:
        """Order, receipt, job and tab of an order that was refused, as `book`. No claim ever rests on such an order."""
        ...


@dataclass(frozen=True, slots=True)
class CoordinatorHour:
    """What the jobs of the coordinator at `endpoint` earned and cost in one hour (Unix hours), in base units."""

    endpoint: str
    hour: int
    earned: Amount
    written_off: Amount


class CoordinatorCreditStore(Protocol):
    """What is remembered of how coordinators behaved."""

    async def record_coordinator_hour(self, dealing: CoordinatorHour) -> None:
        """This is what the hour came to so far. Raises Unavailable."""
        ...

    async def coordinator_hours(self, since: int) -> list[CoordinatorHour]:
        """Those of this hour and later ones."""
        ...


@dataclass(frozen=True, slots=True)
class WriteOff:
    """What a payer owes that no order can be claimed for any more: `amount` base units, in all and since the last look."""

    payer: Address
    amount: Amount
    increase: int


@dataclass(frozen=True, slots=True)
class DebtAlarm:
    """What an alarm is about: base units, until when they can be claimed (Unix seconds; 0: not at all), and what helps."""

    due: int
    claim_by: int
    remedy: str = "tally node collect"


class ReceiptStore(Protocol):
    """What the courier needs to remember."""

    async def unacknowledged(self, coordinator: Address, before: int, page: int, size: int) -> list[UnacknowledgedReceipt]:
        """One page (from 0) of the receipts made before that time that this coordinator has not confirmed, oldest first."""
        ...

    async def acknowledge(self, coordinator: Address, jobs: Iterable[JobId]) -> None:
        """It has confirmed the receipts of these jobs."""
        ...


class ClaimStore(Protocol):
    """What the collector needs to remember."""

    async def claimable(self, now: int, limit: int, skip: int = 0) -> list[ClaimableTab]:
        """Tabs with more receipts than the chain was last seen to have paid, on an order that can still be claimed on: those that
        wait longest, but for the first `skip`.
        """
        ...

    async def record_funds(self, payer: Address, funds: Funds, at: int) -> None:
        """The chain says this of a tab."""
        ...

    async def record_claim(self, claim: Signed[Claim], at: int) -> None:
        """A claim was handed in."""
        ...

    async def write_off(self, now: int) -> list[WriteOff]:
        """Books what can no longer be claimed by that time (Unix seconds); returns where that is more than it was, or less."""
        ...


@dataclass(frozen=True, slots=True)
class SettlementResult:
    """What came of a claim that this node sent itself: the chain's transactions, and base units by payer."""

    transactions: tuple[str, ...]
    paid: Mapping[Address, Amount]


class Settlement(Protocol):
    """Settles on chain at this node's own cost."""

    async def settle(self, claim: Signed[Claim], orders: Sequence[Signed[Order]]) -> SettlementResult:
        """Sends a claim and waits until it is on chain. Raises Refusal (insufficient_funds: no coins for gas), Unavailable."""
        ...


class RecoveryStore(Protocol):
    """What recalling needs to remember."""

    async def record_recovered(self, receipt: Verified[Receipt], order: Verified[Order], late: LateReceipt) -> None:
        """A receipt of a former state, the last on its tab: durable on return. Raises Unavailable."""
        ...

    async def record_recovery_complete(self, coordinator: Address, url: str, at: int) -> None:
        """This coordinator, at that address, has told all that it knows."""
        ...

    async def completed_recoveries(self) -> list[tuple[Address, str]]:
        """Those that have, with their addresses."""
        ...


class StartupStore(Protocol):
    """What a node needs to know of its former life."""

    async def tabs(self, now: int) -> list[StoredTab]:
        """All tabs."""
        ...

    async def consumed_orders(self, now: int) -> list[tuple[Hash, int]]:
        """Digests and deadlines of the orders that must not run again."""
        ...

    async def unfinished_orders(self, now: int) -> list[Matched]:
        """The orders that were begun, have no receipt, and can still be claimed on: what a killed process left."""
        ...


# Link


class LinkLost(Exception):
    """The connection to the coordinator ended; what was not sent never will be, on this link."""


class Link(Protocol):
    """One connection to a coordinator that proved who it is. `endpoint`: the host and port where it was dialled, which its
    operator cannot change as easily as its account.
    """

    coordinator: Address
    endpoint: str

    def post(self, kind: Kind, job: JobId, payload: bytes = b"") -> None:
        """Queues a frame, in order. Does nothing once the link is lost."""
        ...

    @property
    def has_room(self) -> bool:
        """Whether `drained` would return or raise at once."""
        ...

    async def drain(self) -> None:
        """Waits until there is room for more. Raises LinkLost."""
        ...


# Chain


class ChainView(Protocol):
    """What the chain says of payers. Chain trouble never raises here: it shows as stale or unknown funds."""

    @property
    def withdrawal_delay(self) -> float:
        """How long a payer must wait before it may take anything back, in seconds; infinite while that is not known."""
        ...

    async def funds(self, payer: Address) -> Funds:
        """A few seconds old at most while the chain answers."""
        ...

    async def refresh(self, payer: Address) -> Funds:
        """Asked now, if the chain answers."""
        ...


class FeeRateView(Protocol):
    """What the chain says of coordinators."""

    async def rate(self, coordinator: Address) -> int | None:
        """The rate that it has registered, in basis points, minutes old at most; None if the chain never told."""
        ...


# Observer


@dataclass(frozen=True, slots=True)
class JobReport:
    """How a job ended, for metrics and logs. No outcome: it has no receipt. Seconds are of a monotonic clock.

    `endpoint`: where its coordinator was dialled; `written_off`: what it would have cost, where the coordinator left it unpaid.
    """

    job: JobId
    payer: Address
    model: str
    outcome: Outcome | None
    reason: str
    cost: Amount = Amount(0)
    input_tokens: int = 0
    output_tokens: int = 0
    first_seconds: float | None = None
    total_seconds: float = 0.0
    engine_fault: bool = False
    endpoint: str = ""
    written_off: Amount = Amount(0)


class Observer(Protocol):
    """Is told of every job that ended."""

    def job_ended(self, report: JobReport) -> None:
        """Must not raise nor wait."""
        ...
