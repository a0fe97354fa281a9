"""Submits a job: drafts and signs its orders, seals the request and posts both.

If that fails, its orders do not stay open longer than they must.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.http_client import CoordinatorClient
from tallystick.client.coordinator.info import CoordinatorInfo
from tallystick.client.coordinator.job_stream import JobStream
from tallystick.client.coordinator.transport import ConnectionLost
from tallystick.client.jobs.candidates import draft_orders, drafts_within_budget, wrap_keys
from tallystick.client.jobs.further_orders import FurtherOrders
from tallystick.client.jobs.key_sessions import KeySessions
from tallystick.client.jobs.response import JobResponse
from tallystick.client.ledger.idempotency import IdempotencyKey
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.order_writes import NewJob, SignOrder
from tallystick.client.ledger.schema import JobState
from tallystick.client.openai.requests import ApiRequest
from tallystick.client.orders.signing import OrderPolicy, PlacedOrder, sign_order
from tallystick.client.orders.tab import Tab
from tallystick.client.receipts.delivery_check import Delivery, StreamEnd
from tallystick.client.recovery.reconciler import Reconciler
from tallystick.client.selection.shortlist import OWING_SECONDS
from tallystick.protocol.criteria import Demand
from tallystick.protocol.eip712 import Signer, Verified
from tallystick.protocol.errors import Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.messages import Ask, Terms
from tallystick.protocol.ranking_hints import RankingHints
from tallystick.protocol.sealing import ContentKey, commit_request
from tallystick.protocol.trace_context import TraceContext
from tallystick.protocol.types import Address, Amount, Hash, JobId, new_job_id
from tallystick.protocol.wire import Submission


class ReplicaLost(Unavailable):
    """The coordinator's replica was lost while it had a job that never began. It costs nothing and may be submitted anew."""

    def __init__(self) -> None:
        super().__init__(Code.COORDINATOR_UNAVAILABLE, "the coordinator's replica was lost; the job ended without a charge")


class KeyTaken(Unavailable):
    """Another process stored a job of its own for an idempotency key meanwhile. Nothing was posted here."""

    def __init__(self) -> None:
        text = "another process of this wallet just submitted a job with this idempotency key; send the request again"
        super().__init__(Code.CLIENT_BUSY, text, fault=Fault.CLIENT)


@dataclass(frozen=True, slots=True)
class KeyedRequest:
    """An idempotency key and the fingerprint of its request."""

    key: str
    fingerprint: str


class Submitted(NamedTuple):
    """A job that was posted: its response, still without frames, and the open stream of them.

    `send_again` posts the same bytes once more, after a replica was lost where the job waited for a free slot. The job's id keeps
    it from running twice.
    """

    response: JobResponse
    stream: JobStream
    send_again: Callable[[], Awaitable[JobStream]]


@dataclass(frozen=True, slots=True)
class JobSubmitter:
    """Submits the jobs of one market. `clock` is Unix time in nanoseconds; `submitting` holds the jobs that are being posted."""

    config: ClientConfig
    wallet: Signer
    coordinator: CoordinatorClient
    ledger: Ledger
    reconciler: Reconciler
    clock: Callable[[], int]
    random: Callable[[int], bytes]
    submitting: set[JobId]
    sessions: KeySessions

    async def submit(
        self,
        info: CoordinatorInfo,
        request: ApiRequest,
        asks: Sequence[Verified[Ask]],
        max_cost: Amount | None,
        *,
        keep_bytes: int,
        idempotency_key: KeyedRequest | None,
        ranked: bool,
        wait: int,
        hedge_after: float,
        batch: bool,
        hints: RankingHints,
        trace: TraceContext | None = None,
    ) -> Submitted:
        """Posts a job.

        `max_cost` bounds the cap of each order, in base units. `ranked`: the coordinator must try the asks in this order.
        `wait`: seconds that the job may wait for a free slot. `hedge_after`: seconds without output after which a second provider
        may get the job too; 0 for never. `batch`: it waits behind interactive jobs. `hints`: by which it ranks otherwise.
        `trace`: what the coordinator and the provider learn of its trace.
        Raises TallyError, after which nothing is owed.
        """
        job, key = new_job_id(self.clock(), self.random), ContentKey.new(self.random)
        commitment = commit_request(key.commitment_key, job, request.plaintext)
        drafts = draft_orders(request, asks, job, commitment, self.config.default_max_output_tokens)
        new = self._new_job(info, request, job, key)
        now = new.created_at
        late = max(1, round(1_000 * hedge_after)) if hedge_after else None
        within_budget = drafts_within_budget(drafts, max_cost)
        orders: list[PlacedOrder] = []
        self.submitting.add(job)  # until it is among the running jobs, so that nothing else settles it meanwhile
        try:
            orders = await self._sign(info, new, within_budget, wait)
            header = Submission(
                job, wrap_keys(job, key, orders, asks, self.sessions), b"", ranked, wait, late, hints, batch, trace
            ).dumps()
            linger = None
            if idempotency_key is not None:
                linger = self.config.linger_seconds
                await self._store_key(
                    IdempotencyKey(idempotency_key.key, idempotency_key.fingerprint, job, key.secret, header, now)
                )

            async def post() -> JobStream:
                return await self.coordinator.submit(header + key.seal_request(job, request.plaintext), linger=linger)

            stream = await post()
        except (TallyError, asyncio.CancelledError) as error:
            await self._close_orders(request, key, job, error, signed=orders, idempotency_key=idempotency_key)
            if self._came_late(error, orders):
                raise ReplicaLost from error
            raise
        finally:
            self.submitting.discard(job)
        by_digest = {placed.order.digest: placed for placed in orders}
        response = JobResponse(
            job, key, by_digest, info.domain, info.coordinator, keep_bytes=keep_bytes, may_hedge=late is not None
        )
        return Submitted(response, stream, post)

    async def _store_key(self, keyed: IdempotencyKey) -> None:
        """Stores an idempotency key. Raises KeyTaken."""
        if (await self.ledger.store_key(keyed, keyed.made_at - self.config.idempotency_seconds)).job != keyed.job:
            raise KeyTaken

    async def _sign(
        self, info: CoordinatorInfo, job: NewJob, drafts: Sequence[tuple[Address, Terms]], wait: int
    ) -> list[PlacedOrder]:
        placed = await self.ledger.sign_orders(job, drafts, self._signer(info, wait), self.config.budgets)
        if not placed:
            excluded = await self.ledger.excluded(info.domain, job.created_at)
            reasons = "; ".join(f"{provider}: {excluded[provider]}" for provider, _ in drafts if provider in excluded)
            text = (
                f"this wallet excludes every provider found for {job.model!r} ({reasons[:1_000]}); see `tally receipt evidence`"
            )
            if {provider for provider, _ in drafts} <= (await self.ledger.blocked(info.domain)).keys():
                raise Refusal(Code.NO_PROVIDER, text, fault=Fault.PROVIDER)
            error = Unavailable(Code.NO_PROVIDER, text, fault=Fault.PROVIDER)
            error.retry_after = OWING_SECONDS
            raise error
        return placed

    def _signer(self, info: CoordinatorInfo, wait: int) -> SignOrder:
        """Signs orders whose jobs begin within `wait` seconds, and the usual time to start, from now."""
        now_ns, config = self.clock(), self.config
        start = config.start_seconds + wait
        policy = OrderPolicy(config.reserve_target, start, config.run_seconds, config.claim_seconds, info.fee_bps)

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

        return sign

    def further_orders(
        self, info: CoordinatorInfo, request: ApiRequest, demand: Demand, response: JobResponse, wait: int
    ) -> FurtherOrders:
        """The further orders that a job may have while it waits. None of them costs more than its dearest order now."""
        return FurtherOrders(
            self.config,
            self.coordinator,
            self.ledger,
            self.reconciler.recovery,
            request,
            demand,
            self._new_job(info, request, response.job, response.key),
            max(placed.terms.max_cost for placed in response.candidates),
            self.sessions,
            lambda: self._signer(info, wait),
            lambda: self.clock() // 1_000_000_000,
        )

    def _new_job(self, info: CoordinatorInfo, request: ApiRequest, job: JobId, key: ContentKey) -> NewJob:
        return NewJob(
            domain=info.domain,
            payer=self.wallet.address,
            job=job,
            model=request.summary.model,
            path=request.head.path,
            commitment_key=key.commitment_key,
            created_at=self.clock() // 1_000_000_000,
            label=request.label,
        )

    def _came_late(self, error: BaseException, orders: Sequence[PlacedOrder]) -> bool:
        """Whether orders expired on their way: the coordinator hung, and the caller did nothing wrong."""
        now = self.clock() // 1_000_000_000
        expired = any(placed.order.message.deadline <= now for placed in orders)
        return expired and isinstance(error, Refusal) and error.code is Code.ORDER_EXPIRED

    async def _close_orders(
        self,
        request: ApiRequest,
        key: ContentKey,
        job: JobId,
        error: BaseException,
        *,
        signed: Sequence[PlacedOrder],
        idempotency_key: KeyedRequest | None,
    ) -> None:
        """Closes the orders of a job that could not be submitted.

        The orders of a job that may have arrived count until its end is known. Those of a job with an idempotency key wait for
        the next request with that key.
        """
        if isinstance(error, ConnectionLost | asyncio.CancelledError):
            stream = StreamEnd.ABANDONED if idempotency_key is None else StreamEnd.RESUMABLE
            await self.ledger.store_deliveries(job, _nothing_delivered(request, key, signed, stream), matched=False)
            if idempotency_key is None:
                if isinstance(error, ConnectionLost):
                    error.retry = False  # the job may have been admitted, and another request would buy it twice
                    if self.coordinator.replicas.has_several:
                        await self.reconciler.end_lost(job)
                        if await self.reconciler.await_free_end(job, None):
                            raise ReplicaLost from error
                self.reconciler.abandon(job)
            return
        if idempotency_key is not None:
            await self.ledger.forget_key_of(job)
        await self.ledger.end_job(job, JobState.FAILED, str(error), self.clock() // 1_000_000_000)


def _nothing_delivered(
    request: ApiRequest, key: ContentKey, signed: Sequence[PlacedOrder], stream: StreamEnd
) -> dict[Hash, Delivery]:
    """An empty delivery for each order of a job whose stream never began."""
    size, bounded = len(request.body), request.summary.bounded
    digests = [placed.order.digest for placed in signed]
    return {digest: Delivery.empty(key, digest, size, bounded=bounded, cancelled=True, stream=stream) for digest in digests}
