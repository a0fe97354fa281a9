"""The coordinator's identity and deployment, read once and checked against what the config requires."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from tallystick.client.coordinator.info import CoordinatorInfo
from tallystick.client.coordinator.pinning import DeploymentPin


class CheckedInfo:
    """See the module's docstring. `read` asks the coordinator."""

    def __init__(self, read: Callable[[], Awaitable[CoordinatorInfo]], max_fee_bps: int) -> None:
        self._read, self._max_fee_bps, self._reading = read, max_fee_bps, asyncio.Lock()
        self._known: CoordinatorInfo | None = None
        self._pin = DeploymentPin()
        self._on_known: Callable[[], None] = lambda: None

    def require(self, pin: DeploymentPin, on_known: Callable[[], None]) -> None:
        """Requires a deployment from now on. `on_known` is called once an answer of the coordinator has passed the check."""
        self._pin, self._on_known, self._known = pin, on_known, None

    async def get(self) -> CoordinatorInfo:
        """See `Market.info`."""
        if self._known is None:
            async with self._reading:
                if self._known is None:
                    info = await self._read()
                    self._pin.check(info, self._max_fee_bps)
                    self._on_known()
                    self._known = info
        return self._known

    async def fee_changed(self) -> bool:
        """Returns whether the coordinator's fee differs from the fee in orders so far; further orders allow the new fee.

        Raises Refusal if the new fee is above max_fee_bps.
        """
        before, now = await self.get(), await self._read()
        if before.fee_bps == now.fee_bps or replace(now, fee_bps=before.fee_bps) != before:
            return False
        self._pin.check(now, self._max_fee_bps)
        self._known = now
        return True
