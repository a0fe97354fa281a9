"""What each payer owes this node: the provider's half of every tab, in memory, and who may owe more. Pure.

The store is the truth about receipts; this adds what is in flight. A payer may owe, beyond what is reserved for this provider on
chain, its own unsecured limit at most, and all payers together the total limit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from tallystick.protocol.errors import Code, Fault, Refusal, Unavailable
from tallystick.protocol.messages import Order, Receipt
from tallystick.protocol.tab import ProviderTab, Security
from tallystick.protocol.types import Address, Amount


@dataclass(frozen=True, slots=True)
class Funds:
    """What the chain says of a payer and its tab with this node. `known` is false where it could not be asked yet; `thawing` is
    on its way out of the purse, and not in `free`.
    """

    settled: Amount = Amount(0)
    reserved: Amount = Amount(0)
    free: Amount = Amount(0)
    known: bool = False
    thawing: Amount = Amount(0)


@dataclass(frozen=True, slots=True)
class TabRow:
    """A tab as stored: the last receipt's seq and total, the best order to claim on, and what was last seen on chain."""

    payer: Address
    seq: int
    cumulative: Amount
    ceiling: Amount
    claim_by: int
    settled: Amount = Amount(0)
    reserved: Amount = Amount(0)


@dataclass(frozen=True, slots=True)
class Exposure:
    """How much this node gives on trust, in base units. `claim_margin`: an order whose claimBy is nearer than this many
    seconds is not counted on.
    """

    per_payer: Amount = Amount(250_000)
    total: Amount = Amount(10_000_000)
    claim_margin: int = 600


@dataclass(slots=True)
class Account:
    """One payer: its tab, the expiry of the order that its ceiling rests on, and its funds as last seen."""

    tab: ProviderTab = field(default_factory=ProviderTab)
    claim_by: int = 0
    funds: Funds = field(default_factory=Funds)

    @property
    def owed(self) -> int:
        """What is unpaid if every job in flight costs its cap."""
        return max(0, self.tab.cumulative + self.tab.in_flight - self.funds.settled)

    @property
    def unsecured(self) -> int:
        """The part of it that no reservation covers."""
        return max(0, self.owed - self.funds.reserved)


class Tabs:
    """All tabs of this node. `admit`, then exactly one of `book` and `drop` for each job."""

    def __init__(self, exposure: Exposure, rows: Iterable[TabRow] = ()) -> None:
        self._exposure = exposure
        self._accounts: dict[Address, Account] = {}
        self._unsecured = 0
        for row in rows:
            tab = ProviderTab(row.seq, row.cumulative, row.ceiling)
            self._put(row.payer, Account(tab, row.claim_by, Funds(row.settled, row.reserved)))

    def adopt(self, receipt: Receipt, order: Order) -> None:
        """A receipt of a former state of this node turned up: the tab goes on from there."""
        held = self.account(receipt.payer)
        better = order.ceiling >= held.tab.ceiling
        tab = replace(
            held.tab,
            seq=receipt.seq,
            cumulative=Amount(max(held.tab.cumulative, receipt.cumulative_cost)),
            ceiling=Amount(max(held.tab.ceiling, order.ceiling)),
        )
        self._put(receipt.payer, replace(held, tab=tab, claim_by=order.claim_by if better else held.claim_by))

    def adjust(self, exposure: Exposure) -> None:
        """The config has changed: jobs that come from now on are held to this."""
        self._exposure = exposure

    @property
    def unsecured(self) -> Amount:
        """What all payers together could come to owe beyond their reservations."""
        return Amount(self._unsecured)

    def account(self, payer: Address) -> Account:
        """A payer's account; an empty one for a stranger."""
        return self._accounts.get(payer) or Account()

    def exposed(self) -> dict[Address, int]:
        """The unsecured part of every payer that has one."""
        return {payer: account.unsecured for payer, account in self._accounts.items() if account.unsecured}

    def admit(self, order: Order, cap: Amount, funds: Funds, now: int) -> None:
        """Counts a job in flight. Raises Refusal (unauthorised_tab, unsecured, insufficient_funds), or Unavailable where this
        node's own record of the tab is older than the chain's.
        """
        held = self.account(order.payer)
        seen = funds if funds.known else held.funds
        tab = held.tab
        if seen.settled > tab.cumulative:
            raise Unavailable(
                Code.PROVIDER_FAILED,
                f"the chain has paid {seen.settled} on this tab, this node's record ends at {tab.cumulative}: its state was lost",
                fault=Fault.PROVIDER,
            )
        if held.claim_by <= now + self._exposure.claim_margin:
            tab = replace(tab, ceiling=Amount(0))
        others = self._unsecured - held.unsecured
        limit = max(0, min(self._exposure.per_payer, self._exposure.total - others))
        tab_after = tab.admit(order, cap, Security(seen.settled, seen.reserved, Amount(limit)))
        after = Account(tab_after, order.claim_by if order.ceiling >= tab.ceiling else held.claim_by, seen)
        if seen.known and after.owed > seen.free + seen.reserved:
            raise Refusal(
                Code.INSUFFICIENT_FUNDS,
                f"{after.owed} would be owed, but the purse has {seen.free} free and {seen.reserved} reserved for this provider",
            )
        self._put(order.payer, after)

    def booked(self, payer: Address, cost: Amount, cap: Amount) -> ProviderTab:
        """What the tab would be after a receipt over `cost` for a job with this cap. Changes nothing."""
        return self.account(payer).tab.book(cost, cap)

    def book(self, payer: Address, cost: Amount, cap: Amount) -> None:
        """A receipt is durable: its total is the tab's."""
        self._change(payer, self.booked(payer, cost, cap))

    def drop(self, payer: Address, cap: Amount) -> None:
        """A job ended without a receipt."""
        self._change(payer, self.account(payer).tab.drop(cap))

    def observe(self, payer: Address, funds: Funds) -> None:
        """The chain was asked again."""
        held = self._accounts.get(payer)
        if held is not None and funds.known:
            self._put(payer, replace(held, funds=funds))

    def _change(self, payer: Address, tab: ProviderTab) -> None:
        self._put(payer, replace(self.account(payer), tab=tab))

    def _put(self, payer: Address, account: Account) -> None:
        former = self._accounts.get(payer)
        self._unsecured += account.unsecured - (former.unsecured if former else 0)
        if account.tab.seq or account.tab.in_flight:
            self._accounts[payer] = account
        else:  # a stranger again: whoever only tries costs no memory
            self._accounts.pop(payer, None)
