"""The coordinator's rate: what it tells its clients must be what it has registered on chain, since the contract takes that."""

from __future__ import annotations

import asyncio

import structlog

from tallystick.chain.escrow import Escrow
from tallystick.protocol.errors import BadMessage, TallyError
from tallystick.protocol.types import Address

log = structlog.get_logger()
START_SECONDS = 5.0
"""How long a start waits for the chain's answer."""
CHECK_SECONDS = 300.0


class FeeCheck:
    """Compares `told`, the config's fee_bps (hundredths of a percent), with the rate of `coordinator` on chain."""

    def __init__(self, escrow: Escrow, coordinator: Address, told: int, *, interval: float = CHECK_SECONDS) -> None:
        self._escrow, self._coordinator, self._told, self._interval = escrow, coordinator, told, interval
        self._known = told

    async def check_at_start(self) -> None:
        """Raises BadMessage where the two differ. A chain that does not answer is only warned of: the market runs without it."""
        try:
            async with asyncio.timeout(START_SECONDS):
                registered = await self._escrow.fee_bps(self._coordinator)
        except (TallyError, TimeoutError) as error:
            log.warning("the registered fee can't be checked yet", fee_bps=self._told, reason=str(error) or "the chain is slow")
            return
        if registered != self._told:
            raise BadMessage(f"config: {self._difference(registered)}")

    async def run(self) -> None:
        """Looks again every `interval` seconds until cancelled, and logs an error for each new rate that is not the told one."""
        while True:
            await asyncio.sleep(self._interval)
            try:
                registered = await self._escrow.fee_bps(self._coordinator)
            except TallyError as error:
                log.info("the registered fee can't be checked now", reason=str(error))
                continue
            if registered not in {self._known, self._told}:
                log.error("clients are told another fee than the contract takes", do=self._difference(registered))
            elif registered != self._known:
                log.info("the registered fee is the told one again", fee_bps=registered)
            self._known = registered

    def _difference(self, registered: int) -> str:
        return (
            f"fee_bps: clients are told {self._told} hundredths of a percent, but {registered} are registered on chain for "
            f"{self._coordinator}. Register what clients are told with `tally coordinator fee {self._told}`, or set "
            f"fee_bps = {registered}"
        )
