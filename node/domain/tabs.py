"""What each payer owes this node: the provider's half of every tab, in memory, and who may owe more. Pure.

The store is the truth about receipts; this adds what is in flight. What a payer may owe beyond what is reserved for this provider
on chain is its trust (`node.domain.credit_limits`). A debt stops counting against the trust of all payers together when no
order on it can be claimed any more, or when its payer has ordered nothing for long; its own payer is held to it for ever.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from node.domain.credit_limits import CreditLimits, DailyUnearnedCredit, UnearnedCredit
from node.domain.signed_caps import SignedCap, SignedCaps, add, after, highest
from tallystick.protocol.errors import Code, Fault, Refusal, Unavailable
from tallystick.protocol.messages import Order, Receipt
from tallystick.protocol.tab import ProviderTab, Security
from tallystick.protocol.types import Address, Amount

__all__ = ["CreditLimits", "Funds", "PayerAccount", "StoredTab", "Tabs"]


@dataclass(frozen=True, slots=True)
class Funds:
    """What the chain says of a payer and its tab with this node, in base units. `known` is false where it could not be asked, or
    only too long ago. On their way out, and no security: `thawing`, which is not in `free`, and `releasing`, not in `reserved`.
    """

    settled: Amount = Amount(0)
    reserved: Amount = Amount(0)
    free: Amount = Amount(0)
    known: bool = False
    thawing: Amount = Amount(0)
    releasing: Amount = Amount(0)

    @property
    def payable(self) -> int:
        """What a claim could be paid from at this moment, in base units."""
        return self.reserved + self.releasing + self.free + self.thawing


@dataclass(frozen=True, slots=True)
class StoredTab:
    """A tab as stored: the last receipt's seq and total, the best order to claim on, what was last seen on chain; the `lower`
    ceilings that last longer, when the last receipt was made (Unix seconds), and the highest total that was ever claimed.
    """

    payer: Address
    seq: int
    cumulative: Amount
    cap: Amount
    claim_by: int
    settled: Amount = Amount(0)
    reserved: Amount = Amount(0)
    lower_caps: SignedCaps = ()
    last_order_at: int = 0
    claimed: Amount = Amount(0)


@dataclass(frozen=True, slots=True)
class PayerAccount:
    """One payer: its tab, its ceilings, its funds as last seen, when it last ordered, the part of its debt that is written off,
    and its part of the newcomers' trust.
    """

    tab: ProviderTab = field(default_factory=ProviderTab)
    caps: SignedCaps = ()
    funds: Funds = field(default_factory=Funds)
    last_order_at: int = 0
    written_off: int = 0
    unearned: UnearnedCredit = field(default_factory=UnearnedCredit)

    @property
    def claim_by(self) -> int:
        """Until when the ceiling that the tab rests on can be claimed on, in Unix seconds; 0 if it rests on none."""
        return max((one.claim_by for one in self.caps if one.amount >= self.tab.ceiling), default=0)

    @property
    def owed(self) -> int:
        """What is unpaid if every job in flight costs its cap, in base units."""
        return max(0, self.tab.cumulative + self.tab.in_flight - self.funds.settled)

    @property
    def unreserved(self) -> int:
        """The part of it that no reservation covers."""
        return max(0, self.owed - self.funds.reserved)

    @property
    def unsecured(self) -> int:
        """The part of that which is not written off."""
        return max(0, self.owed - self.written_off - self.funds.reserved)

    def write_off(self, now: int, write_off: int) -> int:
        """What must be written off at that time, in base units: what no order can be claimed for, and, if the payer has ordered
        nothing for `write_off` seconds, all that is not reserved.
        """
        best = highest(self.caps, now)
        reach = max(self.funds.settled, best.amount if best else 0)
        expired = max(0, self.tab.cumulative - reach)
        forgotten = not self.tab.in_flight and now >= self.last_order_at + write_off
        return max(expired, self.unreserved) if forgotten else expired

    def next_write_off(self, now: int, write_off: int) -> int | None:
        """When more may have to be written off; None if that can't be."""
        best = highest(self.caps, now)
        times = [best.claim_by if best else now, self.last_order_at + write_off]
        return min((time for time in times if time > now), default=None)


class Tabs:
    """All tabs of this node. `admit`, then exactly one of `book` and `drop` for each job. `on_lost_state` is called when it shows
    or is mended that the chain has paid more than this node remembers.
    """

    def __init__(self, limits: CreditLimits, rows: Iterable[StoredTab] = ()) -> None:
        self._limits = limits
        self._accounts: dict[Address, PayerAccount] = {}
        self._unsecured = self._written_off = self._now = 0
        self._unearned = DailyUnearnedCredit()
        self._write_off_queue: list[tuple[int, Address]] = []
        self._write_off_at: dict[Address, int] = {}
        self.chain_ahead: dict[Address, int] = {}
        """What was paid or claimed, in base units, on each tab whose record ends below that."""
        self.on_stale_state: Callable[[], None] = lambda: None
        for row in rows:
            ceilings: SignedCaps = ()
            for one in (SignedCap(row.cap, row.claim_by), *row.lower_caps):
                ceilings = add(ceilings, one)
            account = PayerAccount(ProviderTab(row.seq, row.cumulative, row.cap), ceilings, Funds(row.settled, row.reserved))
            self._put(row.payer, replace(account, last_order_at=row.last_order_at), row.last_order_at)
            if max(row.settled, row.claimed) > row.cumulative:
                self.chain_ahead[row.payer] = max(row.settled, row.claimed)

    def merge_recovered(self, receipt: Receipt, order: Order) -> None:
        """A receipt of a former state of this node turned up: the tab goes on from there."""
        held = self.account(receipt.payer)
        ceilings = add(held.caps, SignedCap(order.ceiling, order.claim_by))
        total = Amount(max(held.tab.cumulative, receipt.cumulative_cost))
        ceiling = ceilings[0].amount if ceilings else held.tab.ceiling
        tab = replace(held.tab, seq=max(held.tab.seq, receipt.seq), cumulative=total, ceiling=ceiling)
        last_at = max(held.last_order_at, receipt.finished_at)
        self._put(receipt.payer, replace(held, tab=tab, caps=ceilings, last_order_at=last_at), receipt.finished_at)
        if self.chain_ahead.get(receipt.payer, total + 1) <= total:
            del self.chain_ahead[receipt.payer]
            self.on_stale_state()

    def set_limits(self, exposure: CreditLimits) -> None:
        """The config has changed: jobs that come from now on are held to this."""
        self._limits = exposure

    @property
    def unsecured(self) -> Amount:
        """What all payers together could come to owe beyond their reservations, less what is written off."""
        return Amount(self._unsecured)

    @property
    def written_off(self) -> Amount:
        """What payers owe and is no longer counted on."""
        return Amount(self._written_off)

    def unearned_credit(self, now: int) -> Amount:
        """The trust that was given in the last 24 hours beyond what payers had earned."""
        return Amount(self._unearned.granted(now))

    def credit_summary(self, now: int) -> dict[str, int]:
        """For people, at that time (Unix seconds), in base units: what is written off, and what newcomers got in 24 hours."""
        self.expire(now)
        return {"written_off": int(self.written_off), "unearned_credit_today": int(self.unearned_credit(now))}

    def account(self, payer: Address) -> PayerAccount:
        """A payer's account; an empty one for a stranger."""
        return self._accounts.get(payer) or PayerAccount()

    def most_recent_payers(self, most: int) -> list[Address]:
        """The payers that ordered last, at most so many, the last first."""
        return heapq.nlargest(most, self._accounts, key=lambda payer: self._accounts[payer].last_order_at)

    def unsecured_by_payer(self) -> dict[Address, int]:
        """The unsecured part of every payer that has one."""
        return {payer: account.unsecured for payer, account in self._accounts.items() if account.unsecured}

    def expire(self, now: int) -> None:
        """Time has passed: what can no longer be claimed by then (Unix seconds) is written off."""
        self._now = max(self._now, now)
        while self._write_off_queue and self._write_off_queue[0][0] <= self._now:
            time, payer = heapq.heappop(self._write_off_queue)
            if self._write_off_at.get(payer) == time:
                del self._write_off_at[payer]
                self._put(payer, self.account(payer), self._now)

    def admit(self, order: Order, cap: Amount, funds: Funds, now: int) -> None:
        """Counts a job in flight. Raises Refusal (unauthorised_tab, unsecured, insufficient_funds), or Unavailable where this
        node's own record of the tab is older than the chain's.

        Where the chain is not known, nothing counts as reserved, and the job is done on trust or not at all.
        """
        self.expire(now)
        held = self.account(order.payer)
        seen = funds if funds.known else Funds(Amount(max(funds.settled, held.funds.settled)))
        self._require_record(order.payer, held.tab, seen.settled)
        margin = now + self._limits.claim_margin
        if order.claim_by <= margin:
            raise Refusal(
                Code.UNAUTHORISED_TAB,
                f"order.claimBy: leaves {order.claim_by - now} s, but this provider counts on an order only if it can be claimed "
                f"for more than {self._limits.claim_margin} s; sign one that lasts longer",
            )
        ceilings = add(after(held.caps, now), SignedCap(order.ceiling, order.claim_by))
        best = highest(ceilings, margin)
        tab = replace(held.tab, ceiling=best.amount if best else Amount(0))
        security = Security(seen.settled, seen.reserved, Amount(self._credit_limit(held, seen.settled)))
        account = replace(held, tab=tab.admit(order, cap, security), caps=ceilings, funds=seen, last_order_at=now)
        if seen.known and account.owed > seen.free + seen.reserved:
            raise Refusal(
                Code.INSUFFICIENT_FUNDS,
                f"{account.owed} would be owed, but the purse has {seen.free} free and {seen.reserved} reserved for this "
                "provider that do not leave",
            )
        self._put(order.payer, account, now)

    def tab_after(self, payer: Address, cost: Amount, cap: Amount) -> ProviderTab:
        """What the tab would be after a receipt over `cost` for a job with this cap. Changes nothing."""
        return self.account(payer).tab.book(cost, cap)

    def record(self, payer: Address, cost: Amount, cap: Amount) -> None:
        """A receipt is durable: its total is the tab's."""
        self._change(payer, self.tab_after(payer, cost, cap))

    def drop(self, payer: Address, cap: Amount) -> None:
        """A job ended without a receipt."""
        self._change(payer, self.account(payer).tab.drop(cap))

    def observe(self, payer: Address, funds: Funds) -> None:
        """The chain was asked again."""
        held = self._accounts.get(payer)
        if held is None or not funds.known:
            return
        self._put(payer, replace(held, funds=funds), self._now)
        if funds.settled > held.tab.cumulative:
            self._note_ahead(payer, funds.settled)

    def _require_record(self, payer: Address, tab: ProviderTab, settled: int) -> None:
        """Raises Unavailable where the chain paid more than this node remembers to have earned."""
        if settled > tab.cumulative:
            self._note_ahead(payer, settled)
            raise Unavailable(
                Code.PROVIDER_FAILED,
                f"the chain has paid {settled} on this tab, this node's record ends at {tab.cumulative}: its state was lost",
                fault=Fault.PROVIDER,
            )

    def _note_ahead(self, payer: Address, settled: int) -> None:
        if payer not in self.chain_ahead:
            self.chain_ahead[payer] = settled
            self.on_stale_state()

    def _credit_limit(self, held: PayerAccount, settled: int) -> int:
        """What a payer may owe beyond its reservation: by what it has paid, by what all others owe, and by what was given to
        newcomers in the last 24 hours.
        """
        limits = self._limits
        others = self._unsecured - held.unsecured
        used, gift = self._unearned.granted(self._now), self._unearned.aged(held.unearned)
        left = max(0, limits.new_payers_per_day - (used - gift.recent))
        return max(0, min(limits.payer_limit(settled), limits.total - others, limits.earned_by(settled) + gift.old + left))

    def _change(self, payer: Address, tab: ProviderTab) -> None:
        self._put(payer, replace(self.account(payer), tab=tab), self._now)

    def _put(self, payer: Address, account: PayerAccount, at: int) -> None:
        """Keeps an account, and the sums over all of them; `at` is when it came to owe what it owes."""
        former = self._accounts.get(payer) or PayerAccount()
        gift = max(0, account.unreserved - self._limits.earned_by(account.funds.settled))
        lost = account.write_off(self._now, self._limits.write_off_after)
        account = replace(account, written_off=lost, unearned=self._unearned.update(former.unearned, gift, at))
        self._unsecured += account.unsecured - former.unsecured
        self._written_off += account.written_off - former.written_off
        if account.tab.seq or account.tab.in_flight:
            self._accounts[payer] = account
            self._schedule_write_off(payer, account)
        else:  # a stranger again: whoever only tries costs no memory
            self._accounts.pop(payer, None)

    def _schedule_write_off(self, payer: Address, account: PayerAccount) -> None:
        """Sees to it that `expire` looks at an account when its next loss is due; there is one such entry a payer."""
        time = account.next_write_off(self._now, self._limits.write_off_after)
        if time is not None and time < self._write_off_at.get(payer, time + 1):
            self._write_off_at[payer] = time
            heapq.heappush(self._write_off_queue, (time, payer))
