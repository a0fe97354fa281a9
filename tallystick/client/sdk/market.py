"""The market from Python: `async with Market(coordinator, wallet) as market: result = await market.chat(model, messages)`.

A job is sealed and signed here and checked here: what leaves this process is ciphertext and orders, and what comes back is
held against them. The coordinator is trusted with nothing but delay.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, Unpack
from weakref import WeakValueDictionary

from tallystick.client.config import MAX_LABEL, ClientConfig
from tallystick.client.coordinator.access_tokens import AccessTokens
from tallystick.client.coordinator.http_client import CoordinatorClient, CoordinatorInfo, ModelOffer
from tallystick.client.coordinator.pinning import DeploymentPin
from tallystick.client.jobs.job import Job, JobContext
from tallystick.client.jobs.resume import resume_job
from tallystick.client.jobs.submit import JobSubmitter, Named
from tallystick.client.ledger import idempotency
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.queries import KnownJob
from tallystick.client.openai.requests import ApiRequest
from tallystick.client.orders.tab import Tab
from tallystick.client.receipts.evidence import Evidence
from tallystick.client.receipts.file_store import ProofStore
from tallystick.client.receipts.token_audit import TokenAuditor
from tallystick.client.recovery.escrow import PayerEscrow
from tallystick.client.recovery.lost_state import TabRecovery
from tallystick.client.recovery.reconciler import Reconciler
from tallystick.client.sdk.convenience import ConvenienceMethods
from tallystick.client.sdk.maintenance import Maintenance
from tallystick.client.selection.affinity import Affinity
from tallystick.client.selection.options import Choice, Explained, demand_of, explained, least
from tallystick.client.selection.shortlist import Shortlists
from tallystick.protocol.demand import Demand
from tallystick.protocol.eip712 import Domain, Signer, Verified
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, Unavailable
from tallystick.protocol.json_members import read_text
from tallystick.protocol.messages import Ask
from tallystick.protocol.routes import CHAT, JSON
from tallystick.protocol.types import Address, Amount, JobId, parse_address
from tallystick.protocol.wire import dumps
from tallystick.runtime.plaintext import warn_if_plaintext

_STALE = (Code.NO_PROVIDER, Code.NODE_BUSY)
"""Refusals that a fresh shortlist may heal."""


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a caller wants of one job, beside its request."""

    keep: bool
    named: Named
    affinity: str | None


class Market(ConvenienceMethods):
    """A client of one coordinator with one wallet. Use as an async context manager; many jobs may run at once.

    Entering raises BadMessage for a deployment file that cannot be read and Unavailable for a state file that cannot be used.
    The coordinator is first spoken to when it is needed. Leaving cancels the jobs that still run.
    """

    def __init__(
        self,
        coordinator_url: str,
        wallet: Signer,
        config: ClientConfig | None = None,
        *,
        clock: Callable[[], int] = time.time_ns,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        config = replace(config or ClientConfig(), coordinator=coordinator_url)
        self.config, self.wallet = config, wallet
        self._clock, self._random = clock, random
        self._coordinator = CoordinatorClient(coordinator_url, config, AccessTokens(wallet, self.info, self._now))
        self._shortlists = Shortlists(
            self._coordinator,
            wallet.address,
            limit=config.shortlist_size,
            seconds=config.shortlist_seconds,
            context=self._shortlist_context,
            now=self._now,
            staked=self._staked,
            stale=lambda domain, asks: self._ledger.stale_asks(domain, asks, self._now()),
        )
        self._affinity = Affinity(random(32))
        self._pin = DeploymentPin()
        self._onchain: PayerEscrow | None = None
        self._asking = asyncio.Lock()
        self._job_context: JobContext | None = None
        self._info: CoordinatorInfo | None = None
        self._live: set[Job] = set()
        self._on_their_way: set[JobId] = set()
        self._keys: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._idle = asyncio.Event()
        self._draining = False

    @classmethod
    def of(cls, config: ClientConfig, wallet: Signer) -> Market:
        """A market with everything from one config."""
        return cls(config.coordinator, wallet, config)

    @property
    def address(self) -> Address:
        """The payer."""
        return self.wallet.address

    @property
    def running(self) -> int:
        """Jobs under way."""
        return len(self._live)

    def __repr__(self) -> str:
        return f"Market({self.config.coordinator}, {self.address})"

    def _now(self) -> int:
        return self._clock() // 1_000_000_000

    # Opening and closing

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def open(self) -> Self:
        """What entering does, for where no block can hold the market, as across a notebook's cells. `close` it at the end."""
        warn_if_plaintext(self.config.coordinator, "which account buys which model, when, in which sizes, at which price")
        self._auditor = TokenAuditor(self.config)
        self._pin, self._job_context, self._draining = DeploymentPin.of(self.config), None, False
        self._onchain = PayerEscrow.of(self.config, self.wallet)
        self._ledger = await Ledger.open(self.config.ledger_path(self.address), self.address)
        await self._coordinator.__aenter__()
        recovery = TabRecovery.of(
            self._ledger,
            self._coordinator,
            self.wallet,
            self.info,
            now=self._now,
            config=self.config,
            onchain=self._onchain,
        )
        self._resolver = Reconciler(
            self._ledger,
            self._coordinator,
            now=self._now,
            live=lambda: self._on_their_way | {job.id for job in self._live},
            limit=self.config.max_jobs,
            every=self.config.start_seconds,
            recovery=recovery,
        )
        self._placing = JobSubmitter(
            self.config,
            self.wallet,
            self._coordinator,
            self._ledger,
            self._resolver,
            self._clock,
            self._random,
            self._on_their_way,
        )
        return self

    async def close(self) -> None:
        """What leaving does: cancels the jobs that still run."""
        try:
            await self.drain(0)
            await self._resolver.close(self.config.cancel_seconds)
        finally:
            await self._coordinator.__aexit__(None, None, None)
            if self._onchain is not None:
                await self._onchain.close()
            await self._ledger.close()

    async def drain(self, seconds: float) -> None:
        """Takes no more jobs, lets those under way go on for so long, then cancels them and waits for their receipts."""
        self._draining = True
        if self._live:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._idle.wait()
        await asyncio.gather(*(job.cancel() for job in list(self._live)), return_exceptions=True)

    async def info(self) -> CoordinatorInfo:
        """Who the coordinator is; asked once. Raises Refusal if it is not the one, or not on the deployment, insisted on."""
        if self._info is None:
            async with self._asking:
                if self._info is None:
                    info = await self._coordinator.info()
                    self._pin.check(info, self.config.max_fee_bps)
                    self._resolver.keep()
                    self._info = info
                return self._info
        return self._info

    async def _fee_changed(self) -> bool:
        """Whether the coordinator now keeps another fee than the one that orders allowed: then the next ones allow the new one.
        Raises Refusal where it is above max_fee_bps.
        """
        before, now = await self.info(), await self._coordinator.info()
        if before.fee_bps == now.fee_bps or replace(now, fee_bps=before.fee_bps) != before:
            return False
        self._pin.check(now, self.config.max_fee_bps)
        self._info = now
        return True

    async def _open_context(self) -> tuple[CoordinatorInfo, JobContext]:
        info = await self.info()
        if self._job_context is None:
            self._job_context = JobContext(
                self.config,
                self._coordinator,
                self._ledger,
                self._resolver,
                info.domain,
                self._now,
                self._left,
                lambda job: any(other is not job and other.id == job.id for other in self._live),
                ProofStore.of(self.config),
                self._auditor,
            )
        return info, self._job_context

    def _left(self, job: Job) -> None:
        self._live.discard(job)
        if not self._live:
            self._idle.set()
        if job.disputed:
            self._shortlists.forget()
        elif job.receipt is not None and job.receipt_accepted:
            self._affinity.note(job.conversation, job.receipt.message)

    async def _shortlist_context(self) -> tuple[Domain, Iterable[Address]]:
        domain = (await self.info()).domain
        barred = await self._ledger.excluded(domain, self._now())
        if barred and (owing := barred.keys() - await self._ledger.blocked(domain)):
            self._resolver.look_into(sorted(owing))  # their receipts may have come meanwhile
        return domain, barred

    async def _staked(self, provider: Address) -> int | None:
        return None if self._onchain is None else await self._onchain.stake(provider)

    # Looking

    async def models(self) -> list[ModelOffer]:
        """The models on offer, as the coordinator tells them."""
        return await self._coordinator.models()

    async def shortlist(self, model: str, *, route: str = CHAT, **choice: Unpack[Choice]) -> list[Verified[Ask]]:
        """The verified asks that a job would be offered to, best first; what is not chosen here the config says.

        Raises Refusal or Unavailable that say why there is none.
        """
        found, _ = await self._shortlists.get(demand_of(self.config, model, route, choice))
        return found

    async def explain(self, model: str, *, route: str = CHAT, **choice: Unpack[Choice]) -> list[Explained]:
        """Every ask for a model and why it would not be offered a job; those that would come first. Places nothing."""
        demand = demand_of(self.config, model, route, choice)
        barred = await self._ledger.excluded((await self.info()).domain, self._now())
        listed = await self._coordinator.explain(demand.to_json(self.address))
        return explained(listed, demand, barred, self._now())

    # Jobs

    async def submit(
        self,
        path: str,
        body: bytes | Mapping[str, Any],
        *,
        model: str | None = None,
        models: Collection[str] = (),
        max_cost: Amount | None = None,
        keep: bool = False,
        key: str | None = None,
        label: str | None = None,
        affinity: str | None = None,
        content_type: str = JSON,
        **choice: Unpack[Choice],
    ) -> Job:
        """Seals, signs and posts a request to an OpenAI route such as /v1/chat/completions; returns once it is admitted.

        Bytes go to the engine as they are. The body must name one of `models`, if any are given. `max_cost` (base units) bounds
        what this job can cost, as do the config's budgets, those of its workload `label` among them. With `keep`, the job has a
        `proof` at its end. With an idempotency `key` a job survives a lost connection, of this process too, and the same request
        with the same key is that job. Requests of one conversation (named by `affinity`, else known by how they begin) stay with
        the provider that has it in its cache.
        Raises TallyError: then nothing is owed but what an earlier job of the key costs.
        """
        raw = body if isinstance(body, bytes) else dumps(dict(body))
        if len(raw) > self.config.max_body_bytes:
            raise Refusal(
                Code.BODY_TOO_LARGE, f"the request has {len(raw)} bytes, at most {self.config.max_body_bytes} are taken"
            )
        label = self.config.label if label is None else read_text(label, "label", MAX_LABEL)
        asked = ApiRequest.of(path, raw, content_type, label)
        call = asked.summary
        if model is not None and model != call.model:
            raise BadMessage(f"model: {model!r} was asked for, but the body names {call.model!r}")
        if models and call.model not in models:
            text = f"{call.model!r} is not among the models allowed here: {', '.join(sorted(models))[:500]}"
            raise Refusal(Code.UNKNOWN_MODEL, text)
        if self._draining:
            raise Unavailable(Code.SHUTTING_DOWN, "this client is stopping", fault=Fault.CLIENT)
        if len(self._live) >= self.config.max_jobs:
            raise Unavailable(Code.CLIENT_BUSY, f"this client already runs {len(self._live)} jobs", fault=Fault.CLIENT)
        demand = demand_of(self.config, call.model, path, choice)
        limit = least(self.config.max_cost, max_cost)
        cap = None if limit is None else Amount(limit)
        if key is None:
            return await self._find_and_place(asked, demand, cap, _Wish(keep, None, affinity))
        request = idempotency.fingerprint(asked.plaintext)
        async with self._keys.setdefault(idempotency.check_key(key), asyncio.Lock()):
            known = await self._ledger.find_key(key)
            if known is None:
                return await self._find_and_place(asked, demand, cap, _Wish(keep, (key, request), affinity))
            idempotency.check_same(known, request)
            info, context = await self._open_context()
            job = await resume_job(context, info.coordinator, known, asked, keep_bytes=self._room(context, asked, keep))
            self._live.add(job)
            return job

    async def _find_and_place(self, asked: ApiRequest, demand: Demand, cap: Amount | None, wish: _Wish) -> Job:
        asks, remembered = await self._shortlists.get(demand)
        try:
            return await self._place(asked, asks, cap, demand, wish)
        except Refusal as error:
            if error.code is not Code.ORDER_TERMS or not await self._fee_changed():
                raise
        except Unavailable as error:
            self._shortlists.forget(demand)
            if not remembered or error.code not in _STALE:
                raise
        asks, _ = await self._shortlists.get(demand)
        return await self._place(asked, asks, cap, demand, wish)

    async def _place(
        self, asked: ApiRequest, asks: Sequence[Verified[Ask]], cap: Amount | None, demand: Demand, wish: _Wish
    ) -> Job:
        began = asyncio.get_running_loop().time()
        info, context = await self._open_context()
        await self._resolver.recovery.know(ask.message.provider for ask in asks)
        tag = None if demand.ranked else self._affinity.tag(asked, wish.affinity)
        asks, moved = self._affinity.ordered(tag, asks)
        answer, response = await self._placing.place(
            info,
            asked,
            asks,
            cap,
            keep_bytes=self._room(context, asked, wish.keep),
            named=wish.named,
            ranked=demand.ranked or moved,
        )
        made = Job(context, answer, response, asked.summary, asked.plaintext, keyed=wish.named is not None, began=began)
        made.conversation = tag
        self._live.add(made)
        return made

    def _room(self, context: JobContext, asked: ApiRequest, keep: bool) -> int:
        counted = self._auditor.counts(asked.summary.model, asked.head.path)
        return self.config.max_answer_bytes if keep or counted or context.proofs is not None else 0

    # Remembering

    async def find(self, job: JobId) -> KnownJob | None:
        """What this wallet's ledger knows of a job."""
        return await self._ledger.find_job(job)

    async def tab(self, provider: str) -> Tab:
        """The tab with one provider: accepted, open caps, highest ceiling signed, in base units."""
        info = await self.info()
        return await self._ledger.tab(info.domain, parse_address(provider), self._now())

    async def _possible_cost(self, job: JobId) -> Amount:
        return await maintenance_of(self).possible_cost(job)

    async def evidence(self) -> list[Evidence]:
        """Dishonest receipts, kept for third parties."""
        return await self._ledger.evidence()


def maintenance_of(market: Market) -> Maintenance:
    """What the gateway of an open market takes care of."""
    return Maintenance(market.config, market._ledger, market._onchain, market.info, market._clock)  # noqa: SLF001 - its other half
