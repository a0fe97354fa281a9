"""The settler: it collects for providers, in batches, what both sides signed, and learns from the chain what was paid.

Anyone could do the same; the coordinator only does it for many at once. A chain that does not answer delays this and nothing
else: claims wait in the store, and sending one twice pays nothing twice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from coordinator.exposure import Exposure
from coordinator.ports import ClaimStore, PendingClaim, Settlement
from tallystick.chain.claims import ClaimBatch
from tallystick.chain.escrow import Escrow
from tallystick.chain.events import Settled, read_events
from tallystick.chain.rpc import Sender
from tallystick.protocol.errors import BadMessage, TallyError
from tallystick.protocol.types import Address
from tallystick.protocol.wire import ClaimRequest

log = structlog.get_logger()
BATCH = 64


class Settler:
    """Takes claims from nodes, sends them every `interval` seconds, and follows the contract's events."""

    def __init__(
        self,
        *,
        escrow: Escrow,
        sender: Sender,
        store: ClaimStore,
        exposure: Exposure,
        interval: float,
        confirmations: int = 0,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._escrow, self._sender, self._domain = escrow, sender, escrow.deployment.domain
        self._store, self._exposure, self._now = store, exposure, now
        self._interval, self._confirmations = interval, confirmations

    async def take(self, provider: Address, request: ClaimRequest) -> None:
        """Stores a node's claim. Raises PeerError if it is not what it says."""
        claim = request.claim.verify(self._domain)
        if claim.message.provider != provider:
            raise BadMessage("claim: of another provider")
        for row, order in zip(claim.message.rows, request.orders, strict=True):
            verified = order.verify(self._domain)
            if (verified.digest, verified.message.payer, verified.message.provider) != (row.order_hash, row.payer, provider):
                raise BadMessage("claim: a row that is not of the order beside it")
        await self._store.put_claim(request, int(self._now()))

    async def run(self) -> None:
        """Settles and follows until cancelled."""
        while True:
            try:
                await self.settle()
                await self.follow()
            except TallyError as error:
                log.warning("settling waits for the chain", error=str(error))
            await asyncio.sleep(self._interval)

    async def settle(self) -> None:
        """Sends all pending claims. Raises TallyError when the chain does not take them; they stay pending."""
        while pending := await self._store.pending_claims(BATCH):
            owed = [claim for claim in pending if await self._pays(claim)]
            tx = "nothing owed"
            if owed:
                batches = [ClaimBatch.of(c.request.claim, c.request.orders, self._domain) for c in owed]
                sent = await self._escrow.settle_all(self._sender, batches)
                tx = sent[-1].hash
                log.info("settled", claims=len(owed), tx=tx, gas=sum(one.gas_used for one in sent))
            await self._store.close_claims([claim.id for claim in pending], tx)

    async def _pays(self, claim: PendingClaim) -> bool:
        for row in claim.request.claim.message.rows:
            known = await self._store.settlement(row.payer, claim.request.claim.message.provider)
            if known is None or row.cumulative_cost > known.settled:
                return True
        return False

    async def follow(self) -> None:
        """Takes in what the chain settled since the cursor."""
        deployment = self._escrow.deployment
        while True:
            cursor = await self._store.cursor()
            start = deployment.block if cursor is None else cursor
            page = await read_events(self._escrow.rpc, deployment, start, confirmations=self._confirmations)
            if page.cursor == start:
                return
            settled = [event for event in page.events if isinstance(event, Settled)]
            await self._store.put_settlements([_settlement(event) for event in settled], page.cursor)
            for event in settled:
                tab = self._exposure.tab(event.payer, event.provider)
                self._exposure.observe(event.payer, event.provider, settled=event.settled, reserved=tab.reserved)


def _settlement(event: Settled) -> Settlement:
    return Settlement(event.payer, event.provider, event.settled, event.at.transaction, event.at.block)
