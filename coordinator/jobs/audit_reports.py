"""Reports of audits: each is checked against the job that it is about, logged, counted, stored and acknowledged, in this order.

A report needs the receipt of a job that its payer paid here. One job is reported once, and once more if the provider is convicted
over it. An acknowledged report is on disk, with its leaf in the match log. If a process dies between leaf and record, the next
one reads the record out of the log.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import structlog

from coordinator.domain.integrity_records import DAY_SECONDS, IntegrityRecords, ProductKey, RecordChange, effect_of, report_weight
from coordinator.domain.job_aliases import JobAliases
from coordinator.jobs.match_log import MatchLog
from coordinator.jobs.report_store import Finding, ReportDraft, ReportFacts, ReportStore, StoredReport
from coordinator.jobs.shared_store import SharedStore
from coordinator.ports import JobStore, LogStore
from tallystick.protocol.audit_reports import AuditVerdict, CheckedReport, ReportRequest, check_report
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import BadMessage, Code, Fault, PeerError, Refusal, Unavailable, rate_limited
from tallystick.protocol.log_leaves import REPORT, ReportLeaf
from tallystick.protocol.match_log import load_leaf
from tallystick.protocol.merkle import leaf_hash
from tallystick.protocol.messages import Ask, ReportAck
from tallystick.protocol.precisions import precision_class
from tallystick.protocol.types import ZERO_HASH, Address, Hash, JobId
from tallystick.runtime.token_bucket import TokenBucket

log = structlog.get_logger()
REPORTS_PER_SECOND, REPORTS_BURST = 1, 60
"""Reports of one payer: each costs two signature checks, a lookup, and a leaf."""
KEPT_SECONDS = 30 * 86_400
"""How long it is remembered which jobs were reported: longer than a job can be reported."""
RECOVERED_LEAVES = 10_000
"""Leaves before a restart that are searched for reports that were not counted."""
SOURCES = ("payer", "probe")
"""Who audited: a payer, or the coordinator itself."""
REFUSED = ("refused", "")
FindAsk = Callable[[Hash], Ask | None]
"""Returns the ask with this digest while it is listed."""


class AuditReports:
    """See the module's docstring. `now` is Unix time, `tick` a monotonic clock, both in seconds."""

    def __init__(
        self,
        *,
        match_log: MatchLog,
        integrity: IntegrityRecords,
        jobs: JobStore,
        store: ReportStore,
        find_ask: FindAsk,
        now: Callable[[], float],
        tick: Callable[[], float],
        shared: SharedStore | None = None,
    ) -> None:
        """`shared`: what a replica shares with others, which take reports too; None for a lone coordinator."""
        self._match_log, self._integrity, self._jobs, self._store = match_log, integrity, jobs, store
        self._shared, self._next_leaf = shared, 0
        self._find_ask, self._now, self._tick = find_ask, now, tick
        self._rate = TokenBucket(REPORTS_PER_SECOND, REPORTS_BURST)
        self._aliases = JobAliases(match_log.signer.secret)
        self._turn = asyncio.Lock()
        self.counts = Counter[tuple[str, str]]()
        """Reports that this process logged, by verdict and by who audited (see SOURCES); and those that it refused."""
        self._unstored: dict[Finding, tuple[StoredReport, RecordChange]] = {}
        """Reports that are in the log, and that the database did not take yet."""

    async def start(self, log_store: LogStore) -> None:
        """Loads all records, and counts the reports that a former process logged and could not count. Raises Unavailable."""
        records = await self._store.integrity()
        self._integrity.restore(records)
        self._next_leaf = max((record.leaf + 1 for _, record in records), default=0)
        end = self._match_log.epoch
        begin = max([0, end - RECOVERED_LEAVES, *(record.leaf + 1 for _, record in records)])
        for row in await log_store.log_entries(begin, end) if begin < end else []:
            if row.leaf is not None and row.leaf[1] == REPORT:
                leaf = load_leaf(row.leaf)
                if isinstance(leaf, ReportLeaf):
                    await self._recover(leaf, row.number)

    async def refresh(self) -> None:
        """Takes what reports at other replicas changed. Does nothing for a lone coordinator. Raises Unavailable."""
        if self._shared is not None:
            changed = await self._shared.integrity_since(self._next_leaf)
            self._integrity.restore(changed)
            self._next_leaf = max((record.leaf + 1 for _, record in changed), default=self._next_leaf)

    async def _recover(self, leaf: ReportLeaf, index: int) -> None:
        job = self._aliases.job_of(leaf.job_alias)
        known = await self._jobs.job(job)
        payer = Address("") if known is None else known.record.payer
        change = self._integrity.apply(leaf, index)
        report = _stored_report(job, payer, leaf, index)
        await self._store.put_report(report, change, leaf.at - KEPT_SECONDS)
        log.info("the report of an audit was counted after a restart", leaf=index, provider=leaf.provider)

    async def accept(self, request: ReportRequest) -> Verified[ReportAck]:
        """Accepts a report. A report that was accepted before gets the same answer again, and does not count again.

        Raises BadMessage, BadSignature, Refusal for a report that is not taken, and Unavailable.
        """
        try:
            return await self._accept(request)
        except (PeerError, Refusal):
            self.counts[REFUSED] += 1
            raise

    async def _accept(self, request: ReportRequest) -> Verified[ReportAck]:
        domain, coordinator = self._match_log.domain, self._match_log.signer.address
        checked = check_report(request, domain, coordinator, int(self._now()))
        message = checked.report.message
        if not self._rate.try_spend(message.payer, self._tick()):
            text = f"{message.payer} reports more than {REPORTS_PER_SECOND} audits per second"
            raise rate_limited(text, self._rate.delay(message.payer, self._tick()))
        await self._check_job(checked)
        finding = (message.job, message.provider, checked.verdict is AuditVerdict.CONFIRMED)
        async with self._turn:
            stored = await self._stored(finding)
            if stored is None:
                stored = await self._count(checked, finding)
            if stored.report_hash != checked.report.digest:
                text = f"report: the audit of job {message.job.hex()} was reported before, and counts once"
                raise Refusal(Code.REPORT_REPLAYED, text)
        ack = ReportAck(
            coordinator=coordinator,
            report_hash=stored.report_hash,
            index=stored.index,
            leaf_hash=stored.leaf_hash,
            accepted_at=stored.at,
        )
        return self._match_log.signer.sign(ack, domain)

    async def _check_job(self, checked: CheckedReport) -> None:
        """Checks that the job is known here, with this receipt, and that the report names what the job's ask sold."""
        message, receipt = checked.report.message, checked.receipt.message
        known = await self._jobs.job(message.job)
        attempt = None if known is None else known.record.attempt_of(message.provider)
        if known is None or attempt is None:
            text = f"report.job: {message.provider} had no job {message.job.hex()} of {message.payer} through this coordinator"
            raise Refusal(Code.UNKNOWN_JOB, text)
        stored = known.receipts.get(message.provider)
        if stored is None or stored.message != receipt:
            given = "none yet" if stored is None else f"seq {stored.message.seq}"
            raise BadMessage(
                f"receipt: expected the one that the provider sent for job {message.job.hex()}, {given}; got another"
            )
        if message.model != attempt.terms.model:
            raise BadMessage(f"report.model: expected {attempt.terms.model!r}, as the job's terms say, got {message.model!r:.80}")
        self._check_precision(checked, attempt.terms.ask)

    def _check_precision(self, checked: CheckedReport, digest: Hash) -> None:
        """Checks that the report names the precision of the job's ask. `digest`: of that ask, by the job's terms.

        If the ask is withdrawn by now, the report must bring it: the payer's word would let it choose among products.
        """
        given, precision = checked.ask, checked.report.message.precision
        if given is not None and given.digest != digest:
            raise BadMessage(f"ask: expected the one that the job's terms name, {digest.hex()}, got {given.digest.hex()}")
        ask = self._find_ask(digest) or (None if given is None else given.message)
        if ask is not None:
            sold = precision_class(ask.spec.precision)
            if precision != sold:
                raise BadMessage(f"report.precision: expected {sold!r}, as the ask says, got {precision!r}")
        elif not checked.is_probe:
            raise BadMessage("ask: expected the job's ask in the request, because it is not listed any more, got none")

    async def _stored(self, finding: Finding) -> StoredReport | None:
        unstored = self._unstored.get(finding)
        if unstored is None:
            return await self._store.report(finding)
        await self._put(*unstored)
        return unstored[0]

    async def _count(self, checked: CheckedReport, finding: Finding) -> StoredReport:
        """Logs, counts and stores a report. Raises Unavailable; if the report was logged by then, `_stored` stores it later."""
        message = checked.report.message
        if self._match_log.blocked or self._unstored:
            for unstored in tuple(self._unstored.values()):
                await self._put(*unstored)
        if self._match_log.blocked:
            text = "this coordinator cannot log the report now; send it again later"
            raise Unavailable(Code.COORDINATOR_UNAVAILABLE, text, fault=Fault.COORDINATOR)
        draft = self._draft(checked, finding)
        if self._shared is not None:
            report, is_new = await self._shared.log_report(draft, int(self._now()), KEPT_SECONDS)
            if is_new:
                self._note(checked)
            await self.refresh()
            return report
        day_ago = int(self._now()) - DAY_SECONDS
        facts = ReportFacts(
            await self._store.settled_by(message.payer),
            await self._store.count_reports(message.payer, draft.product),
            await self._store.sum_effects(draft.product, day_ago, praises=draft.praises),
        )
        index, leaf = self._match_log.append_report(draft.make(facts))
        self._note(checked)
        change = self._integrity.apply(leaf, index)
        report = draft.store(leaf, index)
        self._unstored[finding] = report, change
        await self._put(report, change)
        return report

    def _note(self, checked: CheckedReport) -> None:
        self.counts[checked.verdict.name.lower(), SOURCES[checked.is_probe]] += 1

    def _draft(self, checked: CheckedReport, finding: Finding) -> ReportDraft:
        message = checked.report.message
        product = ProductKey(message.provider, message.model, message.precision)

        def make(facts: ReportFacts) -> ReportLeaf:
            weight = report_weight(
                checked.verdict,
                message.provider,
                facts.settled,
                facts.earlier,
                is_probe=checked.is_probe,
                has_evidence=checked.receipt.message.evidence_root != ZERO_HASH,
                day_effect=facts.day_effect,
            )
            alias = self._aliases.alias_of(message.job)
            return ReportLeaf(0, 0, alias, *product, int(checked.verdict), checked.is_probe, weight, checked.report.digest)

        return ReportDraft(
            finding,
            message.payer,
            product,
            checked.verdict is AuditVerdict.PASS,
            self._match_log.epoch,
            make,
            lambda leaf, index: _stored_report(message.job, message.payer, leaf, index),
        )

    async def _put(self, report: StoredReport, change: RecordChange) -> None:
        await self._match_log.flush()
        await self._store.put_report(report, change, report.at - KEPT_SECONDS)
        self._unstored.pop(report.finding, None)


def _stored_report(job: JobId, payer: Address, leaf: ReportLeaf, index: int) -> StoredReport:
    """A report as it is stored. Reports of verdicts that this release does not know have no effect."""
    verdict = AuditVerdict(leaf.verdict) if leaf.verdict in tuple(AuditVerdict) else None
    return StoredReport(
        (job, leaf.provider, verdict is AuditVerdict.CONFIRMED),
        payer,
        ProductKey(leaf.provider, leaf.model, leaf.precision),
        leaf.at,
        index,
        leaf.report_hash,
        leaf_hash(leaf.dumps()),
        praises=verdict is AuditVerdict.PASS,
        effect=0 if leaf.is_probe or verdict is None else effect_of(verdict, leaf.weight),
    )
