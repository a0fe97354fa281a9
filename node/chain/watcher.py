"""The chain watcher: compares this node's tabs with the chain, and watches the fee rates of its coordinators."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

import structlog

from node.domain.tabs import Tabs
from node.ports import ChainView, FeeRateView
from tallystick.protocol.types import Address

log = structlog.get_logger()
MAX_TABS, MAX_CONCURRENT, COMPARE_SECONDS = 256, 16, 10.0
RATE_SECONDS, UNCONNECTED_SECONDS = 60.0, 1.0


class ChainWatcher:
    """See the module's docstring. `connected` returns the connected coordinators; `max_fee_bps` returns the accepted fee."""

    def __init__(
        self,
        chain: ChainView,
        rates: FeeRateView,
        tabs: Tabs,
        *,
        connected: Callable[[], Iterable[Address]],
        max_fee_bps: Callable[[], int],
    ) -> None:
        self._chain, self._rates, self._tabs = chain, rates, tabs
        self._connected, self._max_fee_bps = connected, max_fee_bps
        self.rates: dict[Address, int] = {}
        """Registered fee of each coordinator that was connected, in basis points; an order may allow less."""

    async def compare_tabs(self) -> None:
        """Compares the MAX_TABS most recently used tabs with the chain, as many as it returns within COMPARE_SECONDS.

        If the chain paid more on a tab than this state records, the state is stale, and nothing is offered.
        """
        payers = self._tabs.most_recent_payers(MAX_TABS)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(COMPARE_SECONDS):
                for start in range(0, len(payers), MAX_CONCURRENT):
                    batch = payers[start : start + MAX_CONCURRENT]
                    for payer, funds in zip(batch, await asyncio.gather(*map(self._chain.refresh, batch)), strict=True):
                        self._tabs.observe(payer, funds)

    async def run(self) -> None:
        """Checks the fee rates until cancelled."""
        while True:
            coordinators = tuple(dict.fromkeys(self._connected()))
            for coordinator in coordinators:
                await self.check_rate(coordinator)
            await asyncio.sleep(RATE_SECONDS if coordinators else UNCONNECTED_SECONDS)

    async def check_rate(self, coordinator: Address) -> None:
        """Reads one coordinator's rate and logs once if it exceeds what this provider accepts."""
        rate, max_fee_bps = await self._rates.rate(coordinator), self._max_fee_bps()
        if rate is None:
            return
        if rate > max_fee_bps and self.rates.get(coordinator) != rate:
            log.error(
                "the coordinator has registered a higher fee than [admission] max_fee_bps; orders that allow it are refused",
                coordinator=coordinator,
                registered_bps=rate,
                max_fee_bps=max_fee_bps,
            )
        self.rates[coordinator] = rate
