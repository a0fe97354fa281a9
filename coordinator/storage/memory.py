"""In-memory implementations of the ports, for tests and experiments. Nothing outlives the process."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from coordinator.domain.reputation import ProviderRecord
from coordinator.domain.speeds import Key, SpeedRecord
from coordinator.jobs.accounts import AccountTab
from coordinator.ports import (
    WAITING_CLAIMS,
    Backing,
    Cursor,
    JobRecord,
    KnownJob,
    LogRow,
    PendingClaim,
    Settlement,
    StoredLog,
    StoredResponse,
    StoredState,
    too_many_claims,
)
from tallystick.protocol.eip712 import Signed, Verified
from tallystick.protocol.jobs import TERMINAL, State
from tallystick.protocol.link import ClaimRequest, LateReceipt
from tallystick.protocol.merkle import HASH_SIZE
from tallystick.protocol.messages import LogHead, Receipt
from tallystick.protocol.types import Address, Amount, JobId


@dataclass
class MemoryLogStore:
    """Implements LogStore."""

    rows: list[LogRow] = field(default_factory=list)
    heads: list[Signed[LogHead]] = field(default_factory=list)
    decision_docs: list[bytes] = field(default_factory=list)

    def enqueue_leaves(self, rows: Sequence[LogRow]) -> asyncio.Future[None]:
        """See ports.LogStore."""
        if rows[0].number > len(self.rows):
            raise RuntimeError(f"expected leaf {len(self.rows)}, got {rows[0].number}")
        self.rows += rows[len(self.rows) - rows[0].number :]
        future = asyncio.get_running_loop().create_future()
        future.set_result(None)
        return future

    async def put_head(self, head: Signed[LogHead]) -> None:
        """See ports.LogStore."""
        if self.heads and head.message.size <= self.heads[-1].message.size:
            raise RuntimeError(f"expected a head of more than {self.heads[-1].message.size} leaves, got {head.message.size}")
        self.heads.append(Signed(head.message, head.signature))

    def enqueue_decisions(self, count: int, doc: bytes) -> None:  # noqa: ARG002 - keeps all
        """See ports.LogStore."""
        self.decision_docs.append(doc)

    async def decisions(self) -> list[bytes]:
        """See ports.LogStore."""
        return list(self.decision_docs)

    async def load_log(self) -> StoredLog:
        """See ports.LogStore."""
        last_at = self.rows[-1].at if self.rows else 0
        return StoredLog(len(self.rows), last_at, self.heads[-1] if self.heads else None)

    async def log_rows(self, numbers: Sequence[int]) -> list[LogRow]:
        """See ports.LogStore."""
        return [self.rows[number] for number in numbers]

    async def log_entries(self, start: int, end: int) -> list[LogRow]:
        """See ports.LogStore."""
        return self.rows[start:end]

    async def log_hashes(self, start: int, end: int) -> list[bytes]:
        """See ports.LogStore."""
        return [row.hashes[:HASH_SIZE] for row in self.rows[start:end]]

    async def forget_leaves(self, before: int) -> bool:
        """See ports.LogStore."""
        self.rows = [replace(row, leaf=None) if row.at < before else row for row in self.rows]
        return False


@dataclass
class MemoryStore(MemoryLogStore):
    """Implements JobStore, LogStore, TabStore, ResponseStore and ClaimStore."""

    jobs: dict[JobId, JobRecord] = field(default_factory=dict)
    receipts: dict[JobId, dict[Address, tuple[Signed[Receipt], Amount]]] = field(default_factory=dict)
    claims: dict[int, tuple[ClaimRequest, str | None]] = field(default_factory=dict)
    settlements: dict[tuple[Address, Address], Settlement] = field(default_factory=dict)
    read: Cursor | None = None
    responses: dict[JobId, StoredResponse] = field(default_factory=dict)
    records: dict[Address, ProviderRecord] = field(default_factory=dict)
    speeds: dict[Key, SpeedRecord] = field(default_factory=dict)

    def enqueue_job(self, record: JobRecord) -> None:
        """See ports.JobStore."""
        known = self.jobs.get(record.job)
        if known is None or known.state not in TERMINAL or known.is_corrected_by(record):
            self.jobs[record.job] = record

    async def put_receipt(self, job: JobId, receipt: Verified[Receipt], total: Amount, record: JobRecord | None = None) -> None:
        """See ports.JobStore."""
        if record is not None:
            self.enqueue_job(record)
        kept = Signed(receipt.message, receipt.signature)
        self.receipts.setdefault(job, {}).setdefault(receipt.message.provider, (kept, total))

    async def job(self, job: JobId) -> KnownJob | None:
        """See ports.JobStore."""
        record = self.jobs.get(job)
        receipts = {provider: receipt for provider, (receipt, _) in self.receipts.get(job, {}).items()}
        return None if record is None else KnownJob(record, receipts)

    async def load_state(self, now: int, since: int) -> StoredState:
        """See ports.JobStore."""
        for record in self.jobs.values():
            if record.state not in TERMINAL:
                why = "the coordinator was restarted"
                attempts = tuple(
                    attempt if attempt.state in TERMINAL else replace(attempt, state=State.FAILED, reason=why, unseen=True)
                    for attempt in record.attempts
                )
                self.jobs[record.job] = replace(record, state=State.FAILED, finished_at=now, attempts=attempts)
        totals: dict[tuple[Address, Address], Amount] = {}
        for receipts in self.receipts.values():
            for provider, (receipt, total) in receipts.items():
                tab = (receipt.message.payer, provider)
                totals[tab] = Amount(max(total, totals.get(tab, 0)))
        recent = tuple(job for job, record in self.jobs.items() if record.created_at >= since)
        return StoredState(recent, totals, dict(self.records), dict(self.speeds), follows=bool(recent or totals))

    async def forget_jobs(self, before: int) -> bool:
        """See ports.JobStore. Keeps the jobs of receipts that are kept."""
        kept: dict[tuple[Address, Address], dict[str, tuple[int, JobId]]] = {}
        for job, receipts in self.receipts.items():
            for provider, (receipt, total) in receipts.items():
                highest = kept.setdefault((receipt.message.payer, provider), {})
                for name, value in (("seq", receipt.message.seq), ("total", total)):
                    highest[name] = max(highest.get(name, (-1, job)), (value, job))
        needed = {job for highest in kept.values() for _, job in highest.values()}
        for job, record in list(self.jobs.items()):
            if record.finished_at is not None and record.finished_at < before and job not in needed:
                del self.jobs[job]
                self.receipts.pop(job, None)
        return False

    def enqueue_provider_records(
        self, records: Mapping[Address, ProviderRecord], speeds: Mapping[Key, SpeedRecord] = MappingProxyType({})
    ) -> None:
        """See ports.JobStore."""
        self.records |= records
        self.speeds |= speeds

    async def last_receipts(self, provider: Address, after: str, limit: int) -> list[LateReceipt]:
        """See ports.TabStore."""
        last: dict[Address, LateReceipt] = {}
        for job, by_provider in self.receipts.items():
            attempt = self.jobs[job].attempt_of(provider)
            if provider in by_provider and attempt is not None:
                late = LateReceipt(by_provider[provider][0], attempt.order, attempt.terms)
                payer = late.receipt.message.payer
                if payer > after and (payer not in last or last[payer].receipt.message.seq < late.receipt.message.seq):
                    last[payer] = late
        return [last[payer] for payer in sorted(last)][:limit]

    async def receipts_of(self, payer: Address, provider: Address, limit: int) -> list[LateReceipt]:
        """See ports.TabStore."""
        ranked: list[tuple[Amount, int, LateReceipt]] = []
        for job, by_provider in self.receipts.items():
            attempt = self.jobs[job].attempt_of(provider)
            if provider in by_provider and attempt is not None and attempt.order.message.payer == payer:
                receipt, total = by_provider[provider]
                ranked.append((total, receipt.message.seq, LateReceipt(receipt, attempt.order, attempt.terms)))
        return [late for _, _, late in sorted(ranked, key=lambda entry: entry[:2], reverse=True)][:limit]

    async def put_response(self, stored: StoredResponse, *, since: int, max_bytes: int) -> None:
        """See ports.ResponseStore."""
        self.responses = {job: each for job, each in self.responses.items() if each.ended_at >= since}
        self.responses[stored.job] = stored
        while sum(len(each.frames) for each in self.responses.values()) > max_bytes:
            held: Counter[str] = Counter()
            for each in self.responses.values():
                held[each.payer] += len(each.frames)
            most = max(held, key=held.__getitem__)
            del self.responses[next(job for job, each in self.responses.items() if each.payer == most)]

    async def response(self, job: JobId, since: int) -> StoredResponse | None:
        """See ports.ResponseStore."""
        kept = self.responses.get(job)
        return kept if kept is not None and kept.ended_at >= since else None

    async def put_claim(self, request: ClaimRequest, now: int) -> None:  # noqa: ARG002 - the port has it
        """See ports.ClaimStore."""
        provider = request.claim.message.provider
        own = {n: (known, tx) for n, (known, tx) in self.claims.items() if known.claim.message.provider == provider}
        same = [number for number, (known, _) in own.items() if known == request]
        if sum(tx is None for n, (_, tx) in own.items() if n not in same) >= WAITING_CLAIMS:
            raise too_many_claims(provider)
        self.claims[same[0] if same else max(self.claims, default=0) + 1] = (request, None)
        for number, (_, tx) in own.items():
            if number not in same and tx is not None and not tx.startswith("0x"):
                del self.claims[number]

    async def pending_claims(self, limit: int, skipped: Iterable[Address] = ()) -> list[PendingClaim]:
        """See ports.ClaimStore."""
        excluded, turns, pending = set(skipped), Counter[Address](), list[tuple[int, int, ClaimRequest]]()
        for number, (request, tx) in sorted(self.claims.items(), key=lambda entry: entry[0]):
            provider = request.claim.message.provider
            if tx is None and provider not in excluded:
                turns[provider] += 1
                pending.append((turns[provider], number, request))
        return [PendingClaim(number, request) for _, number, request in sorted(pending, key=lambda entry: entry[:2])[:limit]]

    async def close_claims(self, ids: list[int], tx: str) -> None:
        """See ports.ClaimStore."""
        for number in ids:
            self.claims[number] = (self.claims[number][0], tx)

    async def cursor(self) -> Cursor | None:
        """See ports.ClaimStore."""
        return self.read

    async def put_settlements(self, settlements: list[Settlement], cursor: Cursor) -> None:
        """See ports.ClaimStore."""
        self.settlements |= {(settlement.payer, settlement.provider): settlement for settlement in settlements}
        self.read = cursor

    async def forget_settlements(self) -> None:
        """See ports.ClaimStore."""
        self.settlements, self.read = {}, None
        self.claims = {n: (claim, None if tx and tx.startswith("0x") else tx) for n, (claim, tx) in self.claims.items()}

    async def settlement(self, payer: Address, provider: Address) -> Settlement | None:
        """See ports.ClaimStore."""
        return self.settlements.get((payer, provider))


@dataclass
class MemoryFunds:
    """Implements Funds with tables, in base units. `free` is by payer, `reserved` and `settled` by payer and provider."""

    free: dict[Address, Amount] = field(default_factory=dict)
    reserved: dict[tuple[Address, Address], Amount] = field(default_factory=dict)
    settled: dict[tuple[Address, Address], Amount] = field(default_factory=dict)
    stakes: dict[Address, Amount] = field(default_factory=dict)

    async def stake(self, provider: Address) -> Amount:
        """See ports.Funds."""
        return self.stakes.get(provider, Amount(0))

    async def backing(self, payer: Address, provider: Address, *, fresh: bool = False) -> Backing:  # noqa: ARG002 - the port has it
        """See ports.Funds."""
        zero, pair = Amount(0), (payer, provider)
        opened = payer in self.free or pair in self.reserved or pair in self.settled
        return Backing(self.free.get(payer, zero), self.reserved.get(pair, zero), self.settled.get(pair, zero), opened)


@dataclass
class MemoryAccountStore:
    """Implements AccountStore on a MemoryStore."""

    store: MemoryStore

    async def jobs_of(self, account: Address, limit: int) -> list[KnownJob]:
        """See AccountStore."""
        known = [await self.store.job(job) for job in reversed(self.store.jobs) if self.store.receipts.get(job)]
        mine = [job for job in known if job is not None and account in {job.record.payer, *job.receipts}]
        return mine[:limit]

    async def tabs_of(self, account: Address, limit: int) -> list[AccountTab]:
        """See AccountStore."""
        totals: dict[tuple[Address, Address], Amount] = {}
        for receipts in self.store.receipts.values():
            for provider, (receipt, total) in receipts.items():
                tab = receipt.message.payer, provider
                totals[tab] = Amount(max(total, totals.get(tab, 0)))
        tabs = []
        for (payer, provider), total in totals.items():
            paid = self.store.settlements.get((payer, provider))
            settled, tx, block = (Amount(0), "", None) if paid is None else (paid.settled, paid.tx, paid.block)
            if account in {payer, provider}:
                tabs.append(AccountTab(payer, provider, total, settled, tx, block))
        return tabs[:limit]

    async def settled_by(self, payer: Address) -> dict[Address, Amount]:
        """See AccountStore."""
        return {provider: paid.settled for (owner, provider), paid in self.store.settlements.items() if owner == payer}
