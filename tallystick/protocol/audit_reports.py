"""Reports of audits: what a payer found of a provider's answer, and the coordinator's promise to log it. Pure.

A report is bound to the receipt of a job that the payer paid. It names no prompt: `evidence_hash` is the SHA-256 of the evidence
file, which the payer keeps and shows to whom it wants. `salt` is random, so that nobody finds the payer from the report's digest,
which the match log has.

The coordinator answers with a `ReportAck`: the leaf of the report in the match log, by number and hash. A log that has another
leaf there, or none after MERGE_SECONDS, proves that the coordinator dropped the report.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tallystick.protocol.eip712 import Domain, Signed, Verified, read_signed
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.json_members import read_members
from tallystick.protocol.messages import Ask, AuditReport, ProbeSeal, Receipt, ReportAck
from tallystick.protocol.precisions import MAX_PRECISION, precision_class
from tallystick.protocol.types import ZERO_HASH, Address, Hash, JobId

REPORT_SECONDS = 7 * 86_400
"""A report is accepted for this long after its job's end."""
MAX_MODEL = 1_024


class AuditVerdict(IntEnum):
    """What a report says. The numbers are on the wire.

    UNVERIFIABLE: the audit could not decide because of what the provider did, as often before. It counts as a part of a suspect
    answer. Other audits that could not decide are not reported.
    """

    PASS = 0
    SUSPECT = 1
    CONFIRMED = 2
    UNVERIFIABLE = 3


@dataclass(frozen=True, slots=True)
class ReportRequest:
    """The body of POST /v1/reports: a report, the receipt that it is about, the seal of a probe, and the ask of the job.

    The ask says in which precision the model was sold. A coordinator needs it if it does not list it any more.
    """

    report: Signed[AuditReport]
    receipt: Signed[Receipt]
    seal: Signed[ProbeSeal] | None = None
    ask: Signed[Ask] | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON body."""
        seal = None if self.seal is None else self.seal.to_json()
        ask = None if self.ask is None else self.ask.to_json()
        return {"report": self.report.to_json(), "receipt": self.receipt.to_json(), "seal": seal, "ask": ask}

    @classmethod
    def from_json(cls, raw: object, field: str = "report") -> ReportRequest:
        """Reads the JSON body. Raises BadMessage."""
        report, receipt = read_members(raw, field, "report", "receipt")
        seal, ask = (raw.get("seal"), raw.get("ask")) if isinstance(raw, dict) else (None, None)
        return cls(
            read_signed(AuditReport, report, "report"),
            read_signed(Receipt, receipt, "receipt"),
            None if seal is None else read_signed(ProbeSeal, seal, "seal"),
            None if ask is None else read_signed(Ask, ask, "ask"),
        )


@dataclass(frozen=True, slots=True)
class CheckedReport:
    """A report whose signatures and bindings are right. `is_probe`: the coordinator sealed it as its own."""

    report: Verified[AuditReport]
    receipt: Verified[Receipt]
    is_probe: bool
    ask: Verified[Ask] | None = None

    @property
    def verdict(self) -> AuditVerdict:
        """What it says."""
        return AuditVerdict(self.report.message.verdict)


def build_report(
    receipt: Verified[Receipt],
    coordinator: Address,
    job: JobId,
    sold: tuple[str, str],
    verdict: AuditVerdict,
    *,
    reported_at: int,
    random: Callable[[int], bytes],
    evidence_hash: Hash = ZERO_HASH,
) -> AuditReport:
    """A report on a receipt. `sold`: model and precision, as the ask has them; `random` returns that many random bytes."""
    return AuditReport(
        payer=receipt.message.payer,
        provider=receipt.message.provider,
        coordinator=coordinator,
        job=job,
        model=sold[0],
        precision=precision_class(sold[1]),
        verdict=int(verdict),
        receipt_hash=receipt.digest,
        evidence_hash=evidence_hash,
        reported_at=reported_at,
        salt=Hash(random(32)),
    )


def check_report(request: ReportRequest, domain: Domain, coordinator: Address, now: int) -> CheckedReport:
    """Checks a report by itself: who signed it, for whom, of which receipt, and when. `now`: Unix seconds.

    Raises BadMessage, BadSignature, and Refusal for a report of another coordinator or one that comes too late.
    """
    message = request.report.message
    _check_members(message, coordinator)
    report, receipt = request.report.verify(domain), request.receipt.verify(domain)
    paid = receipt.message
    if (paid.payer, paid.provider) != (message.payer, message.provider):
        raise BadMessage(
            f"receipt: expected one of {message.provider} for {message.payer}, as the report says, "
            f"got one of {paid.provider} for {paid.payer}"
        )
    if receipt.digest != message.receipt_hash:
        raise BadMessage(f"report.receiptHash: expected {receipt.digest.hex()}, got {message.receipt_hash.hex()}")
    if not paid.cost:
        raise BadMessage("receipt.cost: expected a receipt that the payer paid for, got one at no cost")
    if now > paid.finished_at + REPORT_SECONDS:
        text = f"report: its job ended more than {REPORT_SECONDS // 86_400} days ago; reports are accepted until then"
        raise Refusal(Code.ORDER_EXPIRED, text)
    ask = None if request.ask is None else request.ask.verify(domain)
    return CheckedReport(report, receipt, _is_sealed(request.seal, report, domain, coordinator), ask)


def _check_members(message: AuditReport, coordinator: Address) -> None:
    if message.coordinator != coordinator:
        text = f"report.coordinator: {message.coordinator}, but this is {coordinator}; report to the coordinator of the order"
        raise Refusal(Code.ORDER_MISDIRECTED, text)
    if message.verdict not in tuple(AuditVerdict):
        raise BadMessage(f"report.verdict: expected one of {', '.join(map(str, map(int, AuditVerdict)))}, got {message.verdict}")
    for name, text, most in (("model", message.model, MAX_MODEL), ("precision", message.precision, MAX_PRECISION)):
        if not 0 < len(text.encode()) <= most:
            raise BadMessage(f"report.{name}: expected 1 to {most} bytes, got {len(text.encode())}")


def _is_sealed(seal: Signed[ProbeSeal] | None, report: Verified[AuditReport], domain: Domain, coordinator: Address) -> bool:
    if seal is None:
        return False
    if seal.message.coordinator != coordinator:
        raise BadMessage(f"seal.coordinator: expected {coordinator}, got {seal.message.coordinator}")
    if seal.message.report_hash != report.digest:
        raise BadMessage(f"seal.reportHash: expected {report.digest.hex()}, got {seal.message.report_hash.hex()}")
    seal.verify(domain)
    return True


def read_ack(raw: object, request: ReportRequest, domain: Domain) -> Verified[ReportAck]:
    """Reads the answer to a report. Raises BadMessage or BadSignature unless the report's coordinator promises to log it."""
    (signed,) = read_members(raw, "answer", "ack")
    ack = read_signed(ReportAck, signed, "ack")
    report = request.report.message
    if ack.message.coordinator != report.coordinator:
        raise BadMessage(f"ack.coordinator: expected {report.coordinator}, got {ack.message.coordinator}")
    digest = report.digest(domain)
    if ack.message.report_hash != digest:
        raise BadMessage(f"ack.reportHash: expected {digest.hex()}, got {ack.message.report_hash.hex()}")
    return ack.verify(domain)
