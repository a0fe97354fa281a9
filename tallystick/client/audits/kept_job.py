"""A job that is kept so that it can be audited: its proof, the evidence that came with its answer, and who may see it. Pure."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from tallystick.client.audit_settings import PromptConsent
from tallystick.client.openai.answers import read_events
from tallystick.client.receipts.proof import Proof
from tallystick.protocol.eip712 import Domain, Signed, read_signed_bytes
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.lenient_json import parse_lenient
from tallystick.protocol.messages import UNKNOWN, Ask, Order, Receipt, Terms
from tallystick.protocol.plaintext_heads import load_response_head, split_request
from tallystick.protocol.precisions import precision_class
from tallystick.protocol.routes import CHAT, COMPLETIONS, media_type
from tallystick.protocol.sse import EVENT_STREAM
from tallystick.protocol.token_evidence import EvidenceRow, unpack_evidence
from tallystick.protocol.types import ZERO_HASH, Address, JobId, parse_address

AUDITABLE_ROUTES = (CHAT, COMPLETIONS)
"""Routes whose answers are text that a model wrote."""
_SIZE = struct.Struct(">I")
_VERSION = 1


@dataclass(frozen=True, slots=True)
class KeptJob:
    """A job with its plaintexts. `evidence`: the packed rows that its provider committed to; empty without.

    `ask`: the ask that it was ordered on, if it is known. `synthetic`: this client made the request up. `kept_at` is in Unix
    seconds.
    """

    proof: Proof
    evidence: bytes = field(repr=False)
    ask: Signed[Ask] | None
    label: str
    consent: PromptConsent
    kept_at: int
    synthetic: bool = False

    @property
    def job(self) -> JobId:
        """The job's id."""
        return self.proof.terms.job

    @property
    def provider(self) -> Address:
        """The provider that answered."""
        return self.proof.receipt.message.provider

    @property
    def model(self) -> str:
        """The model that was sold."""
        return self.proof.terms.model

    @property
    def precision(self) -> str:
        """The precision class that was sold; "unknown" if its ask does not say."""
        return UNKNOWN if self.ask is None else precision_class(self.ask.message.spec.precision)

    @property
    def has_root(self) -> bool:
        """Whether the receipt commits to evidence."""
        return self.proof.receipt.message.evidence_root != ZERO_HASH

    @property
    def rows(self) -> tuple[EvidenceRow, ...]:
        """What the provider committed to of each token; none without evidence. Raises BadMessage."""
        return unpack_evidence(self.evidence)

    def request(self) -> tuple[str, dict[str, Any]]:
        """The route and the JSON body. Raises BadMessage for a body that is no JSON object."""
        head, body = split_request(self.proof.request)
        document = parse_lenient(body, "request")
        if not isinstance(document, dict):
            raise BadMessage("request: expected a JSON object")
        return head.path, document

    def pack(self, asks: dict[bytes, bytes] | None = None) -> bytes:
        """The job's bytes for a file. `asks`: the bytes of asks by their signature, which are slow to make; it is added to."""
        proof, ask = self.proof, b""
        if self.ask is not None:
            known = {} if asks is None else asks
            ask = known.get(self.ask.signature) or Signed(self.ask.message, self.ask.signature).to_bytes()
            known[self.ask.signature] = ask
        members = {
            "v": _VERSION,
            "chain": proof.domain.chain_id,
            "contract": proof.domain.contract,
            "label": self.label,
            "share": self.consent.may_share,
            "private": self.consent.private,
            "at": self.kept_at,
            "synthetic": self.synthetic,
        }
        parts = (
            orjson.dumps(members),
            proof.order.to_bytes(),
            proof.terms.to_bytes(),
            proof.receipt.to_bytes(),
            proof.commitment_key,
            proof.request,
            self.evidence,
            ask,
            *proof.response,
        )
        return b"".join(_SIZE.pack(len(part)) + part for part in parts)

    @classmethod
    def unpack(cls, data: bytes) -> KeptJob:
        """Reads what `pack` returns. Raises BadMessage."""
        members, order, terms, receipt, key, request, evidence, ask, *response = _split(data)
        try:
            raw = orjson.loads(members)
            domain = Domain(int(raw["chain"]), parse_address(raw["contract"], "kept job"))
            proof = Proof(
                domain,
                read_signed_bytes(Order, order),
                Terms.from_bytes(terms),
                read_signed_bytes(Receipt, receipt),
                key,
                request,
                tuple(response),
            )
            consent = PromptConsent(may_share=raw["share"], private=raw["private"])
            sold = read_signed_bytes(Ask, ask) if ask else None
            return cls(proof, evidence, sold, raw["label"], consent, int(raw["at"]), raw["synthetic"])
        except (KeyError, TypeError, ValueError) as error:
            raise BadMessage(f"kept job: {error}") from None


def _split(data: bytes) -> Sequence[bytes]:
    parts, at = list[bytes](), 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        part, at = data[at + 4 : at + 4 + size], at + 4 + size
        if at > len(data):
            raise BadMessage("kept job: it is cut off")
        parts.append(part)
    if len(parts) < 8:
        raise BadMessage(f"kept job: expected at least 8 parts, got {len(parts)}")
    return parts


@dataclass(frozen=True, slots=True)
class AnswerText:
    """The one choice of an answer. `finish`: why it ended, by its provider; empty if it does not say."""

    text: str
    finish: str


def read_answer(response: Sequence[bytes]) -> AnswerText | None:
    """The answer of a chat or completion with one choice and text only. None for errors, tool calls and other forms."""
    try:
        head = load_response_head(response[0])
        body = b"".join(response[1:])
        documents = read_events(body) if media_type(head.content_type) == EVENT_STREAM else [body]
        parts, finish = list[str](), ""
        for document in documents:
            for choice in parse_lenient(document, "answer").get("choices") or ():
                message = choice.get("message") or choice.get("delta") or {}
                if choice.get("index") or message.get("tool_calls") or message.get("function_call"):
                    return None
                if message.get("reasoning_content") or message.get("reasoning"):
                    return None
                parts.append(message.get("content") or choice.get("text") or "")
                finish = choice.get("finish_reason") or finish
        return AnswerText(_readable("".join(parts)), str(finish)) if head.status == 200 and parts else None
    except (BadMessage, AttributeError, IndexError, TypeError, ValueError):
        return None


def _readable(text: str) -> str:
    """A text that any tokenizer reads: the two halves of a character that were apart are joined, a lone one becomes U+FFFD.

    JSON can spell one half of a UTF-16 pair. Engines refuse such a text, so it must not exempt an answer from audits.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
