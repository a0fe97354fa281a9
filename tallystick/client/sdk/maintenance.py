"""What the gateway does for its wallet beside jobs: tops up reserves, warns of idle ones, and records what its cache saved."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.info import CoordinatorInfo
from tallystick.client.jobs.job import Job
from tallystick.client.ledger.idempotency import IdempotencyKey
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.schema import COLLECTABLE
from tallystick.client.ledger.spending import CacheHit
from tallystick.client.recovery.escrow import PayerEscrow
from tallystick.protocol.errors import TallyError
from tallystick.protocol.types import Amount, JobId

log = structlog.get_logger()
NODE_REFRESH_SECONDS = 1.0
"""How long a node keeps the reserve that it read from the chain before it reads it again."""


@dataclass(frozen=True, slots=True)
class Maintenance:
    """Maintenance of one wallet. `clock` is Unix time in nanoseconds; `onchain` is None if the config names no deployment."""

    config: ClientConfig
    ledger: Ledger
    onchain: PayerEscrow | None
    info: Callable[[], Awaitable[CoordinatorInfo]]
    clock: Callable[[], int]

    @property
    def _now(self) -> int:
        return self.clock() // 1_000_000_000

    async def top_up(self, job: Job) -> bool:
        """Reserves more of the purse for a job's first candidate, within the config's `top_up_total`.

        Returns whether it did, so that a request that was refused as `unsecured` may succeed now.
        """
        if self.onchain is None or not self.config.top_up_total:
            return False
        domain, first = (await self.info()).domain, job.candidates[0]
        tab = await self.ledger.tab(domain, first.provider, self._now)
        topped_up = await self.onchain.top_up(first, tab, await self.ledger.accounts(domain, self._now), self.clock())
        if topped_up:
            await asyncio.sleep(NODE_REFRESH_SECONDS)
        return topped_up

    async def warn_idle(self) -> None:
        """Logs a warning for each reserve whose provider was not used for the config's `idle_reserve_days`."""
        if self.onchain is not None:
            accounts = await self.ledger.accounts((await self.info()).domain, self._now)
            await self.onchain.warn_idle(accounts, self._now)

    async def possible_cost(self, job: JobId) -> Amount:
        """What a job may still cost beyond its receipts, in base units: the caps of its orders that can still be collected."""
        known_job = await self.ledger.find_job(job)
        orders = () if known_job is None else known_job.orders
        return Amount(sum(order.terms.max_cost for order in orders if order.state in COLLECTABLE))

    async def find_key(self, key: str) -> IdempotencyKey | None:
        """The job of an idempotency key, if there is one."""
        return await self.ledger.find_key(key)

    async def record_cache_hit(self, hit: CacheHit) -> None:
        """Records what a cache hit saved. Skips it if the ledger cannot be written now."""
        try:
            await self.ledger.record_cache_hit(hit, self._now)
        except TallyError as error:
            log.info("cache hit not recorded", reason=str(error))
