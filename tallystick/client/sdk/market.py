"""The market from Python: `async with Market(coordinator, wallet) as market: result = await market.chat(model, messages)`.

Requests are sealed, and orders signed, in this process; only ciphertext and orders leave it. Everything that comes back is
checked against them. The coordinator is trusted with nothing but delay.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self, Unpack
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from tallystick.client.audit_settings import NO_CONSENT, PromptConsent
from tallystick.client.config import BATCH, MAX_LABEL, MAX_WAIT_SECONDS, ClientConfig, read_priority
from tallystick.client.coordinator.access_tokens import AccessTokens
from tallystick.client.coordinator.http_client import CoordinatorClient, SealReport
from tallystick.client.coordinator.info import CoordinatorInfo
from tallystick.client.coordinator.model_offers import ModelOffer
from tallystick.client.coordinator.pinning import DeploymentPin
from tallystick.client.jobs.job import Job, JobContext, keep_for_audit, matches_of, trace_ended
from tallystick.client.jobs.job_trace import JobTrace
from tallystick.client.jobs.key_sessions import KeySessions
from tallystick.client.jobs.resume import resume_job
from tallystick.client.jobs.submit import JobSubmitter, KeyedRequest, ReplicaLost
from tallystick.client.ledger import idempotency
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.queries import KnownJob
from tallystick.client.ledger.spending import DAY_SECONDS
from tallystick.client.openai.requests import ApiRequest
from tallystick.client.orders.tab import Tab
from tallystick.client.receipts.evidence import Evidence
from tallystick.client.receipts.file_store import ProofStore
from tallystick.client.receipts.token_audit import TokenAuditor
from tallystick.client.recovery.escrow import PayerEscrow
from tallystick.client.recovery.lost_state import TabRecovery
from tallystick.client.recovery.reconciler import Reconciler
from tallystick.client.sdk.admission_turns import AdmissionTurns
from tallystick.client.sdk.audits import JobAudits, MarketAudits
from tallystick.client.sdk.convenience import ConvenienceMethods
from tallystick.client.sdk.maintenance import Maintenance
from tallystick.client.selection.affinity import Affinity, ranking_hints
from tallystick.client.selection.options import (
    AskExplanation,
    Demands,
    ProviderCriteria,
    demand_of,
    explain_asks,
    read_hedge_after,
    smallest_limit,
)
from tallystick.client.selection.shortlist import ShortlistCache
from tallystick.protocol.criteria import Demand
from tallystick.protocol.eip712 import Domain, Signer, Verified
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, Unavailable
from tallystick.protocol.json_members import read_count, read_text
from tallystick.protocol.lenient_json import dump_lenient
from tallystick.protocol.messages import Ask
from tallystick.protocol.routes import CHAT, JSON
from tallystick.protocol.types import Address, Amount, JobId, parse_address
from tallystick.runtime.log_watch import LogWatch
from tallystick.runtime.plaintext import warn_if_plaintext
from tallystick.tracing.export import application_tracer, exporting
from tallystick.tracing.spans import Tracer

MAX_AUDITED_BYTES = 1 << 20
"""Bytes of the longest answer that is kept for audits."""
_STALE_SHORTLIST = (Code.NO_PROVIDER, Code.NODE_BUSY)
"""Refusals after which a fresh shortlist may succeed."""


@dataclass(frozen=True, slots=True)
class _JobOptions:
    """Options of one job beside its request; see `Market.submit`. `max_cost` is in base units, `wait` in seconds. `hedge_after`:
    seconds; 0 for never.
    """

    max_cost: Amount | None
    keep: bool
    idempotency_key: KeyedRequest | None
    affinity: str | None
    wait: int
    hedge_after: float
    batch: bool
    consent: PromptConsent
    trace: JobTrace | None


class Market(ConvenienceMethods):
    """A client of one coordinator with one wallet, and an async context manager. Many jobs may run at a time.

    Entering raises BadMessage for an unreadable deployment file and Unavailable for an unusable ledger file. The coordinator is
    first contacted when it is needed. Leaving cancels the jobs that still run.
    """

    def __init__(
        self,
        coordinator_url: str,
        wallet: Signer,
        config: ClientConfig | None = None,
        *,
        clock: Callable[[], int] = time.time_ns,
        random: Callable[[int], bytes] = os.urandom,
        tracer: Tracer | None = None,
    ) -> None:
        """`tracer`: what records jobs, in place of the config's own export and of the application's OpenTelemetry."""
        self._tracer = self._given_tracer = tracer
        config = replace(config or ClientConfig(), coordinator=coordinator_url)
        self.config, self.wallet = config, wallet
        self._clock, self._random = clock, random
        self._coordinator = CoordinatorClient(coordinator_url, config, AccessTokens(wallet, self.info, self._now), wallet.address)
        self._shortlists = ShortlistCache(
            self._coordinator,
            wallet.address,
            limit=config.shortlist_size,
            seconds=config.shortlist_seconds,
            context=self._shortlist_context,
            now=self._now,
            stake_of=self._stake_of,
            find_stale=lambda domain, asks: self._ledger.stale_asks(domain, asks, self._now()),
        )
        self._demands = Demands(config)
        self._pin = DeploymentPin()
        self._onchain: PayerEscrow | None = None
        self._opened = contextlib.AsyncExitStack()
        self._info_lock = asyncio.Lock()
        self._job_context: JobContext | None = None
        self._log_watch: LogWatch | None = None
        self._info: CoordinatorInfo | None = None
        self._live: set[Job] = set()
        self._turns = AdmissionTurns(time.monotonic, self.config.max_jobs)
        self._submitting: set[JobId] = set()
        self._keys: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._idle = asyncio.Event()
        self._draining = False

    @classmethod
    def of(cls, config: ClientConfig, wallet: Signer) -> Market:
        """A market whose coordinator also comes from the config."""
        return cls(config.coordinator, wallet, config)

    @property
    def address(self) -> Address:
        """The payer's account."""
        return self.wallet.address

    @property
    def running(self) -> int:
        """The number of running jobs."""
        return len(self._live)

    @property
    def coordinator_urls(self) -> tuple[str, ...]:
        """Where the coordinator is reached: the replicas that it listed last, then the configured URLs."""
        return self._coordinator.replicas.urls

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
        """Does what entering does, for code without a block, such as the cells of a notebook. Call `close` at the end."""
        warn_if_plaintext(self.config.coordinator, "which account buys which model, when, in which sizes, at which price")
        async with contextlib.AsyncExitStack() as opened:
            await self._open(opened)
            self._opened = opened.pop_all()
        return self

    async def _open(self, opened: contextlib.AsyncExitStack) -> None:
        if self._given_tracer is None:
            export = await opened.enter_async_context(exporting(self.config.tracing, "tallystick-client", environment={}))
            self._tracer = application_tracer() if export is None else export.tracer
        self._auditor = TokenAuditor(self.config)
        self._pin, self._job_context, self._draining = DeploymentPin.of(self.config), None, False
        self._turns = AdmissionTurns(time.monotonic, self.config.max_jobs)
        self._ledger = await Ledger.open(
            self.config.ledger_path(self.address), self.address, lambda: len(self._submitting) + len(self._live)
        )
        opened.push_async_callback(self._ledger.close)
        self._affinity = Affinity.open(self.wallet, self.config.affinity_path(self.address), self._now)
        opened.callback(self._affinity.close)
        self._onchain = PayerEscrow.of(self.config, self.wallet)
        if self._onchain is not None:
            opened.push_async_callback(self._onchain.close)
        await opened.enter_async_context(self._coordinator)
        recovery = TabRecovery.of(
            self._ledger, self._coordinator, self.wallet, self.info, now=self._now, config=self.config, escrow=self._onchain
        )
        self._reconciler = Reconciler(
            self._ledger,
            self._coordinator,
            now=self._now,
            live=lambda: self._submitting | {job.id for job in self._live},
            limit=self.config.max_jobs,
            every=self.config.start_seconds,
            keep=self.config.ledger_days * DAY_SECONDS,
            recovery=recovery,
        )
        self._submitter = JobSubmitter(
            self.config,
            self.wallet,
            self._coordinator,
            self._ledger,
            self._reconciler,
            self._clock,
            self._random,
            self._submitting,
            KeySessions(self._random),
        )
        audits = MarketAudits(
            self.submit, self._coordinator, self._ledger, self.info, now=self._now, fetch_evidence=self.fetch_evidence
        )
        report = self._coordinator.report if self.config.audits.report else None
        self._audits = JobAudits.of(self.config, self.wallet, audits, self._ledger, report, now=self._now, random=self._random)

    async def close(self) -> None:
        """Does what leaving does: cancels the jobs that still run."""
        try:
            await self.drain(0)
            await self._audits.auditor.close()
            await self._reconciler.close(self.config.cancel_seconds)
            if self._log_watch is not None:
                await self._log_watch.close()
                self._log_watch = None
        finally:
            await self._opened.aclose()

    async def drain(self, seconds: float) -> None:
        """Accepts no more jobs, waits up to `seconds` for the running ones, then cancels them and waits for their receipts."""
        self._draining = True
        self._turns.close()
        if self._live:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._idle.wait()
        await asyncio.gather(*(job.cancel() for job in list(self._live)), return_exceptions=True)

    async def info(self) -> CoordinatorInfo:
        """The coordinator's identity and deployment, read once. Raises Refusal if the config requires others."""
        if self._info is None:
            async with self._info_lock:
                if self._info is None:
                    info = await self._coordinator.info()
                    self._pin.check(info, self.config.max_fee_bps)
                    self._reconciler.start()
                    self._info = info
                return self._info
        return self._info

    async def _fee_changed(self) -> bool:
        """Returns whether the coordinator's fee differs from the fee in orders so far; further orders allow the new fee.

        Raises Refusal if the new fee is above max_fee_bps.
        """
        before, now = await self.info(), await self._coordinator.info()
        if before.fee_bps == now.fee_bps or replace(now, fee_bps=before.fee_bps) != before:
            return False
        self._pin.check(now, self.config.max_fee_bps)
        self._info = now
        return True

    async def _open_context(self) -> tuple[CoordinatorInfo, JobContext]:
        info = await self.info()
        if self._log_watch is None:
            folder = self.config.ledger_path(self.address).with_suffix(".match-log")
            self._log_watch = LogWatch(info.domain, info.coordinator, folder, self._coordinator.log_proof, now=self._now)
        if self._job_context is None:
            self._job_context = JobContext(
                config=self.config,
                coordinator=self._coordinator,
                ledger=self._ledger,
                reconciler=self._reconciler,
                domain=info.domain,
                now=self._now,
                on_answer=self._answer_began,
                on_finished=self._job_finished,
                read_elsewhere=lambda job: any(other is not job and other.id == job.id for other in self._live),
                proof_folder=ProofStore.of(self.config),
                auditor=self._auditor,
            )
        return info, self._job_context

    def _answer_began(self, job: Job) -> None:
        if job.trace is not None:
            job.trace.first_output()
        if not job.reads_whole:  # else it ends in the same moment
            self._note_holder(job)

    def _note_holder(self, job: Job) -> None:
        """Records that the provider of an answer has read the request."""
        if job.provider is not None and job.head is not None and job.head.status == HTTPStatus.OK:
            self._affinity.begin(job.tags, job.provider)

    def _job_finished(self, job: Job) -> None:
        self._live.discard(job)
        trace_ended(job)
        self._turns.job_ended()
        if not self._live:
            self._idle.set()
        if self._log_watch is not None:
            for match, order in matches_of(job):
                self._log_watch.add_match(match, order)
            self._log_watch.add_head(b"" if job.head is None else job.head.log_head)
        self._audits.finished(job)
        if job.disputed:
            self._shortlists.forget()
        if job.receipt is not None and job.receipt_accepted:
            self._affinity.end(job.tags, job.receipt.message)
        elif job.receipt_outstanding:
            self._note_holder(job)
        elif job.provider is not None:
            self._affinity.forget(job.tags, job.provider)

    async def _shortlist_context(self) -> tuple[Domain, Iterable[Address]]:
        domain = (await self.info()).domain
        excluded = await self._ledger.excluded(domain, self._now())
        if excluded and (owing := excluded.keys() - await self._ledger.blocked(domain)):
            self._reconciler.recover_tabs(sorted(owing))  # their receipts may have come meanwhile
        return domain, excluded

    async def _stake_of(self, provider: Address) -> int | None:
        return None if self._onchain is None else await self._onchain.stake(provider)

    # Reading the market

    async def models(self) -> list[ModelOffer]:
        """The models on offer, as the coordinator lists them."""
        return await self._coordinator.models()

    async def shortlist(
        self, model: str, *, route: str = CHAT, priority: str | None = None, **choice: Unpack[ProviderCriteria]
    ) -> list[Verified[Ask]]:
        """The verified asks that a job would be offered to, best first. The config completes `choice` and `priority`.

        Raises Refusal or Unavailable, whose text says why there are none.
        """
        demand = demand_of(self.config, model, route, choice)
        if priority is not None:
            demand = replace(demand, batch=read_priority(priority, "priority") == BATCH)
        asks, _ = await self._shortlists.get(demand)
        return asks

    async def explain(self, model: str, *, route: str = CHAT, **choice: Unpack[ProviderCriteria]) -> list[AskExplanation]:
        """Every ask for a model, and why a job would not be offered to it. Asks that would get the job come first. Places
        nothing.
        """
        demand = demand_of(self.config, model, route, choice)
        excluded = await self._ledger.excluded((await self.info()).domain, self._now())
        listed = await self._coordinator.explain(demand.to_json(self.address))
        return explain_asks(listed, demand, excluded, self._now())

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
        wait: int | None = None,
        hedge_after: float | None = None,
        priority: str | None = None,
        content_type: str = JSON,
        accepts_less: bool = False,
        share_prompt: bool | None = None,
        private: bool = False,
        **choice: Unpack[ProviderCriteria],
    ) -> Job:
        """Seals, signs and posts a request to an OpenAI route such as /v1/chat/completions. Returns once the job is admitted.

        `body`: bytes reach the engine unchanged. `model` and `models`: the body must name this model, or one of these.
        `max_cost`: the most that the job may cost, in base units; the config's budgets, also that of the workload `label`, limit
        it too. `keep`: the job has a `proof` at its end. `key`: an idempotency key; a job with one survives a lost connection and
        a restart of this process, and the same request with the same key returns that job. `affinity`: names the conversation,
        which else is recognised by its beginning; its requests stay with the provider that has it in its cache. `wait`: seconds
        that the job may wait for a free slot (None: the config's `wait_seconds`). `hedge_after`: seconds without output after
        which a second provider may get the job too, of which one is paid; 0 for never (None: as configured). `priority`: "batch"
        waits behind "interactive" (None: as configured). `accepts_less`: less output may be ordered than the body's
        limit, if no provider sells as much. `share_prompt`: whether audits may show the request to other providers, as far as
        nothing else forbids it (None: as configured); a `private` one they may not. Raises TallyError, after which nothing is
        owed except for an earlier job of the same key.
        """
        raw = body if isinstance(body, bytes) else dump_lenient(dict(body))
        if len(raw) > self.config.max_body_bytes:
            raise Refusal(
                Code.BODY_TOO_LARGE,
                f"request body: expected at most {self.config.max_body_bytes} bytes (max_body_bytes), got {len(raw)}",
            )
        label = self.config.label if label is None else read_text(label, "label", MAX_LABEL)
        request = ApiRequest.of(path, raw, content_type, label, accepts_less=accepts_less)
        summary = request.summary
        if model is not None and model != summary.model:
            raise BadMessage(f"model: expected {model!r} in the body, got {summary.model!r}")
        if models and summary.model not in models:
            text = f"model: expected one of those allowed here ({', '.join(sorted(models))[:500]}), got {summary.model!r}"
            raise Refusal(Code.UNKNOWN_MODEL, text)
        self._check_room()
        batch = self.config.priority == BATCH if priority is None else read_priority(priority, "priority") == BATCH
        demand = self._demands.of(summary, path, choice)
        demand = demand if demand.batch is batch else replace(demand, batch=batch)
        limit = smallest_limit(self.config.max_cost, max_cost)
        seconds = self.config.wait_seconds if wait is None else read_count(wait, "wait", high=MAX_WAIT_SECONDS)
        late = self.config.hedge_after if hedge_after is None else read_hedge_after(hedge_after, "hedge_after")
        consent = self._audits.consent(label, share=share_prompt, private=private) if self._audits.keeps(request) else NO_CONSENT
        trace = self._begin_trace(request)
        options = _JobOptions(
            None if limit is None else Amount(limit), keep, None, affinity, seconds, late, batch, consent, trace
        )
        if trace is None:
            return await self._submit_once(request, demand, options, key)
        try:
            return await self._submit_once(request, demand, options, key)
        except BaseException as error:
            trace.refused(error)
            raise

    def _begin_trace(self, request: ApiRequest) -> JobTrace | None:
        if self._tracer is None:
            return None
        parts, settings = urlsplit(self.config.coordinator), self.config.tracing
        server, clock = (parts.hostname or "", parts.port), time.monotonic
        shares, captures = settings.share_trace_ids, settings.capture_content
        return JobTrace.begin(self._tracer, request, server, clock, shares=shares, captures=captures)

    async def _submit_once(self, request: ApiRequest, demand: Demand, options: _JobOptions, key: str | None) -> Job:
        """Submits a job, or resumes that of an idempotency key."""
        fingerprint = "" if key is None else idempotency.fingerprint(request.plaintext)
        request = request.with_evidence() if self.config.evidence else request
        if key is None:
            return await self._submit_to_shortlist(request, demand, options)
        async with self._keys.setdefault(idempotency.check_key(key), asyncio.Lock()):
            keyed = await self._ledger.find_key(key)
            if keyed is None:
                options = replace(options, idempotency_key=KeyedRequest(key, fingerprint))
                return await self._submit_to_shortlist(request, demand, options)
            idempotency.check_same(keyed, fingerprint)
            info, context = await self._open_context()
            kept = self._bytes_to_keep(request, options)
            job = await resume_job(context, info.coordinator, keyed, request, keep_bytes=kept)
            self._prepare_audit(job, request, options)
            if options.trace is not None:
                job.trace = options.trace
                options.trace.submitted(job.id)
            self._live.add(job)
            return job

    def _check_room(self) -> None:
        """Raises Unavailable if this client takes no further job."""
        if self._draining:
            raise Unavailable(Code.SHUTTING_DOWN, "this client is stopping", fault=Fault.CLIENT)
        if len(self._live) >= self.config.max_jobs:
            text = f"this client already runs {len(self._live)} jobs (max_jobs); send the request again later"
            raise Unavailable(Code.CLIENT_BUSY, text, fault=Fault.CLIENT)

    async def _submit_to_shortlist(self, request: ApiRequest, demand: Demand, options: _JobOptions) -> Job:
        """Submits to the shortlist of a demand as soon as the coordinator takes more of this client.

        It submits once more if a replica of the coordinator was lost meanwhile.
        """

        async def submit(wait: int) -> Job:
            self._check_room()
            waiting = options if wait == options.wait else replace(options, wait=wait)
            return await self._submit_to_one(request, demand, waiting)

        return await self._turns.take(submit, options.wait)

    async def _submit_to_one(self, request: ApiRequest, demand: Demand, options: _JobOptions) -> Job:
        try:
            job = await self._submit_to_current(request, demand, options)
        except ReplicaLost:
            return await self._submit_to_current(request, demand, options)
        if options.idempotency_key is None and self._coordinator.replicas.has_several:
            job.resubmit = partial(self._resubmit, request, demand, options)
        return job

    async def _resubmit(self, request: ApiRequest, demand: Demand, options: _JobOptions, job: Job) -> Job:
        """Submits the request of a job anew that did not begin. The job takes the place of the new one, which may wait."""
        self._shortlists.forget(demand)
        other = await self._submit_to_current(request, demand, options)
        if not job.done:
            self._live.discard(other)
        return other

    async def _submit_to_current(self, request: ApiRequest, demand: Demand, options: _JobOptions) -> Job:
        """Submits to the shortlist of a demand, and once more with a fresh shortlist or fee if either was out of date.

        A job does not wait for the providers of a cached shortlist: others may have free slots meanwhile.
        """
        with self._shortlists.choosing(demand.model):
            asks, cached = await self._shortlists.get(demand)
            try:
                return await self._submit_to(request, asks, demand, options, 0 if cached else options.wait)
            except Refusal as error:
                if error.code is not Code.ORDER_TERMS or not await self._fee_changed():
                    raise
                asks, _ = await self._shortlists.get(demand)
            except ReplicaLost:
                raise
            except Unavailable as error:
                self._shortlists.forget(demand)
                if not cached or error.code not in _STALE_SHORTLIST:
                    raise
                asks = await self._shortlists.fresh(demand)
            return await self._submit_to(request, asks, demand, options, options.wait)

    async def _submit_to(
        self, request: ApiRequest, asks: Sequence[Verified[Ask]], demand: Demand, options: _JobOptions, wait: int
    ) -> Job:
        began = asyncio.get_running_loop().time()
        info, context = await self._open_context()
        if self._log_watch is not None and options.idempotency_key is None:  # one with a key may be sealed again, the same
            request = request.with_log_head(self._log_watch.packed_head)
        tags = () if demand.ranked else self._affinity.tags(request, options.affinity)
        asks, holder = await self._affinity.arrange(tags, asks, partial(self._shortlists.of_provider, demand))
        asks = asks[: self.config.shortlist_size]
        await self._reconciler.recovery.recover_unknown(ask.message.provider for ask in asks)
        trace = options.trace
        if trace is not None:
            trace.submitting(len(asks))
        submitted = await self._submitter.submit(
            info,
            request,
            asks,
            options.max_cost,
            keep_bytes=self._bytes_to_keep(request, options),
            idempotency_key=options.idempotency_key,
            ranked=demand.ranked,
            wait=wait,
            hedge_after=options.hedge_after,
            batch=options.batch,
            hints=ranking_hints(demand, holder),
            trace=None if trace is None else trace.shared_context,
        )
        keyed = options.idempotency_key is not None
        job = Job(context, submitted.response, submitted.stream, request, keyed=keyed, began=began)
        job.tags, job.asks, job.trace = tags, asks, trace
        if trace is not None:
            trace.submitted(job.id)
        self._prepare_audit(job, request, options)
        job.further_orders = partial(self._submitter.further_orders, info, request, demand, submitted.response, wait)
        if self._coordinator.replicas.has_several:
            job.send_again = submitted.send_again
        self._live.add(job)
        return job

    def _prepare_audit(self, job: Job, request: ApiRequest, options: _JobOptions) -> None:
        keeps = self._audits.keeps(request)
        if keeps:
            job.audit_consent = options.consent
        if (keeps or options.trace is not None) and not self._gives_proof(request, options.keep):
            keep_for_audit(job)

    def _gives_proof(self, request: ApiRequest, keep: bool) -> bool:
        counted = self._auditor.counts(request.summary.model, request.head.path)
        return keep or counted or self.config.proof_folder is not None

    def _bytes_to_keep(self, request: ApiRequest, options: _JobOptions) -> int:
        """Bytes of the answer to keep in memory, for its proof, its token audit, an audit or its span; 0 if none is wanted."""
        if self._gives_proof(request, options.keep):
            return self.config.max_answer_bytes
        captured = 0 if options.trace is None else options.trace.keep_bytes
        return max(captured, MAX_AUDITED_BYTES if self._audits.keeps(request) else 0)

    # Reading the ledger

    async def find(self, job: JobId) -> KnownJob | None:
        """A job from this wallet's ledger; None if it has no such job."""
        return await self._ledger.find_job(job)

    async def tab(self, provider: str) -> Tab:
        """The tab with one provider: accepted cost, open caps and highest signed cap, in base units."""
        info = await self.info()
        return await self._ledger.tab(info.domain, parse_address(provider), self._now())

    async def _possible_cost(self, job: JobId) -> Amount:
        return await maintenance_of(self).possible_cost(job)

    async def evidence(self) -> list[Evidence]:
        """The dishonest receipts in the ledger, kept for third parties."""
        return await self._ledger.evidence()


def tracer_of(market: Market) -> Tracer | None:
    """What records the jobs of a market; None if nothing does."""
    return market._tracer  # noqa: SLF001 - part of the same class in all but name


def maintenance_of(market: Market) -> Maintenance:
    """The maintenance of an open market's wallet."""
    return Maintenance(market.config, market._ledger, market._onchain, market.info, market._clock)  # noqa: SLF001 - part of the same class in all but name


def audits_of(market: Market) -> JobAudits:
    """The audits of an open market's wallet."""
    return market._audits  # noqa: SLF001 - part of the same class in all but name


def audit_counts(market: Market) -> Mapping[str, int]:
    """The audits that a market ended, by outcome; none before it was opened."""
    audits = getattr(market, "_audits", None)
    return {} if audits is None else audits.auditor.counts


def seal_reports(market: Market, seal: SealReport) -> None:
    """Seals the reports of an open market's wallet as those of the coordinator's own audits."""
    market._coordinator.seal = seal  # noqa: SLF001 - part of the same class in all but name
