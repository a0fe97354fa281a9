"""Placing a job: it is drafted on each ask, signed by the ledger's word, sealed and posted; and however that fails, its orders do
not stay open longer than they must.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import aiohttp

from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.http_client import ConnectionLost, CoordinatorClient, CoordinatorInfo
from tallystick.client.jobs.candidates import draft_orders, drafts_within_budget, wrap_keys
from tallystick.client.jobs.response import JobResponse
from tallystick.client.ledger import idempotency
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.schema import JobState
from tallystick.client.ledger.writes import NewJob
from tallystick.client.openai.requests import ApiRequest
from tallystick.client.orders.signing import OrderPolicy, PlacedOrder, sign_order
from tallystick.client.orders.tab import Tab
from tallystick.client.receipts.delivery_check import Delivery, StreamEnd
from tallystick.client.recovery.reconciler import Reconciler
from tallystick.protocol.eip712 import Signer, Verified
from tallystick.protocol.errors import Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.messages import Ask, Terms
from tallystick.protocol.sealing import ContentKey, commit_request
from tallystick.protocol.types import Address, Amount, Hash, JobId
from tallystick.protocol.wire import Submission

Named = tuple[str, str] | None
"""An idempotency key, and the fingerprint of its request."""


@dataclass(frozen=True, slots=True)
class JobSubmitter:
    """What a job is placed with. `clock` is Unix time in nanoseconds; `placing` holds the jobs on their way."""

    config: ClientConfig
    wallet: Signer
    coordinator: CoordinatorClient
    ledger: Ledger
    resolver: Reconciler
    clock: Callable[[], int]
    random: Callable[[int], bytes]
    placing: set[JobId]

    async def place(
        self,
        info: CoordinatorInfo,
        asked: ApiRequest,
        asks: Sequence[Verified[Ask]],
        max_cost: Amount | None,
        *,
        keep_bytes: int,
        named: Named,
        ranked: bool,
    ) -> tuple[JobResponse, aiohttp.ClientResponse]:
        """Posts a job; its answer to be, and the open stream. Raises TallyError: then nothing is owed."""
        job, key = JobId(self.random(16)), ContentKey.new(self.random)
        commitment = commit_request(key.commitment_key, job, asked.plaintext)
        drafts = draft_orders(asked, asks, job, commitment, self.config.default_max_output_tokens)
        now = self.clock() // 1_000_000_000
        new = NewJob(
            domain=info.domain,
            payer=self.wallet.address,
            job=job,
            model=asked.summary.model,
            path=asked.head.path,
            commitment_key=key.commitment_key,
            created_at=now,
            label=asked.label,
        )
        within = drafts_within_budget(drafts, max_cost)
        async with self._closing(asked, key, job, named) as signed:
            placed = await self._sign(info, new, within)
            signed.extend(placed)
            candidates = wrap_keys(job, key, placed, asks)
            header = Submission(job, candidates, b"", ranked).dumps()
            if named is not None:
                keyed = idempotency.IdempotencyKey(*named, job, key.secret, header, now)
                if (await self.ledger.store_key(keyed, now - self.config.idempotency_seconds)).job != job:
                    raise Unavailable(Code.CLIENT_BUSY, "another process placed this key's job just now", fault=Fault.CLIENT)
            linger = None if named is None else self.config.linger_seconds
            response = await self.coordinator.submit(header + key.seal_request(job, asked.plaintext), linger=linger)
        orders = {one.order.digest: one for one in placed}
        return JobResponse(job, key, orders, info.domain, info.coordinator, keep_bytes=keep_bytes), response

    async def _sign(self, info: CoordinatorInfo, job: NewJob, drafts: Sequence[tuple[Address, Terms]]) -> list[PlacedOrder]:
        now_ns, config = self.clock(), self.config
        policy = OrderPolicy(config.reserve_target, config.start_seconds, config.run_seconds, config.claim_seconds, info.fee_bps)

        def sign(tab: Tab, provider: Address, terms: Terms) -> PlacedOrder:
            return sign_order(
                tab,
                terms,
                signer=self.wallet,
                provider=provider,
                coordinator=info.coordinator,
                domain=info.domain,
                policy=policy,
                now_ns=now_ns,
            )

        placed = await self.ledger.sign_orders(job, drafts, sign, config.budgets)
        if not placed:
            barred = await self.ledger.excluded(info.domain, job.created_at)
            reasons = "; ".join(f"{provider}: {barred[provider]}" for provider, _ in drafts if provider in barred)
            text = f"this wallet leaves out every provider found for {job.model!r} ({reasons[:1_000]}): tally receipt evidence"
            raise Refusal(Code.NO_PROVIDER, text, fault=Fault.PROVIDER)
        return placed

    @contextlib.asynccontextmanager
    async def _closing(self, asked: ApiRequest, key: ContentKey, job: JobId, named: Named) -> AsyncIterator[list[PlacedOrder]]:
        """However placing a job fails, its orders are closed; those of a job that may have arrived count until its end is known,
        and those of a keyed one wait for the next request with the key. The caller adds the orders as they are signed.
        """
        signed: list[PlacedOrder] = []
        self.placing.add(job)  # until it is among the live ones: nobody else is to settle it meanwhile
        try:
            yield signed
        except (ConnectionLost, asyncio.CancelledError) as error:
            stream = StreamEnd.ABANDONED if named is None else StreamEnd.RESUMABLE
            await self.ledger.store_deliveries(_nothing(asked, key, signed, stream), matched=False)
            if named is None:
                if isinstance(error, ConnectionLost):
                    error.retry = False  # the job may have been taken: asking again might buy it twice
                self.resolver.abandon(job)
            raise
        except TallyError as error:
            if named is not None and (known := await self.ledger.find_key(named[0])) is not None and known.job == job:
                await self.ledger.forget_key(named[0])
            await self.ledger.end_job(job, JobState.FAILED, str(error), self.clock() // 1_000_000_000)
            raise
        finally:
            self.placing.discard(job)


def _nothing(asked: ApiRequest, key: ContentKey, signed: Sequence[PlacedOrder], stream: StreamEnd) -> dict[Hash, Delivery]:
    """What arrived for the orders of a job whose stream never began."""
    size, bounded = len(asked.body), asked.summary.bounded
    return {
        one.order.digest: Delivery.empty(key, one.order.digest, size, bounded=bounded, cancelled=True, stream=stream)
        for one in signed
    }
