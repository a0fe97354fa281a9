"""The node's store: SQLAlchemy Core on SQLite. Signed documents are stored unchanged.

A write survives the process when its method returns. Receipts and claims are synced to disk by then, and with them all that was
written before; see docs/explanation/durability.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import sqlalchemy as sa
import sqlalchemy.dialects.sqlite
from sqlalchemy import Connection

from node.domain.order_admission import AdmittedJob, MatchedOrder
from node.domain.signed_ceilings import SignedCeiling
from node.domain.tabs import Funds, StoredTab
from node.ports import (
    ClaimableTab,
    CoordinatorHour,
    FeeTotal,
    PayoutRecord,
    ReceiptRecord,
    TabConflict,
    UnacknowledgedReceipt,
    WriteOff,
)
from node.storage.rows import read_claimable_tab, read_order, read_stored_tab, to_order_row, to_receipt_row
from node.storage.schema import (
    IS_UNACKNOWLEDGED,
    IS_UNFINISHED,
    completed_recoveries,
    coordinator_hours,
    fee_cursor,
    gas,
    identity,
    orders,
    payouts,
    receipts,
    tabs,
)
from tallystick.protocol.eip712 import Domain, Signed, Verified
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Claim, Order, Receipt, Terms
from tallystick.protocol.stored import load_signed, load_struct
from tallystick.protocol.types import Address, Amount, Hash, JobId
from tallystick.runtime.storage import Database

R = TypeVar("R")
MIGRATIONS = Path(__file__).parents[1] / "migrations"


class SqlStore:
    """JobStore, ReceiptStore, RecoveryStore, ClaimStore, CoordinatorCreditStore and StartupStore over one database."""

    def __init__(self, url: str | sa.URL, provider: Address, domain: Domain) -> None:
        self._db = Database(url, "state")
        self._provider, self._domain = provider, domain

    async def start(self) -> None:
        """Connects and migrates. Raises Unavailable, or BadMessage if this is the state of another key, chain or contract."""
        await self._db.start(MIGRATIONS)
        mine = {"provider": self._provider, "chain_id": self._domain.chain_id, "contract": self._domain.contract}

        def work(connection: Connection) -> dict[str, Any]:
            row = connection.execute(sa.select(identity)).mappings().first()
            if row is None:
                connection.execute(sa.insert(identity).values(mine))
            return dict(row or mine)

        stored = await self._db.write(work)
        if stored != mine:
            await self.close()
            text = f"this state belongs to {_describe(stored)}, but the node is {_describe(mine)}"
            raise BadMessage(f"{text}; pass the --wallet of this state, or use another `state` folder")

    async def read(self, work: Callable[[Connection], R]) -> R:
        """Runs `work` on one consistent snapshot and returns its result."""
        return await self._db.read(work)

    async def close(self) -> None:
        """Completes queued writes and closes the database."""
        await self._db.close()

    # Jobs

    def begin(self, admitted: AdmittedJob, at: int) -> asyncio.Future[None]:
        """See ports.JobStore."""
        row = to_order_row(admitted.order, admitted.terms, at)
        return asyncio.ensure_future(self._db.write(lambda connection: _run(connection, _NEW_ORDER, row), synced=False))

    def record_receipt(self, record: ReceiptRecord) -> asyncio.Future[None]:
        """See ports.JobStore."""
        end = _end_rows(record)
        return asyncio.ensure_future(self._db.write(lambda connection: _write_end(connection, end)))

    def record_refusal(self, record: ReceiptRecord) -> asyncio.Future[None]:
        """See ports.JobStore."""
        refused, end = record.matched, _end_rows(record)
        # With a ceiling of 0 no claim rests on the order, because its terms, such as the fee, may be unacceptable.
        row = to_order_row(refused.order, refused.terms, record.receipt.message.finished_at) | {"ceiling": Amount(0)}

        def work(connection: Connection) -> None:
            connection.execute(_NEW_ORDER, row)
            _write_end(connection, end)

        return asyncio.ensure_future(self._db.write(work))

    # Receipts

    async def unacknowledged(self, coordinator: Address, before: int, page: int, size: int) -> list[UnacknowledgedReceipt]:
        """See ports.ReceiptStore."""
        query = (
            sa.select(receipts.c.job, receipts.c.receipt_doc, orders.c.order_doc, orders.c.terms_doc)
            .join(orders, _OF_RECEIPT)
            .where(receipts.c.coordinator == coordinator, IS_UNACKNOWLEDGED)
            .where(receipts.c.finished_at < before)
            .order_by(receipts.c.finished_at, receipts.c.id)
            .limit(size)
            .offset(page * size)
        )
        rows = await self._db.read(lambda c: c.execute(query).all())
        return [
            UnacknowledgedReceipt(
                JobId(bytes.fromhex(job)),
                LateReceipt(load_signed(Receipt, receipt), load_signed(Order, order), load_struct(Terms, terms, "stored terms")),
            )
            for job, receipt, order, terms in rows
        ]

    async def acknowledge(self, coordinator: Address, jobs: Iterable[JobId]) -> None:
        """See ports.ReceiptStore."""
        job_ids = [job.hex() for job in jobs]
        query = sa.update(receipts).where(receipts.c.coordinator == coordinator, receipts.c.job.in_(job_ids))
        await self._db.write(lambda c: c.execute(query.values(acknowledged=True)), synced=False)

    # State recovery

    async def record_recovered(self, receipt: Verified[Receipt], order: Verified[Order], late: LateReceipt) -> None:
        """See ports.RecoveryStore."""
        message, digest = receipt.message, order.digest.hex()
        order_row = to_order_row(order, late.terms, None)
        receipt_row = to_receipt_row(receipt, digest, late.terms.job, order.message.coordinator) | {"acknowledged": True}
        tab = {"payer": message.payer, "since": message.finished_at, "seq": message.seq, "cumulative": message.cumulative_cost}

        def work(connection: Connection) -> None:
            for table, row in ((orders, order_row), (receipts, receipt_row)):
                connection.execute(sa.dialects.sqlite.insert(table).on_conflict_do_nothing(), row)
            connection.execute(_UPDATE_TAB, _NEW_TAB | tab)

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
        best = best_order(now)
        query = (
            sa.select(tabs, orders.c.digest, orders.c.order_doc)
            .join(orders, orders.c.id == best)
            .where(tabs.c.cumulative > tabs.c.settled, orders.c.ceiling > tabs.c.settled)
            .order_by(tabs.c.since, tabs.c.payer)
            .limit(limit)
            .offset(skip)
        )
        rows = await self._db.read(lambda c: c.execute(query).mappings().all())
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
                change = sa.update(tabs).where(tabs.c.payer == row.payer)
                connection.execute(change.values(claimed_at=at, claimed=row.cumulative_cost))

        await self._db.write(work)

    async def write_off(self, now: int) -> list[WriteOff]:
        """See ports.ClaimStore."""
        best = best_order(now)
        columns = (tabs.c.payer, tabs.c.cumulative, tabs.c.settled, tabs.c.written_off, orders.c.ceiling)
        query = sa.select(*columns).select_from(tabs.outerjoin(orders, orders.c.id == best))
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
        last = receipts.alias()
        query = sa.select(tabs, last.c.finished_at).outerjoin(
            last, sa.and_(last.c.payer == tabs.c.payer, last.c.seq == tabs.c.seq)
        )

        def work(connection: Connection) -> tuple[Any, Any]:
            return connection.execute(query).mappings().all(), connection.execute(_live_ceilings(now)).all()

        rows, ceiling_rows = await self._db.read(work)
        ceilings: dict[str, list[SignedCeiling]] = {}
        for payer, ceiling, claim_by in ceiling_rows:
            ceilings.setdefault(payer, []).append(SignedCeiling(ceiling, claim_by))
        return [read_stored_tab(row, ceilings.get(row["payer"], [])) for row in rows]

    async def consumed_orders(self, now: int) -> list[tuple[Hash, int]]:
        """See ports.StartupStore."""
        query = sa.select(orders.c.digest, orders.c.deadline).where(orders.c.deadline > now)
        rows = await self._db.read(lambda c: c.execute(query).all())
        return [(Hash(bytes.fromhex(digest)), deadline) for digest, deadline in rows]

    async def unfinished_orders(self, now: int) -> list[MatchedOrder]:
        """See ports.StartupStore."""
        query = (
            sa.select(orders.c.job, orders.c.digest, orders.c.order_doc, orders.c.terms_doc)
            .where(IS_UNFINISHED, orders.c.claim_by > now)
            .order_by(orders.c.admitted_at)
        )
        rows = await self._db.read(lambda c: c.execute(query).all())
        return [
            MatchedOrder(JobId(bytes.fromhex(job)), read_order(digest, order), load_struct(Terms, terms, "stored terms"))
            for job, digest, order, terms in rows
        ]

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

_NEW_ORDER, _NEW_RECEIPT = sa.insert(orders), sa.insert(receipts)
_OF_RECEIPT = (orders.c.job == receipts.c.job) & (orders.c.digest == receipts.c.order_digest)
_END_JOB = (
    sa.update(orders)
    .where(orders.c.job == sa.bindparam("of_job"), orders.c.digest == sa.bindparam("of_order"))
    .values(ended_at=sa.bindparam("to_ended"), outcome=sa.bindparam("to_outcome"))
)
_NEW_TAB = {
    "settled": Amount(0),
    "reserved": Amount(0),
    "claimed_at": 0,
    "claimed": Amount(0),
    "written_off": Amount(0),
}


def _update_tab() -> sa.Executable:
    """Returns the statement that updates a tab to a receipt.

    `since`, the time of the first unsettled receipt, stays while anything is unsettled.
    """
    query = sa.dialects.sqlite.insert(tabs)
    new = query.excluded
    since = sa.case((tabs.c.cumulative > tabs.c.settled, tabs.c.since), else_=new.since)
    changed = {"seq": new.seq, "cumulative": new.cumulative, "since": since}
    # State recovery may have come in between: a tab never goes back.
    return query.on_conflict_do_update(index_elements=["payer"], set_=changed, where=new.seq > tabs.c.seq)


_UPDATE_TAB = _update_tab()
_TAB_END = sa.select(tabs.c.seq, tabs.c.cumulative).where(tabs.c.payer == sa.bindparam("of_payer"))


def best_order(now: int) -> sa.ScalarSelect[Any]:
    """Selects the id of the payer's order with the highest ceiling that stays claimable after `now`."""
    query = sa.select(orders.c.id).where(orders.c.payer == tabs.c.payer, orders.c.claim_by > now)
    query = query.order_by(orders.c.ceiling.desc(), orders.c.claim_by.desc()).limit(1)
    return query.correlate(tabs).scalar_subquery()


def _live_ceilings(now: int) -> sa.Select[Any]:
    """Selects payer, ceiling and claimBy of live orders, highest ceiling first, without orders that another exceeds in both."""
    live = sa.select(orders.c.payer, orders.c.ceiling, orders.c.claim_by).where(orders.c.claim_by > now)
    above = sa.func.max(orders.c.claim_by).over(
        partition_by=orders.c.payer, order_by=(orders.c.ceiling.desc(), orders.c.claim_by.desc()), rows=(None, -1)
    )
    ranked = live.add_columns(above.label("above")).subquery()
    query = sa.select(ranked.c.payer, ranked.c.ceiling, ranked.c.claim_by)
    query = query.where(sa.or_(ranked.c.above.is_(None), ranked.c.claim_by > ranked.c.above))
    return query.order_by(ranked.c.payer, ranked.c.ceiling.desc())


def _describe(identity: dict[str, Any]) -> str:
    return f"{identity['provider']} on chain {identity['chain_id']} with contract {identity['contract']}"


class _EndRows(NamedTuple):
    """The rows that end a job."""

    receipt: dict[str, Any]
    job: dict[str, Any]
    tab: dict[str, Any]


def _end_rows(record: ReceiptRecord) -> _EndRows:
    matched, receipt = record.matched, record.receipt.message
    digest = matched.order.digest.hex()
    return _EndRows(
        to_receipt_row(record.receipt, digest, matched.job, matched.order.message.coordinator),
        {"of_job": matched.job.hex(), "of_order": digest, "to_ended": receipt.finished_at, "to_outcome": int(receipt.outcome)},
        {"payer": receipt.payer, "since": receipt.finished_at, "seq": receipt.seq, "cumulative": receipt.cumulative_cost},
    )


def _run(connection: Connection, statement: sa.Executable, row: dict[str, Any]) -> None:
    connection.execute(statement, row)


def _write_end(connection: Connection, end: _EndRows) -> None:
    """Writes the rows. Raises TabConflict if the receipt does not follow the last one of its tab."""
    stored = connection.execute(_TAB_END, {"of_payer": end.tab["payer"]}).first() or (0, Amount(0))
    if tuple(stored) != (end.receipt["seq"] - 1, end.receipt["cumulative"] - end.receipt["cost"]):
        raise TabConflict(*stored)
    connection.execute(_NEW_RECEIPT, end.receipt)
    connection.execute(_END_JOB, end.job)
    connection.execute(_UPDATE_TAB, _NEW_TAB | end.tab)
