"""The node's store: SQLAlchemy Core on SQLite.

A write survives the process when its method returns. Receipts and claims are synced to disk by then, and with them all that was
written before; see docs/explanation/durability.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
import sqlalchemy.dialects.sqlite
from sqlalchemy import Connection

from node.domain.gas_totals import GasTotals
from node.domain.order_admission import AdmittedJob, MatchedOrder
from node.domain.signed_ceilings import SignedCeiling
from node.domain.tabs import Funds, StoredTab
from node.ports import (
    ClaimableTab,
    CoordinatorHour,
    DoubtfulReceipt,
    FeeTotal,
    PayoutRecord,
    ReceiptRecord,
    UnacknowledgedReceipt,
    WriteOff,
    stale_claim,
)
from node.storage import voiding
from node.storage.job_rows import NO_CEILING, JobWrite, add_ceiling, put_tabs, tab_end, tab_row, to_beginning, to_ending
from node.storage.job_writer import JobWriter, failed
from node.storage.retention import Page, prune
from node.storage.rows import (
    pack_address,
    read_claimable_tab,
    read_order,
    read_receipt,
    read_stored_tab,
    to_order_row,
    to_receipt_row,
)
from node.storage.schema import (
    ceilings,
    completed_recoveries,
    coordinator_hours,
    fee_cursor,
    gas,
    identity,
    open_orders,
    orders,
    payouts,
    receipts,
    tabs,
)
from tallystick.protocol.eip712 import Domain, Signed, Verified
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Claim, Order, Receipt
from tallystick.protocol.types import Address, Amount, Hash, JobId
from tallystick.runtime.prepared import Prepared
from tallystick.runtime.storage import Database

R = TypeVar("R")
MIGRATIONS = Path(__file__).parents[1] / "migrations"


class SqlStore:
    """JobStore, ReceiptStore, RecoveryStore, ClaimStore, CoordinatorCreditStore and StartupStore over one database."""

    def __init__(self, url: str | sa.URL, provider: Address, domain: Domain) -> None:
        self._db = Database(url, "state")
        self._provider, self._domain = provider, domain
        self._next_order = self._next_receipt = 1
        self._running: dict[Hash, int] = {}
        """The number of each order that has no receipt yet."""
        self.gas_totals = GasTotals()
        self._jobs = JobWriter(self._db, lambda: len(self._running))

    async def start(self) -> None:
        """Connects and migrates. Raises Unavailable, or BadMessage if this is the state of another key, chain or contract."""
        await self._db.start(MIGRATIONS)
        mine = {"provider": self._provider, "chain_id": self._domain.chain_id, "contract": self._domain.contract}

        def work(connection: Connection) -> dict[str, Any]:
            row = connection.execute(sa.select(identity)).mappings().first()
            if row is None:
                connection.execute(sa.insert(identity).values(mine))
            self._next_order = _after(connection, orders.c.id)
            self._next_receipt = _after(connection, receipts.c.id)
            self._running = {Hash(digest): number for digest, number in connection.execute(_UNFINISHED).all()}
            return dict(row or mine)

        stored = await self._db.write(work)
        if stored != mine:
            await self.close()
            text = f"this state belongs to {_describe(stored)}, but the node is {_describe(mine)}"
            raise BadMessage(f"{text}; pass the --wallet of this state, or use another `state` folder")

    async def ping(self) -> float:
        """Waits for the database; returns the seconds that its answer took. Raises Unavailable."""
        return await self._db.ping()

    def observe_commits(self, observe: Callable[[float], None]) -> None:
        """From now on, `observe` gets the seconds of each transaction."""
        self._db.on_commit = observe

    async def read(self, work: Callable[[Connection], R]) -> R:
        """Runs `work` on one consistent snapshot and returns its result."""
        return await self._db.read(work)

    async def close(self) -> None:
        """Completes queued writes and closes the database."""
        await self._jobs.close()
        await self._db.close()

    # Jobs

    def begin(self, admitted: AdmittedJob, at: int) -> asyncio.Future[None]:
        """See ports.JobStore. The future fails with ValueError for an order whose job runs."""
        digest, number = admitted.order.digest, self._next_order
        if digest in self._running:
            return failed(ValueError(f"order {digest.hex()}: it was begun before and has no receipt yet"))
        self._running[digest], self._next_order = number, number + 1
        stored = self._jobs.add(JobWrite(to_beginning(number, admitted, at, admitted.order.message.ceiling)))
        stored.add_done_callback(partial(self._begun, digest))
        return stored

    def _begun(self, digest: Hash, stored: asyncio.Future[None]) -> None:
        if stored.cancelled() or stored.exception() is not None:
            self._running.pop(digest, None)

    def record_receipt(self, record: ReceiptRecord) -> asyncio.Future[None]:
        """See ports.JobStore. The future fails with ValueError for an order that was not begun or has its receipt."""
        digest, number = record.matched.order.digest, self._next_receipt
        order_id = self._running.pop(digest, None)
        if order_id is None:
            return failed(ValueError(f"order {digest.hex()}: expected one that was begun and has no receipt yet"))
        self._next_receipt = number + 1
        return self._jobs.add(JobWrite(None, to_ending(number, order_id, record)))

    def record_refusal(self, record: ReceiptRecord) -> asyncio.Future[None]:
        """See ports.JobStore. The future fails with ValueError for an order whose job runs."""
        digest, order_id, number = record.matched.order.digest, self._next_order, self._next_receipt
        if digest in self._running:
            return failed(ValueError(f"order {digest.hex()}: expected one that was not begun"))
        self._next_order, self._next_receipt = order_id + 1, number + 1
        beginning = to_beginning(order_id, record.matched, record.receipt.message.finished_at, NO_CEILING)
        return self._jobs.add(JobWrite(beginning, to_ending(number, order_id, record)))

    # Receipts

    async def unacknowledged(self, coordinator: Address, before: int, page: int, size: int) -> list[UnacknowledgedReceipt]:
        """See ports.ReceiptStore."""
        query = (
            sa.select(orders.c.digest, orders.c.document, receipts.c.document.label("receipt"))
            .select_from(open_orders)
            .join(orders, orders.c.id == open_orders.c.order_id)
            .join(receipts, receipts.c.id == open_orders.c.receipt_id)
            .where(open_orders.c.coordinator == coordinator, receipts.c.finished_at < before)
            .order_by(receipts.c.finished_at, receipts.c.id)
            .limit(size)
            .offset(page * size)
        )
        rows = await self._db.read(lambda c: c.execute(query).all())
        unacknowledged = []
        for digest, document, receipt in rows:
            order, terms = read_order(digest, document)
            unacknowledged.append(UnacknowledgedReceipt(terms.job, LateReceipt(read_receipt(receipt), order, terms)))
        return unacknowledged

    async def acknowledge(self, coordinator: Address, jobs: Iterable[JobId]) -> None:
        """See ports.ReceiptStore."""
        rows = [{"of_job": job, "of_coordinator": coordinator} for job in jobs]
        await self._db.write(lambda c: _ACKNOWLEDGE.run(c, *rows), synced=False)

    async def doubtful_receipts(self) -> list[DoubtfulReceipt]:
        """See ports.VoidStore."""
        return await self._db.read(voiding.doubtful)

    async def void(self, payer: Address, receipts: Sequence[DoubtfulReceipt]) -> list[MatchedOrder]:
        """See ports.VoidStore."""
        numbers = await self._db.write(partial(voiding.void, payer=payer, receipts=receipts))
        self._running |= {matched.order.digest: number for number, matched in numbers.items()}
        return list(numbers.values())

    # State recovery

    async def record_recovered(self, receipt: Verified[Receipt], order: Verified[Order], late: LateReceipt) -> None:
        """See ports.RecoveryStore. A receipt that is no later than the tab changes nothing."""
        message, ordered = receipt.message, order.message
        order_id, receipt_id = self._next_order, self._next_receipt
        self._next_order, self._next_receipt = order_id + 1, receipt_id + 1
        order_row = to_order_row(order_id, order, late.terms, None)
        receipt_row = to_receipt_row(receipt_id, receipt, order_id, None)
        tab = tab_row(message.payer, message.seq, message.cumulative_cost, message.finished_at)

        def work(connection: Connection) -> None:
            if tab_end(connection, message.payer)[0] >= message.seq:
                return
            connection.execute(sa.insert(orders), order_row)
            connection.execute(sa.insert(receipts), receipt_row)
            put_tabs(connection, [tab])
            add_ceiling(connection, message.payer, ordered.ceiling, ordered.claim_by, order_id)

        await self._db.write(work)

    async def record_recovery_complete(self, coordinator: Address, url: str, at: int) -> None:
        """See ports.RecoveryStore."""
        query = sa.dialects.sqlite.insert(completed_recoveries).on_conflict_do_nothing()
        await self._db.write(lambda c: c.execute(query, {"coordinator": coordinator, "url": url, "at": at}))

    async def completed_recoveries(self) -> list[tuple[Address, str]]:
        """See ports.RecoveryStore."""
        rows = await self._db.read(
            lambda c: c.execute(sa.select(completed_recoveries.c.coordinator, completed_recoveries.c.url)).all()
        )
        return [(Address(coordinator), url) for coordinator, url in rows]

    # Claims

    async def claimable(self, now: int, limit: int, skip: int = 0) -> list[ClaimableTab]:
        """See ports.ClaimStore."""
        values = {"now": now, "size": limit, "skip": skip}
        rows = await self._db.read(lambda c: c.execute(_CLAIMABLE, values).mappings().all())
        return [read_claimable_tab(row) for row in rows]

    async def record_funds(self, payer: Address, funds: Funds, at: int) -> None:
        """See ports.ClaimStore."""
        # A settlement takes the oldest amounts first, so the rest has waited since now at most.
        since = sa.case((tabs.c.settled < funds.settled, at), else_=tabs.c.since)
        query = sa.update(tabs).where(tabs.c.payer == payer)
        query = query.values(settled=funds.settled, reserved=funds.reserved, since=since)
        await self._db.write(lambda c: c.execute(query))

    async def record_claim(self, claim: Signed[Claim], at: int) -> None:
        """See ports.ClaimStore."""

        def work(connection: Connection) -> None:
            for row in claim.message.rows:
                this = tabs.c.payer == row.payer
                highest = connection.execute(sa.select(tabs.c.cumulative, tabs.c.claimed).where(this)).one()
                if row.cumulative_cost > highest.cumulative:
                    raise stale_claim(row.payer)
                claimed = Amount(max(highest.claimed, row.cumulative_cost))
                connection.execute(sa.update(tabs).where(this).values(claimed_at=at, claimed=claimed))

        await self._db.write(work)

    async def write_off(self, now: int) -> list[WriteOff]:
        """See ports.ClaimStore."""
        columns = (tabs.c.payer, tabs.c.cumulative, tabs.c.settled, tabs.c.written_off, ceilings.c.ceiling)
        query = sa.select(*columns).select_from(tabs.outerjoin(ceilings, has_best_order(now)))
        query = query.where(sa.or_(tabs.c.cumulative > tabs.c.settled, tabs.c.written_off > Amount(0)))

        def work(connection: Connection) -> list[WriteOff]:
            write_offs = []
            for row in connection.execute(query).all():
                unclaimable = max(0, row.cumulative - max(row.settled, row.ceiling or 0))
                if unclaimable != row.written_off:
                    write_offs.append(WriteOff(Address(row.payer), Amount(unclaimable), unclaimable - row.written_off))
            for write_off in write_offs:
                change = sa.update(tabs).where(tabs.c.payer == write_off.payer).values(written_off=write_off.amount)
                connection.execute(change)
            return write_offs

        return await self._db.write(work)

    async def record_gas(self, tx: str, at: int, gas_used: int, fee: int) -> None:
        """Stores the gas that this provider paid for a transaction; `fee` is in wei."""
        row = {"tx": tx, "at": at, "gas_used": gas_used, "fee": fee}
        self.gas_totals.add(gas_used, fee)
        await self._db.write(lambda c: c.execute(sa.dialects.sqlite.insert(gas).on_conflict_do_nothing(), row))

    async def record_payout(self, payout: PayoutRecord) -> None:
        """Stores that credit was paid out to an address."""
        row = {"tx": payout.tx, "at": payout.at, "amount": payout.amount, "address": payout.address}
        await self._db.write(lambda c: c.execute(sa.dialects.sqlite.insert(payouts).on_conflict_do_nothing(), row))

    async def fee_total(self) -> FeeTotal | None:
        """Returns the coordinators' fees up to a block, as last stored."""
        row = await self._db.read(lambda c: c.execute(sa.select(fee_cursor)).first())
        return None if row is None else FeeTotal(row.block, row.tip, row.fees)

    async def record_fee_total(self, total: FeeTotal) -> None:
        """Stores the coordinators' fees up to a block."""

        def work(connection: Connection) -> None:
            connection.execute(sa.delete(fee_cursor))
            connection.execute(sa.insert(fee_cursor), {"block": total.block, "tip": total.tip, "fees": total.fees})

        await self._db.write(work)

    # Startup

    async def tabs(self, now: int) -> list[StoredTab]:
        """See ports.StartupStore."""

        def work(connection: Connection) -> tuple[Any, Any, dict[str, int]]:
            rows = connection.execute(sa.select(tabs)).mappings().all()
            last = {row["payer"]: _finished_at(connection, row["payer"], row["seq"]) for row in rows}
            return rows, connection.execute(_live_ceilings(now)).all(), last

        rows, ceiling_rows, last = await self._db.read(work)
        live: dict[str, list[SignedCeiling]] = {}
        for payer, ceiling, claim_by in ceiling_rows:
            live.setdefault(payer, []).append(SignedCeiling(ceiling, claim_by))
        return [read_stored_tab(row, last[row["payer"]], live.get(row["payer"], [])) for row in rows]

    async def consumed_orders(self, now: int) -> list[tuple[Hash, int]]:
        """See ports.StartupStore."""
        query = sa.select(orders.c.digest, orders.c.deadline).where(orders.c.deadline > now)
        rows = await self._db.read(lambda c: c.execute(query).all())
        return [(Hash(digest), deadline) for digest, deadline in rows]

    async def unfinished_orders(self, now: int) -> list[MatchedOrder]:
        """See ports.StartupStore."""
        query = (
            sa.select(orders.c.digest, orders.c.document)
            .join(open_orders, open_orders.c.order_id == orders.c.id)
            .where(open_orders.c.receipt_id.is_(None))
            .order_by(orders.c.id)
        )
        rows = await self._db.read(lambda c: c.execute(query).all())
        unfinished = [read_order(digest, document) for digest, document in rows]
        return [MatchedOrder(terms.job, order, terms) for order, terms in unfinished if order.message.claim_by > now]

    # Retention

    async def prune(self, now: int, keep_seconds: int) -> int:
        """Removes orders and receipts that ended more than `keep_seconds` ago and that nothing rests on any more; their sums stay
        in the earnings. Returns the number of receipts that it removed.
        """
        page, removed = Page(after=0), 0
        while not page.is_last:
            page = await self._db.write(partial(prune, after=page.after, before=now - keep_seconds, now=now), synced=False)
            removed += page.removed
        return removed

    # Coordinators

    async def record_coordinator_hour(self, total: CoordinatorHour) -> None:
        """See ports.CoordinatorCreditStore."""
        amounts = {"earned": total.earned, "written_off": total.written_off}
        query = sa.dialects.sqlite.insert(coordinator_hours).on_conflict_do_update(
            index_elements=["endpoint", "hour"], set_=amounts
        )
        row = {"endpoint": total.endpoint, "hour": total.hour} | amounts
        await self._db.write(lambda c: c.execute(query, row), synced=False)

    async def coordinator_hours(self, since: int) -> list[CoordinatorHour]:
        """See ports.CoordinatorCreditStore."""
        query = sa.select(coordinator_hours).where(coordinator_hours.c.hour >= since)
        rows = await self._db.read(lambda c: c.execute(query).mappings().all())
        return [CoordinatorHour(**row) for row in rows]


# Statements that every job executes. Building them once per job would cost more than executing them.

_ACKNOWLEDGE = Prepared(
    sa.delete(open_orders).where(
        open_orders.c.job == sa.bindparam("of_job"),
        open_orders.c.coordinator == sa.bindparam("of_coordinator"),
        open_orders.c.receipt_id.is_not(None),
    )
)
_UNFINISHED = (
    sa.select(orders.c.digest, orders.c.id)
    .join(open_orders, open_orders.c.order_id == orders.c.id)
    .where(open_orders.c.receipt_id.is_(None))
)


def has_best_order(now: int | sa.BindParameter[int]) -> sa.ColumnElement[bool]:
    """Whether a ceiling is the highest of its tab's payer that stays claimable after `now`."""
    live = ceilings.alias()
    query = sa.select(live.c.order_id).where(live.c.payer == tabs.c.payer, live.c.claim_by > now)
    query = query.order_by(live.c.ceiling.desc(), live.c.claim_by.desc()).limit(1)
    return sa.and_(ceilings.c.payer == tabs.c.payer, ceilings.c.order_id == query.correlate(tabs).scalar_subquery())


_CLAIMABLE = (
    sa.select(tabs, orders.c.digest, orders.c.document)
    .select_from(tabs)
    .join(ceilings, has_best_order(sa.bindparam("now")))
    .join(orders, orders.c.id == ceilings.c.order_id)
    .where(tabs.c.cumulative > tabs.c.settled, ceilings.c.ceiling > tabs.c.settled)
    .order_by(tabs.c.since, tabs.c.payer)
    .limit(sa.bindparam("size", type_=sa.Integer))
    .offset(sa.bindparam("skip", type_=sa.Integer))
)


def _live_ceilings(now: int) -> sa.Select[Any]:
    """Selects payer, ceiling and claimBy of the orders that claims can rest on, highest ceiling first."""
    query = sa.select(ceilings.c.payer, ceilings.c.ceiling, ceilings.c.claim_by).where(ceilings.c.claim_by > now)
    return query.order_by(ceilings.c.payer, ceilings.c.ceiling.desc())


def _finished_at(connection: Connection, payer: str, seq: int) -> int:
    """When the receipt with this number was made, in Unix seconds; 0 if it is not kept."""
    row = connection.exec_driver_sql(
        "SELECT finished_at FROM receipts WHERE payer = ? AND seq = ?", (pack_address(Address(payer)), seq)
    ).first()
    return 0 if row is None else int(row[0])


def _after(connection: Connection, number: sa.ColumnElement[int]) -> int:
    """Returns the number after the highest one of a table."""
    return int(connection.execute(sa.select(sa.func.coalesce(sa.func.max(number), 0))).scalar_one()) + 1


def _describe(identity: dict[str, Any]) -> str:
    return f"{identity['provider']} on chain {identity['chain_id']} with contract {identity['contract']}"
