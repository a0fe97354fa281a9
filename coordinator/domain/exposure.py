"""Exposure: what a payer owes and may come to owe, compared with its funds on chain. Pure.

Per tab: owed = last total - settled, plus the caps of jobs in flight. What a tab's reservation does not cover must be covered by
the free balance of the purse, summed over the payer's tabs. This protects providers from jobs that cannot be paid; each node
still checks for itself.

A total counts only up to what the payer signed for: a provider's claim above every ceiling is not owed. A pair that never traded
is not remembered, so strangers cannot fill the memory.
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
        """Returns what the reservation does not cover, with one more job of this cap."""
        owed = max(0, int(self.cumulative) - int(self.settled))
        return max(0, owed + int(self.in_flight) + int(cap) - int(self.reserved))


@dataclass(slots=True)
class Exposure:
    """All tabs of all payers that have traded here."""

    _tabs: dict[Address, dict[Address, TabExposure]] = field(default_factory=dict)
    _uncovered: dict[Address, int] = field(default_factory=dict)
    """The sum over each payer's tabs of what their reservations do not cover."""

    def known(self, payer: Address, provider: Address) -> TabExposure | None:
        """Returns the tab of a pair that has traded here or is about to, or None."""
        return self._tabs.get(payer, {}).get(provider)

    @property
    def in_flight(self) -> Amount:
        """The caps of all jobs in flight."""
        return Amount(sum(tab.in_flight for tabs in self._tabs.values() for tab in tabs.values()))

    @property
    def size(self) -> int:
        """The number of remembered tabs."""
        return sum(map(len, self._tabs.values()))

    def admit(self, payer: Address, provider: Address, cap: Amount, free: Amount) -> None:
        """Counts a job as in flight. Raises Refusal (insufficient_funds) if the purse does not cover the worst case."""
        chosen = self._tab(payer, provider)
        need = self._uncovered[payer] - chosen.uncovered() + chosen.uncovered(cap)
        if need > free:
            self._forget_if_idle(payer, provider)
            raise Refusal(
                Code.INSUFFICIENT_FUNDS,
                f"the purse of {payer} has {format_amount(free)} dollars free; this job and what is owed may cost "
                f"{format_amount(need)}. Deposit with: tally deposit AMOUNT",
            )
        chosen.in_flight += cap
        self._uncovered[payer] = need

    def release(self, payer: Address, provider: Address, cap: Amount) -> None:
        """Ends a job with this cap."""
        tab = self._tab(payer, provider)
        before = tab.uncovered()
        tab.in_flight -= cap
        self._recount(payer, tab, before)
        self._forget_if_idle(payer, provider)

    def record_receipt(self, payer: Address, provider: Address, cumulative: Amount, ceiling: Amount) -> Amount:
        """Records the total of a receipt, for an order with this ceiling. Returns the total of the tab."""
        tab = self._tab(payer, provider)
        before = tab.uncovered()
        tab.ceiling = Amount(max(tab.ceiling, ceiling))
        tab.cumulative = Amount(max(tab.cumulative, min(cumulative, tab.ceiling)))
        self._recount(payer, tab, before)
        self._forget_if_idle(payer, provider)
        return tab.cumulative

    def observe(self, payer: Address, provider: Address, *, settled: Amount, reserved: Amount) -> None:
        """Records what the chain says of the tab of a job that is about to be admitted."""
        tab = self._tab(payer, provider)
        before = tab.uncovered()
        tab.settled, tab.reserved = Amount(max(tab.settled, settled)), reserved
        self._recount(payer, tab, before)

    def unreserve(self, payer: Address, provider: Address) -> None:
        """Counts nothing as reserved until the next `observe`: a release of the tab's reservation has begun or ended."""
        tab = self.known(payer, provider)
        if tab is not None:
            before = tab.uncovered()
            tab.reserved = Amount(0)
            self._recount(payer, tab, before)

    def settle(self, payer: Address, provider: Address, settled: Amount) -> None:
        """Records what the chain has paid on the tab in all."""
        tab = self.known(payer, provider)
        if tab is not None:
            before = tab.uncovered()
            tab.settled = Amount(max(tab.settled, settled))
            self._recount(payer, tab, before)

    def forget_settled(self) -> None:
        """Forgets all settled totals, after the chain was reorganised."""
        for payer, tabs in self._tabs.items():
            for tab in tabs.values():
                before = tab.uncovered()
                tab.settled = Amount(0)
                self._recount(payer, tab, before)

    def _recount(self, payer: Address, tab: TabExposure, before: int) -> None:
        """Keeps the payer's sum after a tab changed. `before`: what the tab's reservation did not cover."""
        self._uncovered[payer] += tab.uncovered() - before

    def _tab(self, payer: Address, provider: Address) -> TabExposure:
        tab = self.known(payer, provider)
        if tab is None:
            self._uncovered.setdefault(payer, 0)
            tab = self._tabs.setdefault(payer, {})[provider] = TabExposure()
        return tab

    def _forget_if_idle(self, payer: Address, provider: Address) -> None:
        tab = self._tabs[payer][provider]
        if not tab.in_flight and not tab.cumulative:
            del self._tabs[payer][provider]
            if not self._tabs[payer]:
                del self._tabs[payer], self._uncovered[payer]
