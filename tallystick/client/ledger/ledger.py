"""The payer's ledger: tabs, orders, receipts and evidence of one wallet in one SQLite file, which its processes may share.

Every change is one write transaction; it has the file's write lock before it reads (see `runtime.storage`), so that two processes
never sign from the same state of a tab. What a method returned is on disk.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import structlog
from sqlalchemy import Connection

from tallystick.client.config import Budget
from tallystick.client.ledger import ask_freshness, budgets, idempotency, open_orders, queries, repair, writes
from tallystick.client.ledger.accounts import Account, read_accounts
from tallystick.client.ledger.budgets import DAY_SECONDS, BudgetStatus, CacheHit, SpendingRow
from tallystick.client.ledger.idempotency import IdempotencyKey
from tallystick.client.ledger.open_orders import NO_DELIVERIES, Deliveries
from tallystick.client.ledger.process_locks import ProcessLock
from tallystick.client.ledger.queries import KnownJob
from tallystick.client.ledger.repair import OrderEvidence, PaidOrder, RecoveryResult
from tallystick.client.ledger.schema import JobState, deployment_id
from tallystick.client.ledger.writes import IncomingReceipt, NewJob, SignOrder
from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.orders.tab import Tab
from tallystick.client.receipts.delivery_check import UndeliveredCharge
from tallystick.client.receipts.evidence import Evidence, EvidenceFile
from tallystick.protocol.eip712 import Domain, Signed, Verified
from tallystick.protocol.errors import BadReceipt, Code, Fault, Unavailable
from tallystick.protocol.messages import Ask, Receipt, Terms
from tallystick.protocol.types import Address, Amount, Hash, JobId
from tallystick.runtime.keystore import write_private
from tallystick.runtime.storage import Database

log = structlog.get_logger()
MIGRATIONS = Path(__file__).parents[1] / "migrations"


class Ledger:
    """The ledger of one payer. Open with `Ledger.open`, close with `close`."""

    def __init__(self, database: Database, payer: Address, evidence: Path, presence: ProcessLock) -> None:
        self._database, self._evidence = database, evidence
        self.payer = payer
        self._process = presence
        self._warned: set[tuple[int, str]] = set()

    @classmethod
    async def open(cls, path: Path, payer: Address) -> Ledger:
        """Opens or makes the file (mode 0600). Raises Unavailable if it cannot be used."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise Unavailable(Code.DATABASE_UNAVAILABLE, f"state file {path}: {error.strerror}", fault=Fault.CLIENT) from error
        database = Database(f"sqlite:///{path}")
        await database.start(MIGRATIONS)
        return cls(database, payer, path.parent / "evidence", ProcessLock(path))

    async def close(self) -> None:
        """Finishes what is queued and lets go of the file."""
        await self._database.close()
        self._process.leave()

    async def sign_orders(
        self, job: NewJob, drafts: Sequence[tuple[Address, Terms]], sign: SignOrder, limits: Sequence[Budget] = ()
    ) -> list[PlacedOrder]:
        """Signs an order for each draft that the limits have room for and whose provider is not barred, and remembers them as
        open. Raises Refusal where a budget has no room.

        `sign` must be pure: it may be called twice. It gets the tab as it is at that moment.
        """
        reader = self._process.name
        if not limits:
            return await self._database.write(lambda c: writes.sign_orders(c, job, drafts, sign, reader))

        def take(c: Connection) -> tuple[list[PlacedOrder], list[BudgetStatus]]:
            mine = (budget for budget in limits if budget.covers(job.label))
            stands = [budgets.budget_status(c, self.payer, budget, job.created_at) for budget in mine]
            return writes.sign_orders(c, job, budgets.fit_budgets(drafts, stands), sign, reader), stands

        placed, stands = await self._database.write(take)
        for one in stands:
            known = (job.created_at // DAY_SECONDS, one.budget.name)
            if one.percent >= one.budget.warn_percent and known not in self._warned:
                self._warned.add(known)
                log.warning("a budget is nearly used up", budget=one.budget.name, percent=one.percent)
        return placed

    async def accounts(self, domain: Domain, now: int) -> list[Account]:
        """See `accounts.read_accounts`."""
        return await self._database.read(lambda c: read_accounts(c, domain, self.payer, now))

    async def budget_status(self, budget: Budget, now: int) -> BudgetStatus:
        """How a budget stands today."""
        return await self._database.read(lambda c: budgets.budget_status(c, self.payer, budget, now))

    async def record_cache_hit(self, hit: CacheHit, now: int) -> None:
        """See `spending.add_hit`."""
        await self._database.write(lambda c: budgets.add_cache_hit(c, self.payer, hit, now))

    async def spending(self, since: int, by: Sequence[str]) -> list[SpendingRow]:
        """See `spending.read`."""
        return await self._database.read(lambda c: budgets.read_spending(c, self.payer, since, by))

    async def record_receipt(self, arrival: IncomingReceipt) -> BadReceipt | None:
        """Checks a receipt and, where it is final, ends its job. Returns None if the tab now contains it (or did before), else
        what is wrong.

        A dishonest receipt is kept as evidence, also in a file for others, and freezes the tab with its provider. One that
        charges for what did not arrive (Undelivered) counts against its provider; see payer.MAX_UNDELIVERED.
        """
        complaint = await self._database.write(lambda c: writes.record_receipt(c, arrival))
        if isinstance(complaint, UndeliveredCharge):
            log.warning("charged and not delivered", provider=arrival.placed.provider, job=arrival.job.hex(), why=str(complaint))
        if complaint is not None and complaint.fault is Fault.PROVIDER:
            await self._write_evidence(arrival, str(complaint))
        return complaint

    async def _write_evidence(self, arrival: IncomingReceipt, reason: str) -> None:
        found = await self._database.read(lambda c: queries.read_evidence(c, self.payer, arrival.job))
        path = self._evidence / f"{arrival.job.hex()}.json"
        file = EvidenceFile.of(found[-1])
        if not file.convinces:
            file = EvidenceFile.of(found[-1], arrival.proof)
        try:
            await asyncio.to_thread(write_private, path, file.dumps())
        except OSError as error:
            log.warning("evidence was not written to a file", path=str(path), error=str(error))
        provider = arrival.placed.provider
        log.warning("a dishonest receipt: its provider gets no more orders", provider=provider, why=reason, evidence=str(path))

    async def merge_proven(
        self,
        domain: Domain,
        provider: Address,
        shown: Sequence[OrderEvidence],
        settled: Amount,
        now: int,
        *,
        paid: Sequence[PaidOrder] | None = None,
    ) -> RecoveryResult:
        """Raises the tab with a provider to what these verified orders and receipts prove; see mending.adopt."""
        where: dict[str, object] = {"of_deployment_id": deployment_id(domain), "of_payer": self.payer, "of_provider": provider}
        return await self._database.write(lambda c: repair.merge_proven(c, where, shown, settled, now, paid=paid))

    async def providers_with_tab(self, domain: Domain, providers: Sequence[Address]) -> set[Address]:
        """Those of the providers with whom there is a tab."""
        return await self._database.read(lambda c: queries.providers_with_tab(c, domain, self.payer, providers))

    async def end_job(
        self,
        job: JobId,
        state: JobState,
        reason: str,
        now: int,
        *,
        arrived: Deliveries = NO_DELIVERIES,
        matched: Sequence[Hash] = (),
        keep: bool = False,
    ) -> None:
        """Ends a job that has no receipt. Its orders in `arrived` and `matched`, which providers had, count until `claim_by`; see
        books.end.
        """
        await self._database.write(
            lambda c: writes.end_job(c, job, state, reason, now, arrived=arrived, matched=matched, keep=keep)
        )

    async def store_deliveries(self, arrived: Deliveries, *, matched: bool = True) -> None:
        """Keeps what arrived of a stream that nobody reads any more: a receipt that comes later charges for that alone.

        `matched`: providers are known to have had these orders, which count until `claim_by` or a receipt.
        """

        def note(c: Connection) -> None:
            open_orders.store_deliveries(c, arrived)
            if matched:
                open_orders.mark_dispatched(c, arrived)

        await self._database.write(note)

    async def set_reader(self, job: JobId) -> None:
        """This process takes a job up that another one placed."""
        await self._database.write(lambda c: open_orders.set_reader(c, job, self._process.name))

    async def mark_cancelled(self, job: JobId) -> None:
        """This client asks for a job's end: whichever process reads its receipt, it may say so."""
        await self._database.write(lambda c: open_orders.mark_cancelled(c, job))

    async def jobs_awaiting_receipts(self, now: int, every: int, limit: int = 100) -> list[JobId]:
        """Ended jobs whose receipts are outstanding and due to be asked about; see lookups.outstanding."""
        return await self._database.read(lambda c: queries.jobs_awaiting_receipts(c, self.payer, now, every, limit))

    async def record_inquiry(self, job: JobId, now: int) -> None:
        """The coordinator was asked about an ended job."""
        await self._database.write(lambda c: queries.record_inquiry(c, job, now))

    async def known_orders(self, digests: Sequence[Hash]) -> dict[Hash, JobId]:
        """The jobs of those among these orders that the ledger has."""
        return await self._database.read(lambda c: queries.known_orders(c, digests))

    async def store_key(self, keyed: IdempotencyKey, horizon: int) -> IdempotencyKey:
        """Remembers which job a key stands for, and returns what it stands for: another process may have been faster."""
        return await self._database.write(lambda c: idempotency.store_key(c, self.payer, keyed, horizon))

    async def find_key(self, key: str) -> IdempotencyKey | None:
        """The job that a key stands for."""
        return await self._database.read(lambda c: idempotency.find_key(c, self.payer, key))

    async def forget_key(self, key: str) -> None:
        """The key stands for no job any more."""
        await self._database.write(lambda c: idempotency.forget_key(c, self.payer, key))

    async def forget_key_of(self, job: JobId) -> None:
        """No provider took the job: its key, if it has one, stands for no job any more."""
        await self._database.write(lambda c: idempotency.forget_key_of(c, self.payer, job))

    async def tab(self, domain: Domain, provider: Address, now: int) -> Tab:
        """The tab with one provider."""
        found = await self._database.read(lambda c: writes.read_tabs(c, domain, self.payer, [provider], now))
        return found[provider]

    async def blocked(self, domain: Domain | None = None) -> dict[Address, str]:
        """The providers that get no more orders until they are forgiven, and why; in one deployment or in all."""
        return await self._database.read(lambda c: queries.blocked(c, self.payer, domain))

    async def excluded(self, domain: Domain, now: int) -> dict[Address, str]:
        """The providers that get no orders now, and why: frozen ones, and those that owe too many receipts."""
        return await self._database.read(lambda c: queries.excluded(c, domain, self.payer, now))

    async def stale_asks(self, domain: Domain, asks: Sequence[Verified[Ask]], now: int) -> dict[Hash, str]:
        """Why some of these asks are not to be ordered on, by digest, and remembers the newest ones. See freshness."""
        products = [ask_freshness.product_of(ask.message) for ask in asks]
        known, aged = await self._database.read(lambda c: ask_freshness.read_newest(c, domain, products, now))
        reasons, newer = ask_freshness.find_stale(asks, known)
        if newer or aged:
            await self._database.write(lambda c: ask_freshness.remember_asks(c, domain, asks, now))
        return reasons

    async def unblock(self, provider: Address, now: int) -> bool:
        """Lets a provider have orders again, in every deployment; whether it was frozen. The evidence stays. See mending."""
        return await self._database.write(lambda c: repair.unblock(c, self.payer, provider, now))

    async def unresolved_jobs(self, before: int, limit: int = 1_000) -> list[JobId]:
        """Jobs made until that Unix time whose end this ledger does not know, oldest first; not those that another living process
        reads.
        """
        found = await self._database.read(lambda c: queries.unresolved_jobs(c, self.payer, before, limit))
        living = {reader for reader in {reader for _, reader in found} if self._process.other_lives(reader)}
        return [job for job, reader in found if reader not in living]

    async def find_job(self, job: JobId) -> KnownJob | None:
        """What is known of a job."""
        return await self._database.read(lambda c: queries.find_job(c, self.payer, job))

    async def latest_jobs(self, limit: int) -> list[KnownJob]:
        """The newest jobs, newest first."""
        return await self._database.read(lambda c: queries.latest_jobs(c, self.payer, limit))

    async def receipts(self, domain: Domain, provider: Address) -> list[Signed[Receipt]]:
        """Every receipt of a provider that was booked, in the order of their seq."""
        return await self._database.read(lambda c: queries.signed_receipts(c, domain, self.payer, provider))

    async def evidence(self) -> list[Evidence]:
        """Every dishonest receipt, oldest first."""
        return await self._database.read(lambda c: queries.read_evidence(c, self.payer))
