"""The settler: collects for providers in batches what both sides signed, and learns from the chain what was paid.

Anyone could send these claims; the coordinator does it for many providers at once. A chain that does not answer delays this and
nothing else: claims stay in the store, and a claim sent twice does not pay twice. A claim that the contract refuses is closed
alone.

What a provider can make the settler read and spend (claim_value.py values each claim):
- Gas is spent on a claim that pays at least `min_claim`, and `min_claim_row` per row, rows that pay nothing included: the
  signature covers all rows, so none can be left out. Other claims are closed with the reason; a claim on the paying rows may
  follow.
- Providers take turns, one claim each. A claim has at most MAX_ROWS rows (what one transaction takes, some 330), and a provider
  at most WAITING_CLAIMS (128) pending claims.
- Valuing a claim costs at most two chain reads per row. If none of its first MAX_PURSELESS_PAYERS (8) payers has a purse, it
  costs those reads alone.
- Reads for claims that pay nothing count against their provider: a burst of WASTED_READS_BURST (256), the claim that crosses
  that line included, then WASTED_READS_PER_SECOND (1). The provider's claims stay pending meanwhile.
- Checking a claim's signatures takes some 20 ms at most: a provider may send a burst of CLAIMS_BURST (128), then
  CLAIMS_PER_SECOND (1).
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable

import structlog

from coordinator.chain.claim_value import ClaimValuer
from coordinator.domain.exposure import Exposure
from coordinator.ports import ClaimStore, Cursor, PendingClaim, Settlement
from tallystick.chain.claims import BATCH_GAS, CLAIM_GAS, ROW_GAS, ClaimBatch
from tallystick.chain.codec import ContractError
from tallystick.chain.escrow import Escrow
from tallystick.chain.event_reader import DeepReorg, read_events
from tallystick.chain.events import Released, ReleaseStarted, Settled
from tallystick.chain.rpc import MAX_TRANSACTION_GAS, Sender
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, TallyError, rate_limited
from tallystick.protocol.health import CheckResult, Health
from tallystick.protocol.link import ClaimRequest
from tallystick.protocol.types import Address, Amount
from tallystick.runtime.token_bucket import TokenBucket

log = structlog.get_logger()
BATCH_CLAIMS = 64
MAX_ROWS = (MAX_TRANSACTION_GAS - BATCH_GAS - CLAIM_GAS) // ROW_GAS
"""A claim is never divided, since its signature covers all rows. A claim with more rows fits into no transaction."""
WASTED_READS_BURST, WASTED_READS_PER_SECOND = 256, 1
CLAIMS_BURST, CLAIMS_PER_SECOND = 128, 1
REFUSED = "refused by the contract"


class Settler:
    """Accepts claims from nodes, sends those that are worth their gas every `interval` seconds, and follows the chain's events.

    `min_claim` and `min_claim_row`: base units that a claim, and each of its rows on average, must pay for its gas to be spent.
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
        self.on_settled: Callable[[int, int, int], None] = lambda *_: None
        """Called with the number of settled claims, their gas, and what it cost in wei."""
        self._is_delayed = False
        self._wasted_reads = TokenBucket(WASTED_READS_PER_SECOND, WASTED_READS_BURST)
        self._claim_rate = TokenBucket(CLAIMS_PER_SECOND, CLAIMS_BURST)

    async def accept_claim(self, provider: Address, request: ClaimRequest) -> None:
        """Stores a node's claim. Raises PeerError if it is invalid, Unavailable if it cannot be stored or too many arrive."""
        tick = self._tick()
        if not self._claim_rate.try_spend(provider, tick):
            text = f"claims: {provider} sends more than {CLAIMS_PER_SECOND} per second"
            raise rate_limited(text, self._claim_rate.delay(provider, tick), fault=Fault.PROVIDER)
        claim = request.claim.verify(self._domain)
        if claim.message.provider != provider:
            raise BadMessage(f"claim.provider: expected {provider}, got {claim.message.provider}")
        if not 1 <= len(claim.message.rows) <= MAX_ROWS:
            raise BadMessage(f"claim.rows: expected 1 to {MAX_ROWS}, which fit a transaction, got {len(claim.message.rows)}")
        if any(row.payer == provider for row in claim.message.rows):
            raise BadMessage("claim.rows: a row whose payer is the provider itself; the contract pays no such tab")
        for row, order in zip(claim.message.rows, request.orders, strict=True):
            verified = order.verify(self._domain)
            if (verified.digest, verified.message.payer, verified.message.provider) != (row.order_hash, row.payer, provider):
                raise BadMessage("claim.rows: a row does not match its order")
        await self._store.put_claim(request, int(self._now()))

    async def run(self) -> None:
        """Follows events and settles until cancelled. Events come first, so a crash makes no claim be sent twice."""
        while True:
            for step in (self.follow_events, self.settle, self.follow_events):
                try:
                    await step()
                    if step == self.settle:
                        self._is_delayed = False
                except TallyError as error:
                    self._is_delayed = True
                    log.warning("settlement delayed: the chain does not answer", step=step.__name__, error=str(error))
            await asyncio.sleep(self._interval)

    async def check(self) -> dict[str, CheckResult]:
        """The state of `claims`: a warning while claims wait for a chain that takes none, since they expire with their orders."""
        pending = await self._store.pending_claims(BATCH_CLAIMS) if self._is_delayed else []
        if not pending:
            return {"claims": CheckResult(Health.PASS, value=0)}
        left = min(order.message.claim_by for claim in pending for order in claim.request.orders) - round(self._now())
        when = f"the first expires in {left // 60} min" if left > 0 else "the first has expired"
        count = f"{BATCH_CLAIMS} or more" if len(pending) >= BATCH_CLAIMS else len(pending)
        remedy = "check `rpc`, and the coins for gas: tally chain fund " + self._sender.address
        return {"claims": CheckResult(Health.WARN, f"{count} claims wait for the chain; {when}", remedy, len(pending))}

    async def settle(self) -> None:
        """Sends all pending claims that are worth their gas. Raises TallyError if the chain takes none; they stay pending."""
        throttled: set[Address] = set()
        while pending := await self._store.pending_claims(BATCH_CLAIMS, throttled):
            if worthwhile := await self._select_worthwhile(pending, throttled):
                await self._send(worthwhile)

    async def _select_worthwhile(self, pending: list[PendingClaim], throttled: set[Address]) -> list[PendingClaim]:
        """Returns the claims that are worth their gas and closes the others.

        Providers that caused too many wasted reads are added to `throttled`; their claims stay pending.
        """
        valuer = ClaimValuer(
            self._escrow, self._settled_total, min_claim=self._min_claim, min_claim_row=self._min_claim_row, now=self._now()
        )
        worthwhile, closed = list[PendingClaim](), defaultdict[str, list[int]](list)
        for claim in pending:
            provider, reads = claim.request.claim.message.provider, valuer.reads
            if provider in throttled or self._wasted_reads.delay(provider, self._tick()):
                throttled.add(provider)
            elif reason := await valuer.rejection(claim):
                self._wasted_reads.try_spend(provider, self._tick(), valuer.reads - reads)
                closed[reason].append(claim.id)
            else:
                worthwhile.append(claim)
        for reason, ids in closed.items():
            log.info("claims closed without a transaction", reason=reason, count=len(ids))
            await self._store.close_claims(ids, reason)
        return worthwhile

    async def _settled_total(self, payer: Address, provider: Address) -> int:
        known = await self._store.settlement(payer, provider)
        return known.settled if known else 0

    async def _send(self, claims: list[PendingClaim]) -> None:
        batches = [ClaimBatch.of(claim.request.claim, claim.request.orders, self._domain) for claim in claims]
        try:
            sent = await self._escrow.settle_all(self._sender, batches)
        except Refusal as error:
            if error.code is Code.INSUFFICIENT_FUNDS and not isinstance(error, ContractError):
                raise  # this coordinator cannot pay the gas
            if len(claims) > 1:  # one of them is refused: send each alone, so it does not delay the others
                for claim in claims:
                    await self._send([claim])
                return
            log.warning("claim refused", claim=claims[0].id, provider=claims[0].request.claim.message.provider, error=str(error))
            tx = REFUSED
        else:
            tx = sent[-1].hash
            gas, fee = sum(result.gas_used for result in sent), sum(result.fee for result in sent)
            self.on_settled(len(claims), gas, fee)
            log.info("settled", claims=len(claims), tx=tx, gas=gas)
        await self._store.close_claims([claim.id for claim in claims], tx)

    async def follow_events(self) -> None:
        """Reads what the chain settled since the cursor.

        After a deep reorganisation, the next call reads all events again. An endpoint that reports one every time then costs
        one round per interval.
        """
        deployment = self._escrow.deployment
        while True:
            known = await self._store.cursor() or Cursor(deployment.block)
            try:
                page = await read_events(
                    self._escrow.rpc, deployment, known.block, after=known.tip, confirmations=self._confirmations
                )
            except DeepReorg as error:
                log.warning("deep reorganisation: settlements are read again and claims sent again", error=str(error))
                await self._store.forget_settlements()
                self._exposure.forget_settled()
                self._sender.forget_nonce()  # the chain may have dropped transactions of this account too
                return
            if page.cursor == known.block:
                return
            settled = [event for event in page.events if isinstance(event, Settled)]
            await self._store.put_settlements([_settlement(event) for event in settled], Cursor(page.cursor, page.tip))
            self._apply(page.events)

    def _apply(self, events: Iterable[object]) -> None:
        for event in events:
            if isinstance(event, Settled):
                self._exposure.settle(event.payer, event.provider, event.settled)
            elif isinstance(event, ReleaseStarted | Released):
                self._exposure.unreserve(event.payer, event.provider)

    async def watch(self) -> None:
        """Keeps the exposure of a replica current until cancelled, whichever replica settles. Writes nothing."""
        known: Cursor | None = None
        while True:
            try:
                known = await self.watch_events(known)
            except TallyError as error:
                log.warning("settlements not read: the chain does not answer", error=str(error))
            await asyncio.sleep(self._interval)

    async def watch_events(self, known: Cursor | None) -> Cursor | None:
        """Applies the events since `known`, from where the settler had read if None. Returns how far it read; None to begin anew.

        Raises TallyError.
        """
        deployment = self._escrow.deployment
        known = known or await self._store.cursor() or Cursor(deployment.block)
        while True:
            try:
                page = await read_events(
                    self._escrow.rpc, deployment, known.block, after=known.tip, confirmations=self._confirmations
                )
            except DeepReorg as error:
                log.warning("deep reorganisation: settlements are read again", error=str(error))
                self._exposure.forget_settled()
                return None
            self._apply(page.events)
            if page.cursor == known.block:
                return known
            known = Cursor(page.cursor, page.tip)


def _settlement(event: Settled) -> Settlement:
    return Settlement(event.payer, event.provider, event.settled, event.at.transaction, event.at.block)
