"""The chain as the node sees it: a payer's purse and tab, remembered for a few seconds, and the rates of coordinators.

Chain trouble delays settlement, never jobs that trust covers: what was last seen stays good for a part of the time that a payer
must wait before it may take it back, and a stranger is unknown, not refused.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import structlog

from node.domain.tabs import Funds
from tallystick.chain.escrow import Escrow, Purse, TabState
from tallystick.protocol.errors import TallyError
from tallystick.protocol.types import Address, Amount

log = structlog.get_logger()
R = TypeVar("R")
_REMEMBERED = 10_000
_STALE_PART, _HELD_PART = 4, 2
"""What was seen is used without asking again for a quarter of the shortest wait, and while the chain is silent for half of it:
the rest is left for the claim."""


class EscrowView:
    """ports.ChainView over the escrow contract. Times are seconds: an answer is good for `fresh`; then it is still used, but
    asked for again in the background, for `stale`; the chain is given `patience` to answer, and is left alone for `rest` after
    a failure. A payer is asked for at most every `gap`, a coordinator's rate at most every `rates`. `fresh` and `stale` are less
    where the deployment's waits are short.
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
        rates: float = 300.0,
        tick: Callable[[], float] = time.monotonic,
    ) -> None:
        self._escrow, self._provider, self._tick = escrow, provider, tick
        self._fresh, self._stale, self._patience, self._rest, self._gap = fresh, stale, patience, rest, gap
        self._every, self._rates = rates, dict[Address, tuple[int | None, float]]()
        self._seen: OrderedDict[Address, tuple[Funds, float]] = OrderedDict()
        self._asking: dict[Address, asyncio.Task[Funds]] = {}
        self._quiet_until = float("-inf")
        self.reachable = True
        self.wait = float("inf")
        """How long a payer must wait before it may take anything back, in seconds; infinite until the chain has told."""

    async def funds(self, payer: Address) -> Funds:
        """See ports.ChainView."""
        seen, at = self._seen.get(payer, (Funds(), float("-inf")))
        age = self._tick() - at
        if age <= min(self._fresh, self.wait / _STALE_PART):
            return seen
        asking = self._ask(payer)
        return seen if age <= min(self._stale, self.wait / _STALE_PART) else await asyncio.shield(asking)

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
        began = self._tick()
        answer = await self._answer(self._read(payer))
        if answer is None:
            return self._held(payer)
        purse, tab = answer
        stays, leaves = (tab.reserved, Amount(0)) if tab.release_at == 0 else (Amount(0), tab.reserved)
        free, thawing = Amount(max(0, purse.free - purse.thawing)), Amount(min(purse.free, purse.thawing))
        funds = Funds(tab.settled, stays, free, known=True, thawing=thawing, releasing=leaves)
        self._seen[payer] = (funds, began)
        self._seen.move_to_end(payer)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return funds

    def _held(self, payer: Address) -> Funds:
        """What is left of the last answer while the chain is silent: all of it, until a payer may have taken back the rest."""
        seen, at = self._seen.get(payer, (Funds(), float("-inf")))
        return seen if self._tick() - at <= self.wait / _HELD_PART else Funds(settled=seen.settled)

    async def _read(self, payer: Address) -> tuple[Purse, TabState]:
        if self.wait == float("inf"):
            rules = await self._escrow.rules()
            self.wait = float(min(rules.thaw, rules.release))
        return await asyncio.gather(self._escrow.purse(payer), self._escrow.tab(payer, self._provider))

    async def _answer(self, question: Coroutine[Any, Any, R]) -> R | None:
        """What the chain answers; None if it does not, which is said once."""
        if self._tick() < self._quiet_until:
            question.close()
            return None
        try:
            async with asyncio.timeout(self._patience):
                answer = await question
        except (TallyError, TimeoutError) as error:
            self._quiet_until = self._tick() + self._rest
            if self.reachable:
                log.warning("the chain does not answer; going on with what is known", error=str(error) or "timed out")
            self.reachable = False
            return None
        if not self.reachable:
            log.info("the chain answers again")
        self.reachable = True
        return answer

    async def rate(self, coordinator: Address) -> int | None:
        """The rate that a coordinator has registered, in basis points of what is paid; None if the chain never told."""
        rate, at = self._rates.get(coordinator, (None, float("-inf")))
        if self._tick() - at > self._every:
            answer = await self._answer(self._escrow.read("account", coordinator))
            rate = rate if answer is None else int(answer[2])
            if answer is not None:
                self._rates[coordinator] = (rate, self._tick())
        return rate
