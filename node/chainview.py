"""The chain as the node sees it: a payer's purse and tab, remembered for a few seconds. Chain trouble delays settlement, never
jobs: what was last seen stays good while the chain does not answer, and a stranger is unknown, not refused.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable

import structlog

from node.tabs import Funds
from tallystick.chain.escrow import Escrow
from tallystick.protocol.errors import TallyError
from tallystick.protocol.types import Address, Amount

log = structlog.get_logger()
_REMEMBERED = 10_000


class EscrowView:
    """ports.ChainView over the escrow contract. Times are seconds: an answer is good for `fresh`; then it is still used, but
    asked for again in the background, for `stale`; the chain is given `patience` to answer, and is left alone for `rest` after
    a failure. A payer is asked for at most every `gap`.
    """

    def __init__(
        self,
        escrow: Escrow,
        provider: Address,
        *,
        fresh: float = 3.0,
        stale: float = 60.0,
        patience: float = 3.0,
        rest: float = 5.0,
        gap: float = 0.5,
        tick: Callable[[], float] = time.monotonic,
    ) -> None:
        self._escrow, self._provider, self._tick = escrow, provider, tick
        self._fresh, self._stale, self._patience, self._rest, self._gap = fresh, stale, patience, rest, gap
        self._seen: OrderedDict[Address, tuple[Funds, float]] = OrderedDict()
        self._asking: dict[Address, asyncio.Task[Funds]] = {}
        self._quiet_until = float("-inf")
        self.reachable = True

    async def funds(self, payer: Address) -> Funds:
        """See ports.ChainView."""
        seen, at = self._seen.get(payer, (Funds(), float("-inf")))
        age = self._tick() - at
        if age <= self._fresh:
            return seen
        asking = self._ask(payer)
        return seen if age <= self._stale else await asyncio.shield(asking)

    async def refresh(self, payer: Address) -> Funds:
        """See ports.ChainView."""
        seen, at = self._seen.get(payer, (Funds(), float("-inf")))
        if self._tick() - at <= self._gap:
            return seen
        return await asyncio.shield(self._ask(payer))

    async def close(self) -> None:
        """Stops what is being asked."""
        for task in list(self._asking.values()):
            task.cancel()
        await asyncio.gather(*self._asking.values(), return_exceptions=True)

    def _ask(self, payer: Address) -> asyncio.Task[Funds]:
        """One question at a time about each payer."""
        task = self._asking.get(payer)
        if task is None:
            task = self._asking[payer] = asyncio.create_task(self._look(payer), name=f"funds of {payer}")
            task.add_done_callback(lambda _: self._asking.pop(payer, None))
        return task

    async def _look(self, payer: Address) -> Funds:
        known = self._seen.get(payer, (Funds(), 0.0))[0]
        if self._tick() < self._quiet_until:
            return known
        try:
            async with asyncio.timeout(self._patience):
                purse, tab = await asyncio.gather(self._escrow.purse(payer), self._escrow.tab(payer, self._provider))
        except (TallyError, TimeoutError) as error:
            self._quiet_until = self._tick() + self._rest
            if self.reachable:
                log.warning("the chain does not answer; going on with what is known", error=str(error) or "timed out")
            self.reachable = False
            return known
        if not self.reachable:
            log.info("the chain answers again")
        self.reachable = True
        # What is on its way out of the purse is no security.
        funds = Funds(tab.settled, tab.reserved, Amount(max(0, purse.free - purse.thawing)), known=True, thawing=purse.thawing)
        self._seen[payer] = (funds, self._tick())
        self._seen.move_to_end(payer)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return funds
