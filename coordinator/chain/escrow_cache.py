"""The on-chain balances behind a payer's orders, cached: a slow or unavailable chain does not delay jobs of known payers.

Money that the payer can withdraw before a provider collects is not counted: the thawing part of the free balance, and a
reservation under a release, whether the release still waits or can be finished at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from coordinator.ports import Backing
from tallystick.chain.escrow import Escrow, Purse, TabState
from tallystick.chain.read_cache import ReadCache
from tallystick.protocol.errors import TallyError
from tallystick.protocol.types import Address, Amount, Seconds

_CACHED_PAIRS = 100_000
_STALE_TTLS = 120
"""Balances older than so many times `ttl` are used only if the chain does not answer: ten minutes by default. A payer that was
idle does not wait for the chain then. Nodes, which bear the risk, decide for themselves how old a balance may be.
"""
_STAKE_SECONDS = 60
"""Age in seconds up to which a cached stake is used. Withdrawing a stake takes hours."""
_NO_TAB = TabState(Amount(0), Amount(0), Seconds(0))
log = structlog.get_logger()


class EscrowCache:
    """ports.Funds over the escrow contract.

    Balances of at most `ttl` seconds are used as they are. Balances of at most 120 times that age are used too, while new ones
    are read. Older ones are used only if the chain does not answer; the chain is then asked again after another `ttl` seconds.
    """

    def __init__(self, escrow: Escrow, ttl: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._escrow, self._ttl = escrow, ttl
        self._backings = ReadCache("funds", self._read_backing, capacity=_CACHED_PAIRS, clock=clock)
        self._stakes = ReadCache("stake", self._read_stake, capacity=_CACHED_PAIRS, clock=clock)

    async def backing(self, payer: Address, provider: Address, *, fresh: bool = False) -> Backing:
        """See ports.Funds."""
        pair = (payer, provider)
        if fresh:
            return await self._backings.refresh(pair)
        try:
            return await self._backings.get(pair, max_age=self._ttl, max_stale=_STALE_TTLS * self._ttl)
        except TallyError:
            last = self._backings.last(pair)
            if last is None:
                raise
            return last.value

    async def stake(self, provider: Address) -> Amount:
        """See ports.Funds."""
        return await self._stakes.get(provider, max_age=_STAKE_SECONDS)

    async def close(self) -> None:
        """Cancels all reads in progress."""
        await self._backings.close()
        await self._stakes.close()

    async def _read_stake(self, provider: Address) -> Amount:
        try:
            return (await self._escrow.provider(provider)).stake
        except TallyError as error:
            log.warning("stake not read", provider=provider, error=str(error))
            raise

    async def _read_backing(self, pair: tuple[Address, Address]) -> Backing:
        try:
            purse, tab = await self._read_balances(pair)
        except TallyError as error:
            self._backings.renew(pair)
            log.warning("funds not read", payer=pair[0], provider=pair[1], error=str(error))
            raise
        return Backing(
            free=Amount(max(0, purse.free - purse.thawing)),
            reserved=Amount(0) if tab.release_at else tab.reserved,
            settled=tab.settled,
            opened=purse.owner is not None,
        )

    async def _read_balances(self, pair: tuple[Address, Address]) -> tuple[Purse, TabState]:
        """Purse and tab, read at once if the payer is known to have a purse. A payer without a purse has no tab worth a read."""
        last = self._backings.last(pair)
        if last is not None and last.value.opened:
            return await asyncio.gather(self._escrow.purse(pair[0]), self._escrow.tab(*pair))
        purse = await self._escrow.purse(pair[0])
        return purse, _NO_TAB if purse.owner is None else await self._escrow.tab(*pair)
