"""What the gateway does for its wallet beside jobs: more reserved where a provider wants it, warnings, what its cache saved."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.http_client import Info
from tallystick.client.jobs.job import Job
from tallystick.client.ledger.budgets import Hit
from tallystick.client.ledger.idempotency import Keyed
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.schema import COLLECTABLE
from tallystick.client.recovery.escrow import PayerEscrow
from tallystick.protocol.errors import TallyError
from tallystick.protocol.types import Amount, JobId

log = structlog.get_logger()
SEEN_SECONDS = 1.0
"""Until a node that just looked at the chain looks again."""


@dataclass(frozen=True, slots=True)
class Upkeep:
    """See the module's docstring. `clock` is Unix time in nanoseconds; `onchain` is None where the config names no deployment."""

    config: ClientConfig
    ledger: Ledger
    onchain: PayerEscrow | None
    info: Callable[[], Awaitable[Info]]
    clock: Callable[[], int]

    @property
    def _now(self) -> int:
        return self.clock() // 1_000_000_000

    async def secure(self, job: Job) -> bool:
        """Reserves more of the purse for the provider that a job was offered to first, within the config's top_up_total. Where it
        returns True, a request that was refused as `unsecured` may do now.
        """
        if self.onchain is None or not self.config.top_up_total:
            return False
        domain, first = (await self.info()).domain, job.candidates[0]
        tab = await self.ledger.tab(domain, first.provider, self._now)
        done = await self.onchain.top_up(first, tab, await self.ledger.accounts(domain, self._now), self.clock())
        if done:
            await asyncio.sleep(SEEN_SECONDS)
        return done

    async def warn_idle(self) -> None:
        """Logs what is reserved for providers that were not used for the config's idle_days."""
        if self.onchain is not None:
            accounts = await self.ledger.accounts((await self.info()).domain, self._now)
            await self.onchain.warn_idle(accounts, self._now)

    async def at_stake(self, job: JobId) -> Amount:
        """What a job may still cost beyond its receipts, in base units: the caps of its orders that providers may collect on."""
        known = await self.ledger.find(job)
        standing = () if known is None else [one for one in known.orders if one.state.value in COLLECTABLE]
        return Amount(sum(one.terms.max_cost for one in standing))

    async def keyed(self, key: str) -> Keyed | None:
        """The job that an idempotency key stands for."""
        return await self.ledger.keyed(key)

    async def note_hit(self, hit: Hit) -> None:
        """Tells what the cache saved beside what was spent, where the books are free for it."""
        try:
            await self.ledger.note_hit(hit, self._now)
        except TallyError as error:
            log.info("a hit of the cache was not counted", reason=str(error))
