"""Exposure: what a payer owes and could come to owe, against what stands on chain for it. Pure.

Per tab: owed = last total - settled, plus the caps in flight. What a tab's reservation does not cover must be covered by the
purse's free balance, summed over the payer's tabs. This protects providers from hopeless jobs; each node still checks itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.types import Address, Amount, format_amount


@dataclass(slots=True)
class TabExposure:
    """One tab as the coordinator knows it, in base units."""

    cumulative: Amount = Amount(0)
    settled: Amount = Amount(0)
    reserved: Amount = Amount(0)
    in_flight: Amount = Amount(0)

    def uncovered(self, cap: int = 0) -> int:
        """What the reservation does not cover, with one more job of this cap."""
        return max(0, max(0, self.cumulative - self.settled) + self.in_flight + cap - self.reserved)


@dataclass(slots=True)
class Exposure:
    """All tabs of all payers that have traded here."""

    _tabs: dict[Address, dict[Address, TabExposure]] = field(default_factory=dict)

    def tab(self, payer: Address, provider: Address) -> TabExposure:
        """The tab of a pair, made on first sight."""
        return self._tabs.setdefault(payer, {}).setdefault(provider, TabExposure())

    def admit(self, payer: Address, provider: Address, cap: Amount, free: Amount) -> None:
        """Counts a job in flight. Raises Refusal (insufficient_funds) where the purse does not cover the worst case."""
        chosen = self.tab(payer, provider)
        others = sum(tab.uncovered() for tab in self._tabs[payer].values() if tab is not chosen)
        need = others + chosen.uncovered(cap)
        if need > free:
            raise Refusal(
                Code.INSUFFICIENT_FUNDS,
                f"the purse of {payer} has {format_amount(free)} free; this job and what is owed may cost "
                f"{format_amount(need)}. Deposit with: tally deposit AMOUNT",
            )
        chosen.in_flight += cap

    def release(self, payer: Address, provider: Address, cap: Amount) -> None:
        """A job with this cap is over."""
        self.tab(payer, provider).in_flight -= cap

    def book(self, payer: Address, provider: Address, cumulative: Amount) -> None:
        """A receipt brought the tab to this total."""
        tab = self.tab(payer, provider)
        tab.cumulative = Amount(max(tab.cumulative, cumulative))

    def observe(self, payer: Address, provider: Address, *, settled: Amount, reserved: Amount) -> None:
        """The chain says this of the tab."""
        tab = self.tab(payer, provider)
        tab.settled, tab.reserved = Amount(max(tab.settled, settled)), reserved
