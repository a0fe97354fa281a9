"""Exposure: what a payer owes and could come to owe, against what stands on chain for it. Pure.

Per tab: owed = last total - settled, plus the caps in flight. What a tab's reservation does not cover must be covered by the
purse's free balance, summed over the payer's tabs. This protects providers from hopeless jobs; each node still checks itself.

A total counts as far as the payer signed for it: what a provider writes above every ceiling is not owed. A pair that never
traded is not remembered, so strangers cannot fill the memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.types import Address, Amount, format_amount


@dataclass(slots=True)
class TabExposure:
    """One tab as the coordinator knows it, in base units. `ceiling`: the highest of the orders behind its receipts."""

    cumulative: Amount = Amount(0)
    settled: Amount = Amount(0)
    reserved: Amount = Amount(0)
    in_flight: Amount = Amount(0)
    ceiling: Amount = Amount(0)

    def uncovered(self, cap: int = 0) -> int:
        """What the reservation does not cover, with one more job of this cap."""
        return max(0, max(0, self.cumulative - self.settled) + self.in_flight + cap - self.reserved)


@dataclass(slots=True)
class Exposure:
    """All tabs of all payers that have traded here."""

    _tabs: dict[Address, dict[Address, TabExposure]] = field(default_factory=dict)

    def known(self, payer: Address, provider: Address) -> TabExposure | None:
        """The tab of a pair that has traded here or is about to."""
        return self._tabs.get(payer, {}).get(provider)

    @property
    def in_flight(self) -> Amount:
        """The caps of all jobs in flight."""
        return Amount(sum(tab.in_flight for tabs in self._tabs.values() for tab in tabs.values()))

    @property
    def size(self) -> int:
        """How many tabs are remembered."""
        return sum(map(len, self._tabs.values()))

    def admit(self, payer: Address, provider: Address, cap: Amount, free: Amount) -> None:
        """Counts a job in flight. Raises Refusal (insufficient_funds) where the purse does not cover the worst case."""
        chosen = self._tab(payer, provider)
        others = sum(tab.uncovered() for tab in self._tabs[payer].values() if tab is not chosen)
        need = others + chosen.uncovered(cap)
        if need > free:
            self._forget_if_idle(payer, provider)
            raise Refusal(
                Code.INSUFFICIENT_FUNDS,
                f"the purse of {payer} has {format_amount(free)} free; this job and what is owed may cost "
                f"{format_amount(need)}. Deposit with: tally deposit AMOUNT",
            )
        chosen.in_flight += cap

    def release(self, payer: Address, provider: Address, cap: Amount) -> None:
        """A job with this cap is over."""
        self._tab(payer, provider).in_flight -= cap
        self._forget_if_idle(payer, provider)

    def record_receipt(self, payer: Address, provider: Address, cumulative: Amount, ceiling: Amount) -> Amount:
        """A receipt, for an order with this ceiling, brought the tab to this total. Returns what the tab comes to."""
        tab = self._tab(payer, provider)
        tab.ceiling = Amount(max(tab.ceiling, ceiling))
        tab.cumulative = Amount(max(tab.cumulative, min(cumulative, tab.ceiling)))
        self._forget_if_idle(payer, provider)
        return tab.cumulative

    def observe(self, payer: Address, provider: Address, *, settled: Amount, reserved: Amount) -> None:
        """The chain says this of the tab of a job that is about to be admitted."""
        tab = self._tab(payer, provider)
        tab.settled, tab.reserved = Amount(max(tab.settled, settled)), reserved

    def unreserve(self, payer: Address, provider: Address) -> None:
        """A release of the tab's reservation has begun or ended: until the next `observe` nothing counts as reserved."""
        tab = self.known(payer, provider)
        if tab is not None:
            tab.reserved = Amount(0)

    def settle(self, payer: Address, provider: Address, settled: Amount) -> None:
        """The chain has paid so much on the tab, in all."""
        tab = self.known(payer, provider)
        if tab is not None:
            tab.settled = Amount(max(tab.settled, settled))

    def forget_settled(self) -> None:
        """What the chain was known to have paid is no longer certain."""
        for tabs in self._tabs.values():
            for tab in tabs.values():
                tab.settled = Amount(0)

    def _tab(self, payer: Address, provider: Address) -> TabExposure:
        return self._tabs.setdefault(payer, {}).setdefault(provider, TabExposure())

    def _forget_if_idle(self, payer: Address, provider: Address) -> None:
        tab = self._tabs[payer][provider]
        if not tab.in_flight and not tab.cumulative:
            del self._tabs[payer][provider]
            if not self._tabs[payer]:
                del self._tabs[payer]
