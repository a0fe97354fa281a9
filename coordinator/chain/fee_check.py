"""The fee check: the fee that clients are told must equal the rate registered on chain, which the contract takes."""

from __future__ import annotations

import asyncio

import structlog

from tallystick.chain.escrow import Escrow
from tallystick.protocol.errors import BadMessage, TallyError
from tallystick.protocol.types import Address

log = structlog.get_logger()
START_SECONDS = 5.0
"""How long the start waits for the chain's answer."""
CHECK_SECONDS = 300.0


class FeeCheck:
    """Compares the configured fee (hundredths of a percent) with the coordinator's rate on chain."""

    def __init__(self, escrow: Escrow, coordinator: Address, configured: int, *, interval: float = CHECK_SECONDS) -> None:
        self._escrow, self._coordinator, self._configured, self._interval = escrow, coordinator, configured, interval
        self._last_seen = configured

    async def check_at_start(self) -> None:
        """Raises BadMessage if the two differ. If the chain does not answer, logs a warning: the market runs without it."""
        try:
            async with asyncio.timeout(START_SECONDS):
                registered = await self._escrow.fee_bps(self._coordinator)
        except (TallyError, TimeoutError) as error:
            reason = str(error) or "the chain is slow"
            log.warning("the registered fee cannot be checked yet", fee_bps=self._configured, reason=reason)
            return
        if registered != self._configured:
            raise BadMessage(f"config: {self._difference(registered)}")

    async def run(self) -> None:
        """Checks every `interval` seconds until cancelled. Logs an error for each new rate that differs from the config."""
        while True:
            await asyncio.sleep(self._interval)
            try:
                registered = await self._escrow.fee_bps(self._coordinator)
            except TallyError as error:
                log.info("the registered fee cannot be checked now", reason=str(error))
                continue
            if registered not in {self._last_seen, self._configured}:
                log.error("the contract takes another fee than clients are told", do=self._difference(registered))
            elif registered != self._last_seen:
                log.info("the registered fee equals the configured one again", fee_bps=registered)
            self._last_seen = registered

    def _difference(self, registered: int) -> str:
        return (
            f"fee_bps: clients are told {self._configured} hundredths of a percent, but {registered} are registered on chain for "
            f"{self._coordinator}. Register the configured fee with `tally coordinator fee {self._configured}`, or set "
            f"fee_bps = {registered}"
        )
