"""What follows from an audit: a report to the coordinator, and for a confirmed provider a block and an evidence file."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import structlog

from tallystick.audit.integrity import weight_of
from tallystick.audit.verdicts import Verdict
from tallystick.client.audits.conduct import Conclusion
from tallystick.client.audits.evidence_file import AuditEvidence, Case, SignedOpinion
from tallystick.client.audits.kept_job import KeptJob
from tallystick.client.audits.planning import draw, is_own
from tallystick.client.audits.records import KnownAudit
from tallystick.client.audits.report_queue import ReportQueue
from tallystick.client.audits.store import AuditStore
from tallystick.client.audits.threshold_table import ThresholdTable
from tallystick.client.receipts.proof import read_proof
from tallystick.protocol.audit_reports import AuditVerdict, ReportRequest, build_report
from tallystick.protocol.eip712 import Domain, Signed, Signer, Verified, read_signed
from tallystick.protocol.errors import TallyError
from tallystick.protocol.messages import Ask, Receipt
from tallystick.protocol.types import ZERO_HASH, Address, Hash
from tallystick.runtime.keystore import write_private

log = structlog.get_logger()
MAX_CASES = 8
"""Suspect answers that an evidence file has."""
_REPORTED = {Verdict.PASS: AuditVerdict.PASS, Verdict.SUSPECT: AuditVerdict.SUSPECT}
Block = Callable[[Domain, Address, str], Awaitable[bool]]
"""Blocks a provider with a reason. Returns whether it was not blocked before."""


@dataclass(frozen=True, slots=True)
class Consequences:
    """Draws the consequences for one wallet. `coordinator` returns its account. `now` is Unix seconds."""

    wallet: Signer
    store: AuditStore
    thresholds: ThresholdTable
    folder: Path
    block: Block
    coordinator: Callable[[], Awaitable[Address]]
    reports: ReportQueue | None
    now: Callable[[], int]
    report_delay: int
    """Seconds that a report waits at most, so that its time does not tell which job was audited."""
    random: Callable[[int], bytes]

    async def draw(self, conclusion: Conclusion, kept: KeptJob) -> None:
        """Reports the audit, and acts on the provider if it is confirmed, or if its answers often cannot be checked."""
        audit = conclusion.audit
        if conclusion.provider is Verdict.CONFIRMED:
            digest = await self._block(audit, kept)
            await self._report(audit, kept, AuditVerdict.CONFIRMED, digest)
        elif audit.unverifiable:
            if await self._is_named(audit):
                await self._report(audit, kept, AuditVerdict.UNVERIFIABLE, ZERO_HASH)
        elif conclusion.verdict in _REPORTED and self._counts(audit, kept):
            await self._report(audit, kept, _REPORTED[conclusion.verdict], ZERO_HASH)

    async def _block(self, audit: KnownAudit, kept: KeptJob) -> Hash:
        """Blocks a confirmed provider. Returns the SHA-256 of the evidence file; zero without one."""
        path = self.folder / f"audit-{audit.provider}-{audit.id}.json"
        digest = await self._write_evidence(audit, path)
        reason = (
            f"audits confirm that it does not serve {audit.model} as sold: tally audit show {audit.job}; to order from it "
            f"again: tally audit unblock {audit.provider}"
        )
        if await self.block(kept.proof.domain, audit.provider, reason[:500]):
            log.warning(
                "audits confirm that a provider does not serve what it sells: blocked",
                provider=audit.provider,
                model=audit.model,
                evidence=str(path),
            )
        return digest

    async def _is_named(self, audit: KnownAudit) -> bool:
        """Whether the provider of an unverifiable answer is named for such answers. Logs it if it is named from this one on."""
        counts = (await self.store.provider_audits(audit.provider, audit.model, audit.precision)).latest
        before = replace(counts, unverifiable=max(0, counts.unverifiable - 1))
        if counts.is_named and not before.is_named:
            log.warning(
                "a provider's answers often cannot be checked; no conviction, but it counts for less",
                provider=audit.provider,
                model=audit.model,
                unverifiable=counts.unverifiable,
                audits=counts.total,
                latest=audit.reason,
            )
        return counts.is_named

    def _counts(self, audit: KnownAudit, kept: KeptJob) -> bool:
        """Whether this verdict is reported. Passes by partial evidence are reported in proportion: a report states no weight.

        The coordinator weighs answers without any evidence itself.
        """
        if audit.verdict is not Verdict.PASS or not kept.has_root or audit.coverage is None or audit.coverage >= 1:
            return True
        return draw(self.random) < weight_of(audit.verdict, audit.coverage)

    async def _write_evidence(self, audit: KnownAudit, path: Path) -> Hash:
        """Writes the evidence file; returns its SHA-256. Zero if that failed, or if no single answer is suspect."""
        evidence = await self.evidence(audit)
        if not evidence.cases:
            return ZERO_HASH
        data = evidence.dumps()
        try:
            await asyncio.to_thread(write_private, path, data)
        except OSError as error:
            log.warning("the evidence file could not be written", path=str(path), error=str(error))
            return ZERO_HASH
        return Hash(hashlib.sha256(data).digest())

    async def evidence(self, audit: KnownAudit) -> AuditEvidence:
        """The evidence against the provider of an audit: its suspect answers that are still kept, newest first."""
        suspects = await self.store.suspects(audit.provider, audit.model, audit.precision, MAX_CASES)
        cases: list[Case] = []
        for suspect in suspects:
            if suspect.kept is not None:
                opinions = [opinion.scores for opinion in await self.store.opinions(suspect.id) if not is_own(opinion.referee)]
                signed = tuple(read_opinion(scores) for scores in opinions if scores is not None)
                cases.append(Case(KeptJob.unpack(suspect.kept), signed))
        history = await self.store.history(audit.provider, audit.model, audit.precision)
        thresholds = self.thresholds.of(audit.model, audit.precision)
        jobs = len({vote.job for vote in history})
        return AuditEvidence(audit.provider, audit.model, audit.precision, jobs, thresholds, tuple(cases))

    async def _report(self, audit: KnownAudit, kept: KeptJob, verdict: AuditVerdict, evidence: Hash) -> None:
        receipt: Signed[Receipt] = kept.proof.receipt
        if self.reports is None or not receipt.message.cost:
            return
        try:
            verified: Verified[Receipt] = receipt.verify(kept.proof.domain)
            report = build_report(
                verified,
                await self.coordinator(),
                kept.job,
                (audit.model, audit.precision),
                verdict,
                reported_at=self.now(),
                random=self.random,
                evidence_hash=evidence,
            )
            signed = self.wallet.sign(report, kept.proof.domain)
            request = ReportRequest(
                Signed(signed.message, signed.signature), Signed(receipt.message, receipt.signature), ask=kept.ask
            )
            await self.reports.add(audit.id, request, int(draw(self.random) * (self.report_delay + 1)))
        except TallyError as error:
            log.info("an audit was not reported", audit=audit.id, reason=str(error))


def read_opinion(data: bytes) -> SignedOpinion:
    """A referee's scoring job in the file, and the ask on which it was sold. Raises BadMessage."""
    raw: Any = orjson.loads(data)
    ask = raw.get("ask")
    return SignedOpinion(read_proof(orjson.dumps(raw["job"])), None if ask is None else read_signed(Ask, ask))
