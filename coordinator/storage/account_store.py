"""What one account may see of the database: its jobs, as payer or provider, and its tabs."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence

import sqlalchemy as sa
from sqlalchemy import Connection

from coordinator.jobs.accounts import AccountTab
from coordinator.ports import KnownJob
from coordinator.storage.job_codec import load_job
from coordinator.storage.schema import jobs, settlements, tab_receipts, tabs
from coordinator.storage.settled_rows import read_settled
from tallystick.protocol.types import Address, Amount
from tallystick.runtime.storage import Database

FIRST_RECEIPTS = 8
"""Receipts of each tab that are read first."""
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

    async def settled_by(self, payer: Address) -> Mapping[Address, Amount]:
        """See jobs.accounts.AccountStore."""
        return await self._db.read(lambda connection: read_settled(connection, payer))


def _read_jobs(connection: Connection, account: Address, limit: int) -> list[KnownJob]:
    mine = sa.or_(tabs.c.payer == account, tabs.c.provider == account)
    recent = connection.execute(sa.select(tabs.c.tab).where(mine).order_by(tabs.c.number.desc()).limit(RECENT_TABS)).scalars()
    wanted = _newest_numbers(connection, recent.all(), limit)
    docs = connection.execute(sa.select(jobs.c.doc).where(jobs.c.number.in_(wanted)).order_by(jobs.c.number.desc())).scalars()
    return [
        KnownJob(read.record, {provider: receipt for provider, (receipt, _) in read.receipts.items()})
        for read in (load_job(bytes(doc)) for doc in docs)
    ]


_OF_TAB = (
    sa.select(tab_receipts.c.number)
    .where(tab_receipts.c.tab == sa.bindparam("of_tab"))
    .order_by(tab_receipts.c.total.desc(), tab_receipts.c.seq.desc())
    .limit(sa.bindparam("most"))
)


def _newest_numbers(connection: Connection, of_tabs: Sequence[int], limit: int) -> list[int]:
    """Returns the numbers of the newest jobs of these tabs, newest first.

    It reads a few receipts of each tab, and more only of a tab whose every receipt so far is among the newest.
    """
    newest, most, left = list[int](), FIRST_RECEIPTS, list(of_tabs)
    while left:
        read = {tab: connection.execute(_OF_TAB, {"of_tab": tab, "most": most}).scalars().all() for tab in left}
        newest = sorted({*newest, *itertools.chain.from_iterable(read.values())}, reverse=True)[:limit]
        oldest = newest[-1] if newest else 0
        left = [tab for tab, numbers in read.items() if len(numbers) == most < limit and min(numbers) >= oldest]
        most = min(2 * most, limit)
    return newest


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
