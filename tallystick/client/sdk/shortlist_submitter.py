"""Submits requests to the asks of their shortlist, again where that is out of date, and resumes those of an idempotency key."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from weakref import WeakValueDictionary

from tallystick.client.audit_settings import PromptConsent
from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.checked_info import CheckedInfo
from tallystick.client.coordinator.http_client import CoordinatorClient
from tallystick.client.coordinator.info import CoordinatorInfo
from tallystick.client.coordinator.transport import ConnectionLost
from tallystick.client.jobs.job_trace import JobTrace
from tallystick.client.jobs.placed_job import PlacedJob
from tallystick.client.jobs.resume import KeyFreed, resume_job
from tallystick.client.jobs.running_job import JobContext, RunningJob
from tallystick.client.jobs.submit import JobSubmitter, KeyedRequest, KeyTaken, ReplicaLost
from tallystick.client.ledger import idempotency
from tallystick.client.ledger.idempotency import IdempotencyKey
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.openai.requests import ApiRequest
from tallystick.client.receipts.file_store import ProofStore
from tallystick.client.receipts.token_audit import TokenAuditor
from tallystick.client.recovery.reconciler import Reconciler
from tallystick.client.sdk.job_followup import JobFollowUp
from tallystick.client.sdk.running_jobs import RunningJobs
from tallystick.client.selection.affinity import Affinity, ranking_hints
from tallystick.client.selection.shortlist import ShortlistCache
from tallystick.protocol.criteria import Demand
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import Code, Refusal, Unavailable
from tallystick.protocol.messages import Ask
from tallystick.protocol.types import Amount

MAX_AUDITED_BYTES = 1 << 20
"""Bytes of the longest answer that is kept for audits."""
KEY_TRIES = 4
"""How often one request looks up the job of its idempotency key."""
_STALE_SHORTLIST = (Code.NO_PROVIDER, Code.NODE_BUSY)
"""Refusals after which a fresh shortlist may succeed."""


@dataclass(frozen=True, slots=True)
class JobOptions:
    """Options of one job beside its request; see `Market.submit`. `max_cost` is in base units, `wait` in seconds. `hedge_after`:
    seconds; 0 for never. `consent`: who may see it because of an audit; None for a job that is not kept for audits.
    """

    max_cost: Amount | None
    keep: bool
    idempotency_key: KeyedRequest | None
    affinity: str | None
    wait: int
    hedge_after: float
    batch: bool
    consent: PromptConsent | None
    trace: JobTrace | None


@dataclass(slots=True)
class ShortlistSubmitter:
    """Submits the requests of an open market. `now` is Unix time in seconds."""

    config: ClientConfig
    coordinator: CoordinatorClient
    info: CheckedInfo
    ledger: Ledger
    reconciler: Reconciler
    jobs: JobSubmitter
    running: RunningJobs
    shortlists: ShortlistCache
    affinity: Affinity
    auditor: TokenAuditor
    follow_up: JobFollowUp
    now: Callable[[], int]
    _context: JobContext | None = None
    _keys: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)
    """Locks of the idempotency keys whose requests are being submitted."""

    async def submit(self, request: ApiRequest, demand: Demand, options: JobOptions, key: str | None) -> RunningJob:
        """Submits a job, or resumes that of an idempotency key."""
        fingerprint = "" if key is None else idempotency.fingerprint(request.plaintext)
        request = request.with_evidence() if self.config.evidence else request
        if key is None:
            return await self._submit_to_shortlist(request, demand, options)
        keyed = KeyedRequest(idempotency.check_key(key), fingerprint)
        options = replace(options, idempotency_key=keyed)
        submit = partial(self._submit_to_shortlist, request, demand, options)
        job = await self._submit_keyed(keyed, submit, request, options)
        if self.coordinator.replicas.has_several:
            job.resubmit = partial(self._resubmit_keyed, keyed, request, demand, options)
        return job

    async def _submit_keyed(
        self, key: KeyedRequest, submit: Callable[[], Awaitable[RunningJob]], request: ApiRequest, options: JobOptions
    ) -> RunningJob:
        """Resumes the job of an idempotency key, or submits one for a key without. Requests of one key go one after the other.

        A key that is another job's by now, or none's any more, or whose replica was lost meanwhile, is looked up again.
        """
        async with self._keys.setdefault(key.key, asyncio.Lock()):
            tries = 1
            while True:
                keyed = await self.ledger.find_key(key.key)
                try:
                    return await (submit() if keyed is None else self._resume(keyed, key, request, options))
                except (KeyTaken, KeyFreed, ConnectionLost) as error:
                    if tries == KEY_TRIES or (isinstance(error, ConnectionLost) and not self.coordinator.replicas.has_several):
                        raise
                tries += 1

    async def _resume(self, keyed: IdempotencyKey, key: KeyedRequest, request: ApiRequest, options: JobOptions) -> RunningJob:
        idempotency.check_same(keyed, key.fingerprint)
        info, context = await self._open_context()
        job = await resume_job(context, info.coordinator, keyed, request, keep_bytes=self._bytes_to_keep(request, options))
        self._prepare_audit(job, request, options)
        job.trace = options.trace
        if job.trace is not None:
            job.trace.submitted(job.id)
        self.running.add(job)
        return job

    async def _open_context(self) -> tuple[CoordinatorInfo, JobContext]:
        info = await self.info.get()
        self.follow_up.watch_log(info)
        if self._context is None:
            self._context = JobContext(
                config=self.config,
                coordinator=self.coordinator,
                ledger=self.ledger,
                reconciler=self.reconciler,
                domain=info.domain,
                now=self.now,
                on_answer=self.follow_up.answer_began,
                on_finished=self.follow_up.job_finished,
                read_elsewhere=self.running.read_elsewhere,
                proof_folder=ProofStore.of(self.config),
                auditor=self.auditor,
            )
        return info, self._context

    async def _submit_to_shortlist(self, request: ApiRequest, demand: Demand, options: JobOptions) -> RunningJob:
        """Submits to the shortlist of a demand as soon as the coordinator takes more of this client.

        It submits once more if a replica of the coordinator was lost meanwhile.
        """

        async def submit(wait: int) -> RunningJob:
            self.running.check_room()
            waiting = options if wait == options.wait else replace(options, wait=wait)
            return await self._submit_to_one(request, demand, waiting)

        return await self.running.turns.take(submit, options.wait)

    async def _submit_to_one(self, request: ApiRequest, demand: Demand, options: JobOptions) -> RunningJob:
        try:
            job = await self._submit_to_current(request, demand, options)
        except ReplicaLost:
            return await self._submit_to_current(request, demand, options)
        if options.idempotency_key is None and self.coordinator.replicas.has_several:
            job.resubmit = partial(self._resubmit, request, demand, options)
        return job

    async def _resubmit(self, request: ApiRequest, demand: Demand, options: JobOptions, job: RunningJob) -> RunningJob:
        """Submits the request of a job anew that did not begin. The job takes the place of the new one, which may wait."""
        self.shortlists.forget(demand)
        return self._replaced(job, await self._submit_to_current(request, demand, options))

    async def _resubmit_keyed(
        self, key: KeyedRequest, request: ApiRequest, demand: Demand, options: JobOptions, job: RunningJob
    ) -> RunningJob:
        """The same for a job with an idempotency key, which may go on, or be another one by now."""
        self.shortlists.forget(demand)
        submit = partial(self._submit_to_current, request, demand, options)
        return self._replaced(job, await self._submit_keyed(key, submit, request, options))

    def _replaced(self, job: RunningJob, other: RunningJob) -> RunningJob:
        if not job.done:
            self.running.forget(other)
        return other

    async def _submit_to_current(self, request: ApiRequest, demand: Demand, options: JobOptions) -> RunningJob:
        """Submits to the shortlist of a demand, and once more with a fresh shortlist or fee if either was out of date.

        A job does not wait for the providers of a cached shortlist: others may have free slots meanwhile.
        """
        with self.shortlists.choosing(demand.model):
            asks, cached = await self.shortlists.get(demand)
            try:
                return await self._submit_to(request, asks, demand, options, 0 if cached else options.wait)
            except Refusal as error:
                if error.code is not Code.ORDER_TERMS or not await self.info.fee_changed():
                    raise
                asks, _ = await self.shortlists.get(demand)
            except ReplicaLost:
                raise
            except Unavailable as error:
                self.shortlists.forget(demand)
                if not cached or error.code not in _STALE_SHORTLIST:
                    raise
                asks = await self.shortlists.fresh(demand)
            return await self._submit_to(request, asks, demand, options, options.wait)

    async def _submit_to(
        self, request: ApiRequest, asks: Sequence[Verified[Ask]], demand: Demand, options: JobOptions, wait: int
    ) -> RunningJob:
        began = asyncio.get_running_loop().time()
        info, context = await self._open_context()
        if options.idempotency_key is None:  # one with a key may be sealed again, the same
            request = request.with_log_head(self.follow_up.watch_log(info).packed_head)
        tags = () if demand.ranked else self.affinity.tags(request, options.affinity)
        asks, holder = await self.affinity.arrange(tags, asks, partial(self.shortlists.of_provider, demand))
        asks = asks[: self.config.shortlist_size]
        await self.reconciler.recovery.recover_unknown(ask.message.provider for ask in asks)
        trace = options.trace
        if trace is not None:
            trace.submitting(len(asks))
        submitted = await self.jobs.submit(
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
        placed = PlacedJob(context, submitted.response, submitted.stream, request, keyed=keyed, began=began)
        placed.tags, placed.asks = tags, asks
        placed.further_orders = partial(self.jobs.further_orders, info, request, demand, submitted.response, wait)
        if self.coordinator.replicas.has_several:
            placed.send_again = submitted.send_again
        job = RunningJob(context, placed, request, trace)
        if trace is not None:
            trace.submitted(job.id)
        self._prepare_audit(job, request, options)
        self.running.add(job)
        return job

    def _prepare_audit(self, job: RunningJob, request: ApiRequest, options: JobOptions) -> None:
        job.audit_consent = options.consent
        if (options.consent is not None or options.trace is not None) and not self._gives_proof(request, options.keep):
            job.placed.record.for_audit_only = True

    def _gives_proof(self, request: ApiRequest, keep: bool) -> bool:
        counted = self.auditor.counts(request.summary.model, request.head.path)
        return keep or counted or self.config.proof_folder is not None

    def _bytes_to_keep(self, request: ApiRequest, options: JobOptions) -> int:
        """Bytes of the answer to keep in memory, for its proof, its token audit, an audit or its span; 0 if none is wanted."""
        if self._gives_proof(request, options.keep):
            return self.config.max_answer_bytes
        captured = 0 if options.trace is None else options.trace.keep_bytes
        return max(captured, MAX_AUDITED_BYTES if options.consent is not None else 0)
