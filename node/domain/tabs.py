"""The provider's side of every tab, in memory: what each payer owes, and which payer may owe more.

The store is the source of truth for receipts; this module adds the jobs in flight. Credit is what a payer may owe beyond the
amount reserved for this provider on chain (`node.domain.credit_limits`). A debt stops counting against the credit of all payers
together when no order can claim it any more, or when its payer has ordered nothing for long. It counts against its own payer for
ever.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from node.domain.credit_limits import CreditLimits, DailyUnearnedCredit, UnearnedCredit
from node.domain.signed_ceilings import SignedCeiling, SignedCeilings, add, after, highest
from tallystick.protocol.errors import Code, Fault, Refusal, Unavailable
from tallystick.protocol.messages import Order, Receipt
from tallystick.protocol.tab import ProviderTab, Security
from tallystick.protocol.types import Address, Amount, format_amount

__all__ = ["CreditLimits", "Funds", "PayerAccount", "StoredTab", "Tabs"]


@dataclass(frozen=True, slots=True)
class Funds:
    """The chain's state of a payer and its tab with this provider, in base units. `known` is false if the state is unknown or too
    old.

    Amounts that are being withdrawn are no security: `thawing` is not in `free`, and `releasing` is not in `reserved`.
    """

    settled: Amount = Amount(0)
    reserved: Amount = Amount(0)
    free: Amount = Amount(0)
    known: bool = False
    thawing: Amount = Amount(0)
    releasing: Amount = Amount(0)

    @property
    def payable(self) -> int:
        """What a claim could be paid from now, in base units."""
        return self.reserved + self.releasing + self.free + self.thawing


@dataclass(frozen=True, slots=True)
class StoredTab:
    """A tab as stored: number and total of the last receipt, the best order to claim with, and the last known chain state.

    `lower_ceilings`: those that stay claimable for longer; `last_order_at`: when the last receipt was made (Unix seconds);
    `claimed`: the highest total that was ever claimed.
    """

    payer: Address
    seq: int
    cumulative: Amount
    ceiling: Amount
    claim_by: int
    settled: Amount = Amount(0)
    reserved: Amount = Amount(0)
    lower_ceilings: SignedCeilings = ()
    last_order_at: int = 0
    claimed: Amount = Amount(0)


class PayerAccount(NamedTuple):
    """The account of one payer: its tab, its signed ceilings, its funds as last seen, its last order's time (Unix seconds).

    `written_off`: the part of its debt that is written off, in base units; `unearned`: its unearned credit.
    """

    tab: ProviderTab = ProviderTab()
    ceilings: SignedCeilings = ()
    funds: Funds = Funds()
    last_order_at: int = 0
    written_off: int = 0
    unearned: UnearnedCredit = UnearnedCredit()

    @property
    def claim_by(self) -> int:
        """Until when the ceiling that the tab rests on can be claimed, in Unix seconds; 0 if the tab rests on none."""
        return max((ceiling.claim_by for ceiling in self.ceilings if ceiling.amount >= self.tab.ceiling), default=0)

    @property
    def owed(self) -> int:
        """The debt if every job in flight costs its maximum, in base units."""
        return max(0, int(self.tab.cumulative) + int(self.tab.in_flight) - int(self.funds.settled))

    @property
    def unreserved(self) -> int:
        """The part of `owed` that no reservation covers."""
        return max(0, self.owed - int(self.funds.reserved))

    @property
    def unsecured(self) -> int:
        """The part of `unreserved` that is not written off."""
        return max(0, self.owed - self.written_off - int(self.funds.reserved))

    def write_off(self, now: int, write_off: int) -> int:
        """Returns the debt to write off at `now`, in base units.

        This is the debt that no order can claim. If the payer has ordered nothing for `write_off_after` seconds, it is all
        unreserved debt.
        """
        best = highest(self.ceilings, now)
        reach = int(max(self.funds.settled, best.amount if best else 0))
        expired = max(0, int(self.tab.cumulative) - reach)
        forgotten = not self.tab.in_flight and now >= self.last_order_at + write_off
        return max(expired, self.unreserved) if forgotten else expired

    def next_write_off(self, now: int, write_off: int) -> int | None:
        """Returns when more debt may have to be written off (Unix seconds); None if that cannot happen."""
        best = highest(self.ceilings, now)
        times = [best.claim_by if best else now, self.last_order_at + write_off]
        return min([time for time in times if time > now], default=None)


_UNKNOWN = PayerAccount()


class Tabs:
    """All tabs of this node. Each job calls `admit`, then exactly one of `record` and `drop`.

    `on_stale_state` is called when a tab turns out to be paid beyond this node's record, and when such a tab is recovered.
    """

    def __init__(self, limits: CreditLimits, rows: Iterable[StoredTab] = ()) -> None:
        self._limits = limits
        self._accounts: dict[Address, PayerAccount] = {}
        self._unsecured = self._written_off = self._now = 0
        self._unearned = DailyUnearnedCredit()
        self._write_off_queue: list[tuple[int, Address]] = []
        self._write_off_at: dict[Address, int] = {}
        self.chain_ahead: dict[Address, int] = {}
        """Base units paid or claimed on each tab whose record ends below that amount."""
        self.on_stale_state: Callable[[], None] = lambda: None
        for row in rows:
            ceilings: SignedCeilings = ()
            for ceiling in (SignedCeiling(row.ceiling, row.claim_by), *row.lower_ceilings):
                ceilings = add(ceilings, ceiling)
            account = PayerAccount(ProviderTab(row.seq, row.cumulative, row.ceiling), ceilings, Funds(row.settled, row.reserved))
            self._put(row.payer, account._replace(last_order_at=row.last_order_at), row.last_order_at)
            if max(row.settled, row.claimed) > row.cumulative:
                self.chain_ahead[row.payer] = max(row.settled, row.claimed)

    def merge_recovered(self, receipt: Receipt, order: Order) -> None:
        """Continues a tab from a receipt that an earlier state of this node signed."""
        former = self.account(receipt.payer)
        ceilings = add(former.ceilings, SignedCeiling(order.ceiling, order.claim_by))
        total = Amount(max(former.tab.cumulative, receipt.cumulative_cost))
        ceiling = ceilings[0].amount if ceilings else former.tab.ceiling
        tab = former.tab._replace(seq=max(former.tab.seq, receipt.seq), cumulative=total, ceiling=ceiling)
        last_at = max(former.last_order_at, receipt.finished_at)
        self._put(receipt.payer, former._replace(tab=tab, ceilings=ceilings, last_order_at=last_at), receipt.finished_at)
        if self.chain_ahead.get(receipt.payer, total + 1) <= total:
            del self.chain_ahead[receipt.payer]
            self.on_stale_state()

    def set_limits(self, exposure: CreditLimits) -> None:
        """Sets the limits for later jobs, after the config changed."""
        self._limits = exposure

    @property
    def unsecured(self) -> Amount:
        """Largest possible debt of all payers beyond their reservations, without written-off debt, in base units."""
        return Amount(self._unsecured)

    @property
    def written_off(self) -> Amount:
        """Debt of all payers that is written off, in base units."""
        return Amount(self._written_off)

    def unearned_credit(self, now: int) -> Amount:
        """Returns the unearned credit granted in the 24 hours before `now` (Unix seconds), in base units."""
        return Amount(self._unearned.granted(now))

    def credit_summary(self, now: int) -> dict[str, int]:
        """Returns the credit totals for the status report at `now` (Unix seconds), in base units."""
        self.expire(now)
        return {"written_off": int(self.written_off), "unearned_credit_today": int(self.unearned_credit(now))}

    def account(self, payer: Address) -> PayerAccount:
        """Returns a payer's account; an empty one for an unknown payer."""
        return self._accounts.get(payer, _UNKNOWN)

    def most_recent_payers(self, limit: int) -> list[Address]:
        """Returns at most `limit` payers, most recent order first."""
        return heapq.nlargest(limit, self._accounts, key=lambda payer: self._accounts[payer].last_order_at)

    def unsecured_by_payer(self) -> dict[Address, int]:
        """Returns the unsecured debt of every payer that has any, in base units."""
        return {payer: account.unsecured for payer, account in self._accounts.items() if account.unsecured}

    def expire(self, now: int) -> None:
        """Advances the time to `now` (Unix seconds) and writes off what is no longer claimable."""
        self._now = max(self._now, now)
        while self._write_off_queue and self._write_off_queue[0][0] <= self._now:
            time, payer = heapq.heappop(self._write_off_queue)
            if self._write_off_at.get(payer) == time:
                del self._write_off_at[payer]
                self._put(payer, self.account(payer), self._now)

    def admit(self, order: Order, max_cost: Amount, funds: Funds, now: int) -> None:
        """Counts a job in flight; `max_cost` is its largest cost in base units.

        Raises Refusal (`unauthorised_tab`, `unsecured`, `insufficient_funds`), or Unavailable if this node's record of the tab is
        older than the chain's. While the chain state is unknown, nothing counts as reserved, and the job needs credit.
        """
        self.expire(now)
        former = self.account(order.payer)
        seen = funds if funds.known else Funds(Amount(max(funds.settled, former.funds.settled)))
        self._require_record(order.payer, former.tab, seen.settled)
        margin = now + self._limits.claim_margin
        if order.claim_by <= margin:
            raise Refusal(
                Code.UNAUTHORISED_TAB,
                f"order.claimBy: expected more than {self._limits.claim_margin} s from now, got {order.claim_by - now} s; "
                "sign an order that stays claimable for longer",
            )
        ceilings = add(after(former.ceilings, now), SignedCeiling(order.ceiling, order.claim_by))
        best = highest(ceilings, margin)
        tab = former.tab._replace(ceiling=best.amount if best else Amount(0))
        security = Security(seen.settled, seen.reserved, Amount(self._credit_limit(former, seen.settled)))
        account = former._replace(tab=tab.admit(order, max_cost, security), ceilings=ceilings, funds=seen, last_order_at=now)
        if seen.known and account.owed > int(seen.free) + int(seen.reserved):
            raise Refusal(
                Code.INSUFFICIENT_FUNDS,
                f"the payer would owe {format_amount(Amount(account.owed))} dollars, but its purse has "
                f"{format_amount(seen.free)} free and {format_amount(seen.reserved)} reserved for this provider that are not "
                "being withdrawn; add funds to the purse",
            )
        self._put(order.payer, account, now)

    def record(self, payer: Address, cost: Amount, max_cost: Amount) -> None:
        """Records a durable receipt over `cost` for a job with this maximum cost: its total becomes the tab's total."""
        self._change(payer, self.account(payer).tab.record(cost, max_cost))

    def continue_from(self, payer: Address, seq: int, cumulative: Amount) -> None:
        """Continues a tab from a receipt that is stored, if this record ends before it: its write was thought to have failed."""
        tab = self.account(payer).tab
        if seq > tab.seq:
            self._change(payer, tab._replace(seq=seq, cumulative=cumulative))

    def roll_back(self, payer: Address, cumulative: Amount) -> None:
        """Lowers a tab's total to what it was before its last receipts, which were voided. Their numbers stay used."""
        self._change(payer, self.account(payer).tab._replace(cumulative=cumulative))

    def drop(self, payer: Address, max_cost: Amount) -> None:
        """Removes a job that ended without a receipt."""
        self._change(payer, self.account(payer).tab.drop(max_cost))

    def observe(self, payer: Address, funds: Funds) -> None:
        """Updates the payer's funds to the chain's latest state."""
        former = self._accounts.get(payer)
        if former is None or not funds.known:
            return
        self._put(payer, former._replace(funds=funds), self._now)
        if funds.settled > former.tab.cumulative:
            self._note_ahead(payer, funds.settled)

    def _require_record(self, payer: Address, tab: ProviderTab, settled: int) -> None:
        """Raises Unavailable if the chain settled more than this node's record of the tab."""
        if settled > tab.cumulative:
            self._note_ahead(payer, settled)
            raise Unavailable(
                Code.PROVIDER_FAILED,
                f"the chain has settled {format_amount(Amount(settled))} dollars on this tab, but this node's record ends at "
                f"{format_amount(tab.cumulative)}: its state was lost",
                fault=Fault.PROVIDER,
            )

    def _note_ahead(self, payer: Address, settled: int) -> None:
        if payer not in self.chain_ahead:
            self.chain_ahead[payer] = settled
            self.on_stale_state()

    def _credit_limit(self, account: PayerAccount, settled: int) -> int:
        """Returns what a payer may owe beyond its reservation: limited by its payments, by all other debt, and by today's
        unearned credit.
        """
        limits = self._limits
        others = self._unsecured - account.unsecured
        granted, unearned = self._unearned.granted(self._now), self._unearned.aged(account.unearned)
        left = max(0, int(limits.new_payers_per_day) - (granted - unearned.recent))
        return max(
            0, min(limits.payer_limit(settled), int(limits.total) - others, limits.earned_by(settled) + unearned.old + left)
        )

    def _change(self, payer: Address, tab: ProviderTab) -> None:
        self._put(payer, self.account(payer)._replace(tab=tab), self._now)

    def _put(self, payer: Address, account: PayerAccount, at: int) -> None:
        """Stores an account and updates the sums over all accounts; `at` is when the debt arose."""
        former = self.account(payer)
        unearned = max(0, account.unreserved - self._limits.earned_by(account.funds.settled))
        written_off = account.write_off(self._now, self._limits.write_off_after)
        account = account._replace(written_off=written_off, unearned=self._unearned.update(former.unearned, unearned, at))
        self._unsecured += account.unsecured - former.unsecured
        self._written_off += account.written_off - former.written_off
        if account.tab.seq or account.tab.in_flight:
            self._accounts[payer] = account
            self._schedule_write_off(payer, account)
        else:  # no job left: refused attempts of an unknown payer use no memory
            self._accounts.pop(payer, None)

    def _schedule_write_off(self, payer: Address, account: PayerAccount) -> None:
        """Schedules the next check of an account in `expire`; there is one entry for each payer."""
        time = account.next_write_off(self._now, self._limits.write_off_after)
        if time is not None and time < self._write_off_at.get(payer, time + 1):
            self._write_off_at[payer] = time
            heapq.heappush(self._write_off_queue, (time, payer))
