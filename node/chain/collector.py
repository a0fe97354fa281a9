"""The collector: turns receipts into money. It submits claims to the coordinator, whose settler batches them on chain.

The collector watches the chain for settled amounts and submits a claim again if it was not settled. A tab is claimed when its due
amount is large enough, has waited long enough, uses up a large part of its reservation, or rests on an order that soon expires.
It is claimed at once while its payer withdraws funds. Claims that the coordinator does not settle in time are settled by the node
itself, with its own wallet.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple

import structlog

from node.chain.claim_policy import CHECKS_PER_WITHDRAWAL, ClaimPolicy
from node.domain.tabs import Funds
from node.ports import ChainView, ClaimableTab, ClaimStore, DebtAlarm, Link, Settlement
from tallystick.protocol.eip712 import Domain, Signer, Verified
from tallystick.protocol.errors import Code, Refusal, TallyError
from tallystick.protocol.link import ClaimRequest
from tallystick.protocol.messages import Claim, ClaimRow
from tallystick.protocol.types import Address, Amount, format_amount
from tallystick.protocol.wire import NO_JOB, Kind, dumps

log = structlog.get_logger()
MAX_ROWS = 64
MAX_TABS = 1_024
"""Tabs that one check reads; if there are more, the next check continues after them."""
MAX_WATCHED = 64
"""Number of payers whose withdrawals each check looks for: this many that owe most, and as many of the others in turns."""
MAX_REFRESHED = 256
"""Number of tabs that each check refreshes from the chain before they are claimed, largest due amount first."""
MIN_RETRY_DELAY, MAX_RETRY_DELAY = 60.0, 6 * 3_600.0
"""Seconds until the tab of a payer with an empty purse is checked again; doubled each time."""
MAX_EMPTY_PURSES = 10_000
"""Number of empty purses that are remembered."""
_WRITE_OFF_SECONDS = 600.0
_MIN_CHECK_INTERVAL = 0.5
THAWING, EXPIRING = "a payer with debt withdraws from its purse", "a debt will soon be unclaimable"
RELEASING = "a payer with debt releases its reservation"
NO_COINS = "a debt will soon be unclaimable, and this wallet has no coins to collect it"
WRITTEN_OFF = "debts that no order can claim any more were written off"


class RetryDelay(NamedTuple):
    """Until when a tab is left alone, by the collector's clock, and for how many seconds."""

    until: float = 0.0
    seconds: float = 0.0


class Collector:
    """See the module's docstring.

    `link` returns the connection to a coordinator, if there is one; `on_funds` receives the chain's state of a payer; `on_check`
    receives the time of each check; `in_doubt` returns whether a payer's tab must not be claimed now. `alarm` is called once for
    each event that the operator should see: a payer with debt withdraws, or a debt will soon be unclaimable.
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
        alarm: Callable[[str, Address, DebtAlarm], None] = lambda _event, _payer, _debt: None,
        policy: ClaimPolicy | None = None,
        on_funds: Callable[[Address, Funds], None] = lambda _payer, _funds: None,
        on_check: Callable[[int], None] = lambda _now: None,
        in_doubt: Callable[[Address], bool] = lambda _payer: False,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._signer, self._domain, self._store, self._chain = signer, domain, store, chain
        self._link, self.policy, self._on_funds, self._now = link, policy or ClaimPolicy(), on_funds, now
        self._alarm, self._settlement, self._on_check, self._in_doubt = alarm, settlement, on_check, in_doubt
        self._alarmed: set[tuple[str, Address]] = set()
        self._watch_from = self._skip = 0
        self._empty_purses: dict[Address, RetryDelay] = {}
        self._write_offs_checked_at = float("-inf")
        self._overdue: list[ClaimableTab] = []
        self._has_overdue = asyncio.Event()
        self._tried_at: dict[Address, float] = {}

    @property
    def open_alarms(self) -> frozenset[tuple[str, Address]]:
        """The events that hold as of the last check, each with its payer."""
        return frozenset(self._alarmed)

    async def run(self) -> None:
        """Checks the tabs every `check_interval` seconds until cancelled."""
        await asyncio.gather(self._claim_forever(), self._settle_forever())

    @property
    def check_interval(self) -> float:
        """Seconds between two checks: at most a part of the withdrawal delay, so no withdrawal completes between two checks."""
        return min(self.policy.check_interval, max(_MIN_CHECK_INTERVAL, self._chain.withdrawal_delay / CHECKS_PER_WITHDRAWAL))

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
                log.warning("direct settlement failed; it will be tried again", error=str(error))

    async def claim_due(self, *, everything: bool = False) -> int:
        """Claims the tabs that are due, or `everything` that is owed; returns the number of claimed tabs. Raises Unavailable."""
        now, policy = self._now(), self.policy
        self._on_check(int(now))
        listed = await self._store.claimable(int(now), MAX_TABS, self._skip)
        self._skip = self._skip + MAX_TABS if len(listed) == MAX_TABS else 0
        tabs = [tab for tab in listed if not self._in_doubt(tab.payer)]
        withdrawing = await self._raise_alarms(listed, now)
        wanted = [
            tab
            for tab in tabs
            if policy.is_due(tab, now) or ((everything or tab.payer in withdrawing) and tab.due >= max(1, policy.dust))
        ]
        not_delayed = [tab for tab in wanted if now >= self._empty_purses.get(tab.payer, RetryDelay()).until]
        by_priority = sorted(not_delayed, key=lambda tab: (policy.is_pending(tab, now), -tab.due))
        due = [tab for tab in by_priority[:MAX_REFRESHED] if await self._still_due(tab, now)]
        overdue = [tab for tab in due if self._is_overdue(tab, now, withdrawing=tab.payer in withdrawing)]
        # A claim that was not settled in time is submitted again.
        ready = [tab for tab in due if everything or not policy.is_pending(tab, now)]
        claimed = 0
        for coordinator in dict.fromkeys(tab.order.message.coordinator for tab in ready):
            link = self._link(coordinator)
            if link is None:
                continue
            its_tabs = [tab for tab in ready if tab.order.message.coordinator == coordinator]
            for start in range(0, len(its_tabs), MAX_ROWS):
                await self._claim(link, its_tabs[start : start + MAX_ROWS])
            claimed += len(its_tabs)
        if overdue:
            self._overdue = overdue
            self._has_overdue.set()
        await self._record_write_offs(now)
        return claimed

    async def _raise_alarms(self, tabs: list[ClaimableTab], now: float) -> set[Address]:
        """Raises alarms; returns the payers that withdraw funds. It checks the payers that owe most, and the others in turns."""
        by_due = sorted(tabs, key=lambda tab: -tab.due)
        largest, others = by_due[:MAX_WATCHED], by_due[MAX_WATCHED:]
        start = self._watch_from if self._watch_from < len(others) else 0
        self._watch_from = start + MAX_WATCHED
        alarms: set[tuple[str, Address]] = set()
        for tab in (*largest, *others[start : start + MAX_WATCHED]):
            funds = await self._chain.funds(tab.payer)
            alarms |= {(event, tab.payer) for event, amount in ((THAWING, funds.thawing), (RELEASING, funds.releasing)) if amount}
        withdrawing = {payer for _, payer in alarms}
        soon = now + self.policy.expiry_margin / 2
        least = max(1, self.policy.direct_min_amount)
        alarms |= {(EXPIRING, tab.payer) for tab in tabs if tab.order.message.claim_by <= soon and tab.due >= least}
        by_payer = {tab.payer: tab for tab in tabs}
        for event, payer in sorted(alarms - self._alarmed):
            tab = by_payer[payer]
            self._alarm(event, payer, DebtAlarm(tab.due, tab.order.message.claim_by))
        self._alarmed = alarms
        return withdrawing

    def _is_overdue(self, tab: ClaimableTab, now: float, *, withdrawing: bool) -> bool:
        linked = self._link(tab.order.message.coordinator) is not None
        return self.policy.must_settle_directly(
            tab, now, linked=linked, wait=self._chain.withdrawal_delay if withdrawing else float("inf")
        )

    async def settle_directly(self) -> int:
        """Settles claims that coordinators did not settle in time: one transaction of at most MAX_ROWS tabs, earliest expiry
        first.

        A tab is tried again after `retry_after` at the earliest. Returns the number of tabs that were paid. Raises Unavailable.
        """
        overdue, self._overdue = self._overdue, []
        self._has_overdue.clear()
        now, policy = self._now(), self.policy
        self._tried_at = {payer: at for payer, at in self._tried_at.items() if now - at < policy.retry_after}
        fresh = [tab for tab in overdue if tab.payer not in self._tried_at]
        worth = [tab for tab in fresh if await self._collectable(tab) >= max(1, policy.direct_min_amount)]
        tabs = sorted(worth, key=lambda tab: tab.order.message.claim_by)[:MAX_ROWS]
        if self._settlement is None or not tabs:
            return 0
        self._tried_at |= dict.fromkeys((tab.payer for tab in tabs), now)
        claim = await self._sign(tabs)
        try:
            result = await self._settlement.settle(claim, [tab.order for tab in tabs])
        except Refusal as refusal:
            log.warning("claim not settled", tabs=len(tabs), amount=_total(tabs), reason=str(refusal))
            if refusal.code is Code.INSUFFICIENT_FUNDS:
                first = tabs[0]
                debt = DebtAlarm(
                    sum(tab.due for tab in tabs),
                    first.order.message.claim_by,
                    "send this wallet coins of the chain to pay for gas",
                )
                self._alarm(NO_COINS, first.payer, debt)
            return 0
        log.info(
            "settled directly", tabs=len(tabs), paid=format_amount(Amount(sum(result.paid.values()))), tx=result.transactions
        )
        return len(result.paid)

    async def _collectable(self, tab: ClaimableTab) -> int:
        """Returns what settling a tab would bring now, in base units; 0 if the chain cannot be asked."""
        funds = await self._chain.funds(tab.payer)
        return min(tab.due, funds.payable) if funds.known else 0

    async def _record_write_offs(self, now: float) -> None:
        """Records unclaimable debt at intervals, and raises one alarm for all new debt."""
        if now - self._write_offs_checked_at < _WRITE_OFF_SECONDS:
            return
        self._write_offs_checked_at = now
        write_offs = [write_off for write_off in await self._store.write_off(int(now)) if write_off.increase > 0]
        if write_offs:
            total, largest = (
                sum(write_off.increase for write_off in write_offs),
                max(write_offs, key=lambda write_off: write_off.increase),
            )
            log.warning("debt written off", payers=len(write_offs), amount=format_amount(Amount(total)), largest=largest.payer)
            self._alarm(
                WRITTEN_OFF,
                largest.payer,
                DebtAlarm(total, 0, "if this happens often, lower the limits under [credit] in the config"),
            )

    async def _still_due(self, tab: ClaimableTab, now: float) -> bool:
        """Returns whether a claim would bring anything, by the chain's current state, or by its last known state if it does not
        respond.
        """
        funds = await self._chain.refresh(tab.payer)
        if not funds.known:
            return True
        if (funds.settled, funds.reserved) != (tab.settled, tab.reserved):
            self._on_funds(tab.payer, funds)
            await self._store.record_funds(tab.payer, funds, int(now))
            if funds.settled > tab.settled:
                log.info(
                    "settled on chain",
                    payer=tab.payer,
                    amount=format_amount(funds.settled - tab.settled),
                    total=format_amount(funds.settled),
                )
        owed = min(tab.cumulative, tab.order.message.ceiling) - funds.settled
        if owed > 0 and min(owed, funds.payable) < max(1, self.policy.dust):
            self._back_off(tab, now)
            return False
        self._empty_purses.pop(tab.payer, None)
        return owed > 0

    def _back_off(self, tab: ClaimableTab, now: float) -> None:
        """Leaves a tab with an empty purse alone, for longer each time, but never until its order has expired."""
        seconds = min(MAX_RETRY_DELAY, max(MIN_RETRY_DELAY, 2 * self._empty_purses.get(tab.payer, RetryDelay()).seconds))
        left = max(0.0, tab.order.message.claim_by - now)
        self._empty_purses[tab.payer] = RetryDelay(now + min(seconds, left / 4), seconds)
        if len(self._empty_purses) > MAX_EMPTY_PURSES:
            self._empty_purses.pop(next(iter(self._empty_purses)))

    async def _claim(self, link: Link, tabs: list[ClaimableTab]) -> None:
        claim = await self._sign(tabs)
        link.post(Kind.CLAIM, NO_JOB, dumps(ClaimRequest(claim, tuple(tab.order for tab in tabs)).to_json()))
        log.info("claim submitted", tabs=len(tabs), amount=_total(tabs))

    async def _sign(self, tabs: list[ClaimableTab]) -> Verified[Claim]:
        """Signs a claim on the due amounts and stores it before it leaves. Raises Unavailable."""
        rows = tuple(
            ClaimRow(payer=tab.payer, order_hash=tab.order.digest, seq=tab.seq, cumulative_cost=tab.cumulative) for tab in tabs
        )
        claim = self._signer.sign(Claim(provider=self._signer.address, rows=rows), self._domain)
        await self._store.record_claim(claim, int(self._now()))
        return claim


def _total(tabs: list[ClaimableTab]) -> str:
    return format_amount(Amount(sum(tab.due for tab in tabs)))
