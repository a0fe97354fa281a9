"""The chain as the node sees it: purses and tabs of payers, and registered rates of coordinators, cached.

Trouble with the chain delays settlement, but never a job within the provider's trust. The last balances stay valid for a part of
the time that a payer must wait before it can withdraw them. The funds of a payer that was never read count as unknown.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import structlog

from node.domain.tabs import Funds
from tallystick.chain.escrow import Escrow
from tallystick.chain.read_cache import ReadCache
from tallystick.protocol.errors import Code, TallyError, Unavailable
from tallystick.protocol.types import Address, Amount

log = structlog.get_logger()
R = TypeVar("R")
_CACHED_ACCOUNTS = 10_000
_STALE_DIVISOR, _OUTAGE_DIVISOR = 4, 2
"""Balances are used for a quarter of the shortest wait, and for half of it while the chain does not answer. The rest of the wait
is left for the claim."""


class EscrowView:
    """ports.ChainView over the escrow contract. All times are seconds.

    Balances are used for `fresh` seconds; then, until `stale`, they are still used while new ones are read, so that a payer that
    was idle does not wait for the chain. A payer can spend elsewhere what it has between two reads, however soon they follow each
    other; what it can take back is bounded by the deployment's waits. Both times are shorter if the waits are short. The chain
    has `timeout` to answer, and after a failure it is not asked for `pause`. One payer is refreshed at most once in
    `refresh_interval`, one coordinator's rate at most once in `rate_seconds`.
    """

    def __init__(
        self,
        escrow: Escrow,
        provider: Address,
        *,
        fresh: float = 3.0,
        stale: float = 600.0,
        timeout: float = 3.0,
        pause: float = 5.0,
        refresh_interval: float = 0.5,
        rate_seconds: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._escrow, self._provider, self._clock = escrow, provider, clock
        self._fresh, self._stale, self._timeout, self._pause = fresh, stale, timeout, pause
        self._refresh_interval, self._rate_seconds = refresh_interval, rate_seconds
        self._funds = ReadCache("funds of", self._read_funds, capacity=_CACHED_ACCOUNTS, clock=clock)
        self._rates = ReadCache("rate of", self._read_rate, capacity=_CACHED_ACCOUNTS, clock=clock)
        self._paused_until = float("-inf")
        self.reachable = True
        self.withdrawal_delay = float("inf")
        """The shortest wait in seconds before a payer can take anything back; infinite until the chain was read."""

    async def funds(self, payer: Address) -> Funds:
        """See ports.ChainView."""
        limit = self.withdrawal_delay / _STALE_DIVISOR
        return await self._get_funds(payer, max_age=min(self._fresh, limit), max_stale=min(self._stale, limit))

    async def refresh(self, payer: Address) -> Funds:
        """See ports.ChainView."""
        return await self._get_funds(payer, max_age=self._refresh_interval)

    async def rate(self, coordinator: Address) -> int | None:
        """The rate that a coordinator registered, in basis points of each payment; None if it was never read."""
        try:
            return await self._rates.get(coordinator, max_age=self._rate_seconds)
        except TallyError:
            last = self._rates.last(coordinator)
            return None if last is None else last.value

    async def close(self) -> None:
        """Cancels all reads in progress."""
        await self._funds.close()
        await self._rates.close()

    async def _get_funds(self, payer: Address, *, max_age: float, max_stale: float = 0.0) -> Funds:
        try:
            return await self._funds.get(payer, max_age=max_age, max_stale=max_stale)
        except TallyError:
            return self._funds_in_outage(payer)

    def _funds_in_outage(self, payer: Address) -> Funds:
        """The last funds while the chain does not answer. Once the payer may have withdrawn the rest, only `settled` is left."""
        last = self._funds.last(payer)
        if last is None:
            return Funds()
        valid = self._clock() - last.read_at <= self.withdrawal_delay / _OUTAGE_DIVISOR
        return last.value if valid else Funds(settled=last.value.settled)

    async def _read_funds(self, payer: Address) -> Funds:
        return await self._answer(self._read_balances(payer))

    async def _read_balances(self, payer: Address) -> Funds:
        if self.withdrawal_delay == float("inf"):
            rules = await self._escrow.rules()
            self.withdrawal_delay = float(min(rules.thaw, rules.release))
        return await read_funds(self._escrow, payer, self._provider)

    async def _read_rate(self, coordinator: Address) -> int:
        _, _, fee_bps = await self._answer(self._escrow.read("account", coordinator))
        return int(fee_bps)

    async def _answer(self, read: Coroutine[Any, Any, R]) -> R:
        """The result of a read. Raises Unavailable if the chain fails or is paused; only the first failure is logged."""
        if self._clock() < self._paused_until:
            read.close()
            raise Unavailable(Code.CHAIN_UNAVAILABLE, "the chain failed a moment ago and is not asked now")
        try:
            async with asyncio.timeout(self._timeout):
                answer = await read
        except (TallyError, TimeoutError) as error:
            self._paused_until = self._clock() + self._pause
            if self.reachable:
                log.warning("chain does not answer; using the last known balances", error=str(error) or "timed out")
            self.reachable = False
            raise Unavailable(Code.CHAIN_UNAVAILABLE, f"the chain does not answer: {error or 'timed out'}") from error
        if not self.reachable:
            log.info("chain answers again")
        self.reachable = True
        return answer


async def read_funds(escrow: Escrow, payer: Address, provider: Address, *, block: str = "latest") -> Funds:
    """Reads a payer's funds and its tab with a provider at a block of the chain. Raises Unavailable."""
    purse, tab = await asyncio.gather(escrow.purse(payer, block=block), escrow.tab(payer, provider, block=block))
    reserved, releasing = (tab.reserved, Amount(0)) if tab.release_at == 0 else (Amount(0), tab.reserved)
    free, thawing = Amount(max(0, purse.free - purse.thawing)), Amount(min(purse.free, purse.thawing))
    return Funds(tab.settled, reserved, free, known=True, thawing=thawing, releasing=releasing)
