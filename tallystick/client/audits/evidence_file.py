"""Evidence files of audits: answers that referees found suspect, in a form that others can judge offline.

    tallystick        "audit-evidence/1"
    provider, model, precision
    audits            audited answers of this provider in all; the payer's word
    thresholds        those that the payer used; a reader uses its own where they are higher
    cases             list of {"job": proof, "ask", "evidence", "opinions"}: one for each suspect answer
      job             the proof of the job (see receipts/proof.py), with its plaintexts
      ask             the ask that the order is on, as signed, or null
      evidence        base64: the rows that the receipt commits to
      opinions        list of {"job": proof, "ask"}: the scoring jobs of other providers, each signed by its referee

Nobody has to believe the payer: the provider signed the answer and the rows, each referee its numbers, and the statistics are
computed again. What remains the payer's word is how many other audits passed, and that the referees are not its own.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from tallystick.audit.thresholds import Thresholds
from tallystick.audit.verdicts import Audit, Referees, Verdict, judge, judge_provider
from tallystick.client.audit_settings import NO_CONSENT
from tallystick.client.audits.kept_job import KeptJob
from tallystick.client.audits.referees import read_scores
from tallystick.client.audits.subject import Subject
from tallystick.client.receipts.proof import Finding as Result
from tallystick.client.receipts.proof import Proof, read_proof
from tallystick.protocol.eip712 import Signed, read_signed
from tallystick.protocol.errors import BadMessage, BadReceipt, Fault
from tallystick.protocol.json_members import read_count, read_items, read_text
from tallystick.protocol.lenient_json import parse_lenient
from tallystick.protocol.messages import UNKNOWN, Ask
from tallystick.protocol.plaintext_heads import split_request
from tallystick.protocol.precisions import precision_class
from tallystick.protocol.routes import SCORES
from tallystick.protocol.token_scores import PROMPT_MEMBERS, ScoreRequest
from tallystick.protocol.types import Address, parse_address
from tallystick.protocol.wire import dumps, loads

FORMAT = "audit-evidence/1"
MAX_CASES = 32
MAX_OPINIONS = 16
MIN_REFEREES = 2


@dataclass(frozen=True, slots=True)
class SignedOpinion:
    """A referee's scoring job, and the ask on which it sold that."""

    proof: Proof
    ask: Signed[Ask] | None

    def to_json(self) -> dict[str, Any]:
        """The wire form."""
        return {"job": loads(self.proof.dumps(), "proof"), "ask": None if self.ask is None else self.ask.to_json()}

    @classmethod
    def from_json(cls, raw: object, where: str) -> SignedOpinion:
        """Reads the wire form. Raises BadMessage."""
        if not isinstance(raw, dict):
            raise BadMessage(f"{where}: expected an object")
        ask = raw.get("ask")
        return cls(read_proof(dumps(raw.get("job"))), None if ask is None else read_signed(Ask, ask, f"{where}.ask"))


@dataclass(frozen=True, slots=True)
class Case:
    """One suspect answer, and what referees signed of it."""

    kept: KeptJob
    opinions: tuple[SignedOpinion, ...]

    def to_json(self) -> dict[str, Any]:
        """The wire form."""
        ask = self.kept.ask
        return {
            "job": loads(self.kept.proof.dumps(), "proof"),
            "ask": None if ask is None else Signed(ask.message, ask.signature).to_json(),
            "evidence": base64.b64encode(self.kept.evidence).decode(),
            "opinions": [opinion.to_json() for opinion in self.opinions],
        }

    @classmethod
    def from_json(cls, raw: object, where: str) -> Case:
        """Reads the wire form. Raises BadMessage."""
        if not isinstance(raw, dict):
            raise BadMessage(f"{where}: expected an object")
        try:
            evidence = base64.b64decode(read_text(raw.get("evidence") or "", f"{where}.evidence", 1 << 28), validate=True)
        except (binascii.Error, ValueError):
            raise BadMessage(f"{where}.evidence: expected base64") from None
        ask = None if raw.get("ask") is None else read_signed(Ask, raw["ask"], f"{where}.ask")
        opinions = read_items(raw.get("opinions"), f"{where}.opinions", MAX_OPINIONS)
        return cls(
            KeptJob(read_proof(dumps(raw.get("job"))), evidence, ask, "", NO_CONSENT, 0),
            tuple(SignedOpinion.from_json(item, f"{where}.opinions[{number}]") for number, item in enumerate(opinions)),
        )


@dataclass(frozen=True, slots=True)
class AuditEvidence:
    """The contents of a file; see the module's docstring."""

    provider: Address
    model: str
    precision: str
    audits: int
    thresholds: Thresholds
    cases: tuple[Case, ...]

    def dumps(self) -> bytes:
        """The file's bytes."""
        return dumps(
            {
                "tallystick": FORMAT,
                "provider": self.provider,
                "model": self.model,
                "precision": self.precision,
                "audits": self.audits,
                "thresholds": {name: repr(value) for name, value in asdict(self.thresholds).items()},
                "cases": [case.to_json() for case in self.cases],
            }
        )

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> AuditEvidence:
        """Reads the file's JSON object. Raises BadMessage, which names the invalid member."""
        cases = read_items(raw.get("cases"), "audit.cases", MAX_CASES)
        return cls(
            provider=parse_address(raw.get("provider"), "audit.provider"),
            model=read_text(raw.get("model"), "audit.model"),
            precision=read_text(raw.get("precision"), "audit.precision"),
            audits=read_count(raw.get("audits"), "audit.audits"),
            thresholds=_read_thresholds(raw.get("thresholds")),
            cases=tuple(Case.from_json(item, f"audit.cases[{number}]") for number, item in enumerate(cases)),
        )

    def check(self, thresholds: Thresholds | None = None) -> list[Result]:
        """What the file proves, by checks in order. `thresholds`: those of the reader; the defaults otherwise.

        Raises BadSignature, BadMessage or BadReceipt for what is inconsistent, and BadReceipt if nothing in it proves that the
        answers are not what the provider sold.
        """
        own = _highest(thresholds or Thresholds(), self.thresholds)
        results: list[Result] = []
        votes: list[Audit] = []
        for number, case in enumerate(self.cases, 1):
            case_votes = list(self._check_case(case, own, results, f"answer {number}"))
            votes += case_votes
        counts = [_agreeing([vote for vote in votes if vote.job == job]) for job in {vote.job for vote in votes}]
        sure = [count for count in counts if count >= MIN_REFEREES]
        rules = Referees(min(sure, default=MIN_REFEREES))
        others = [Audit(f"passed {number}".encode(), b"", Verdict.PASS) for number in range(max(0, self.audits - len(sure)))]
        verdict = judge_provider([*others, *votes], rules)
        if verdict is not Verdict.CONFIRMED:
            text = (
                f"audit evidence: {len(sure)} of {self.audits} audited answers are suspect to two referees or more, which is too "
                "few to say that the provider does not serve what it sells"
            )
            raise BadReceipt(text, fault=Fault.CLIENT)
        text = f"{len(sure)} answers of {self.audits} (the payer's count) are not what {self.provider} sold as {self.model}"
        return [*results, Result("verdict", text)]

    def _check_case(self, case: Case, thresholds: Thresholds, results: list[Result], name: str) -> Iterable[Audit]:
        kept = case.kept
        kept.proof.check()
        if (kept.provider, kept.model) != (self.provider, self.model):
            raise BadMessage(f"{name}: expected an answer of {self.provider} for {self.model}, got another one")
        _check_ask(kept.proof, kept.ask, self.precision, name)
        subject = Subject.of(kept)
        results.append(Result(name, f"signed by the provider, with evidence of {len(subject.rows)} tokens"))
        for opinion in case.opinions:
            receipt = opinion.proof.receipt.message
            opinion.proof.check()
            if receipt.provider == self.provider or opinion.proof.terms.model != self.model:
                raise BadMessage(f"{name}: expected other providers of {self.model} as referees")
            _check_ask(opinion.proof, opinion.ask, self.precision, f"{name}: {receipt.provider}")
            request = _question(opinion.proof, subject, name)
            findings = subject.judge(request, read_scores(opinion.proof, request), thresholds)
            verdict = judge(findings)
            numbers = ", ".join(
                f"{finding.test} {finding.statistic:.4g} of {finding.threshold:.4g}" for finding in findings if finding.conclusive
            )
            results.append(Result(f"{name}: {receipt.provider}", f"{verdict.value}: {numbers or 'nothing to compare'}"))
            yield Audit(bytes(kept.job), receipt.provider.encode(), verdict)


def _agreeing(votes: Sequence[Audit]) -> int:
    """How many referees find an answer suspect, if none passes it; else 0."""
    known = [vote for vote in votes if vote.verdict is not Verdict.INCONCLUSIVE]
    return len({vote.referee for vote in known}) if all(vote.verdict is Verdict.SUSPECT for vote in known) else 0


def _check_ask(proof: Proof, ask: Signed[Ask] | None, precision: str, name: str) -> None:
    """Whether a job was sold in this class, which the terms of its order say by the digest of the ask."""
    if ask is None:
        if precision_class(precision) != UNKNOWN:
            raise BadMessage(f"{name}: expected the ask, since only it says in which precision the model was sold")
        return
    verified = ask.verify(proof.domain)
    if verified.digest != proof.terms.ask or verified.message.provider != proof.receipt.message.provider:
        raise BadMessage(f"{name}: expected the ask that the order is on, got another one")
    if precision_class(verified.message.spec.precision) != precision_class(precision):
        raise BadMessage(f"{name}: expected an ask for the class {precision!r}, got {verified.message.spec.precision!r}")


def _question(proof: Proof, subject: Subject, name: str) -> ScoreRequest:
    """The question of a scoring job. Raises BadMessage if it was about another prompt or answer: the payer lied about them."""
    head, body = split_request(proof.request)
    if head.path != SCORES:
        raise BadMessage(f"{name}: expected a scoring job, got a job of {head.path}")
    request = ScoreRequest.from_json(parse_lenient(body, "score request"))
    expected = {member: subject.request[member] for member in PROMPT_MEMBERS if subject.request.get(member) is not None}
    if dict(request.prompt) != expected:
        raise BadMessage(f"{name}: the referee was shown another prompt than the provider was")
    if request.completion not in (tuple(row.token for row in subject.rows), subject.text):
        raise BadMessage(f"{name}: the referee was shown another answer than the provider gave")
    return request


def _highest(mine: Thresholds, theirs: Thresholds) -> Thresholds:
    return Thresholds(**{field.name: max(getattr(mine, field.name), getattr(theirs, field.name)) for field in fields(Thresholds)})


def _read_thresholds(raw: object) -> Thresholds:
    """Decimal numbers as text: the wire has no floats."""
    if not isinstance(raw, dict):
        raise BadMessage("audit.thresholds: expected an object")
    try:
        values = {name: float(read_text(value, f"audit.thresholds.{name}", 40)) for name, value in raw.items()}
    except ValueError:
        raise BadMessage("audit.thresholds: expected decimal numbers as text") from None
    if not all(map(math.isfinite, values.values())):
        raise BadMessage("audit.thresholds: expected finite numbers")
    return Thresholds.of(values)


def read_audit_evidence(data: bytes) -> AuditEvidence:
    """Reads a file's bytes. Raises BadMessage."""
    raw = loads(data, "audit evidence")
    if not isinstance(raw, dict) or raw.get("tallystick") != FORMAT:
        raise BadMessage(f'audit evidence: expected a JSON object with "tallystick": "{FORMAT}"')
    return AuditEvidence.from_json(raw)
