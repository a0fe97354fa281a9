"""What a node keeps in sight on chain beside its claims: that its state is not older than what it was paid for, and what the
coordinators have registered as their rate.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

import structlog

from node.domain.tabs import Tabs
from node.ports import ChainView, FeeRateView
from tallystick.protocol.types import Address

log = structlog.get_logger()
COMPARED, AT_ONCE, COMPARE_SECONDS = 256, 16, 10.0
RATE_SECONDS, FIRST_SECONDS = 60.0, 1.0


class ChainWatcher:
    """See the module's docstring. `connected` tells the coordinators that are; `most_bps` what fee is borne."""

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
        """What each coordinator that was connected keeps of a payment unless its order allows less, in basis points."""

    async def compare_tabs(self) -> None:
        """Holds the COMPARED tabs that were used last against the chain, as far as it answers within COMPARE_SECONDS: if it has
        paid more on one than this state knows of, the state is old, and nothing is offered.
        """
        payers = self._tabs.most_recent_payers(COMPARED)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(COMPARE_SECONDS):
                for start in range(0, len(payers), AT_ONCE):
                    some = payers[start : start + AT_ONCE]
                    for payer, funds in zip(some, await asyncio.gather(*map(self._chain.refresh, some)), strict=True):
                        self._tabs.observe(payer, funds)

    async def run(self) -> None:
        """Looks at the rates until cancelled."""
        while True:
            coordinators = tuple(dict.fromkeys(self._connected()))
            for coordinator in coordinators:
                await self.check_rate(coordinator)
            await asyncio.sleep(RATE_SECONDS if coordinators else FIRST_SECONDS)

    async def check_rate(self, coordinator: Address) -> None:
        """Asks for one coordinator's rate, and says once if it is above what this provider bears."""
        rate, most = await self._rates.rate(coordinator), self._max_fee_bps()
        if rate is None:
            return
        if rate > most and self.rates.get(coordinator) != rate:
            log.error(
                "the coordinator has registered a higher fee than [admission] max_fee_bps; orders that allow it are refused",
                coordinator=coordinator,
                registered_bps=rate,
                max_fee_bps=most,
            )
        self.rates[coordinator] = rate
