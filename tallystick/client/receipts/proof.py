"""Proof files: a job that its payer can prove to anyone. A proof file is one JSON object:

    tallystick         "proof/1"
    chainId, contract  the deployment that the signatures bind
    order, receipt     {"message", "signature"}, as on the wire
    terms              the terms that the order commits to
    commitmentKey      hex; it lets a reader confirm guesses of the plaintexts, so share it only as part of this file
    request            base64 of the sealed request's plaintext: its head and body
    response           list of base64: the plaintext chunks of the answer in order; the first is the response head
    evidence           base64: the packed rows of evidence that came with the answer (token_evidence.py); absent without

Creating and checking a proof needs no network, clock or ledger file.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from typing import Any

from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.receipts.answer_evidence import EvidenceState, check_rows
from tallystick.client.receipts.price_check import check_against_order
from tallystick.protocol.eip712 import Domain, Signed, read_signed
from tallystick.protocol.errors import BadMessage, BadReceipt, TallyError
from tallystick.protocol.messages import Order, Outcome, Receipt, Terms
from tallystick.protocol.plaintext_heads import load_response_head, split_request
from tallystick.protocol.sealing import Transcript, commit_request
from tallystick.protocol.types import format_amount, parse_address
from tallystick.protocol.wire import dumps, loads

FORMAT = "proof/1"
MAX_BYTES = 256 * 1024 * 1024
"""Largest proof file that is read, in bytes."""

_NAMES = {"tallystick", "chainId", "contract", "order", "terms", "receipt", "commitmentKey", "request", "response"}
_OPTIONAL = {"evidence"}
_WHOLE = (Outcome.COMPLETED, Outcome.LENGTH)


@dataclass(frozen=True, slots=True)
class Finding:
    """The name of a check, and its result in words."""

    check: str
    found: str


@dataclass(frozen=True, slots=True)
class Proof:
    """The contents of a proof file; see the module's docstring. `request`, `response` and `evidence` are plaintext."""

    domain: Domain
    order: Signed[Order]
    terms: Terms
    receipt: Signed[Receipt]
    commitment_key: bytes = field(repr=False)
    request: bytes = field(repr=False)
    response: tuple[bytes, ...] = field(repr=False)
    evidence: bytes = field(default=b"", repr=False)

    def dumps(self) -> bytes:
        """The file's bytes."""
        return dumps(
            {
                "tallystick": FORMAT,
                "chainId": self.domain.chain_id,
                "contract": self.domain.contract,
                "order": self.order.to_json(),
                "terms": self.terms.to_json(),
                "receipt": self.receipt.to_json(),
                "commitmentKey": self.commitment_key.hex(),
                "request": _encode(self.request),
                "response": [_encode(chunk) for chunk in self.response],
                **({"evidence": _encode(self.evidence)} if self.evidence else {}),
            }
        )

    @classmethod
    def loads(cls, data: bytes) -> Proof:
        """Reads a file's bytes. Raises BadMessage, which names the invalid member."""
        raw = loads(data, "proof")
        if not isinstance(raw, dict) or raw.get("tallystick") != FORMAT:
            raise BadMessage(f'proof: expected a JSON object with "tallystick": "{FORMAT}"')
        if raw.keys() - _OPTIONAL != _NAMES:
            raise BadMessage(f"proof: expected the members {', '.join(sorted(_NAMES))}; got {', '.join(sorted(raw))[:300]}")
        chain = raw["chainId"]
        if isinstance(chain, bool) or not isinstance(chain, int) or not 0 < chain < 1 << 63:
            raise BadMessage(f"proof.chainId: expected a whole number above 0, got {str(chain)[:80]!r}")
        if not isinstance(raw["response"], list):
            raise BadMessage(f"proof.response: expected a list, got {type(raw['response']).__name__}")
        return cls(
            domain=Domain(chain, parse_address(raw["contract"], "proof.contract")),
            order=read_signed(Order, raw["order"], "proof.order"),
            terms=Terms.from_json(raw["terms"], "proof.terms"),
            receipt=read_signed(Receipt, raw["receipt"], "proof.receipt"),
            commitment_key=_key(raw["commitmentKey"]),
            request=_decode(raw["request"], "proof.request"),
            response=tuple(_decode(chunk, f"proof.response[{n}]") for n, chunk in enumerate(raw["response"])),
            evidence=_decode(raw.get("evidence", ""), "proof.evidence"),
        )

    def text(self) -> tuple[str, str]:
        """Returns the bodies of request and answer, decoded as UTF-8; undecodable bytes are replaced."""
        _, body = split_request(self.request)
        return body.decode("utf-8", "replace"), b"".join(self.response[1:]).decode("utf-8", "replace")

    def check(self) -> list[Finding]:
        """Checks everything that can be checked offline, and returns the findings in order.

        Raises BadSignature, BadMessage or BadReceipt for the first check that fails.
        """
        order = self.order.verify(self.domain)
        receipt = self.receipt.verify(self.domain)
        message, terms = receipt.message, self.terms
        where = f"chain {self.domain.chain_id}, contract {self.domain.contract}"
        findings = [Finding("order", f"signed by the payer {order.message.payer}, for {where}")]
        if order.message.terms_hash != terms.struct_hash():
            raise BadMessage("proof.terms: expected the terms that the order commits to, got others")
        findings.append(Finding("terms", f"as ordered: {terms.model}, at most {format_amount(terms.max_cost)} dollars"))
        if commit_request(self.commitment_key, terms.job, self.request) != terms.request_commitment:
            raise BadMessage("proof.request: expected the request that the order commits to, got another one (or another key)")
        head, body = split_request(self.request)
        findings.append(Finding("request", f"as ordered: {len(body)} bytes to {head.path}"))
        findings.append(Finding("receipt", f"signed by the provider {message.provider}, for this order"))
        check_against_order(PlacedOrder(order, terms), message, None)
        bill = f"{message.input_tokens} + {message.output_tokens} tokens cost {format_amount(message.cost)} dollars"
        findings.append(Finding("price", f"{bill}, by the prices of the terms"))
        return [*findings, self._transcript(message), *self._evidence(message)]

    def _evidence(self, receipt: Receipt) -> list[Finding]:
        """What is found of the rows of evidence; nothing if the receipt commits to none. Raises BadReceipt for false ones."""
        evidence = check_rows(receipt, self.evidence, self.terms.max_output_tokens)
        if evidence.state is EvidenceState.FALSE:
            raise BadReceipt(f"proof.evidence: {evidence.reason}")
        if evidence.state is EvidenceState.NOT_SENT:
            return [Finding("evidence", "the receipt commits to rows that are not in this file")]
        return [Finding("evidence", f"rows of {len(evidence.rows)} tokens, as the provider signed")] if evidence.rows else []

    def _transcript(self, receipt: Receipt) -> Finding:
        transcript = Transcript(self.commitment_key, receipt.order_hash)
        for chunk in self.response:
            transcript.add(chunk)
        if transcript.commitment != receipt.result_commitment:
            raise BadReceipt(
                f"proof.response: expected the answer that the receipt commits to, got {len(self.response)} chunks of another "
                "(an answer that was cut off lacks its end)"
            )
        size = sum(map(len, self.response[1:]))
        outcome = Outcome(receipt.outcome)
        kind = "the whole answer" if outcome in _WHOLE else f"a partial answer ({outcome.name.lower()})"
        status = f" with status {load_response_head(self.response[0]).status}" if self.response else ""
        return Finding("transcript", f"{kind}{status}: {len(self.response)} chunks, {size} bytes, as the provider signed")


def describe(proof: Proof, findings: list[Finding]) -> dict[str, Any]:
    """Describes a checked proof as one JSON document."""
    receipt = proof.receipt.message
    return {
        "valid": True,
        "job": proof.terms.job.hex(),
        "payer": receipt.payer,
        "provider": receipt.provider,
        "model": proof.terms.model,
        "outcome": Outcome(receipt.outcome).name.lower(),
        "whole": receipt.outcome in _WHOLE,
        "cost": str(int(receipt.cost)),
        "orderHash": "0x" + receipt.order_hash.hex(),
        "receiptHash": "0x" + receipt.digest(proof.domain).hex(),
        "checks": {finding.check: finding.found for finding in findings},
    }


def read_proof(data: bytes) -> Proof:
    """Reads the bytes of a proof file; see Proof.loads. Raises BadMessage, also for a file larger than MAX_BYTES."""
    if len(data) > MAX_BYTES:
        raise BadMessage(f"proof: expected at most {MAX_BYTES} bytes, got {len(data)}")
    try:
        return Proof.loads(data)
    except TallyError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise BadMessage(f"proof: {error}") from None


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decode(raw: object, member: str) -> bytes:
    try:
        return base64.b64decode(raw if isinstance(raw, str) else "?", validate=True)
    except (binascii.Error, ValueError):
        raise BadMessage(f"{member}: expected base64") from None


def _key(raw: object) -> bytes:
    try:
        key = bytes.fromhex(raw if isinstance(raw, str) else "?")
    except ValueError:
        key = b""
    if len(key) != 32:
        raise BadMessage("proof.commitmentKey: expected 64 hex digits")
    return key
