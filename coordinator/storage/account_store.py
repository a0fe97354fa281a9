"""What one account may see of the database: its jobs, as payer or provider, and its tabs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import sqlalchemy as sa
from sqlalchemy import Connection

from coordinator.jobs.accounts import AccountTab
from coordinator.ports import KnownJob
from coordinator.storage.job_codec import load_job
from coordinator.storage.schema import jobs, settlements, tab_receipts, tabs
from tallystick.protocol.types import Address, Amount
from tallystick.runtime.storage import Database

RECENT_TABS = 100
"""Tabs of an account whose jobs are listed: those with the newest jobs."""


class SqlAccountStore:
    """Implements jobs.accounts.AccountStore. `flush`: writes what is queued, so that an account sees its newest jobs."""

    def __init__(self, database: Database, flush: Callable[[], Awaitable[None]]) -> None:
        self._db, self._flush = database, flush

    async def jobs_of(self, account: Address, limit: int) -> list[KnownJob]:
        """See jobs.accounts.AccountStore."""
        await self._flush()
        return await self._db.read(lambda connection: _read_jobs(connection, account, limit))

    async def tabs_of(self, account: Address, limit: int) -> list[AccountTab]:
        """See jobs.accounts.AccountStore."""
        await self._flush()
        return await self._db.read(lambda connection: _read_tabs(connection, account, limit))

    async def settled_by(self, payer: Address) -> Amount:
        """See jobs.accounts.AccountStore."""
        query = sa.select(settlements.c.settled).where(settlements.c.payer == payer)
        amounts = await self._db.read(lambda connection: connection.execute(query).scalars().all())
        return Amount(sum(map(int, amounts)))


def _read_jobs(connection: Connection, account: Address, limit: int) -> list[KnownJob]:
    columns = tab_receipts.c
    mine = sa.or_(tabs.c.payer == account, tabs.c.provider == account)
    recent = connection.execute(sa.select(tabs.c.tab).where(mine).order_by(tabs.c.number.desc()).limit(RECENT_TABS)).scalars()
    numbers = set[int]()
    for tab in recent.all():
        newest = sa.select(columns.number).where(columns.tab == tab).order_by(columns.total.desc(), columns.seq.desc())
        numbers.update(connection.execute(newest.limit(limit)).scalars())
    wanted = sorted(numbers, reverse=True)[:limit]
    docs = connection.execute(sa.select(jobs.c.doc).where(jobs.c.number.in_(wanted)).order_by(jobs.c.number.desc())).scalars()
    return [
        KnownJob(read.record, {provider: receipt for provider, (receipt, _) in read.receipts.items()})
        for read in (load_job(bytes(doc)) for doc in docs)
    ]


def _read_tabs(connection: Connection, account: Address, limit: int) -> list[AccountTab]:
    paid = sa.and_(settlements.c.payer == tabs.c.payer, settlements.c.provider == tabs.c.provider)
    mine = sa.or_(tabs.c.payer == account, tabs.c.provider == account)
    columns = (tabs.c.payer, tabs.c.provider, tabs.c.total, settlements.c.settled, settlements.c.tx, settlements.c.block)
    query = sa.select(*columns).select_from(tabs.outerjoin(settlements, paid)).where(mine)
    rows = connection.execute(query.order_by(tabs.c.number.desc()).limit(limit)).all()
    return [
        AccountTab(
            Address(payer), Address(provider), Amount(int.from_bytes(total, "big")), Amount(int(settled or 0)), tx or "", block
        )
        for payer, provider, total, settled, tx, block in rows
    ]
