"""The interfaces that the node's core needs: an engine, a store, a link to a coordinator, the chain, an observer.

Each interface is narrow and has an in-memory implementation in `node.testing.memory`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from node.domain.order_admission import AdmittedJob, MatchedOrder
from node.domain.requests import EngineRequest
from node.domain.tabs import Funds, StoredTab
from node.domain.upstream_models import UpstreamModel
from tallystick.protocol.eip712 import Signed, Verified
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Claim, Order, Outcome, Receipt
from tallystick.protocol.types import Address, Amount, Hash, JobId
from tallystick.protocol.usage_reports import ReportedUsage
from tallystick.protocol.wire import Kind

# Engine

FULL_KV_CACHE = 0.95


class ResponseStart(NamedTuple):
    """The engine accepted the request. A status of 400 or more is a deterministic refusal that the client receives."""

    status: int
    content_type: str


class ResponsePart(NamedTuple):
    """Bytes of the response body. `has_output`: the user would see something of them; `text_bytes`: bytes of generated text in
    them.
    """

    data: bytes
    has_output: bool
    text_bytes: int = 0
    usage: ReportedUsage | None = None


class ResponseEnd(NamedTuple):
    """The engine finished the response. `tail`: the last bytes of the body; `truncated`: the output limit was reached."""

    tail: bytes = b""
    text_bytes: int = 0
    usage: ReportedUsage | None = None
    truncated: bool = False


EngineEvent = ResponseStart | ResponsePart | ResponseEnd


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """The load that an engine reports: the number of waiting requests and the used share of its KV cache (None: not reported)."""

    waiting: int
    kv_used: float | None = None

    @property
    def has_queue(self) -> bool:
        """Whether one more request would have to wait."""
        return self.waiting > 0 or (self.kv_used is not None and self.kv_used >= FULL_KV_CACHE)


class Engine(Protocol):
    """One endpoint that answers inference requests."""

    def answer(self, request: EngineRequest) -> AsyncGenerator[EngineEvent, None]:
        """Yields one ResponseStart, any number of ResponseParts, and one ResponseEnd. Closing the generator stops the engine at
        once.

        Raises Unavailable: `node_busy` if another provider should be tried now, `engine_unavailable` if the engine is down or its
        response is malformed.
        """
        ...

    async def models(self) -> tuple[UpstreamModel, ...]:
        """Returns the models that the engine serves now; this is also its health check. Raises Unavailable."""
        ...

    async def load(self) -> EngineLoad | None:
        """Returns the engine's reported load; None if it reports none. Never raises."""
        ...


# Store


class ReceiptRecord(NamedTuple):
    """The order and the receipt that are stored together when a job ends or an order is refused."""

    matched: MatchedOrder
    receipt: Verified[Receipt]


@dataclass(frozen=True, slots=True)
class UnacknowledgedReceipt:
    """A receipt that its coordinator has not confirmed, with the evidence that goes with it."""

    job: JobId
    late_receipt: LateReceipt


@dataclass(frozen=True, slots=True)
class ClaimableTab:
    """A tab with an unsettled amount: its last receipt, the best order to claim with, and the last claim that was submitted.

    Amounts are base units. Times are Unix seconds; `since` is when the oldest uncollected receipt was made.
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
        """The amount that a claim would collect now, in base units."""
        return min(self.cumulative, self.order.message.ceiling) - self.settled


DOUBTFUL_SECONDS = 60
"""What a killed process had not sent yet was signed in its last minute. So a coordinator that withholds its acknowledgements, and
waits for a restart, can refuse no more than the work of a minute.
"""


class DoubtfulReceipt(NamedTuple):
    """A receipt with a charge that no coordinator had confirmed when the process was killed that signed it.

    `before`: the total of its tab without it, in base units.
    """

    coordinator: Address
    job: JobId
    payer: Address
    seq: int
    before: Amount


class TabConflict(Exception):
    """A receipt does not follow the last one that is stored, which has this `seq` and this total in base units."""

    def __init__(self, seq: int, cumulative: Amount) -> None:
        super().__init__(f"the receipt does not follow the stored tab, which ends with receipt {seq} and {cumulative} base units")
        self.seq, self.cumulative = seq, cumulative


class JobStore(Protocol):
    """The store that the job runner needs. It writes in the order of the calls; cancelling a future cancels no write."""

    def begin(self, admitted: AdmittedJob, at: int) -> asyncio.Future[None]:
        """Stores an admitted order. Once the future is done, the order survives the process, so a restart never runs it again."""
        ...

    def record_receipt(self, record: ReceiptRecord) -> asyncio.Future[None]:
        """Stores receipt, job and tab in one transaction. Once the future is done, they survive a power cut.

        The future fails if nothing was written: with TabConflict for a receipt that does not follow the stored tab, else with
        Unavailable.
        """
        ...

    def record_refusal(self, record: ReceiptRecord) -> asyncio.Future[None]:
        """Stores order, receipt, job and tab of a refused order, as `record_receipt` does. Such an order never backs a claim."""
        ...


@dataclass(frozen=True, slots=True)
class CoordinatorHour:
    """Earnings and unpaid work of the jobs from the coordinator at `endpoint` in one hour (Unix time / 3600), in base units."""

    endpoint: str
    hour: int
    earned: Amount
    written_off: Amount


class CoordinatorCreditStore(Protocol):
    """The store that coordinator credit needs."""

    async def record_coordinator_hour(self, total: CoordinatorHour) -> None:
        """Stores the totals of an hour so far. Raises Unavailable."""
        ...

    async def coordinator_hours(self, since: int) -> list[CoordinatorHour]:
        """Returns the totals of the hour `since` and later hours."""
        ...


@dataclass(frozen=True, slots=True)
class WriteOff:
    """Debt of a payer that no order can claim any more, in base units: the total, and its increase since the last check."""

    payer: Address
    amount: Amount
    increase: int


@dataclass(frozen=True, slots=True)
class DebtAlarm:
    """The debt that an alarm is about: base units, the claim deadline (Unix seconds; 0: none) and the remedy for the operator."""

    due: int
    claim_by: int
    remedy: str = "tally node collect"


class ReceiptStore(Protocol):
    """The store that the receipt sender needs."""

    async def unacknowledged(self, coordinator: Address, before: int, page: int, size: int) -> list[UnacknowledgedReceipt]:
        """Returns one page (numbered from 0) of receipts made before `before` that this coordinator has not confirmed, oldest
        first.
        """
        ...

    async def acknowledge(self, coordinator: Address, jobs: Iterable[JobId]) -> None:
        """Marks the receipts of these jobs as confirmed by the coordinator."""
        ...


class VoidStore(Protocol):
    """The store that voids receipts of a killed process."""

    async def doubtful_receipts(self) -> list[DoubtfulReceipt]:
        """Returns the newest receipts that charge and that no coordinator has confirmed, a bounded number, oldest first."""
        ...

    async def void(self, payer: Address, receipts: Sequence[DoubtfulReceipt]) -> list[MatchedOrder]:
        """Removes the last receipts of a payer's tab, lowest first, durably. Their numbers stay used. Returns their orders, which
        have no receipt then.

        Returns nothing and removes nothing if they are not the last, or if a total with them was claimed or settled.
        """
        ...


def stale_claim(payer: Address) -> Unavailable:
    """The error of a claim on a tab that has a lower total now."""
    text = f"the last receipts of the tab with {payer} were voided while it was claimed; it is claimed anew"
    return Unavailable(Code.PROVIDER_FAILED, text, fault=Fault.PROVIDER)


class ClaimStore(Protocol):
    """The store that the collector needs."""

    async def claimable(self, now: int, limit: int, skip: int = 0) -> list[ClaimableTab]:
        """Returns at most `limit` tabs with unsettled receipts and a claimable order, longest waiting first, after skipping
        `skip` tabs.
        """
        ...

    async def record_funds(self, payer: Address, funds: Funds, at: int) -> None:
        """Stores the chain's state of a tab."""
        ...

    async def record_claim(self, claim: Signed[Claim], at: int) -> None:
        """Stores the totals of a claim before it is submitted. Raises Unavailable for one above a tab, whose last receipts were
        voided since it was read: such a claim would cost the stake.
        """
        ...

    async def write_off(self, now: int) -> list[WriteOff]:
        """Records debt that is not claimable after `now` (Unix seconds). Returns the payers whose written-off debt changed."""
        ...


@dataclass(frozen=True, slots=True)
class SettlementResult:
    """Result of a claim that this node settled itself: transaction hashes, and base units paid by payer."""

    transactions: tuple[str, ...]
    paid: Mapping[Address, Amount]


class Settlement(Protocol):
    """Settles claims on chain; this node pays the gas."""

    async def settle(self, claim: Signed[Claim], orders: Sequence[Signed[Order]]) -> SettlementResult:
        """Sends a claim and waits until it is mined. Raises Refusal (`insufficient_funds`: no coins for gas) or Unavailable."""
        ...


@dataclass(frozen=True, slots=True)
class FeeTotal:
    """What coordinators took out of this provider's settlements in all blocks before `block`, in base units.

    `tip` is the hash of the block before `block`, by which a reorganisation is noticed.
    """

    block: int
    tip: str
    fees: Amount


@dataclass(frozen=True, slots=True)
class PayoutRecord:
    """Credit that the node paid out by itself: the transaction, its time (Unix seconds), base units, and to whom."""

    tx: str
    at: int
    amount: Amount
    address: Address


class RecoveryStore(Protocol):
    """The store that state recovery needs."""

    async def record_recovered(self, receipt: Verified[Receipt], order: Verified[Order], late: LateReceipt) -> None:
        """Stores the last receipt of a tab that an earlier state signed; durable on return. Raises Unavailable."""
        ...

    async def record_recovery_complete(self, coordinator: Address, url: str, at: int) -> None:
        """Records that the coordinator at `url` has returned all receipts that it knows."""
        ...

    async def completed_recoveries(self) -> list[tuple[Address, str]]:
        """Returns account and URL of each coordinator whose recovery is complete."""
        ...


class StartupStore(Protocol):
    """What the node reads from its store when it starts."""

    async def tabs(self, now: int) -> list[StoredTab]:
        """Returns all tabs."""
        ...

    async def consumed_orders(self, now: int) -> list[tuple[Hash, int]]:
        """Returns digest and deadline of each order that must not run again."""
        ...

    async def unfinished_orders(self, now: int) -> list[MatchedOrder]:
        """Returns orders that a killed process began, that have no receipt, and that are still claimable."""
        ...


# Link


class LinkLost(Exception):
    """The connection to the coordinator ended; frames that were queued on it are lost."""


class Link(Protocol):
    """A connection to an authenticated coordinator.

    `endpoint` is the host and port of the configured coordinator, also on a link to a replica that it listed: listing more
    replicas gains it nothing. A coordinator can change its account more easily than its endpoint.
    """

    coordinator: Address
    endpoint: str
    log_head: bytes
    """The newest head of the coordinator's match log; empty if none is known."""

    def post(self, kind: Kind, job: JobId, payload: bytes = b"") -> None:
        """Queues a frame, in order. Does nothing after the link is lost."""
        ...

    @property
    def has_room(self) -> bool:
        """Whether a frame can be posted now: the queue has room, and the link is not lost."""
        ...

    @property
    def is_lost(self) -> bool:
        """Whether the link has ended, so that nothing that is posted arrives."""
        ...

    async def drain(self) -> None:
        """Waits until the queue has room. Raises LinkLost."""
        ...


# Chain


class ChainView(Protocol):
    """The chain's state of payers. Chain failures never raise here: the funds are stale or unknown instead."""

    @property
    def withdrawal_delay(self) -> float:
        """Seconds that a payer must wait before it can withdraw anything; infinite while unknown."""
        ...

    async def funds(self, payer: Address) -> Funds:
        """Returns the payer's funds, at most a few seconds old while the chain responds."""
        ...

    async def refresh(self, payer: Address) -> Funds:
        """Asks the chain and returns the payer's funds."""
        ...


class FeeRateView(Protocol):
    """The fee rates that coordinators registered on chain."""

    async def rate(self, coordinator: Address) -> int | None:
        """Returns the coordinator's registered rate in basis points, at most minutes old; None if the chain has never returned
        one.
        """
        ...


# Observer


class JobReport(NamedTuple):
    """How a job ended, for metrics and logs. Durations are seconds. `outcome` is None if the job has no receipt.

    `fault`: whose fault its failure is; empty if it did not fail.

    `endpoint`: where its coordinator was dialled; `written_off`: the cost of work that the coordinator left unpaid, in base
    units; `trace_id`: of its trace, in hex, if it has one.
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
    fault: str = ""
    endpoint: str = ""
    written_off: Amount = Amount(0)
    trace_id: str = ""


class Observer(Protocol):
    """Receives a report of every job that ended."""

    def job_ended(self, report: JobReport) -> None:
        """Must not raise or wait."""
        ...
