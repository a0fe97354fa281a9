"""A dishonest receipt in a file that others can check: what the provider signed, and whatever contradicts it.

    tallystick         "evidence/1"
    chainId, contract  the deployment that the signatures bind
    reason             what the payer found, in words
    order, receipt     {"message", "signature"}, as on the wire
    terms              the terms that the order commits to
    others             the provider's other receipts for this payer that it contradicts, signed
    proof              the job's proof (see proof.py) with both plaintexts; null where they were not kept, or need not be

What follows from signatures alone convinces anyone. That an answer was another one than the receipt commits to does not: the
payer could have changed it.
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
from tallystick.protocol.sealing import Transcript, commit_request
from tallystick.protocol.types import Address, JobId, parse_address
from tallystick.protocol.wire import dumps, loads, split_request

FORMAT = "evidence/1"
MAX_OTHER_RECEIPTS = 8
RecountTokens = Callable[[bytes, Sequence[bytes], Receipt], AuditFinding | None]


@dataclass(frozen=True, slots=True)
class Evidence:
    """A dishonest receipt, and what shows that it is one; `others`: the provider's receipts around it."""

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
    """See the module's docstring."""

    domain: Domain
    reason: str
    order: Signed[Order]
    terms: Terms
    receipt: Signed[Receipt]
    others: tuple[Signed[Receipt], ...]
    proof: Proof | None

    @classmethod
    def of(cls, found: Evidence, proof: Proof | None = None) -> EvidenceFile:
        """What the ledger has, with the plaintexts if they were kept."""
        return cls(found.domain, found.reason, found.order, found.terms, found.receipt, found.others, proof)

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
                "others": [one.to_json() for one in self.others],
                "proof": None if self.proof is None else loads(self.proof.dumps(), "proof"),
            }
        )

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> EvidenceFile:
        """Reads the file's JSON object. Raises BadMessage that names the member at fault."""
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
            others=tuple(read_signed(Receipt, one, f"evidence.others[{n}]") for n, one in enumerate(others)),
            proof=None if proof is None else read_proof(dumps(proof)),
        )

    @property
    def equivocation(self) -> Signed[Receipt] | None:
        """Another receipt of the same payer and seq: what costs the provider its stake."""
        here = self.receipt.message
        return next((one for one in self.others if one.message.seq == here.seq and one.message != here), None)

    @property
    def convinces(self) -> bool:
        """Whether what is in it shows to anyone that the receipt is dishonest: then no plaintext has to be shared for that."""
        try:
            self.check()
        except TallyError:
            return False
        return True

    def check(self, recount: RecountTokens | None = None) -> list[Finding]:
        """What shows that the receipt is dishonest, to anyone. With `recount` the tokens of kept plaintexts are counted again.

        Raises BadSignature or BadMessage where the file is not what it says, BadReceipt where nothing in it shows that.
        """
        order, receipt = self.order.verify(self.domain), self.receipt.verify(self.domain)
        if order.message.terms_hash != self.terms.struct_hash():
            raise BadMessage("evidence.terms: not the terms that the order commits to")
        here = receipt.message
        if (here.order_hash, here.payer, here.provider) != (order.digest, order.message.payer, order.message.provider):
            raise BadMessage("evidence.receipt: not a receipt of this order")
        placed = PlacedOrder(order, self.terms)
        near = [one.verify(self.domain).message for one in self.others]
        if any((one.payer, one.provider) != (here.payer, here.provider) for one in near):
            raise BadMessage("evidence.others: a receipt of another tab")
        findings = [Finding("signatures", f"the provider {here.provider} signed the receipt, the payer {here.payer} the order")]
        signed = self._signed_plaintexts(receipt)
        checks: list[Callable[[], None]] = [
            lambda: check_against_order(placed, here, None),
            lambda: check_sequence(here, AdjacentReceipts.of(here, near)),
        ]
        if signed is not None:
            delivered = _delivered(signed)
            checks.append(lambda: check_against_order(placed, here, delivered))
        for check in checks:
            try:
                check()
            except BadReceipt as contradiction:
                found = Finding("contradiction", str(contradiction))
                findings += [found] if found not in findings else []
        doubt = None if recount is None or signed is None else recount(signed.request, signed.response, here)
        if doubt is not None:
            findings.append(Finding("recount", doubt.reason))
        if len(findings) == 1:
            raise BadReceipt(f"evidence: nothing in it convinces others of: {self.reason}", fault=Fault.CLIENT)
        return findings

    def _signed_plaintexts(self, receipt: Verified[Receipt]) -> Proof | None:
        """The job's proof, if the provider signed for these plaintexts."""
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
    """Reads a file's bytes. Raises BadMessage."""
    raw = loads(data, "evidence")
    if not isinstance(raw, dict) or raw.get("tallystick") != FORMAT:
        what = "a proof, which shows that all was well" if isinstance(raw, dict) and raw.get("tallystick") == PROOF else "none"
        raise BadMessage(f'evidence: expected a JSON object with "tallystick": "{FORMAT}"; this is {what}')
    return EvidenceFile.from_json(raw)


def _delivered(proof: Proof) -> Delivery:
    """What the bytes are that the provider signed for."""
    head, body = split_request(proof.request)
    bounded = summarise(head.path, body, head.content_type).bounded
    sizes = len(body), sum(map(len, proof.response[1:]))
    return Delivery(*sizes, proof.receipt.message.result_commitment, finished=True, bounded=bounded)
