"""Checks the rows of evidence that came with an answer against the receipt, which commits to them. Pure.

Each chunk with rows was sealed in its place by the provider, so rows that do not fit the receipt are the provider's doing. Others
cannot see that: this client has the same key, and could have made up the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from tallystick.client.receipts.token_audit import AuditFinding
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.messages import Receipt
from tallystick.protocol.token_evidence import EvidenceRow, evidence_root, unpack_evidence
from tallystick.protocol.types import ZERO_HASH

MAX_ROW_BYTES = 35
"""Bytes of the longest row: a token and a count, and five tokens with their log-probabilities."""
ROWS_ALLOWANCE = 8
"""Rows of tokens beyond the ordered maximum, such as an end token."""


class EvidenceState(str, Enum):
    """What is known of an answer's evidence.

    `none`: the provider commits to none. `checked`: the rows are those that the receipt commits to. `not_sent`: the receipt
    commits to rows that did not come, for which the provider can be asked. `false`: the rows are not those of the receipt.
    """

    NONE = "none"
    CHECKED = "checked"
    NOT_SENT = "not_sent"
    FALSE = "false"


@dataclass(frozen=True, slots=True)
class AnswerEvidence:
    """The rows of an answer, `packed` as they came; none unless `state` is CHECKED. `reason`: what is wrong with false ones."""

    state: EvidenceState
    rows: tuple[EvidenceRow, ...] = ()
    packed: bytes = b""
    reason: str = ""

    @property
    def finding(self) -> AuditFinding | None:
        """The objection to a receipt whose evidence is false."""
        return AuditFinding(self.reason, refuse=True) if self.state is EvidenceState.FALSE else None


NO_EVIDENCE = AnswerEvidence(EvidenceState.NONE)


def most_bytes(max_output_tokens: int) -> int:
    """The most bytes of rows that an answer of this many tokens can have."""
    return (max_output_tokens + ROWS_ALLOWANCE) * MAX_ROW_BYTES


def check_rows(receipt: Receipt, packed: bytes | None, max_output_tokens: int) -> AnswerEvidence:
    """Checks rows as they came, `packed`, against their receipt; None for more bytes than `most_bytes`.

    Rows must be as many as were ordered at most, and have the root of the receipt.
    """
    if packed == b"":
        return NO_EVIDENCE if receipt.evidence_root == ZERO_HASH else AnswerEvidence(EvidenceState.NOT_SENT)
    try:
        rows = _read_rows(receipt, packed, max_output_tokens)
    except BadMessage as error:
        reason = f"the provider sent false evidence: {str(error).removeprefix('evidence: ')}"
        return AnswerEvidence(EvidenceState.FALSE, reason=reason)
    return AnswerEvidence(EvidenceState.CHECKED, rows, packed or b"")


def _read_rows(receipt: Receipt, packed: bytes | None, max_output_tokens: int) -> tuple[EvidenceRow, ...]:
    most = max_output_tokens + ROWS_ALLOWANCE
    if packed is None:
        raise BadMessage(f"expected rows of at most {most} tokens in at most {most_bytes(max_output_tokens)} bytes, got more")
    if receipt.evidence_root == ZERO_HASH:
        raise BadMessage("expected no rows, since the receipt commits to none, got some")
    rows = unpack_evidence(packed)
    if len(rows) > most:
        raise BadMessage(f"expected rows of at most {most} tokens, got {len(rows)}")
    if evidence_root(rows) != receipt.evidence_root:
        raise BadMessage(f"expected the rows that the receipt commits to, got {len(rows)} others")
    return rows
