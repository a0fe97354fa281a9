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
from tallystick.client.ledger.budgets import DAY_SECONDS, Hit, Spent, Standing
from tallystick.client.ledger.idempotency import Keyed
from tallystick.client.ledger.open_orders import NOTHING, Arrived
from tallystick.client.ledger.process_locks import Presence
from tallystick.client.ledger.queries import KnownJob
from tallystick.client.ledger.repair import Found, Paid, Shown
from tallystick.client.ledger.schema import JobState, venue
from tallystick.client.ledger.writes import Arrival, NewJob, Sign
from tallystick.client.receipts.checks import Placed, Tab, Undelivered
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

    def __init__(self, database: Database, payer: Address, evidence: Path, presence: Presence) -> None:
        self._database, self._evidence = database, evidence
        self.payer = payer
        self._presence = presence
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
        return cls(database, payer, path.parent / "evidence", Presence(path))

    async def close(self) -> None:
        """Finishes what is queued and lets go of the file."""
        await self._database.close()
        self._presence.leave()

    async def take(
        self, job: NewJob, drafts: Sequence[tuple[Address, Terms]], sign: Sign, limits: Sequence[Budget] = ()
    ) -> list[Placed]:
        """Signs an order for each draft that the limits have room for and whose provider is not barred, and remembers them as
        open. Raises Refusal where a budget has no room.

        `sign` must be pure: it may be called twice. It gets the tab as it is at that moment.
        """
        reader = self._presence.name
        if not limits:
            return await self._database.write(lambda c: writes.take(c, job, drafts, sign, reader))

        def take(c: Connection) -> tuple[list[Placed], list[Standing]]:
            mine = (budget for budget in limits if budget.covers(job.label))
            stands = [budgets.standing(c, self.payer, budget, job.created_at) for budget in mine]
            return writes.take(c, job, budgets.within(drafts, stands), sign, reader), stands

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

    async def standing(self, budget: Budget, now: int) -> Standing:
        """How a budget stands today."""
        return await self._database.read(lambda c: budgets.standing(c, self.payer, budget, now))

    async def note_hit(self, hit: Hit, now: int) -> None:
        """See `spending.add_hit`."""
        await self._database.write(lambda c: budgets.add_hit(c, self.payer, hit, now))

    async def spent(self, since: int, by: Sequence[str]) -> list[Spent]:
        """See `spending.read`."""
        return await self._database.read(lambda c: budgets.read(c, self.payer, since, by))

    async def book(self, arrival: Arrival) -> BadReceipt | None:
        """Checks a receipt and, where it is final, ends its job. Returns None if the tab now contains it (or did before), else
        what is wrong.

        A dishonest receipt is kept as evidence, also in a file for others, and freezes the tab with its provider. One that
        charges for what did not arrive (Undelivered) counts against its provider; see payer.MAX_UNDELIVERED.
        """
        complaint = await self._database.write(lambda c: writes.book(c, arrival))
        if isinstance(complaint, Undelivered):
            log.warning("charged and not delivered", provider=arrival.placed.provider, job=arrival.job.hex(), why=str(complaint))
        if complaint is not None and complaint.fault is Fault.PROVIDER:
            await self._write_evidence(arrival, str(complaint))
        return complaint

    async def _write_evidence(self, arrival: Arrival, reason: str) -> None:
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

    async def adopt(
        self,
        domain: Domain,
        provider: Address,
        shown: Sequence[Shown],
        settled: Amount,
        now: int,
        *,
        paid: Sequence[Paid] | None = None,
    ) -> Found:
        """Raises the tab with a provider to what these verified orders and receipts prove; see mending.adopt."""
        where: dict[str, object] = {"of_venue": venue(domain), "of_payer": self.payer, "of_provider": provider}
        return await self._database.write(lambda c: repair.adopt(c, where, shown, settled, now, paid=paid))

    async def traded(self, domain: Domain, providers: Sequence[Address]) -> set[Address]:
        """Those of the providers with whom there is a tab."""
        return await self._database.read(lambda c: queries.traded(c, domain, self.payer, providers))

    async def end(
        self,
        job: JobId,
        state: JobState,
        reason: str,
        now: int,
        *,
        arrived: Arrived = NOTHING,
        matched: Sequence[Hash] = (),
        keep: bool = False,
    ) -> None:
        """Ends a job that has no receipt. Its orders in `arrived` and `matched`, which providers had, count until `claim_by`; see
        books.end.
        """
        await self._database.write(lambda c: writes.end(c, job, state, reason, now, arrived=arrived, matched=matched, keep=keep))

    async def note_arrived(self, arrived: Arrived, *, matched: bool = True) -> None:
        """Keeps what arrived of a stream that nobody reads any more: a receipt that comes later charges for that alone.

        `matched`: providers are known to have had these orders, which count until `claim_by` or a receipt.
        """

        def note(c: Connection) -> None:
            open_orders.keep(c, arrived)
            if matched:
                open_orders.dispatched(c, arrived)

        await self._database.write(note)

    async def note_reader(self, job: JobId) -> None:
        """This process takes a job up that another one placed."""
        await self._database.write(lambda c: open_orders.read_by(c, job, self._presence.name))

    async def note_cancelled(self, job: JobId) -> None:
        """This client asks for a job's end: whichever process reads its receipt, it may say so."""
        await self._database.write(lambda c: open_orders.cancelled(c, job))

    async def outstanding(self, now: int, every: int, limit: int = 100) -> list[JobId]:
        """Ended jobs whose receipts are outstanding and due to be asked about; see lookups.outstanding."""
        return await self._database.read(lambda c: queries.outstanding(c, self.payer, now, every, limit))

    async def note_asked(self, job: JobId, now: int) -> None:
        """The coordinator was asked about an ended job."""
        await self._database.write(lambda c: queries.asked(c, job, now))

    async def known_orders(self, digests: Sequence[Hash]) -> dict[Hash, JobId]:
        """The jobs of those among these orders that the ledger has."""
        return await self._database.read(lambda c: queries.known_orders(c, digests))

    async def keep_key(self, keyed: Keyed, horizon: int) -> Keyed:
        """Remembers which job a key stands for, and returns what it stands for: another process may have been faster."""
        return await self._database.write(lambda c: idempotency.put(c, self.payer, keyed, horizon))

    async def keyed(self, key: str) -> Keyed | None:
        """The job that a key stands for."""
        return await self._database.read(lambda c: idempotency.find(c, self.payer, key))

    async def forget_key(self, key: str) -> None:
        """The key stands for no job any more."""
        await self._database.write(lambda c: idempotency.forget(c, self.payer, key))

    async def forget_key_of(self, job: JobId) -> None:
        """No provider took the job: its key, if it has one, stands for no job any more."""
        await self._database.write(lambda c: idempotency.forget_job(c, self.payer, job))

    async def tab(self, domain: Domain, provider: Address, now: int) -> Tab:
        """The tab with one provider."""
        found = await self._database.read(lambda c: writes.read_tabs(c, domain, self.payer, [provider], now))
        return found[provider]

    async def frozen(self, domain: Domain | None = None) -> dict[Address, str]:
        """The providers that get no more orders until they are forgiven, and why; in one deployment or in all."""
        return await self._database.read(lambda c: queries.frozen(c, self.payer, domain))

    async def barred(self, domain: Domain, now: int) -> dict[Address, str]:
        """The providers that get no orders now, and why: frozen ones, and those that owe too many receipts."""
        return await self._database.read(lambda c: queries.barred(c, domain, self.payer, now))

    async def stale(self, domain: Domain, asks: Sequence[Verified[Ask]], now: int) -> dict[Hash, str]:
        """Why some of these asks are not to be ordered on, by digest, and remembers the newest ones. See freshness."""
        products = [ask_freshness.product_of(ask.message) for ask in asks]
        known, aged = await self._database.read(lambda c: ask_freshness.read(c, domain, products, now))
        reasons, newer = ask_freshness.judge(asks, known)
        if newer or aged:
            await self._database.write(lambda c: ask_freshness.note(c, domain, asks, now))
        return reasons

    async def forgive(self, provider: Address, now: int) -> bool:
        """Lets a provider have orders again, in every deployment; whether it was frozen. The evidence stays. See mending."""
        return await self._database.write(lambda c: repair.forgive(c, self.payer, provider, now))

    async def unresolved(self, before: int, limit: int = 1_000) -> list[JobId]:
        """Jobs made until that Unix time whose end this ledger does not know, oldest first; not those that another living process
        reads.
        """
        found = await self._database.read(lambda c: queries.unresolved(c, self.payer, before, limit))
        living = {reader for reader in {reader for _, reader in found} if self._presence.other_lives(reader)}
        return [job for job, reader in found if reader not in living]

    async def find(self, job: JobId) -> KnownJob | None:
        """What is known of a job."""
        return await self._database.read(lambda c: queries.find(c, self.payer, job))

    async def latest(self, limit: int) -> list[KnownJob]:
        """The newest jobs, newest first."""
        return await self._database.read(lambda c: queries.latest(c, self.payer, limit))

    async def receipts(self, domain: Domain, provider: Address) -> list[Signed[Receipt]]:
        """Every receipt of a provider that was booked, in the order of their seq."""
        return await self._database.read(lambda c: queries.signed_receipts(c, domain, self.payer, provider))

    async def evidence(self) -> list[Evidence]:
        """Every dishonest receipt, oldest first."""
        return await self._database.read(lambda c: queries.read_evidence(c, self.payer))
