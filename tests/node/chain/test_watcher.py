from __future__ import annotations

import asyncio
from dataclasses import replace

from node.chain.watcher import MAX_CONCURRENT, MAX_TABS, ChainWatcher
from node.domain.tabs import CreditLimits, Funds, StoredTab, Tabs
from node.testing.memory import MemoryChain
from tallystick.protocol.types import Address, Amount
from tests.node.harness import COORDINATOR, NOW

PAID = Funds(settled=Amount(40), known=True)


class Rates:
    """The rates that coordinators have registered."""

    def __init__(self) -> None:
        self.asked: list[Address] = []
        self.known: int | None = 100

    async def rate(self, coordinator: Address) -> int | None:
        """See ports.FeeRateView."""
        self.asked.append(coordinator)
        return self.known


class CountingChain(MemoryChain):
    """Counts concurrent and total refreshes."""

    def __init__(self, funds: Funds) -> None:
        super().__init__(funds)
        self.at_once = self.most = 0
        self.asked: list[Address] = []

    async def refresh(self, payer: Address) -> Funds:
        """See ports.ChainView."""
        self.asked.append(payer)
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        return await super().refresh(payer)


def rows(count: int) -> list[StoredTab]:
    """Returns tabs of 40 units, the first the oldest."""
    return [
        StoredTab(Address(f"0x{n:040x}"), 1, Amount(40), Amount(40), NOW + 86_400, last_order_at=NOW + n)
        for n in range(1, count + 1)
    ]


def watch(chain: MemoryChain, tabs: Tabs, rates: Rates) -> ChainWatcher:
    """Returns a watcher with one coordinator that is connected twice."""
    both = (COORDINATOR.address, COORDINATOR.address)
    return ChainWatcher(chain, rates, tabs, connected=lambda: both, max_fee_bps=lambda: 100)


async def test_a_stale_state_is_detected_before_anything_is_offered() -> None:
    """A payment of one unit above the record is noticed at the start; a payment equal to the record is not reported."""
    for extra, known in ((0, False), (1, True)):
        tabs = Tabs(CreditLimits(), rows(3))
        chain = MemoryChain(PAID)
        chain.cached[rows(3)[0].payer] = replace(PAID, settled=Amount(40 + extra))
        await watch(chain, tabs, Rates()).compare_tabs()
        assert bool(tabs.chain_ahead) is known
        assert tabs.unsecured == 0


async def test_the_comparison_is_limited() -> None:
    """The most recently used tabs are compared, up to a limit, a few at once."""
    chain = CountingChain(PAID)
    await watch(chain, Tabs(CreditLimits(), rows(MAX_TABS + 10)), Rates()).compare_tabs()
    assert (len(chain.asked), chain.most) == (MAX_TABS, MAX_CONCURRENT)
    assert rows(10)[9].payer not in chain.asked
    assert rows(11)[10].payer in chain.asked


async def test_rates_are_kept_while_the_chain_is_down() -> None:
    """Each coordinator's rate is read once a round; a chain that does not respond leaves the known rates."""
    rates = Rates()
    watching = watch(MemoryChain(), Tabs(CreditLimits()), rates)
    task = asyncio.create_task(watching.run())
    for _ in range(10):  # turns of the loop
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (rates.asked, watching.rates) == ([COORDINATOR.address], {COORDINATOR.address: 100})
    rates.known = 101
    await watching.check_rate(COORDINATOR.address)
    rates.known = None
    await watching.check_rate(COORDINATOR.address)
    assert watching.rates == {COORDINATOR.address: 101}
