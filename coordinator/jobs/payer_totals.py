"""The totals of a payer's tabs, read from the database when the payer comes, since another replica may have raised them.

A lone coordinator knows all totals from its start. A replica reads those of a payer at its first job, and again with a job that
comes RELOAD_SECONDS later: notices of other replicas keep them current in between, and may be lost.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable

from coordinator.domain.exposure import Exposure
from tallystick.protocol.types import Address, Amount

RELOAD_SECONDS = 10.0
MAX_PAYERS = 10_000
"""Payers whose time of reading is remembered; that of others is read again with their next job."""


LoadTotals = Callable[[Address], Awaitable[Iterable[tuple[Address, Amount, Amount]]]]
"""Reads the tabs of a payer: provider, highest total of its receipts, and what the chain has paid of it. Raises Unavailable."""


class PayerTotals:
    """See the module's docstring. `tick` is a monotonic clock in seconds."""

    def __init__(self, exposure: Exposure, load: LoadTotals, tick: Callable[[], float]) -> None:
        self._exposure, self._load, self._tick = exposure, load, tick
        self._read_at: OrderedDict[Address, float] = OrderedDict()

    async def refresh(self, payer: Address) -> None:
        """Raises the exposure of a payer to what the database has, unless that was read lately. Raises Unavailable."""
        if self._tick() - self._read_at.get(payer, float("-inf")) < RELOAD_SECONDS:
            return
        began = self._tick()
        for provider, total, settled in await self._load(payer):
            self._exposure.record_receipt(payer, provider, total, total)
            self._exposure.settle(payer, provider, settled)
        self._read_at[payer] = began
        self._read_at.move_to_end(payer)
        while len(self._read_at) > MAX_PAYERS:
            self._read_at.popitem(last=False)

    def forget(self) -> None:
        """Has the totals of every payer read again, since notices may have been lost."""
        self._read_at.clear()
