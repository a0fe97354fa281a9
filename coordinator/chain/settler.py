"""The settler: it collects for providers, in batches, what both sides signed, and learns from the chain what was paid.

Anyone could do the same; the coordinator only does it for many at once. A chain that does not answer delays this and nothing
else: claims wait in the store, and sending one twice pays nothing twice. A claim that the contract will not take closes alone.

What a provider can make it read and spend (gauge.py judges each claim):
- Gas goes to a claim that pays at least `least` base units, and `least_row` for each of its rows, the idle ones too: its
  signature covers all of them, so none can be left out. Others are closed with the reason; one on the rows that pay may follow.
- Providers are taken in turns, a claim each. A claim has at most MAX_ROWS rows (what one transaction takes, some 330), a provider
  at most WAITING_CLAIMS (128) claims waiting.
- A look at a claim costs at most two chain reads a row. With no purse behind any of its first STRANGERS (8) payers it costs
  these reads and no more.
- Reads for claims that bring nothing are counted against their provider: IDLE_READS (256) at once, and the claim that crosses
  that line; then IDLE_READS_PER_SECOND (1). Its claims wait meanwhile.
- A claim's signatures cost some 20 ms at most to check: CLAIMS_AT_ONCE (128) are taken of a provider, then CLAIMS_PER_SECOND (1).
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable

import structlog

from coordinator.chain.claim_value import ClaimValuer
from coordinator.domain.exposure import Exposure
from coordinator.domain.token_bucket import TokenBucket
from coordinator.ports import ClaimStore, Cursor, PendingClaim, Settlement
from tallystick.chain.claims import BATCH_GAS, CLAIM_GAS, ROW_GAS, ClaimBatch
from tallystick.chain.codec import ContractError
from tallystick.chain.escrow import Escrow
from tallystick.chain.events import DeepReorg, Released, ReleaseStarted, Settled, read_events
from tallystick.chain.rpc import MAX_TRANSACTION_GAS, Sender
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.link import ClaimRequest
from tallystick.protocol.types import Address, Amount

log = structlog.get_logger()
BATCH_CLAIMS = 64
MAX_ROWS = (MAX_TRANSACTION_GAS - BATCH_GAS - CLAIM_GAS) // ROW_GAS
"""A claim is never divided, since its signature covers all of its rows; one with more rows fits no transaction."""
WASTED_READS_BURST, WASTED_READS_PER_SECOND = 256, 1
CLAIMS_BURST, CLAIMS_PER_SECOND = 128, 1
REFUSED = "refused by the contract"


class Settler:
    """Takes claims from nodes, sends those that are worth their gas every `interval` seconds, follows the events.

    `least` and `least_row`: what a claim, and on average each of its rows, must pay for gas to be spent on it, in base units.
    """

    def __init__(
        self,
        *,
        escrow: Escrow,
        sender: Sender,
        store: ClaimStore,
        exposure: Exposure,
        interval: float,
        min_claim: Amount = Amount(1),
        min_claim_row: Amount = Amount(1),
        confirmations: int = 0,
        now: Callable[[], float] = time.time,
        tick: Callable[[], float] = time.monotonic,
    ) -> None:
        self._escrow, self._sender, self._domain = escrow, sender, escrow.deployment.domain
        self._store, self._exposure, self._now, self._tick = store, exposure, now, tick
        self._interval, self._confirmations = interval, confirmations
        self._min_claim, self._min_claim_row = min_claim, min_claim_row
        self._idle = TokenBucket(WASTED_READS_PER_SECOND, WASTED_READS_BURST)
        self._pace = TokenBucket(CLAIMS_PER_SECOND, CLAIMS_BURST)

    async def accept_claim(self, provider: Address, request: ClaimRequest) -> None:
        """Stores a node's claim. Raises PeerError if it is not what it says, Unavailable if it cannot be stored or many come."""
        if not self._pace.try_spend(provider, self._tick()):
            text = f"claims: more than {CLAIMS_PER_SECOND} a second come from {provider}"
            raise Unavailable(Code.RATE_LIMITED, text, fault=Fault.PROVIDER)
        claim = request.claim.verify(self._domain)
        if claim.message.provider != provider:
            raise BadMessage("claim: of another provider")
        if not 1 <= len(claim.message.rows) <= MAX_ROWS:
            raise BadMessage(f"claim.rows: {len(claim.message.rows)}; a transaction takes 1 to {MAX_ROWS}")
        if any(row.payer == provider for row in claim.message.rows):
            raise BadMessage("claim: a row whose payer is the provider itself; the contract pays no such tab")
        for row, order in zip(claim.message.rows, request.orders, strict=True):
            verified = order.verify(self._domain)
            if (verified.digest, verified.message.payer, verified.message.provider) != (row.order_hash, row.payer, provider):
                raise BadMessage("claim: a row that is not of the order beside it")
        await self._store.put_claim(request, int(self._now()))

    async def run(self) -> None:
        """Follows and settles until cancelled. What was paid is looked up first, so that after a crash nothing is sent twice."""
        while True:
            for step in (self.follow, self.settle, self.follow):
                try:
                    await step()
                except TallyError as error:
                    log.warning("settling waits for the chain", step=step.__name__, error=str(error))
            await asyncio.sleep(self._interval)

    async def settle(self) -> None:
        """Sends all pending claims that are worth it. Raises TallyError when the chain does not take them; they stay pending."""
        waiting: set[Address] = set()
        while pending := await self._store.pending_claims(BATCH_CLAIMS, waiting):
            if owed := await self._select_worthwhile(pending, waiting):
                await self._send(owed)

    async def _select_worthwhile(self, pending: list[PendingClaim], waiting: set[Address]) -> list[PendingClaim]:
        """The claims that are worth sending; the others are closed. Those of providers that made it read too much in vain wait,
        and so these providers are added to `waiting`.
        """
        valuer = ClaimValuer(
            self._escrow, self._known, min_claim=self._min_claim, min_claim_row=self._min_claim_row, now=self._now()
        )
        worth, closed = list[PendingClaim](), defaultdict[str, list[int]](list)
        for claim in pending:
            provider, reads = claim.request.claim.message.provider, valuer.reads
            if provider in waiting or self._idle.delay(provider, self._tick()):
                waiting.add(provider)
            elif reason := await valuer.rejection(claim):
                self._idle.try_spend(provider, self._tick(), valuer.reads - reads)
                closed[reason].append(claim.id)
            else:
                worth.append(claim)
        for reason, idle in closed.items():
            log.info("claims closed", reason=reason, count=len(idle))
            await self._store.close_claims(idle, reason)
        return worth

    async def _known(self, payer: Address, provider: Address) -> int:
        known = await self._store.settlement(payer, provider)
        return known.settled if known else 0

    async def _send(self, owed: list[PendingClaim]) -> None:
        batches = [ClaimBatch.of(c.request.claim, c.request.orders, self._domain) for c in owed]
        try:
            sent = await self._escrow.settle_all(self._sender, batches)
        except Refusal as error:
            if error.code is Code.INSUFFICIENT_FUNDS and not isinstance(error, ContractError):
                raise  # it is this coordinator that cannot pay the gas
            if len(owed) > 1:  # one of them: each for itself, so that it holds up nobody else
                for claim in owed:
                    await self._send([claim])
                return
            log.warning("claim refused", claim=owed[0].id, provider=owed[0].request.claim.message.provider, error=str(error))
            tx = REFUSED
        else:
            tx = sent[-1].hash
            log.info("settled", claims=len(owed), tx=tx, gas=sum(one.gas_used for one in sent))
        await self._store.close_claims([claim.id for claim in owed], tx)

    async def follow(self) -> None:
        """Takes in what the chain settled since the cursor. After a deep reorganisation all is read again, from the next call on:
        an endpoint that reports one each time costs one round an interval.
        """
        deployment = self._escrow.deployment
        while True:
            known = await self._store.cursor() or Cursor(deployment.block)
            try:
                page = await read_events(
                    self._escrow.rpc, deployment, known.block, after=known.tip, confirmations=self._confirmations
                )
            except DeepReorg as error:
                log.warning("all settlements are read again, and claims sent again", error=str(error))
                await self._store.forget_settlements()
                self._exposure.forget_settled()
                return
            if page.cursor == known.block:
                return
            settled = [event for event in page.events if isinstance(event, Settled)]
            await self._store.put_settlements([_settlement(event) for event in settled], Cursor(page.cursor, page.tip))
            for event in page.events:
                if isinstance(event, Settled):
                    self._exposure.settle(event.payer, event.provider, event.settled)
                elif isinstance(event, ReleaseStarted | Released):
                    self._exposure.unreserve(event.payer, event.provider)


def _settlement(event: Settled) -> Settlement:
    return Settlement(event.payer, event.provider, event.settled, event.at.transaction, event.at.block)
