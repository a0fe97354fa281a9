"""The collector: turns receipts into money. It hands claims to the coordinator, whose settler batches them on chain, watches the
chain for what was settled, and hands them in again if nothing came of it.

A tab is claimed when what it owes is worth it, has waited long enough, uses up a good part of its reservation, or rests on an
order that soon can no longer be claimed on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from node.ports import ChainView, Claimable, ClaimStore, Link
from node.tabs import Funds
from tallystick.protocol.eip712 import Domain, Signer
from tallystick.protocol.errors import TallyError
from tallystick.protocol.link import ClaimRequest
from tallystick.protocol.messages import Claim, ClaimRow
from tallystick.protocol.types import Address, Amount
from tallystick.protocol.wire import NO_JOB, Kind, dumps

log = structlog.get_logger()
MAX_ROWS = 64
_MAX_TABS = 1_024
_WATCHED = 64
THAWING, EXPIRING = "a payer that owes takes its money out", "a debt will soon be out of reach"


@dataclass(frozen=True, slots=True)
class ClaimPolicy:
    """When to claim. `amount` is base units, times are seconds, `reserve_percent` is of a tab's reservation.

    `row_gas`: what settling one row costs in base units, and `gas_multiple` how many times that a claim must bring, unless its
    order expires; `check`: how often tabs are looked at; `age`: how long something may stay uncollected; `margin`: how near
    claimBy may come; `retry`: how long a claim is given to show on chain; `dust`: less than this is not worth anything, not even
    at the end.
    """

    check: float = 15.0
    amount: Amount = Amount(1_000_000)
    age: float = 3_600.0
    reserve_percent: int = 50
    margin: float = 86_400.0
    retry: float = 120.0
    dust: Amount = Amount(1)
    row_gas: Amount = Amount(0)
    gas_multiple: int = 10

    def wants(self, tab: Claimable, now: float) -> bool:
        """Whether it is time to claim this tab."""
        due = tab.due
        if due < max(1, self.dust):
            return False
        if tab.order.message.claim_by - now <= self.margin:
            return True
        return due >= self.gas_multiple * self.row_gas and (
            due >= self.amount
            or now - tab.since >= self.age
            or (tab.reserved > 0 and due * 100 >= tab.reserved * self.reserve_percent)
        )

    def waits(self, tab: Claimable, now: float) -> bool:
        """Whether the last claim may still show on chain."""
        return now - tab.claimed_at < self.retry and tab.claimed > tab.settled


class Collector:
    """See the module's docstring. `link` gives the connection to a coordinator, if there is one; `observed` is told what the
    chain says of a payer, `alarm` once what a person should see: that a payer takes its money out while it owes, or that a debt
    will soon be out of reach.
    """

    def __init__(
        self,
        *,
        signer: Signer,
        domain: Domain,
        store: ClaimStore,
        chain: ChainView,
        link: Callable[[Address], Link | None],
        alarm: Callable[[str, Address, Claimable], None] = lambda _what, _payer, _tab: None,
        policy: ClaimPolicy | None = None,
        observed: Callable[[Address, Funds], None] = lambda _payer, _funds: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._signer, self._domain, self._store, self._chain = signer, domain, store, chain
        self._link, self.policy, self._observed, self._now = link, policy or ClaimPolicy(), observed, now
        self._alarm = alarm
        self._alarmed: set[tuple[str, Address]] = set()

    async def run(self) -> None:
        """Looks at the tabs every `check` seconds until cancelled."""
        while True:
            try:
                await self.sweep()
            except TallyError as error:
                log.warning("claims are delayed", error=str(error))
            await asyncio.sleep(self.policy.check)

    async def sweep(self, *, everything: bool = False) -> int:
        """Claims what is due, or `everything` that is owed. Returns the number of tabs claimed. Raises Unavailable."""
        now, policy = self._now(), self.policy
        tabs = await self._store.claimable(int(now), _MAX_TABS)
        thawing = await self._watch(tabs, now)
        wanted = [
            tab
            for tab in tabs
            if policy.wants(tab, now) or ((everything or tab.payer in thawing) and tab.due >= max(1, policy.dust))
        ]
        due = [tab for tab in wanted if await self._still_due(tab)]
        # A claim that the chain has not shown in time is made again.
        ready = [tab for tab in due if everything or not policy.waits(tab, now)]
        handed = 0
        for coordinator in dict.fromkeys(tab.order.message.coordinator for tab in ready):
            link = self._link(coordinator)
            if link is None:
                continue
            its = [tab for tab in ready if tab.order.message.coordinator == coordinator]
            for start in range(0, len(its), MAX_ROWS):
                await self._claim(link, its[start : start + MAX_ROWS])
            handed += len(its)
        return handed

    async def _watch(self, tabs: list[Claimable], now: float) -> set[Address]:
        """Sounds the alarms; returns the payers whose money is on its way out. The tabs that owe most are asked after."""
        thawing: set[Address] = set()
        alarms: set[tuple[str, Address]] = set()
        for tab in sorted(tabs, key=lambda tab: -tab.due)[:_WATCHED]:
            if (await self._chain.funds(tab.payer)).thawing:
                thawing.add(tab.payer)
                alarms.add((THAWING, tab.payer))
        alarms |= {(EXPIRING, tab.payer) for tab in tabs if tab.order.message.claim_by - now <= self.policy.margin / 2}
        for what, payer in sorted(alarms - self._alarmed):
            self._alarm(what, payer, next(tab for tab in tabs if tab.payer == payer))
        self._alarmed = alarms
        return thawing

    async def _still_due(self, tab: Claimable) -> bool:
        funds = await self._chain.refresh(tab.payer)
        if not funds.known or (funds.settled, funds.reserved) == (tab.settled, tab.reserved):
            return True
        self._observed(tab.payer, funds)
        await self._store.observed(tab.payer, funds, int(self._now()))
        if funds.settled > tab.settled:
            log.info("settled on chain", payer=tab.payer, amount=int(funds.settled - tab.settled), total=int(funds.settled))
        return min(tab.cumulative, tab.order.message.ceiling) > funds.settled

    async def _claim(self, link: Link, tabs: list[Claimable]) -> None:
        rows = tuple(
            ClaimRow(payer=tab.payer, order_hash=tab.order.digest, seq=tab.seq, cumulative_cost=tab.cumulative) for tab in tabs
        )
        claim = self._signer.sign(Claim(provider=self._signer.address, rows=rows), self._domain)
        await self._store.claimed(claim, int(self._now()))
        request = ClaimRequest(claim, tuple(tab.order for tab in tabs))
        link.post(Kind.CLAIM, NO_JOB, dumps(request.to_json()))
        log.info("claim handed in", tabs=len(tabs), amount=sum(tab.due for tab in tabs))
