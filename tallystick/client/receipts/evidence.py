"""Evidence files: a dishonest receipt and what contradicts it, in a form that others can check.

    tallystick         "evidence/1"
    chainId, contract  the deployment that the signatures bind
    reason             what the payer found, in words
    order, receipt     {"message", "signature"}, as on the wire
    terms              the terms that the order commits to
    others             the provider's other signed receipts for this payer that contradict it
    proof              the job's proof with both plaintexts (see proof.py); null if they were not kept or are not needed

A contradiction between signatures convinces anyone. A claim that another answer arrived than the one that the receipt commits to
convinces nobody, because the payer could have changed the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tallystick.client.openai.requests import summarise
from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.receipts.delivery_check import Delivery
from tallystick.client.receipts.price_check import check_against_order
from tallystick.client.receipts.proof import FORMAT as PROOF
from tallystick.client.receipts.proof import Finding, Proof, read_proof
from tallystick.client.receipts.sequence_check import AdjacentReceipts, check_sequence
from tallystick.client.receipts.token_audit import AuditFinding
from tallystick.protocol.eip712 import Domain, Signed, Verified, read_signed
from tallystick.protocol.errors import BadMessage, BadReceipt, Fault, TallyError
from tallystick.protocol.json_members import read_count, read_items, read_text
from tallystick.protocol.messages import Order, Receipt, Terms
from tallystick.protocol.plaintext_heads import split_request
from tallystick.protocol.sealing import Transcript, commit_request
from tallystick.protocol.types import Address, JobId, parse_address
from tallystick.protocol.wire import dumps, loads

FORMAT = "evidence/1"
MAX_OTHER_RECEIPTS = 8
RecountTokens = Callable[[bytes, Sequence[bytes], Receipt], AuditFinding | None]


@dataclass(frozen=True, slots=True)
class Evidence:
    """A dishonest receipt in the ledger, with its order; `others`: the provider's receipts adjacent to it.

    `recorded_at` is Unix seconds.
    """

    provider: Address
    job: JobId
    reason: str
    receipt: Signed[Receipt]
    order: Signed[Order]
    terms: Terms
    recorded_at: int
    domain: Domain
    others: tuple[Signed[Receipt], ...] = ()


@dataclass(frozen=True, slots=True)
class EvidenceFile:
    """The contents of an evidence file; see the module's docstring."""

    domain: Domain
    reason: str
    order: Signed[Order]
    terms: Terms
    receipt: Signed[Receipt]
    others: tuple[Signed[Receipt], ...]
    proof: Proof | None

    @classmethod
    def of(cls, evidence: Evidence, proof: Proof | None = None) -> EvidenceFile:
        """Creates the file from the ledger's evidence, with the job's proof if its plaintexts were kept."""
        return cls(evidence.domain, evidence.reason, evidence.order, evidence.terms, evidence.receipt, evidence.others, proof)

    def dumps(self) -> bytes:
        """The file's bytes."""
        return dumps(
            {
                "tallystick": FORMAT,
                "chainId": self.domain.chain_id,
                "contract": self.domain.contract,
                "reason": self.reason,
                "order": self.order.to_json(),
                "terms": self.terms.to_json(),
                "receipt": self.receipt.to_json(),
                "others": [other.to_json() for other in self.others],
                "proof": None if self.proof is None else loads(self.proof.dumps(), "proof"),
            }
        )

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> EvidenceFile:
        """Reads the file's JSON object. Raises BadMessage, which names the invalid member."""
        others = read_items(raw.get("others"), "evidence.others", MAX_OTHER_RECEIPTS)
        proof = raw.get("proof")
        return cls(
            domain=Domain(
                read_count(raw.get("chainId"), "evidence.chainId", low=1), parse_address(raw.get("contract"), "evidence.contract")
            ),
            reason=read_text(raw.get("reason"), "evidence.reason", 1_000),
            order=read_signed(Order, raw.get("order"), "evidence.order"),
            terms=Terms.from_json(raw.get("terms"), "evidence.terms"),
            receipt=read_signed(Receipt, raw.get("receipt"), "evidence.receipt"),
            others=tuple(read_signed(Receipt, item, f"evidence.others[{n}]") for n, item in enumerate(others)),
            proof=None if proof is None else read_proof(dumps(proof)),
        )

    @property
    def equivocation(self) -> Signed[Receipt] | None:
        """Another receipt of the same payer with the same seq: equivocation, for which the provider can be slashed."""
        receipt = self.receipt.message
        return next((other for other in self.others if other.message.seq == receipt.seq and other.message != receipt), None)

    @property
    def convinces(self) -> bool:
        """Whether the file proves to anyone that the receipt is dishonest. If so, no plaintext has to be added to it."""
        try:
            self.check()
        except TallyError:
            return False
        return True

    def check(self, recount: RecountTokens | None = None) -> list[Finding]:
        """Returns what proves to anyone that the receipt is dishonest. With `recount`, the tokens of the plaintexts are
        recounted.

        Raises BadSignature or BadMessage if the file is inconsistent, BadReceipt if nothing in it proves that.
        """
        order, receipt = self.order.verify(self.domain), self.receipt.verify(self.domain)
        if order.message.terms_hash != self.terms.struct_hash():
            raise BadMessage("evidence.terms: expected the terms that the order commits to, got others")
        message = receipt.message
        if (message.order_hash, message.payer, message.provider) != (order.digest, order.message.payer, order.message.provider):
            raise BadMessage("evidence.receipt: expected a receipt for this order, got one for another order")
        placed = PlacedOrder(order, self.terms)
        others = [other.verify(self.domain).message for other in self.others]
        if any((other.payer, other.provider) != (message.payer, message.provider) for other in others):
            raise BadMessage("evidence.others: expected receipts of the same payer and provider, got one of another tab")
        findings = [
            Finding("signatures", f"the provider {message.provider} signed the receipt, the payer {message.payer} the order")
        ]
        signed = self._signed_plaintexts(receipt)
        checks: list[Callable[[], None]] = [
            lambda: check_against_order(placed, message, None),
            lambda: check_sequence(message, AdjacentReceipts.of(message, others)),
        ]
        if signed is not None:
            delivery = _delivery(signed)
            checks.append(lambda: check_against_order(placed, message, delivery))
        for check in checks:
            try:
                check()
            except BadReceipt as contradiction:
                finding = Finding("contradiction", str(contradiction))
                findings += [finding] if finding not in findings else []
        audit = None if recount is None or signed is None else recount(signed.request, signed.response, message)
        if audit is not None:
            findings.append(Finding("recount", audit.reason))
        if len(findings) == 1:
            raise BadReceipt(f"evidence: nothing in this file proves to others: {self.reason}", fault=Fault.CLIENT)
        return findings

    def _signed_plaintexts(self, receipt: Verified[Receipt]) -> Proof | None:
        """Returns the job's proof if the provider signed for its plaintexts, else None."""
        proof = self.proof
        if proof is None or proof.receipt != self.receipt or proof.order != self.order:
            return None
        commitment = commit_request(proof.commitment_key, self.terms.job, proof.request)
        transcript = Transcript(proof.commitment_key, receipt.message.order_hash)
        for chunk in proof.response:
            transcript.add(chunk)
        same = transcript.commitment == receipt.message.result_commitment and commitment == self.terms.request_commitment
        return proof if same else None


def read_evidence(data: bytes) -> EvidenceFile:
    """Reads the bytes of an evidence file. Raises BadMessage."""
    raw = loads(data, "evidence")
    if not isinstance(raw, dict) or raw.get("tallystick") != FORMAT:
        kind = "a proof file" if isinstance(raw, dict) and raw.get("tallystick") == PROOF else "something else"
        raise BadMessage(f'evidence: expected a JSON object with "tallystick": "{FORMAT}", got {kind}')
    return EvidenceFile.from_json(raw)


def _delivery(proof: Proof) -> Delivery:
    """The delivery that the provider signed for."""
    head, body = split_request(proof.request)
    bounded = summarise(head.path, body, head.content_type).bounded
    sizes = len(body), sum(map(len, proof.response[1:]))
    return Delivery(*sizes, proof.receipt.message.result_commitment, finished=True, bounded=bounded)
