"""The market from Python: `async with Market(coordinator, wallet) as market: result = await market.chat(model, messages)`.

Requests are sealed, and orders signed, in this process; only ciphertext and orders leave it. Everything that comes back is
checked against them. The coordinator is trusted with nothing but delay.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, Unpack
from urllib.parse import urlsplit

from tallystick.client.config import BATCH, MAX_LABEL, MAX_WAIT_SECONDS, ClientConfig, read_priority
from tallystick.client.coordinator.access_tokens import AccessTokens
from tallystick.client.coordinator.checked_info import CheckedInfo
from tallystick.client.coordinator.http_client import CoordinatorClient, SealReport
from tallystick.client.coordinator.info import CoordinatorInfo
from tallystick.client.coordinator.model_offers import ModelOffer
from tallystick.client.coordinator.pinning import DeploymentPin
from tallystick.client.jobs.job import Job
from tallystick.client.jobs.job_trace import JobTrace
from tallystick.client.jobs.key_sessions import KeySessions
from tallystick.client.jobs.submit import JobSubmitter
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.queries import KnownJob
from tallystick.client.ledger.spending import DAY_SECONDS
from tallystick.client.openai.requests import ApiRequest, body_bytes
from tallystick.client.orders.tab import Tab
from tallystick.client.receipts.evidence import Evidence
from tallystick.client.receipts.token_audit import TokenAuditor
from tallystick.client.recovery.escrow import PayerEscrow
from tallystick.client.recovery.lost_state import TabRecovery
from tallystick.client.recovery.reconciler import Reconciler
from tallystick.client.sdk.audits import JobAudits, MarketAudits
from tallystick.client.sdk.convenience import ConvenienceMethods
from tallystick.client.sdk.job_followup import JobFollowUp
from tallystick.client.sdk.maintenance import Maintenance
from tallystick.client.sdk.running_jobs import RunningJobs
from tallystick.client.sdk.shortlist_submitter import JobOptions, ShortlistSubmitter
from tallystick.client.selection.affinity import Affinity
from tallystick.client.selection.options import (
    AskExplanation,
    Demands,
    ProviderCriteria,
    demand_of,
    explain_asks,
    read_hedge_after,
    smallest_limit,
)
from tallystick.client.selection.shortlist import Exclusions, ShortlistCache
from tallystick.protocol.eip712 import Domain, Signer, Verified
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.json_members import read_count, read_text
from tallystick.protocol.messages import Ask
from tallystick.protocol.routes import CHAT, JSON
from tallystick.protocol.types import Address, Amount, JobId, parse_address
from tallystick.runtime.log_watch import LogWatch
from tallystick.runtime.plaintext import warn_if_plaintext
from tallystick.tracing.export import application_tracer, exporting
from tallystick.tracing.spans import Tracer


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
        self._checked_info = CheckedInfo(self._coordinator.info, config.max_fee_bps)
        self._onchain: PayerEscrow | None = None
        self._opened = contextlib.AsyncExitStack()
        self._running = RunningJobs(config.max_jobs)

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
        return len(self._running)

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
        pin = DeploymentPin.of(self.config)
        self._running = running = RunningJobs(self.config.max_jobs)
        self._ledger = await Ledger.open(self.config.ledger_path(self.address), self.address, lambda: running.open_count)
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
            live=lambda: running.ids,
            limit=self.config.max_jobs,
            every=self.config.start_seconds,
            keep=self.config.ledger_days * DAY_SECONDS,
            recovery=recovery,
        )
        self._checked_info.require(pin, self._reconciler.start)
        self._open_submitter()

    def _open_submitter(self) -> None:
        running = self._running
        jobs = JobSubmitter(
            self.config,
            self.wallet,
            self._coordinator,
            self._ledger,
            self._reconciler,
            self._clock,
            self._random,
            running.submitting,
            KeySessions(self._random),
        )
        audits = MarketAudits(
            self.submit, self._coordinator, self._ledger, self.info, now=self._now, fetch_evidence=self.fetch_evidence
        )
        report = self._coordinator.report if self.config.audits.report else None
        self._audits = JobAudits.of(self.config, self.wallet, audits, self._ledger, report, now=self._now, random=self._random)
        self._follow_up = JobFollowUp(running, self._affinity, self._shortlists, self._audits, self._open_watch)
        self._submitter = ShortlistSubmitter(
            self.config,
            self._coordinator,
            self._checked_info,
            self._ledger,
            self._reconciler,
            jobs,
            running,
            self._shortlists,
            self._affinity,
            TokenAuditor(self.config),
            self._follow_up,
            self._now,
        )

    def _open_watch(self, info: CoordinatorInfo) -> LogWatch:
        folder = self.config.ledger_path(self.address).with_suffix(".match-log")
        return LogWatch(info.domain, info.coordinator, folder, self._coordinator.log_proof, now=self._now)

    async def close(self) -> None:
        """Does what leaving does: cancels the jobs that still run."""
        try:
            await self.drain(0)
            await self._audits.auditor.close()
            await self._reconciler.close(self.config.cancel_seconds)
            await self._follow_up.close()
        finally:
            await self._opened.aclose()

    async def drain(self, seconds: float) -> None:
        """Accepts no more jobs, waits up to `seconds` for the running ones, then cancels them and waits for their receipts."""
        await self._running.drain(seconds)

    @property
    def _draining(self) -> bool:
        return self._running.draining

    async def info(self) -> CoordinatorInfo:
        """The coordinator's identity and deployment, read once. Raises Refusal if the config requires others."""
        return await self._checked_info.get()

    async def _shortlist_context(self) -> tuple[Domain, Exclusions]:
        domain = (await self.info()).domain
        excluded = frozenset(await self._ledger.excluded(domain, self._now()))
        owing = excluded and excluded - (await self._ledger.blocked(domain)).keys()
        if owing:
            self._reconciler.recover_tabs(sorted(owing))  # their receipts may have come meanwhile
        return domain, Exclusions(excluded, owing)

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
        raw = body_bytes(body)
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
        self._running.check_room()
        batch = self.config.priority == BATCH if priority is None else read_priority(priority, "priority") == BATCH
        demand = self._demands.of(summary, path, choice)
        demand = demand if demand.batch is batch else replace(demand, batch=batch)
        limit = smallest_limit(self.config.max_cost, max_cost)
        seconds = self.config.wait_seconds if wait is None else read_count(wait, "wait", high=MAX_WAIT_SECONDS)
        late = self.config.hedge_after if hedge_after is None else read_hedge_after(hedge_after, "hedge_after")
        consent = self._audits.consent(label, share=share_prompt, private=private) if self._audits.keeps(request) else None
        trace = self._begin_trace(request)
        options = JobOptions(None if limit is None else Amount(limit), keep, None, affinity, seconds, late, batch, consent, trace)
        if trace is None:
            return Job(await self._submitter.submit(request, demand, options, key))
        try:
            return Job(await self._submitter.submit(request, demand, options, key))
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
