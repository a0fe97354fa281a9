"""The audits of one wallet: keeps jobs, draws some of them in secret, and audits those in the background, within a budget.

A job pays for none of it: `offer` appends to a list. What was drawn is in the file within a second, so a crash loses at most what
came in that second. One process of a wallet audits at a time; the others leave it what they drew.
"""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import structlog

from tallystick.client.audits.auditability import KEPT_ROUTES, as_chat, can_be_audited, needs_no_referee, shape_of
from tallystick.client.audits.conduct import Conclusion, Conductor, NoReferee
from tallystick.client.audits.consent_file import read_answer
from tallystick.client.audits.consequences import Consequences
from tallystick.client.audits.kept_job import KeptJob
from tallystick.client.audits.kept_jobs import KeptJobs
from tallystick.client.audits.planning import MAX_RATE, draw, is_drawn, may_show
from tallystick.client.audits.records import KnownAudit, NewAudit
from tallystick.client.audits.referees import AuditMarket
from tallystick.client.audits.report_queue import ReportQueue, SendReport
from tallystick.client.audits.schema import AuditKind, AuditState, Origin
from tallystick.client.audits.store import AuditStore
from tallystick.client.audits.subject import Subject, is_unverifiable
from tallystick.client.audits.threshold_table import ThresholdTable
from tallystick.client.config import MIB, ClientConfig
from tallystick.client.ledger.audit_spending import AUDIT_LABEL
from tallystick.client.ledger.ledger import Ledger
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.types import Address, Amount, JobId, format_amount
from tallystick.runtime.database_url import sqlite_url
from tallystick.runtime.single_instance import InstanceLock, instance_lock

log = structlog.get_logger()
MAX_DRAWN: Final = 256
"""Drawn jobs that wait for the file."""
MAX_PACKED: Final = 256 << 10
"""Bytes of a job that is audited itself, since a thousand of them may wait. A longer one is audited by a made-up request."""
SYNTHETIC_SECONDS: Final = 600
"""A made-up request is placed within this time, at random."""
AUDIT_SECONDS: Final = 1_800
"""The longest that one audit may take."""
BUDGET_DAYS: Final = 30
WORK_SECONDS: Final = 2.0
"""How long draws gather before they are recorded: each visit to the file costs as much as several jobs."""
IDLE_SECONDS: Final = 30.0
"""How often the auditor looks for audits that have become due."""
RETRY_SECONDS: Final = 120
MAX_ATTEMPTS: Final = 6
SCORERS_SECONDS: Final = 60
MAX_MODELS: Final = 256
TRACE_FRAMES: Final = 12
MAX_DUE: Final = 64
"""Audits of one visit to the file."""
ASKED_SECONDS: Final = 3_600
"""After which an audit that a person asked for is done in the background, if that person's process did not end it."""


OUTCOMES: Final = ("pass", "suspect", "inconclusive", "unverifiable", "failed")
"""How audits of providers end. Failed: without a verdict, for want of a referee or by an error."""


@dataclass(frozen=True, slots=True)
class AuditorPorts:
    """What an auditor needs beside its files. `coordinator` returns the coordinator's account."""

    market: AuditMarket
    ledger: Ledger
    coordinator: Callable[[], Awaitable[Address]]
    send_report: SendReport | None
    now: Callable[[], int]
    random: Callable[[int], bytes]


class Auditor:
    """The auditor of one wallet. It does nothing until a job is offered, or `resume` is called; call `close` at the end."""

    def __init__(self, config: ClientConfig, wallet: Signer, ports: AuditorPorts) -> None:
        """Raises BadMessage for thresholds that cannot be read."""
        self._config, self._settings, self._wallet, self._ports = config, config.audits, wallet, ports
        self.thresholds = ThresholdTable.load(config.audits.thresholds)
        limit = config.audits.keep_mib * MIB if config.audits.enabled else 0
        folder = config.kept_jobs_path(wallet.address)
        self.kept_jobs = KeptJobs(folder, limit=limit, hours=config.audits.keep_hours, now=ports.now)
        self._drawn: deque[tuple[KeptJob, float]] = deque()
        self._wake = asyncio.Event()
        self._working: asyncio.Task[None] | None = None
        self._opening, self._busy = asyncio.Lock(), asyncio.Lock()
        self._store: AuditStore | None = None
        self._lock: InstanceLock | None = None
        self.counts = Counter[str]()
        """Audits that this process ended, by outcome (see OUTCOMES)."""
        self._scorers: dict[str, tuple[int, frozenset[Address]]] = {}
        """Who sells scoring of a model, and until when this is believed (Unix seconds)."""

    # The path of a job

    def offer(self, kept: KeptJob) -> None:
        """Keeps a job that ended with an honest receipt, and perhaps draws it for an audit. Never waits, never raises."""
        self.kept_jobs.add(kept)
        number = draw(self._ports.random)
        if number < MAX_RATE and self._settings.budget_percent > 0 and len(self._drawn) < MAX_DRAWN:
            self._drawn.append((kept, number))
            self.resume()

    def resume(self) -> None:
        """Goes on with audits that wait, also those of an earlier process."""
        if not self._settings.enabled:
            return
        self._wake.set()
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work(), name="auditor")

    async def close(self) -> None:
        """Writes what was kept and drawn, and stops. An audit in progress is done anew by the next process."""
        if self._working is not None:
            self._working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._working
        await self.kept_jobs.flush()
        if self._drawn:
            with contextlib.suppress(TallyError):
                await self._take_drawn()
        if self._lock is not None:
            await self._lock.release()
        if self._store is not None:
            await self._store.close()

    # The background

    async def store(self) -> AuditStore:
        """The file of audits, which is opened when it is first needed. Raises Unavailable."""
        async with self._opening:
            if self._store is None:
                self._store = await AuditStore.open(self._config.audits_path(self._wallet.address))
            return self._store

    async def _work(self) -> None:
        while True:
            self._wake.clear()
            try:
                await asyncio.sleep(WORK_SECONDS)  # so that many draws are one visit to the file
                await self.work_once()
            except TallyError as error:
                log.info("audits have to wait", reason=str(error))
            except Exception as error:  # noqa: BLE001 - logged, and the auditor goes on
                _log_bug("a bug in the auditor", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IDLE_SECONDS):
                    await self._wake.wait()

    async def work_once(self) -> int:
        """Records what was drawn, and does every audit that is due and within the budget. Returns how many it ended."""
        async with self._busy:
            await self._take_drawn()
            return await self._do_due() if await self._is_alone() else 0

    async def _do_due(self) -> int:
        store, now, ended = await self.store(), self._ports.now(), 0
        await store.prune(now, contents_before=now - 3_600 * self._settings.keep_hours)
        await self.kept_jobs.prune()
        conductor = await self.conductor()
        for audit in await store.due(now, MAX_DUE):
            ended += await self._conduct(conductor, audit)
            await self._take_drawn()
        if (queue := await self._reports()) is not None:
            await queue.send_due()
        return ended

    async def _is_alone(self) -> bool:
        """Whether this process may audit: no other one of this wallet does."""
        if self._lock is not None:
            return True
        lock = instance_lock(sqlite_url(self._config.audits_path(self._wallet.address)), "auditor", "ledger_file")
        try:
            await lock.acquire()
        except Unavailable as error:
            if error.code is not Code.ALREADY_RUNNING:
                raise
            return False
        self._lock = lock
        return True

    async def _take_drawn(self) -> None:
        """Plans audits of drawn jobs. Raises Unavailable for a file that cannot be used now: then they go on waiting."""
        while self._drawn:
            kept, number = self._drawn[0]
            try:
                await self._record_draw(kept, number)
            except Unavailable:
                raise
            except BadMessage as error:
                log.info("a drawn job cannot be audited", job=kept.job.hex(), reason=str(error))
            except Exception as error:  # noqa: BLE001 - logged; it concerns this job alone
                _log_bug("a bug: a drawn job cannot be audited", error, job=kept.job.hex())
            self._drawn.popleft()

    async def _record_draw(self, kept: KeptJob, number: float) -> None:
        """Plans the audit of a drawn job, if its provider's rate says so and somebody may judge it."""
        if not await self._has_referee(kept):
            return
        store = await self.store()
        integrity = await store.integrity(kept.provider, kept.model, kept.precision)
        if not is_drawn(number, integrity, await self._ports.ledger.jobs_of(kept.provider)):
            return
        kind, packed, job, delay = AuditKind.JOB, kept.pack() if self._is_auditable(kept) else b"", kept.job.hex(), 0
        if not 0 < len(packed) <= MAX_PACKED:
            if not self._settings.synthetic or not can_be_audited(as_chat(kept)[1]):
                return
            kind, packed, job = AuditKind.SYNTHETIC, shape_of(kept).pack(), ""
            delay = int(draw(self._ports.random) * SYNTHETIC_SECONDS)  # after the real request, so that nothing joins the two
        new = NewAudit(kind, Origin.DRAWN, kept.provider, kept.model, kept.precision, job, packed, delay)
        if len(packed) <= MAX_PACKED:
            await store.add(new, self._ports.now())

    async def _has_referee(self, kept: KeptJob) -> bool:
        """Whether anybody scores answers of a model: an engine of the user's own, or another provider than the job's."""
        if any(referee.serves(kept.model, kept.precision) for referee in self._config.referees):
            return True
        until, providers = self._scorers.get(kept.model, (0, frozenset()))
        if until <= self._ports.now():
            try:
                asks = await self._ports.market.scoring_asks(kept.model)
            except TallyError:
                asks = ()
            providers = frozenset(ask.message.provider for ask in asks)
            if len(self._scorers) >= MAX_MODELS:
                self._scorers.clear()
            self._scorers[kept.model] = self._ports.now() + SCORERS_SECONDS, providers
        return bool(providers - {kept.provider})

    def _is_auditable(self, kept: KeptJob) -> bool:
        """Whether a drawn job can be audited itself. Otherwise a request of its shape is: no form of an answer is exempt."""
        own = any(referee.serves(kept.model, kept.precision) for referee in self._config.referees)
        try:
            Subject.of(kept)
        except BadMessage as error:
            return is_unverifiable(error)  # nobody has to see it
        return own or may_show(kept.consent, synthetic=False)

    async def _why_it_waits(self, audit: KnownAudit) -> str:
        """Why an audit waits: the budget of audits is used up, or one of the user's own nearly is. Empty if it need not."""
        if audit.origin is Origin.ASKED:
            return ""
        now = self._ports.now()
        for budget in self._config.budgets:
            if budget.covers(AUDIT_LABEL):
                status = await self._ports.ledger.budget_status(budget, now)
                if status.percent >= budget.warn_percent:
                    return "waits: one of the [[budgets]] is nearly used up, and jobs come first"
        likely, left = self._likely_cost(audit), max(0, await self.allowance())
        if likely <= left:
            return ""
        amounts = f"about {format_amount(Amount(likely))} dollars, and {format_amount(Amount(left))} are left"
        return f"waits for the budget of audits ([audits] budget_percent): it costs {amounts}"

    async def allowance(self) -> int:
        """What audits may cost now, in base units: their share of the spending on jobs, less what they cost."""
        store, since = await self.store(), self._ports.now() - BUDGET_DAYS * 86_400
        share = int(await self._ports.ledger.spent_on_jobs(since)) * round(self._settings.budget_percent * 100) // 10_000
        return share - int(await store.spent_since(since))

    def _likely_cost(self, audit: KnownAudit) -> int:
        """About what an audit costs: a referee reads what the job read and wrote; a made-up request costs as much as a job."""
        own = any(referee.serves(audit.model, audit.precision) for referee in self._config.referees)
        job = 0 if audit.kept is None else int(KeptJob.unpack(audit.kept).proof.receipt.message.cost)
        scoring = 0 if (own and not audit.kind.planted) or needs_no_referee(audit) else job
        return scoring + (job if audit.kind is AuditKind.SYNTHETIC else 0)

    async def _conduct(self, conductor: Conductor, audit: KnownAudit) -> bool:
        """Does one audit if it may cost what it will. Returns whether it ended; otherwise it waits, is postponed, or failed.

        Whatever goes wrong with it, the others go on.
        """
        store, now = await self.store(), self._ports.now()
        try:
            if why := await self._why_it_waits(audit):
                await store.note(audit.id, why)
                return False
            async with asyncio.timeout(AUDIT_SECONDS):
                await conductor.conduct(audit)
        except BadMessage as error:
            await self._fail(audit, str(error))
        except (TallyError, TimeoutError) as error:
            most = 3 if isinstance(error, NoReferee) else MAX_ATTEMPTS
            if audit.attempts + 1 >= most:
                await self._fail(audit, str(error) or "it took too long")
            else:
                await store.postpone(audit.id, str(error) or "it took too long", now + RETRY_SECONDS * (1 << audit.attempts))
            return False
        except Exception as error:  # noqa: BLE001 - logged; it concerns this audit alone
            _log_bug("a bug in an audit", error, audit=audit.id)
            await self._fail(audit, f"a bug in this client: {type(error).__name__}: {error}")
        return True

    async def _fail(self, audit: KnownAudit, reason: str) -> None:
        """Ends an audit that has no verdict and gets none."""
        self.counts["failed"] += not audit.kind.planted
        await (await self.store()).fail(audit.id, reason, self._ports.now())

    async def _reports(self) -> ReportQueue | None:
        if self._ports.send_report is None or not self._settings.report:
            return None
        return ReportQueue(await self.store(), self._ports.send_report, self._ports.now)

    async def consequences(self) -> Consequences:
        """What follows from audits."""
        ports = self._ports
        return Consequences(
            wallet=self._wallet,
            store=await self.store(),
            thresholds=self.thresholds,
            folder=self._config.ledger_path(self._wallet.address).parent / "evidence",
            block=ports.ledger.block,
            coordinator=ports.coordinator,
            reports=await self._reports(),
            now=ports.now,
            report_delay=self._settings.report_delay,
            random=ports.random,
        )

    async def conductor(self) -> Conductor:
        """Conducts single audits."""
        return Conductor(
            settings=self._settings,
            own=self._config.referees,
            store=await self.store(),
            market=self._ports.market,
            thresholds=self.thresholds,
            now=self._ports.now,
            random=self._ports.random,
            sharing_forbidden=self._sharing_forbidden(),
            on_conclusion=self._conclude,
        )

    async def _conclude(self, conclusion: Conclusion, kept: KeptJob) -> None:
        self.counts["unverifiable" if conclusion.audit.unverifiable else conclusion.verdict.value] += 1
        await (await self.consequences()).draw(conclusion, kept)

    def _sharing_forbidden(self) -> bool:
        """Whether the user says no now, in the config or else by the answer to `tally start`."""
        if self._settings.share_prompts is not None:
            return not self._settings.share_prompts
        return read_answer(self._config.consent_path(self._wallet.address)) is False

    # By hand

    async def check_unpaid(self, job: JobId) -> KnownAudit | None:
        """The earlier audit of a job, if there is one. Raises Refusal if referees were paid for it, or are being paid now."""
        known = await (await self.store()).find(job)
        if known is None or known.state is AuditState.FAILED or (known.state is AuditState.DONE and not known.cost):
            return known
        if known.state is AuditState.PENDING:
            if known.origin is Origin.DRAWN:  # it waits for its turn, or for the budget
                return known
            text = f"is being audited by another command, as audit {known.id}; to pay for another audit of it now: --again"
        else:
            text = (
                f"was audited before, as audit {known.id}, for {format_amount(known.cost)} dollars: {known.verdict.value}. "
                f"See: tally audit show {known.id}; to pay for another audit of it: --again"
            )
        raise Refusal(Code.BAD_MESSAGE, f"JOB: {job.hex()} {text}", fault=Fault.CLIENT)

    async def audit(self, kept: KeptJob, *, again: bool = False) -> Conclusion:
        """Audits one job now, because a person asked. Raises TallyError that says why it has no verdict.

        `again`: also if referees were paid for an audit of it before.
        """
        try:
            Subject.of(kept)  # fails before anything is paid
        except BadMessage as error:
            if not is_unverifiable(error):
                raise
        earlier = None if again else await self.check_unpaid(kept.job)
        store, now = await self.store(), self._ports.now()
        new = NewAudit(
            AuditKind.JOB,
            Origin.ASKED,
            kept.provider,
            kept.model,
            kept.precision,
            kept.job.hex(),
            kept.pack(),
            ASKED_SECONDS,  # not due before, so that no process in the background does it too
        )
        number = await store.add(new, now)
        audit = None if number is None else await store.get(number)
        if audit is None:
            raise BadMessage(f"job {kept.job.hex()}: its audit could not be recorded")
        if earlier is not None:
            await store.fail(earlier.id, f"a person asked for this audit before its turn: audit {audit.id}", now)
        try:
            conclusion = await (await self.conductor()).conduct(audit)
        except Exception as error:
            await self._fail(audit, str(error) or type(error).__name__)
            raise
        async with self._busy:
            if (queue := await self._reports()) is not None:
                await queue.send_due()
        if self._settings.report_delay:
            self.resume()  # what waits is sent in its time
        return conclusion

    def auditable(self, path: str) -> bool:
        """Whether answers of a route are kept."""
        return self._settings.keeps_jobs and path in KEPT_ROUTES


def _log_bug(event: str, error: Exception, **values: object) -> None:
    """Logs where an error came from, without the values of variables: those are prompts, and may take a minute to print."""
    log.error(event, **values, traceback="".join(traceback.format_exception(error, limit=-TRACE_FRAMES)))
