"""The totals of a payer's tabs, read from the database when the payer comes, since another replica may have raised them.

A lone coordinator knows all totals from its start. A replica reads those of a payer at its first job, and again with a job that
comes RELOAD_SECONDS later. A notice of another replica makes that sooner, at most once in HINT_SECONDS for each payer. It may be
lost, and is not signed, so the amount in it does not count.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from weakref import WeakValueDictionary

from coordinator.domain.exposure import Exposure
from tallystick.protocol.types import Address, Amount

RELOAD_SECONDS, HINT_SECONDS = 10.0, 1.0
"""Seconds after which the totals of a payer are read again, without and with a notice that one rose."""
MAX_PAYERS = 10_000
"""Payers whose time of reading is remembered; that of others is read again with their next job."""


LoadTotals = Callable[[Address], Awaitable[Iterable[tuple[Address, Amount, Amount]]]]
"""Reads the tabs of a payer: provider, highest total of its receipts, and what the chain has paid of it. Raises Unavailable."""


class PayerTotals:
    """See the module's docstring. `tick` is a monotonic clock in seconds."""

    def __init__(self, exposure: Exposure, load: LoadTotals, tick: Callable[[], float]) -> None:
        self._exposure, self._load, self._tick = exposure, load, tick
        self._read_at: OrderedDict[Address, float] = OrderedDict()
        self._hinted: set[Address] = set()
        """Payers in `_read_at` of whom a notice came since."""
        self._reading: WeakValueDictionary[Address, asyncio.Lock] = WeakValueDictionary()

    async def refresh(self, payer: Address) -> None:
        """Raises the exposure of a payer to what the database has, unless that was read lately. Raises Unavailable."""
        if self._is_current(payer):
            return
        lock = self._reading.setdefault(payer, asyncio.Lock())
        async with lock:
            if not self._is_current(payer):
                await self._read(payer)

    def hint(self, payer: Address) -> None:
        """Has the totals of a payer that comes here read again soon."""
        if payer in self._read_at:
            self._hinted.add(payer)

    def _is_current(self, payer: Address) -> bool:
        age = self._tick() - self._read_at.get(payer, float("-inf"))
        return age < (HINT_SECONDS if payer in self._hinted else RELOAD_SECONDS)

    async def _read(self, payer: Address) -> None:
        began, hinted = self._tick(), payer in self._hinted
        self._hinted.discard(payer)  # one that comes from now on may be newer than what is read
        try:
            await self._apply(payer)
        except BaseException:
            if hinted:
                self._hinted.add(payer)
            raise
        self._read_at[payer] = began
        self._read_at.move_to_end(payer)
        while len(self._read_at) > MAX_PAYERS:
            self._hinted.discard(self._read_at.popitem(last=False)[0])

    async def _apply(self, payer: Address) -> None:
        for provider, total, settled in await self._load(payer):
            self._exposure.record_receipt(payer, provider, total, total)
            self._exposure.settle(payer, provider, settled)

    def forget(self) -> None:
        """Has the totals of every payer read again, since notices may have been lost."""
        self._read_at.clear()
        self._hinted.clear()
