"""What stands on chain for a payer, read through a cache: a chain that is slow or down never delays a known payer's jobs."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict

from coordinator.ports import Backing
from tallystick.chain.escrow import Escrow
from tallystick.protocol.errors import Unavailable
from tallystick.protocol.types import Address

_Pair = tuple[Address, Address]
_KEPT = 100_000


class ChainFunds:
    """Values younger than `ttl` seconds are served as they are; older ones too, while a fresh read is under way."""

    def __init__(self, escrow: Escrow, ttl: float) -> None:
        self._escrow, self._ttl = escrow, ttl
        self._known: OrderedDict[_Pair, tuple[float, Backing]] = OrderedDict()
        self._reading: dict[_Pair, asyncio.Task[Backing]] = {}

    async def backing(self, payer: Address, provider: Address, *, fresh: bool = False) -> Backing:
        """See ports.Funds."""
        pair = (payer, provider)
        known = self._known.get(pair)
        if known is not None and not fresh and time.monotonic() - known[0] < self._ttl:
            return known[1]
        task = self._reading.get(pair)
        if task is None:
            task = self._reading[pair] = asyncio.create_task(self._read(pair), name=f"funds of {payer}")
        return known[1] if known is not None and not fresh else await asyncio.shield(task)

    async def _read(self, pair: _Pair) -> Backing:
        try:
            purse, tab = await asyncio.gather(self._escrow.purse(pair[0]), self._escrow.tab(*pair))
            backing = Backing(free=purse.free, reserved=tab.reserved, settled=tab.settled)
        except Unavailable:
            if pair not in self._known:
                raise
            backing = self._known[pair][1]
        finally:
            del self._reading[pair]
        self._known[pair] = (time.monotonic(), backing)
        self._known.move_to_end(pair)
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return backing
