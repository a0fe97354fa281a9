"""What stands on chain for a payer, read through a cache: a chain that is slow or down never delays a known payer's jobs.

What the payer can pull out before a provider collects counts as nothing: of the free balance what thaws, and a reservation
under a release, whether that still runs or can be finished at once.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import structlog

from coordinator.ports import Backing
from tallystick.chain.escrow import Escrow, Purse, TabState
from tallystick.protocol.errors import TallyError
from tallystick.protocol.types import Address, Amount, Seconds

_Pair = tuple[Address, Address]
_KEPT = 100_000
_OLD = 10
"""Figures older than so many times `ttl` serve only while the chain does not answer."""
_STAKE_SECONDS = 60
"""A stake takes hours to leave, so a minute old is young."""
_NO_TAB = TabState(Amount(0), Amount(0), Seconds(0))
log = structlog.get_logger()


class ChainFunds:
    """Values younger than `ttl` seconds are served as they are; those up to ten times as old too, while a fresh read is under
    way; still older ones only where the chain does not answer. What the chain did not say is asked again after another `ttl`.
    """

    def __init__(self, escrow: Escrow, ttl: float, tick: Callable[[], float] = time.monotonic) -> None:
        self._escrow, self._ttl, self._tick = escrow, ttl, tick
        self._known: OrderedDict[_Pair, tuple[float, Backing]] = OrderedDict()
        self._reading: dict[_Pair, asyncio.Task[Backing]] = {}
        self._stakes: OrderedDict[Address, tuple[float, Amount]] = OrderedDict()
        self._staking: dict[Address, asyncio.Task[Amount]] = {}

    async def backing(self, payer: Address, provider: Address, *, fresh: bool = False) -> Backing:
        """See ports.Funds."""
        pair = (payer, provider)
        known = self._known.get(pair)
        age = self._tick() - known[0] if known is not None else 0.0
        if known is not None and not fresh and age < self._ttl:
            return known[1]
        task = self._reading.get(pair)
        if task is None:
            task = self._reading[pair] = asyncio.create_task(self._read(pair), name=f"funds of {payer}")
            task.add_done_callback(_log_failed)
        if known is not None and not fresh:
            if age >= _OLD * self._ttl:
                await asyncio.wait({task})
                known = self._known.get(pair, known)
            return known[1]
        return await asyncio.shield(task)

    async def stake(self, provider: Address) -> Amount:
        """See ports.Funds."""
        known = self._stakes.get(provider)
        if known is not None and self._tick() - known[0] < _STAKE_SECONDS:
            return known[1]
        task = self._staking.get(provider)
        if task is None:
            task = self._staking[provider] = asyncio.create_task(self._read_stake(provider), name=f"stake of {provider}")
            task.add_done_callback(_log_failed)
        return await asyncio.shield(task)

    async def _read_stake(self, provider: Address) -> Amount:
        try:
            stake = (await self._escrow.provider(provider)).stake
        finally:
            del self._staking[provider]
        self._stakes[provider] = (self._tick(), stake)
        self._stakes.move_to_end(provider)
        while len(self._stakes) > _KEPT:
            self._stakes.popitem(last=False)
        return stake

    async def _read(self, pair: _Pair) -> Backing:
        try:
            purse, tab = await self._figures(pair)
        except TallyError:
            if pair in self._known:
                self._keep(pair, self._known[pair][1])
            raise
        finally:
            del self._reading[pair]
        backing = Backing(
            free=Amount(max(0, purse.free - purse.thawing)),
            reserved=Amount(0) if tab.release_at else tab.reserved,
            settled=tab.settled,
            opened=purse.owner is not None,
        )
        self._keep(pair, backing)
        return backing

    async def _figures(self, pair: _Pair) -> tuple[Purse, TabState]:
        """Both figures at once for a payer that is known to have a purse; who has none has no tab that is worth a read."""
        known = self._known.get(pair)
        if known is not None and known[1].opened:
            return await asyncio.gather(self._escrow.purse(pair[0]), self._escrow.tab(*pair))
        purse = await self._escrow.purse(pair[0])
        return purse, _NO_TAB if purse.owner is None else await self._escrow.tab(*pair)

    def _keep(self, pair: _Pair, backing: Backing) -> None:
        self._known[pair] = (self._tick(), backing)
        self._known.move_to_end(pair)
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)

    async def close(self) -> None:
        """Stops reading."""
        tasks = [*self._reading.values(), *self._staking.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _log_failed(task: asyncio.Task[Any]) -> None:
    """Whoever waits for a read gets its error; one that nobody waits for must not be silent."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("funds not read", task=task.get_name(), error=str(error))
