"""The payer's ledger: tabs, orders, receipts and evidence of one wallet in one SQLite file that its processes may share.

Every change is one write transaction. It takes the file's write lock before it reads (see `runtime.storage`), so two processes
never sign from the same state of a tab. When a method returns, its change survives the process. What each job writes is not
synced to disk one by one: a power cut may take the last of it, which coordinator and providers still have
(docs/explanation/durability.md). Evidence, recovered state and a person's decisions are synced.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import structlog
from sqlalchemy import Connection

from tallystick.client.config import Budget
from tallystick.client.ledger import (
    ask_freshness,
    audit_spending,
    budgets,
    idempotency,
    job_ends,
    open_orders,
    order_writes,
    queries,
    receipt_writes,
    repair,
    spending,
    upstream_spending,
)
from tallystick.client.ledger.accounts import Account, read_accounts
from tallystick.client.ledger.budgets import BudgetStatus
from tallystick.client.ledger.idempotency import IdempotencyKey
from tallystick.client.ledger.open_orders import NO_DELIVERIES, Deliveries
from tallystick.client.ledger.order_writes import NewJob, SignOrder
from tallystick.client.ledger.process_locks import ProcessLock
from tallystick.client.ledger.queries import KnownJob
from tallystick.client.ledger.receipt_writes import IncomingReceipt
from tallystick.client.ledger.repair import OrderEvidence, PaidOrder, RecoveryResult
from tallystick.client.ledger.retention import FORGOTTEN_AT_ONCE, forget_jobs
from tallystick.client.ledger.schema import JobState
from tallystick.client.ledger.spending import DAY_SECONDS, CacheHit, SpendingRow
from tallystick.client.ledger.tabs import read_tabs, tab_key
from tallystick.client.ledger.upstream_spending import UpstreamBooking
from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.orders.tab import Tab
from tallystick.client.receipts.delivery_check import UndeliveredCharge
from tallystick.client.receipts.evidence import Evidence, EvidenceFile
from tallystick.protocol.eip712 import Domain, Signed, Verified
from tallystick.protocol.errors import BadReceipt, Fault
from tallystick.protocol.messages import Ask, Order, Receipt, Terms
from tallystick.protocol.pricing import Usage
from tallystick.protocol.types import Address, Amount, Hash, JobId
from tallystick.runtime.database_errors import explain_failed_start
from tallystick.runtime.database_url import sqlite_url
from tallystick.runtime.group_writer import FEW_JOBS
from tallystick.runtime.keystore import write_private
from tallystick.runtime.storage import Database

log = structlog.get_logger()
R = TypeVar("R")
PAGE_SIZE = 1_024
"""Bytes, of a new file. A job changes few bytes on many pages, and a transaction writes whole pages: small ones are best."""
MIGRATIONS = Path(__file__).parents[1] / "migrations"


class Ledger:
    """The ledger of one payer. Open with `Ledger.open`, close with `close`."""

    def __init__(
        self, database: Database, payer: Address, evidence: Path, process: ProcessLock, running: Callable[[], int]
    ) -> None:
        self._database, self._evidence, self._running = database, evidence, running
        self.payer = payer
        self._process = process
        self._warned: set[tuple[int, str]] = set()

    @classmethod
    async def open(cls, path: Path, payer: Address, running: Callable[[], int] = lambda: 0) -> Ledger:
        """Opens or creates the file, with mode 0600. `running` returns how many jobs run in this process.

        Raises Unavailable if the file cannot be used.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise explain_failed_start(error, sqlite_url(path), "ledger_file") from error
        database = Database(sqlite_url(path), "ledger_file", page_size=PAGE_SIZE)
        await database.start(MIGRATIONS)
        return cls(database, payer, path.parent / "evidence", ProcessLock(path), running)

    async def ping(self) -> float:
        """Waits for the ledger's writer; returns the seconds that it took. Raises Unavailable."""
        return await self._database.ping()

    def observe_commits(self, observe: Callable[[float], None]) -> None:
        """From now on, `observe` gets the seconds of each transaction."""
        self._database.on_commit = observe

    async def close(self) -> None:
        """Finishes queued writes and closes the file."""
        await self._database.close()
        self._process.release()

    async def _write(self, work: Callable[[Connection], R]) -> R:
        """Runs a step of a job in a transaction that is not synced. While few jobs run, none waits for a thread."""
        return await self._database.write(work, synced=False, brief=self._running() <= FEW_JOBS)

    async def sign_orders(
        self, job: NewJob, drafts: Sequence[tuple[Address, Terms]], sign: SignOrder, limits: Sequence[Budget] = ()
    ) -> list[PlacedOrder]:
        """Signs an order for each draft that fits the budgets and whose provider is not excluded, and stores the orders as open.

        `sign` gets the current tab; it must be pure, because it may be called twice. Raises Refusal if no draft fits a budget.
        """
        reader = self._process.name

        def store(c: Connection, fitting: Sequence[tuple[Address, Terms]]) -> list[PlacedOrder]:
            return order_writes.sign_orders(c, job, fitting, sign, reader)

        return await self._sign(job, drafts, store, limits)

    async def sign_further_orders(
        self, job: NewJob, drafts: Sequence[tuple[Address, Terms]], sign: SignOrder, limits: Sequence[Budget] = ()
    ) -> list[PlacedOrder]:
        """Like `sign_orders`, for a job that has open orders. Signs nothing for a job that has ended."""
        return await self._sign(job, drafts, lambda c, fitting: order_writes.sign_further_orders(c, job, fitting, sign), limits)

    async def _sign(
        self,
        job: NewJob,
        drafts: Sequence[tuple[Address, Terms]],
        store: Callable[[Connection, Sequence[tuple[Address, Terms]]], list[PlacedOrder]],
        limits: Sequence[Budget],
    ) -> list[PlacedOrder]:
        if not limits:
            return await self._write(lambda c: store(c, drafts))

        def sign_within_budgets(c: Connection) -> tuple[list[PlacedOrder], list[BudgetStatus]]:
            applicable = (budget for budget in limits if budget.covers(job.label))
            statuses = [budgets.budget_status(c, self.payer, budget, job.created_at) for budget in applicable]
            return store(c, budgets.fit_budgets(drafts, statuses)), statuses

        placed, statuses = await self._write(sign_within_budgets)
        for status in statuses:
            day_and_budget = (job.created_at // DAY_SECONDS, status.budget.name)
            if status.percent >= status.budget.warn_percent and day_and_budget not in self._warned:
                self._warned.add(day_and_budget)
                log.warning("a budget is nearly used up", budget=status.budget.name, percent=status.percent)
        return placed

    async def accounts(self, domain: Domain, now: int) -> list[Account]:
        """See `accounts.read_accounts`."""
        return await self._database.read(lambda c: read_accounts(c, domain, self.payer, now))

    async def budget_status(self, budget: Budget, now: int) -> BudgetStatus:
        """Returns the state of a budget on the UTC day of `now` (Unix seconds)."""
        return await self._database.read(lambda c: budgets.budget_status(c, self.payer, budget, now))

    async def record_cache_hit(self, hit: CacheHit, now: int) -> None:
        """See `spending.add_cache_hit`."""
        await self._write(lambda c: spending.add_cache_hit(c, self.payer, hit, now))

    async def reserve_upstream(self, booking: UpstreamBooking, limits: Sequence[Budget]) -> None:
        """See `upstream_spending.reserve`."""
        await self._write(lambda c: upstream_spending.reserve(c, self.payer, booking, limits))

    async def settle_upstream(self, booking: UpstreamBooking, cost: Amount, usage: Usage, *, failed: bool) -> None:
        """See `upstream_spending.settle`."""
        await self._write(lambda c: upstream_spending.settle(c, self.payer, booking, cost, usage, failed=failed))

    async def spending(self, since: int, by: Sequence[str]) -> list[SpendingRow]:
        """See `spending.read_spending`."""
        return await self._database.read(lambda c: spending.read_spending(c, self.payer, since, by))

    async def record_receipt(self, incoming: IncomingReceipt) -> BadReceipt | None:
        """Checks a receipt, records it, and ends its job if the receipt is final.

        Returns None if the tab contains the receipt now or already did, otherwise the error. A dishonest receipt blocks its
        provider and is stored as evidence, also in a file for others. A receipt that charges for what did not arrive
        (UndeliveredCharge) counts against its provider; see `delivery_check.MAX_UNDELIVERED_QUARTERS`.
        """
        error = await self._write(lambda c: receipt_writes.record_receipt(c, incoming))
        if isinstance(error, UndeliveredCharge):
            log.warning(
                "a receipt charges for what did not arrive",
                provider=incoming.placed.provider,
                job=incoming.job.hex(),
                reason=str(error),
            )
        if error is not None and error.fault is Fault.PROVIDER:
            await self._database.write(
                lambda c: receipt_writes.touch_tab(c, incoming.tab_key)
            )  # syncs the block and its evidence
            await self._write_evidence(incoming, str(error))
        return error

    async def _write_evidence(self, incoming: IncomingReceipt, reason: str) -> None:
        evidence = (await self._database.read(lambda c: queries.read_evidence(c, self.payer, incoming.job)))[-1]
        path = self._evidence / f"{incoming.job.hex()}.json"
        file = EvidenceFile.of(evidence)
        if not file.convinces:
            file = EvidenceFile.of(evidence, incoming.proof)
        try:
            await asyncio.to_thread(write_private, path, file.dumps())
        except OSError as error:
            log.warning("the evidence file could not be written", path=str(path), error=str(error))
        provider = incoming.placed.provider
        log.warning("a dishonest receipt blocked its provider", provider=provider, reason=reason, evidence=str(path))

    async def merge_proven(
        self,
        domain: Domain,
        provider: Address,
        receipts: Sequence[OrderEvidence],
        settled: Amount,
        now: int,
        *,
        paid: Sequence[PaidOrder] | None = None,
    ) -> RecoveryResult:
        """Raises the tab with a provider to what verified orders, receipts and payments prove; see `repair.merge_proven`."""
        key = tab_key(domain, self.payer, provider)
        return await self._database.write(lambda c: repair.merge_proven(c, key, receipts, settled, now, paid=paid))

    async def providers_with_tab(self, domain: Domain, providers: Sequence[Address]) -> set[Address]:
        """Returns those of the providers with which this payer has a tab."""
        return await self._database.read(lambda c: queries.providers_with_tab(c, domain, self.payer, providers))

    async def end_job(
        self,
        job: JobId,
        state: JobState,
        reason: str,
        now: int,
        *,
        deliveries: Deliveries = NO_DELIVERIES,
        matched: Sequence[Hash] = (),
        keep_orders_open: bool = False,
    ) -> None:
        """Ends a job without a receipt; see `job_ends.end_job`."""
        await self._write(
            lambda c: job_ends.end_job(
                c, job, state, reason, now, deliveries=deliveries, matched=matched, keep_orders_open=keep_orders_open
            )
        )

    async def store_deliveries(self, job: JobId, deliveries: Deliveries, *, matched: bool = True) -> None:
        """Stores what arrived of a stream that is no longer read; a receipt that comes later may charge only for that.

        `matched`: providers are known to have had these orders, which then count until a receipt or their `claim_by`.
        """

        def store(c: Connection) -> None:
            open_orders.store_deliveries(c, job, deliveries)
            if matched:
                open_orders.mark_dispatched(c, job, deliveries)

        await self._database.write(store, synced=False)

    async def set_reader(self, job: JobId) -> None:
        """Makes this process the reader of a job that another process placed."""
        await self._database.write(lambda c: open_orders.set_reader(c, job, self._process.name), synced=False)

    async def mark_cancelled(self, job: JobId) -> None:
        """Notes that this client asks for the end of a job; its receipt may then say that the client cancelled."""
        await self._database.write(lambda c: open_orders.mark_cancelled(c, job), synced=False)

    async def jobs_awaiting_receipts(self, now: int, every: int, limit: int = 100) -> list[JobId]:
        """Returns ended jobs for which the coordinator should be asked now; see `queries.jobs_awaiting_receipts`."""
        return await self._database.read(lambda c: queries.jobs_awaiting_receipts(c, self.payer, now, every, limit))

    async def record_inquiry(self, job: JobId, now: int) -> None:
        """Stores when the coordinator was last asked about an ended job."""
        await self._database.write(lambda c: queries.record_inquiry(c, job, now), synced=False)

    async def known_orders(self, signed: Sequence[Verified[Order]]) -> dict[Hash, JobId]:
        """Returns the job of each of these orders, by digest; orders that the ledger lacks are left out."""
        return await self._database.read(lambda c: queries.known_orders(c, signed))

    async def store_key(self, key: IdempotencyKey, oldest: int) -> IdempotencyKey:
        """Stores a key unless it already has a job, and returns the stored key: another process may have been faster."""
        return await self._write(lambda c: idempotency.store_key(c, self.payer, key, oldest))

    async def find_key(self, key: str) -> IdempotencyKey | None:
        """Returns the stored key with its job, or None."""
        return await self._database.read(lambda c: idempotency.find_key(c, self.payer, key))

    async def batch_keys(self, batch: str) -> set[str]:
        """Returns the stored keys of a batch's lines."""
        return await self._database.read(lambda c: idempotency.batch_keys(c, self.payer, batch))

    async def forget_key(self, key: str) -> None:
        """Deletes a key; it may be used again."""
        await self._database.write(lambda c: idempotency.forget_key(c, self.payer, key), synced=False)

    async def forget_key_of(self, job: JobId) -> None:
        """Deletes the key, if any, of a job that costs nothing; the key may be used again. That of another job stays."""
        await self._database.write(lambda c: idempotency.forget_key_of(c, self.payer, job), synced=False)

    async def tab(self, domain: Domain, provider: Address, now: int) -> Tab:
        """Returns the tab with one provider."""
        tabs = await self._database.read(lambda c: read_tabs(c, domain, self.payer, [provider], now))
        return tabs[provider]

    async def blocked(self, domain: Domain | None = None) -> dict[Address, str]:
        """Returns the providers that get no orders until a person unblocks them, with the reason; in one deployment or in all."""
        return await self._database.read(lambda c: queries.blocked(c, self.payer, domain))

    async def excluded(self, domain: Domain, now: int) -> dict[Address, str]:
        """Returns the providers that get no orders now, with the reason: blocked ones, and those that owe too many receipts."""
        return await self._database.read(lambda c: queries.excluded(c, domain, self.payer, now))

    async def stale_asks(self, domain: Domain, asks: Sequence[Verified[Ask]], now: int) -> dict[Hash, str]:
        """Remembers the newest of these asks. Returns why some must not be ordered on, by digest; see `ask_freshness`."""
        products = [ask_freshness.product_of(ask.message) for ask in asks]
        known, aged = await self._database.read(lambda c: ask_freshness.read_newest(c, domain, products, now))
        reasons, newer = ask_freshness.find_stale(asks, known)
        if newer or aged:
            await self._database.write(lambda c: ask_freshness.remember_asks(c, domain, asks, now), synced=False)
        return reasons

    async def block(self, domain: Domain, provider: Address, reason: str) -> bool:
        """Lets a provider have no more orders until a person unblocks it. Returns whether it could have some before."""
        key = tab_key(domain, self.payer, provider)
        return await self._database.write(lambda c: receipt_writes.block_provider(c, key, reason))

    async def spent_on_jobs(self, since: int) -> Amount:
        """See `audit_spending.spent_on_jobs`."""
        return await self._database.read(lambda c: audit_spending.spent_on_jobs(c, self.payer, since))

    async def jobs_of(self, provider: Address) -> int:
        """See `audit_spending.jobs_of`."""
        return await self._database.read(lambda c: audit_spending.jobs_of(c, self.payer, provider))

    async def unblock(self, provider: Address, now: int) -> bool:
        """Lets a provider have orders again, in every deployment; see `repair.unblock`. Returns whether it was blocked."""
        return await self._database.write(lambda c: repair.unblock(c, self.payer, provider, now))

    async def unresolved_jobs(self, limit: int = 1_000) -> list[JobId]:
        """Returns the jobs whose end is unknown, oldest first.

        Jobs that another living process reads are left out.
        """
        jobs = await self._database.read(lambda c: queries.unresolved_jobs(c, self.payer, limit))
        living = {reader for reader in {reader for _, reader in jobs} if self._process.other_is_alive(reader)}
        return [job for job, reader in jobs if reader not in living]

    async def forget_jobs(self, now: int, keep: int, limit: int = FORGOTTEN_AT_ONCE) -> bool:
        """Deletes jobs that ended more than `keep` seconds before `now` and are not needed, oldest first; see `retention`.

        Returns whether there may be more of them: one call deletes at most `limit`.
        """
        return await self._database.write(lambda c: forget_jobs(c, self.payer, now, keep, limit), synced=False) == limit

    async def find_job(self, job: JobId) -> KnownJob | None:
        """Returns a job with its orders and receipt; None if the ledger does not have it."""
        return await self._database.read(lambda c: queries.find_job(c, self.payer, job))

    async def latest_jobs(self, limit: int) -> list[KnownJob]:
        """Returns the last jobs, newest first."""
        return await self._database.read(lambda c: queries.latest_jobs(c, self.payer, limit))

    async def receipts(self, domain: Domain, provider: Address) -> list[Signed[Receipt]]:
        """Returns every recorded receipt of a provider, by seq."""
        return await self._database.read(lambda c: queries.signed_receipts(c, domain, self.payer, provider))

    async def evidence(self) -> list[Evidence]:
        """Returns the evidence against all providers, oldest first."""
        return await self._database.read(lambda c: queries.read_evidence(c, self.payer))
