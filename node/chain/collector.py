"""The collector: turns receipts into money. It hands claims to the coordinator, whose settler batches them on chain, watches the
chain for what was settled, and hands them in again if nothing came of it.

A tab is claimed when what it owes is worth it, has waited long enough, uses up a good part of its reservation, or rests on an
order that soon can no longer be claimed on. It is claimed at once while its payer takes money out of its reach. What the
coordinator then does not settle in time, the node settles by itself, with its own wallet's coins.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import structlog

from node.domain.tabs import Funds
from node.ports import ChainView, ClaimableTab, ClaimStore, DebtAlarm, Link, Settlement
from tallystick.protocol.eip712 import Domain, Signer, Verified
from tallystick.protocol.errors import Code, Refusal, TallyError
from tallystick.protocol.link import ClaimRequest
from tallystick.protocol.messages import Claim, ClaimRow
from tallystick.protocol.types import Address, Amount
from tallystick.protocol.wire import NO_JOB, Kind, dumps

log = structlog.get_logger()
MAX_ROWS = 64
MAX_TABS = 1_024
"""Tabs that one look goes through; of more, the next look takes the next."""
WATCHED = 64
"""Payers of which each look asks whether they take money out: so many that owe most, and as many of the rest in turns."""
LOOKS = 256
"""Tabs of which each look asks the chain, those that owe most first, before they are claimed."""
FIRST_REST, LONGEST_REST = 60.0, 6 * 3_600.0
"""Seconds for which a payer with an empty purse is not asked after, doubled each time: its tab may never be worth a look."""
REMEMBERED = 10_000
"""Empty purses that are remembered as such."""
_WRITE_OFF_SECONDS = 600.0
_SHORTEST_PAUSE = 0.5
_PAUSE_PART = 4
THAWING, EXPIRING = "a payer that owes takes its money out", "a debt will soon be out of reach"
RELEASING = "a payer that owes takes its reservation back"
NO_COINS = "a debt would be out of reach soon, and this wallet has no coins to collect it by itself"
WRITTEN_OFF = "debts that no order can be claimed for any more were written off"


@dataclass(frozen=True, slots=True)
class ClaimPolicy:
    """When to claim. `amount` is base units, times are seconds, `reserve_percent` is of a tab's reservation.

    `row_gas`: what settling one row costs in base units, and `gas_multiple` how many times that a claim must bring, unless its
    order expires; `check`: how often tabs are looked at; `age`: how long something may stay uncollected; `margin`: how near
    claimBy may come; `retry`: how long a claim is given to show on chain; `dust`: less than this is not worth anything, not even
    at the end. `own`: how near claimBy may come before the node settles by itself what the coordinator did not (0: never), and
    `own_least`: what that must bring.
    """

    check_interval: float = 15.0
    claim_amount: Amount = Amount(1_000_000)
    max_age: float = 3_600.0
    reserve_percent: int = 50
    expiry_margin: float = 86_400.0
    retry_after: float = 120.0
    dust: Amount = Amount(1)
    gas_cost_per_tab: Amount = Amount(0)
    min_gas_multiple: int = 10
    direct_margin: float = 3_600.0
    direct_min_amount: Amount = Amount(10_000)

    def is_due(self, tab: ClaimableTab, now: float) -> bool:
        """Whether it is time to claim this tab."""
        due = tab.due
        if due < max(1, self.dust):
            return False
        if tab.order.message.claim_by - now <= self.expiry_margin:
            return True
        return due >= self.min_gas_multiple * self.gas_cost_per_tab and (
            due >= self.claim_amount
            or now - tab.since >= self.max_age
            or (tab.reserved > 0 and due * 100 >= tab.reserved * self.reserve_percent)
        )

    def is_pending(self, tab: ClaimableTab, now: float) -> bool:
        """Whether the last claim may still show on chain."""
        return now - tab.claimed_at < self.retry_after and tab.claimed > tab.settled

    def must_settle_directly(self, tab: ClaimableTab, now: float, *, linked: bool, wait: float = float("inf")) -> bool:
        """Whether the node must settle this tab by itself now. `linked`: its coordinator can be asked to; `wait`: the seconds
        after which its payer takes back what would pay it, if it began to.
        """
        left = tab.order.message.claim_by - now
        if self.direct_margin <= 0 or (left > self.direct_margin and wait == float("inf")):
            return False
        patience = min(self.retry_after, wait / _PAUSE_PART)
        unheard = tab.claimed > tab.settled and now - tab.claimed_at >= patience
        return unheard or not linked or left <= self.retry_after + self.check_interval


class RetryDelay(NamedTuple):
    """Until when a tab is left alone, by the clock of the collector, and for how many seconds."""

    until: float = 0.0
    seconds: float = 0.0


class Collector:
    """See the module's docstring. `link` gives the connection to a coordinator, if there is one; `observed` is told what the
    chain says of a payer, `passed` the time at each look; `alarm` once what a person should see: that a payer takes its money out
    while it owes, or that a debt will soon be out of reach.
    """

    def __init__(
        self,
        *,
        signer: Signer,
        domain: Domain,
        store: ClaimStore,
        chain: ChainView,
        link: Callable[[Address], Link | None],
        settlement: Settlement | None = None,
        alarm: Callable[[str, Address, DebtAlarm], None] = lambda _what, _payer, _debt: None,
        policy: ClaimPolicy | None = None,
        on_funds: Callable[[Address, Funds], None] = lambda _payer, _funds: None,
        on_check: Callable[[int], None] = lambda _now: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._signer, self._domain, self._store, self._chain = signer, domain, store, chain
        self._link, self.policy, self._on_funds, self._now = link, policy or ClaimPolicy(), on_funds, now
        self._alarm, self._settlement, self._on_check = alarm, settlement, on_check
        self._alarmed: set[tuple[str, Address]] = set()
        self._watch_from = self._skip = 0
        self._empty_purses: dict[Address, RetryDelay] = {}
        self._write_offs_checked_at = float("-inf")
        self._overdue: list[ClaimableTab] = []
        self._has_overdue = asyncio.Event()
        self._tried_at: dict[Address, float] = {}

    async def run(self) -> None:
        """Looks at the tabs every `check` seconds until cancelled; more often where payers need not wait for long."""
        await asyncio.gather(self._claim_forever(), self._settle_forever())

    @property
    def check_interval(self) -> float:
        """Seconds between two looks: a part of the time for which payers must wait, so that nothing leaves between two."""
        return min(self.policy.check_interval, max(_SHORTEST_PAUSE, self._chain.withdrawal_delay / _PAUSE_PART))

    async def _claim_forever(self) -> None:
        while True:
            try:
                await self.claim_due()
            except TallyError as error:
                log.warning("claims are delayed", error=str(error))
            await asyncio.sleep(self.check_interval)

    async def _settle_forever(self) -> None:
        while True:
            await self._has_overdue.wait()
            try:
                await self.settle_directly()
            except TallyError as error:
                log.warning("not settled by this node itself; it will try again", error=str(error))

    async def claim_due(self, *, everything: bool = False) -> int:
        """Claims what is due, or `everything` that is owed. Returns the number of tabs claimed. Raises Unavailable."""
        now, policy = self._now(), self.policy
        self._on_check(int(now))
        tabs = await self._store.claimable(int(now), MAX_TABS, self._skip)
        self._skip = self._skip + MAX_TABS if len(tabs) == MAX_TABS else 0
        leaving = await self._raise_alarms(tabs, now)
        wanted = [
            tab
            for tab in tabs
            if policy.is_due(tab, now) or ((everything or tab.payer in leaving) and tab.due >= max(1, policy.dust))
        ]
        rested = [tab for tab in wanted if now >= self._empty_purses.get(tab.payer, RetryDelay()).until]
        first = sorted(rested, key=lambda tab: (policy.is_pending(tab, now), -tab.due))
        due = [tab for tab in first[:LOOKS] if await self._still_due(tab, now)]
        late = [tab for tab in due if self._is_overdue(tab, now, leaving=tab.payer in leaving)]
        # A claim that the chain has not shown in time is made again.
        ready = [tab for tab in due if everything or not policy.is_pending(tab, now)]
        handed = 0
        for coordinator in dict.fromkeys(tab.order.message.coordinator for tab in ready):
            link = self._link(coordinator)
            if link is None:
                continue
            its = [tab for tab in ready if tab.order.message.coordinator == coordinator]
            for start in range(0, len(its), MAX_ROWS):
                await self._claim(link, its[start : start + MAX_ROWS])
            handed += len(its)
        if late:
            self._overdue = late
            self._has_overdue.set()
        await self._record_write_offs(now)
        return handed

    async def _raise_alarms(self, tabs: list[ClaimableTab], now: float) -> set[Address]:
        """Sounds the alarms; returns the payers whose money is on its way out. Of the tabs, those that owe most are asked after,
        and the others in turns.
        """
        by_due = sorted(tabs, key=lambda tab: -tab.due)
        most, rest = by_due[:WATCHED], by_due[WATCHED:]
        start = self._watch_from if self._watch_from < len(rest) else 0
        self._watch_from = start + WATCHED
        alarms: set[tuple[str, Address]] = set()
        for tab in (*most, *rest[start : start + WATCHED]):
            funds = await self._chain.funds(tab.payer)
            alarms |= {(what, tab.payer) for what, amount in ((THAWING, funds.thawing), (RELEASING, funds.releasing)) if amount}
        leaving = {payer for _, payer in alarms}
        soon = now + self.policy.expiry_margin / 2
        least = max(1, self.policy.direct_min_amount)
        alarms |= {(EXPIRING, tab.payer) for tab in tabs if tab.order.message.claim_by <= soon and tab.due >= least}
        by_payer = {tab.payer: tab for tab in tabs}
        for what, payer in sorted(alarms - self._alarmed):
            tab = by_payer[payer]
            self._alarm(what, payer, DebtAlarm(tab.due, tab.order.message.claim_by))
        self._alarmed = alarms
        return leaving

    def _is_overdue(self, tab: ClaimableTab, now: float, *, leaving: bool) -> bool:
        linked = self._link(tab.order.message.coordinator) is not None
        return self.policy.must_settle_directly(
            tab, now, linked=linked, wait=self._chain.withdrawal_delay if leaving else float("inf")
        )

    async def settle_directly(self) -> int:
        """Settles by itself what the last look found that coordinators did not settle in time: one transaction of at most
        MAX_ROWS tabs, those first that expire first. Each is tried again after `retry` at the earliest. Returns the number of
        tabs that were paid. Raises Unavailable.
        """
        late, self._overdue = self._overdue, []
        self._has_overdue.clear()
        now, policy = self._now(), self.policy
        self._tried_at = {payer: at for payer, at in self._tried_at.items() if now - at < policy.retry_after}
        fresh = [tab for tab in late if tab.payer not in self._tried_at]
        worth = [tab for tab in fresh if await self._collectable(tab) >= max(1, policy.direct_min_amount)]
        tabs = sorted(worth, key=lambda tab: tab.order.message.claim_by)[:MAX_ROWS]
        if self._settlement is None or not tabs:
            return 0
        self._tried_at |= dict.fromkeys((tab.payer for tab in tabs), now)
        claim = await self._sign(tabs)
        try:
            collected = await self._settlement.settle(claim, [tab.order for tab in tabs])
        except Refusal as refusal:
            log.warning("not settled", tabs=len(tabs), amount=sum(tab.due for tab in tabs), reason=str(refusal))
            if refusal.code is Code.INSUFFICIENT_FUNDS:
                first = tabs[0]
                debt = DebtAlarm(
                    sum(tab.due for tab in tabs), first.order.message.claim_by, "send this wallet coins of the chain"
                )
                self._alarm(NO_COINS, first.payer, debt)
            return 0
        log.info("settled by this node itself", tabs=len(tabs), paid=sum(collected.paid.values()), tx=collected.transactions)
        return len(collected.paid)

    async def _collectable(self, tab: ClaimableTab) -> int:
        """What settling a tab would bring now, in base units; nothing where the chain can't be asked."""
        funds = await self._chain.funds(tab.payer)
        return min(tab.due, funds.payable) if funds.known else 0

    async def _record_write_offs(self, now: float) -> None:
        """Books what is out of reach, now and then, and tells of all that is new in one alarm."""
        if now - self._write_offs_checked_at < _WRITE_OFF_SECONDS:
            return
        self._write_offs_checked_at = now
        losses = [loss for loss in await self._store.write_off(int(now)) if loss.increase > 0]
        if losses:
            total, largest = sum(loss.increase for loss in losses), max(losses, key=lambda loss: loss.increase)
            log.warning("written off", payers=len(losses), amount=total, most=largest.payer)
            self._alarm(WRITTEN_OFF, largest.payer, DebtAlarm(total, 0, "if it is often: less trust, in [credit] of the config"))

    async def _still_due(self, tab: ClaimableTab, now: float) -> bool:
        """Whether a claim would bring anything, as the chain says now; without its word, as it was last seen."""
        funds = await self._chain.refresh(tab.payer)
        if not funds.known:
            return True
        if (funds.settled, funds.reserved) != (tab.settled, tab.reserved):
            self._on_funds(tab.payer, funds)
            await self._store.record_funds(tab.payer, funds, int(now))
            if funds.settled > tab.settled:
                log.info("settled on chain", payer=tab.payer, amount=int(funds.settled - tab.settled), total=int(funds.settled))
        owed = min(tab.cumulative, tab.order.message.ceiling) - funds.settled
        if owed > 0 and min(owed, funds.payable) < max(1, self.policy.dust):
            self._back_off(tab, now)
            return False
        self._empty_purses.pop(tab.payer, None)
        return owed > 0

    def _back_off(self, tab: ClaimableTab, now: float) -> None:
        """Leaves a tab alone that nothing is behind, for longer each time, but not until its order has expired."""
        seconds = min(LONGEST_REST, max(FIRST_REST, 2 * self._empty_purses.get(tab.payer, RetryDelay()).seconds))
        left = max(0.0, tab.order.message.claim_by - now)
        self._empty_purses[tab.payer] = RetryDelay(now + min(seconds, left / 4), seconds)
        if len(self._empty_purses) > REMEMBERED:
            self._empty_purses.pop(next(iter(self._empty_purses)))

    async def _claim(self, link: Link, tabs: list[ClaimableTab]) -> None:
        claim = await self._sign(tabs)
        link.post(Kind.CLAIM, NO_JOB, dumps(ClaimRequest(claim, tuple(tab.order for tab in tabs)).to_json()))
        log.info("claim handed in", tabs=len(tabs), amount=sum(tab.due for tab in tabs))

    async def _sign(self, tabs: list[ClaimableTab]) -> Verified[Claim]:
        """A claim on what is owed, written down before it leaves. Raises Unavailable."""
        rows = tuple(
            ClaimRow(payer=tab.payer, order_hash=tab.order.digest, seq=tab.seq, cumulative_cost=tab.cumulative) for tab in tabs
        )
        claim = self._signer.sign(Claim(provider=self._signer.address, rows=rows), self._domain)
        await self._store.record_claim(claim, int(self._now()))
        return claim
