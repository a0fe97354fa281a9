"""Reports of audits: who may report what, and what makes a report invalid, by name."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from tallystick.protocol.audit_reports import (
    REPORT_SECONDS,
    AuditVerdict,
    ReportRequest,
    build_report,
    check_report,
    read_ack,
)
from tallystick.protocol.eip712 import Domain, Signed, Signer, Verified
from tallystick.protocol.errors import BadMessage, BadSignature, Code, Refusal
from tallystick.protocol.messages import AuditReport, ProbeSeal, Receipt, ReportAck
from tallystick.protocol.types import ZERO_ADDRESS, ZERO_HASH, Address, Amount, Hash, JobId
from tests.builders import build_ask

DOMAIN = Domain(31_337, Address("0x" + "5f" * 20))
PAYER, PROVIDER, COORDINATOR, STRANGER = (Signer(bytes((0,) * 31 + (n,))) for n in (1, 2, 3, 4))
JOB, NOW = JobId(bytes(range(16))), 1_700_000_000


def paid_receipt(signer: Signer = PROVIDER, **changes: Any) -> Verified[Receipt]:
    """A provider's receipt for one job of the payer at a cost of 20 base units."""
    receipt = Receipt(
        payer=PAYER.address,
        provider=PROVIDER.address,
        seq=1,
        cumulative_cost=Amount(20),
        order_hash=ZERO_HASH,
        result_commitment=ZERO_HASH,
        input_tokens=1,
        cached_input_tokens=0,
        output_tokens=1,
        cost=Amount(20),
        outcome=0,
        finished_at=NOW,
        evidence_root=ZERO_HASH,
    )
    return signer.sign(replace(receipt, **changes), DOMAIN)


def request(
    receipt: Verified[Receipt] | None = None, *, signer: Signer = PAYER, seal: ProbeSeal | None = None, **changes: Any
) -> ReportRequest:
    """A report on a receipt, with changes to the report."""
    receipt = receipt or paid_receipt()
    report = build_report(
        receipt, COORDINATOR.address, JOB, ("tiny", " F16"), AuditVerdict.SUSPECT, reported_at=NOW, random=bytes
    )
    signed = signer.sign(replace(report, **changes), DOMAIN)
    return ReportRequest(signed, receipt, None if seal is None else COORDINATOR.sign(seal, DOMAIN))


def seal_of(asked: ReportRequest, report_hash: Hash | None = None) -> ProbeSeal:
    """The coordinator's seal on a report, or on another digest."""
    return ProbeSeal(coordinator=COORDINATOR.address, report_hash=report_hash or asked.report.message.digest(DOMAIN))


def check(asked: ReportRequest, now: int = NOW + 5) -> None:
    """Checks a report as the coordinator does."""
    check_report(asked, DOMAIN, COORDINATOR.address, now)


def test_a_report_on_a_paid_receipt_is_accepted_and_survives_the_wire() -> None:
    """What the payer signed reaches the coordinator as it was, with and without a seal."""
    asked = request()
    checked = check_report(ReportRequest.from_json(asked.to_json()), DOMAIN, COORDINATOR.address, NOW)
    assert (checked.report.message, checked.verdict, checked.is_probe) == (asked.report.message, AuditVerdict.SUSPECT, False)
    sealed = request(seal=seal_of(asked))
    assert ReportRequest.from_json(sealed.to_json()).to_json() == sealed.to_json()
    assert check_report(sealed, DOMAIN, COORDINATOR.address, NOW).is_probe


def test_reports_of_the_same_finding_differ_by_their_salt() -> None:
    """A digest in the match log cannot be recomputed from guesses of the payer."""
    receipt = paid_receipt()
    reports = [
        build_report(
            receipt, COORDINATOR.address, JOB, ("tiny", " F16"), AuditVerdict.PASS, reported_at=NOW, random=random
        ).digest(DOMAIN)
        for random in (bytes, lambda size: b"\x01" * size)
    ]
    assert len(set(reports)) == 2


@pytest.mark.parametrize(
    ("changes", "member"),
    [
        ({"receipt_hash": Hash(b"\x01" * 32)}, "report.receiptHash"),
        ({"provider": STRANGER.address}, "receipt: expected one of"),
        ({"verdict": max(AuditVerdict) + 1}, "report.verdict"),
        ({"verdict": 255}, "report.verdict"),
        ({"model": ""}, "report.model"),
        ({"model": "m" * 1_025}, "report.model"),
        ({"precision": ""}, "report.precision"),
        ({"precision": "€" * 11}, "report.precision"),
    ],
)
def test_a_report_that_does_not_fit_its_receipt_names_the_member(changes: dict[str, Any], member: str) -> None:
    """The error says which member is wrong."""
    with pytest.raises(BadMessage, match=member):
        check(request(**changes))


def test_a_report_of_another_payers_job_is_refused() -> None:
    """A stranger signs in its own name, and the receipt is not its own."""
    with pytest.raises(BadMessage, match=f"for {STRANGER.address}"):
        check(request(signer=STRANGER, payer=STRANGER.address))


def test_forged_signatures_are_refused() -> None:
    """Neither the report in another payer's name, nor a receipt that the provider did not sign, nor a seal of a stranger."""
    asked = request()
    forged = STRANGER.sign_digest(asked.report.message.digest(DOMAIN))
    for bad in (
        replace(asked, report=replace(asked.report, signature=forged)),
        replace(asked, receipt=replace(asked.receipt, signature=STRANGER.sign_digest(paid_receipt().digest))),
        replace(asked, seal=Verified(seal_of(asked), STRANGER.sign_digest(seal_of(asked).digest(DOMAIN)), ZERO_HASH)),
    ):
        with pytest.raises(BadSignature):
            check(ReportRequest.from_json(bad.to_json()))


def test_a_seal_of_another_report_does_not_lend_its_weight() -> None:
    """A seal names one report, of one coordinator."""
    asked = request()
    with pytest.raises(BadMessage, match=r"seal\.reportHash"):
        check(request(seal=seal_of(asked, Hash(b"\x02" * 32))))
    other = replace(seal_of(asked), coordinator=STRANGER.address)
    with pytest.raises(BadMessage, match=r"seal\.coordinator"):
        check(replace(asked, seal=STRANGER.sign(other, DOMAIN)))


def test_a_report_to_another_coordinator_is_refused() -> None:
    """It is counted where the order was placed, and nowhere else."""
    with pytest.raises(Refusal) as refused:
        check(request(coordinator=STRANGER.address))
    assert refused.value.code is Code.ORDER_MISDIRECTED


def test_a_receipt_without_cost_carries_no_report() -> None:
    """Otherwise reports would cost nothing."""
    with pytest.raises(BadMessage, match=r"receipt\.cost"):
        check(request(paid_receipt(cost=Amount(0))))
    check(request(paid_receipt(cost=Amount(1))))


def test_a_report_is_accepted_until_its_time_is_over() -> None:
    """The last second counts, the next does not."""
    check(request(), NOW + REPORT_SECONDS)
    with pytest.raises(Refusal, match="7 days") as refused:
        check(request(), NOW + REPORT_SECONDS + 1)
    assert refused.value.code is Code.ORDER_EXPIRED


@pytest.mark.parametrize("raw", [None, [], "x", {}, {"report": 1, "receipt": 2}, {"report": {}, "receipt": {}, "seal": 1}])
def test_bodies_that_are_no_report_are_refused(raw: object) -> None:
    """Whatever JSON arrives."""
    with pytest.raises(BadMessage):
        ReportRequest.from_json(raw)


def test_every_member_of_a_report_is_signed() -> None:
    """A change of any member is noticed."""
    asked = request()
    for field in fields(AuditReport):
        value = getattr(asked.report.message, field.name)
        other: Any = value + 1 if isinstance(value, int) else ZERO_ADDRESS if str(value).startswith("0x") else None
        if other is None:
            other = value + "x" if isinstance(value, str) else type(value)(bytes((value[0] ^ 1,)) + value[1:])
        changed = replace(asked.report, message=replace(asked.report.message, **{field.name: other}))
        with pytest.raises((BadSignature, BadMessage, Refusal)):
            check(replace(asked, report=changed))


def test_an_acknowledgement_is_of_this_report_and_of_this_coordinator() -> None:
    """Another report's, another coordinator's, and one that nobody signed are refused."""
    asked = request()
    digest = asked.report.message.digest(DOMAIN)
    ack = ReportAck(coordinator=COORDINATOR.address, report_hash=digest, index=7, leaf_hash=Hash(b"\x03" * 32), accepted_at=NOW)
    signed = COORDINATOR.sign(ack, DOMAIN)
    assert read_ack({"ack": signed.to_json()}, asked, DOMAIN).message == ack
    other = COORDINATOR.sign(replace(ack, report_hash=ZERO_HASH), DOMAIN)
    with pytest.raises(BadMessage, match=r"ack\.reportHash"):
        read_ack({"ack": other.to_json()}, asked, DOMAIN)
    with pytest.raises(BadMessage, match=r"ack\.coordinator"):
        read_ack({"ack": STRANGER.sign(replace(ack, coordinator=STRANGER.address), DOMAIN).to_json()}, asked, DOMAIN)
    forged = replace(signed, signature=STRANGER.sign_digest(signed.digest))
    with pytest.raises(BadSignature):
        read_ack({"ack": forged.to_json()}, asked, DOMAIN)


def test_the_ask_survives_the_wire_and_its_signature_is_checked() -> None:
    """A coordinator that does not list it any more reads from it what was sold."""
    ask = PROVIDER.sign(build_ask(PROVIDER.address), DOMAIN)
    asked = replace(request(), ask=ask)
    checked = check_report(ReportRequest.from_json(asked.to_json()), DOMAIN, COORDINATOR.address, NOW)
    assert checked.ask is not None
    assert (checked.ask.message, checked.ask.digest) == (ask.message, ask.digest)
    of_another = PROVIDER.sign(build_ask(PROVIDER.address, model="another"), DOMAIN).signature
    with pytest.raises(BadSignature):
        check(replace(asked, ask=Signed(ask.message, of_another)))
    with pytest.raises(BadMessage, match="ask"):
        ReportRequest.from_json(asked.to_json() | {"ask": {"message": 7}})
