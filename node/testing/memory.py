"""In-memory implementations of the node's ports: the core's tests run on them, and they are a reference for other adapters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from node.domain.order_admission import AdmittedJob, MatchedOrder
from node.domain.requests import EngineRequest
from node.domain.signed_ceilings import SignedCeiling, SignedCeilings, add, after
from node.domain.tabs import Funds, StoredTab
from node.domain.upstream_models import UpstreamModel
from node.ports import (
    DOUBTFUL_SECONDS,
    ClaimableTab,
    CoordinatorHour,
    DoubtfulReceipt,
    EngineEvent,
    EngineLoad,
    JobReport,
    LinkLost,
    ReceiptRecord,
    TabConflict,
    UnacknowledgedReceipt,
    WriteOff,
    stale_claim,
)
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.errors import TallyError
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Claim
from tallystick.protocol.types import Address, Amount, Hash, JobId
from tallystick.protocol.wire import Kind

Step = EngineEvent | BaseException | Callable[[], Awaitable[object]]
"""One step of a scripted engine: an event to yield, an error to raise, or something to wait for."""


class ScriptedEngine:
    """ports.Engine that performs the same steps for every request.

    `called` is set by the first request; `stopped` counts the responses that were not read to their end; `receives_request`: the
    engine has the request as soon as it is called.
    """

    def __init__(self, *steps: Step, models: Sequence[str] = ("model",)) -> None:
        self.steps: tuple[Step, ...] = steps
        self.model_names = list(models)
        self.fault: TallyError | None = None
        self.requests: list[EngineRequest] = []
        self.called = asyncio.Event()
        self.stopped = 0
        self.receives_request = True
        self.reported_load: EngineLoad | None = None
        self.checks = 0

    async def answer(self, request: EngineRequest) -> AsyncGenerator[EngineEvent, None]:
        """See ports.Engine."""
        self.requests.append(request)
        self.called.set()
        if self.receives_request:
            request.on_sent()
        finished = False
        try:
            for step in self.steps:
                if isinstance(step, BaseException):
                    raise step
                if callable(step):
                    await step()
                else:
                    finished = step is self.steps[-1]
                    yield step
        finally:
            self.stopped += not finished

    async def load(self) -> EngineLoad | None:
        """See ports.Engine."""
        return self.reported_load

    async def models(self) -> tuple[UpstreamModel, ...]:
        """See ports.Engine."""
        self.checks += 1
        if self.fault is not None:
            raise self.fault
        return tuple(UpstreamModel(name) for name in self.model_names)


@dataclass(frozen=True, slots=True)
class _Tab:
    seq: int = 0
    cumulative: Amount = Amount(0)
    funds: Funds = field(default_factory=Funds)
    since: int = 0
    claimed_at: int = 0
    claimed: Amount = Amount(0)
    written_off: Amount = Amount(0)
    last_at: int = 0


class MemoryStore:
    """ports.JobStore, ReceiptStore, VoidStore, ClaimStore, CoordinatorCreditStore and StartupStore. `fault`, if set, is raised by
    the next writes.
    """

    def __init__(self) -> None:
        self.orders: dict[Hash, MatchedOrder] = {}
        self.refused: set[Hash] = set()
        self.receipt_records: list[ReceiptRecord] = []
        self.acknowledged_jobs: set[JobId] = set()
        self.claims: list[Signed[Claim]] = []
        self.fault: TallyError | None = None
        self._coordinator_hours: dict[tuple[str, int], CoordinatorHour] = {}
        self._tabs: dict[Address, _Tab] = {}

    def begin(self, admitted: AdmittedJob, at: int) -> asyncio.Future[None]:
        """See ports.JobStore."""
        return asyncio.ensure_future(self._begin(admitted, at))

    def record_receipt(self, record: ReceiptRecord) -> asyncio.Future[None]:
        """See ports.JobStore."""
        return asyncio.ensure_future(self._record_receipt(record))

    def record_refusal(self, record: ReceiptRecord) -> asyncio.Future[None]:
        """See ports.JobStore."""
        return asyncio.ensure_future(self._record_refusal(record))

    async def _begin(self, admitted: AdmittedJob, at: int) -> None:  # noqa: ARG002 - the port's signature
        self._check()
        if admitted.order.digest in self.orders:
            raise ValueError("an order was begun twice")
        self.orders[admitted.order.digest] = admitted

    async def _record_receipt(self, record: ReceiptRecord) -> None:
        await asyncio.sleep(0)
        self._check()
        receipt = record.receipt.message
        tab = self._tabs.get(receipt.payer, _Tab())
        if (receipt.seq, receipt.cumulative_cost) != (tab.seq + 1, tab.cumulative + receipt.cost):
            raise TabConflict(tab.seq, tab.cumulative)
        since = tab.since if tab.cumulative > tab.funds.settled else receipt.finished_at
        tab = replace(tab, seq=receipt.seq, cumulative=receipt.cumulative_cost, since=since, last_at=receipt.finished_at)
        self._tabs[receipt.payer] = tab
        self.receipt_records.append(record)

    async def _record_refusal(self, record: ReceiptRecord) -> None:
        self._check()
        digest = record.matched.order.digest
        if digest in self.orders:
            raise ValueError("an order was refused after it was begun")
        await self._record_receipt(record)
        self.orders[digest] = record.matched
        self.refused.add(digest)

    async def unacknowledged(self, coordinator: Address, before: int, page: int, size: int) -> list[UnacknowledgedReceipt]:
        """See ports.ReceiptStore."""
        receipts = [
            UnacknowledgedReceipt(record.matched.job, LateReceipt(record.receipt, record.matched.order, record.matched.terms))
            for record in self.receipt_records
            if record.matched.order.message.coordinator == coordinator
            and record.matched.job not in self.acknowledged_jobs
            and record.receipt.message.finished_at < before
        ]
        return receipts[page * size : (page + 1) * size]

    async def acknowledge(self, coordinator: Address, jobs: Iterable[JobId]) -> None:  # noqa: ARG002 - the port's signature
        """See ports.ReceiptStore."""
        self._check()
        self.acknowledged_jobs |= set(jobs)

    async def doubtful_receipts(self) -> list[DoubtfulReceipt]:
        """See ports.VoidStore."""
        return [
            DoubtfulReceipt(
                record.matched.order.message.coordinator,
                record.matched.job,
                record.matched.payer,
                record.receipt.message.seq,
                Amount(record.receipt.message.cumulative_cost - record.receipt.message.cost),
            )
            for record in self.receipt_records
            if record.receipt.message.cost and record.matched.job not in self.acknowledged_jobs
            if record.receipt.message.finished_at > self.receipt_records[-1].receipt.message.finished_at - DOUBTFUL_SECONDS
        ]

    async def void(self, payer: Address, receipts: Sequence[DoubtfulReceipt]) -> list[MatchedOrder]:
        """See ports.VoidStore."""
        self._check()
        tab, before, numbers = self._tabs.get(payer, _Tab()), receipts[0].before, [receipt.seq for receipt in receipts]
        last = list(range(tab.seq - len(numbers) + 1, tab.seq + 1))
        confirmed = any(receipt.job in self.acknowledged_jobs for receipt in receipts)
        if numbers != last or max(tab.funds.settled, tab.claimed) > before or confirmed:
            return []
        voided = [
            record for record in self.receipt_records if record.matched.payer == payer and record.receipt.message.seq in last
        ]
        self.receipt_records = [record for record in self.receipt_records if record not in voided]
        self._tabs[payer] = replace(tab, cumulative=before)
        return [MatchedOrder(record.matched.job, record.matched.order, record.matched.terms) for record in voided]

    async def claimable(self, now: int, limit: int, skip: int = 0) -> list[ClaimableTab]:
        """See ports.ClaimStore."""
        claimable = [self._claimable(payer, tab, now) for payer, tab in self._tabs.items() if tab.cumulative > tab.funds.settled]
        return [tab for tab in claimable if tab is not None and tab.due > 0][skip : skip + limit]

    async def record_funds(self, payer: Address, funds: Funds, at: int) -> None:
        """See ports.ClaimStore."""
        tab = self._tabs[payer]
        since = at if funds.settled > tab.funds.settled else tab.since
        self._tabs[payer] = replace(tab, funds=funds, since=since)

    async def record_claim(self, claim: Signed[Claim], at: int) -> None:
        """See ports.ClaimStore."""
        self._check()
        for row in claim.message.rows:
            tab = self._tabs[row.payer]
            if row.cumulative_cost > tab.cumulative:
                raise stale_claim(row.payer)
            self._tabs[row.payer] = replace(tab, claimed_at=at, claimed=Amount(max(tab.claimed, row.cumulative_cost)))
        self.claims.append(claim)

    async def write_off(self, now: int) -> list[WriteOff]:
        """See ports.ClaimStore."""
        write_offs = []
        for payer, tab in self._tabs.items():
            best = self._best(payer, now)
            unclaimable = max(0, tab.cumulative - max(tab.funds.settled, best.order.message.ceiling if best else 0))
            if unclaimable != tab.written_off:
                write_offs.append(WriteOff(payer, Amount(unclaimable), unclaimable - tab.written_off))
                self._tabs[payer] = replace(tab, written_off=Amount(unclaimable))
        return write_offs

    async def tabs(self, now: int) -> list[StoredTab]:
        """See ports.StartupStore."""
        return [self._row(payer, tab, now) for payer, tab in self._tabs.items()]

    async def consumed_orders(self, now: int) -> list[tuple[Hash, int]]:
        """See ports.StartupStore."""
        orders = [(digest, admitted.order.message.deadline) for digest, admitted in self.orders.items()]
        return [(digest, deadline) for digest, deadline in orders if deadline > now]

    async def unfinished_orders(self, now: int) -> list[MatchedOrder]:
        """See ports.StartupStore."""
        ended = {record.matched.order.digest for record in self.receipt_records}
        return [
            MatchedOrder(matched.job, matched.order, matched.terms)
            for digest, matched in self.orders.items()
            if digest not in ended and matched.order.message.claim_by > now
        ]

    async def record_coordinator_hour(self, total: CoordinatorHour) -> None:
        """See ports.CoordinatorCreditStore."""
        self._check()
        self._coordinator_hours[total.endpoint, total.hour] = total

    async def coordinator_hours(self, since: int) -> list[CoordinatorHour]:
        """See ports.CoordinatorCreditStore."""
        return [total for total in self._coordinator_hours.values() if total.hour >= since]

    def _check(self) -> None:
        if self.fault is not None:
            raise self.fault

    def _best(self, payer: Address, now: int) -> MatchedOrder | None:
        usable = [matched for digest, matched in self.orders.items() if digest not in self.refused and matched.payer == payer]
        live = [matched for matched in usable if matched.order.message.claim_by > now]
        return max(live, key=lambda matched: (matched.order.message.ceiling, matched.order.message.claim_by), default=None)

    def _claimable(self, payer: Address, tab: _Tab, now: int) -> ClaimableTab | None:
        best = self._best(payer, now)
        if best is None:
            return None
        return ClaimableTab(
            payer=payer,
            seq=tab.seq,
            cumulative=tab.cumulative,
            settled=tab.funds.settled,
            reserved=tab.funds.reserved,
            order=best.order,
            since=tab.since,
            claimed_at=tab.claimed_at,
            claimed=tab.claimed,
        )

    def _row(self, payer: Address, tab: _Tab, now: int) -> StoredTab:
        ceilings: SignedCeilings = ()
        for digest, matched in self.orders.items():
            if matched.payer == payer and digest not in self.refused:
                ceilings = add(ceilings, SignedCeiling(matched.order.message.ceiling, matched.order.message.claim_by))
        best, *lower = after(ceilings, now) or (SignedCeiling(Amount(0), 0),)
        return StoredTab(
            payer,
            tab.seq,
            tab.cumulative,
            best.amount,
            best.claim_by,
            tab.funds.settled,
            tab.funds.reserved,
            tuple(lower),
            tab.last_at,
            tab.claimed,
        )


class MemoryLink:
    """ports.Link that keeps what was posted. `fill` makes `drain` wait, `disconnect` makes it raise LinkLost."""

    def __init__(self, coordinator: Address, endpoint: str = "coordinator.example:443") -> None:
        self.coordinator, self.endpoint, self.log_head = coordinator, endpoint, b""
        self.frames: list[tuple[Kind, JobId, bytes]] = []
        self._posted = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._lost = False
        self.on_first_chunk: Callable[[JobId], None] = lambda _job: None
        """Called with a job's id after its first chunk."""

    def post(self, kind: Kind, job: JobId, payload: bytes = b"") -> None:
        """See ports.Link."""
        if self._lost:
            return
        first = kind is Kind.CHUNK and not self.payloads(job, Kind.CHUNK)
        self.frames.append((kind, job, payload))
        self._posted.set()
        if first:
            asyncio.get_running_loop().call_soon(self.on_first_chunk, job)

    @property
    def has_room(self) -> bool:
        """See ports.Link."""
        return self._room.is_set() and not self._lost

    @property
    def is_lost(self) -> bool:
        """See ports.Link."""
        return self._lost

    async def drain(self) -> None:
        """See ports.Link."""
        await self._room.wait()
        if self._lost:
            raise LinkLost

    def disconnect(self) -> None:
        """Loses the connection."""
        self._lost = True
        self._room.set()

    def fill(self) -> None:
        """Leaves no room for more frames."""
        self._room.clear()

    def payloads(self, job: JobId, kind: Kind | None = None) -> list[bytes]:
        """Returns the payloads posted for a job, of one kind or of all kinds."""
        return [payload for frame_kind, frame_job, payload in self.frames if frame_job == job and kind in (None, frame_kind)]

    async def until(self, kind: Kind, job: JobId, count: int = 1) -> bytes:
        """Waits for the n-th frame of a kind for a job, and returns its payload."""
        while len(self.payloads(job, kind)) < count:
            self._posted.clear()
            await self._posted.wait()
        return self.payloads(job, kind)[count - 1]


class MemoryChain:
    """ports.ChainView with given funds; `fresh` holds what only a refresh returns."""

    withdrawal_delay = 86_400.0

    def __init__(self, funds: Funds | None = None) -> None:
        self.cached: dict[Address, Funds] = {}
        self.fresh: dict[Address, Funds] = {}
        self.default = funds or Funds(reserved=Amount(10**9), free=Amount(10**9), known=True)

    async def funds(self, payer: Address) -> Funds:
        """See ports.ChainView."""
        return self.cached.get(payer, self.default)

    async def refresh(self, payer: Address) -> Funds:
        """See ports.ChainView."""
        self.cached[payer] = self.fresh.get(payer, self.cached.get(payer, self.default))
        return self.cached[payer]


class RecordingObserver:
    """ports.Observer that keeps the reports."""

    def __init__(self) -> None:
        self.reports: list[JobReport] = []

    def job_ended(self, report: JobReport) -> None:
        """See ports.Observer."""
        self.reports.append(report)
