"""Rows of evidence that came with an answer are those of its receipt, or count against its provider."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.client.receipts.answer_evidence import (
    MAX_ROW_BYTES,
    NO_EVIDENCE,
    ROWS_ALLOWANCE,
    AnswerEvidence,
    EvidenceState,
    check_rows,
    most_bytes,
)
from tallystick.protocol.token_evidence import MAX_TOKEN_ID, EvidenceRow, evidence_root, pack_evidence
from tallystick.protocol.types import ZERO_HASH, Address, Hash
from tests.builders import build_receipt

PAYER = Address("0x" + "11" * 20)
ROWS = tuple(EvidenceRow.of(n, [(n + 7 * i, -0.5 * i) for i in range(5)]) for n in range(10))
PACKED = pack_evidence(ROWS)


ROOT = evidence_root(ROWS)


def check(packed: bytes | None, root: Hash = ROOT, most: int = 100) -> AnswerEvidence:
    """The check against a receipt with this root."""
    return check_rows(build_receipt(PAYER, PAYER, evidence_root=root), packed, most)


def test_rows_of_the_receipt() -> None:
    """They are returned as rows and as they came, and are no objection."""
    evidence = check(PACKED)
    assert evidence == AnswerEvidence(EvidenceState.CHECKED, ROWS, PACKED)
    assert evidence.finding is None


def test_no_rows() -> None:
    """Without a commitment there is nothing to miss. Rows that the receipt commits to can be asked for later."""
    assert check(b"", ZERO_HASH) == NO_EVIDENCE
    assert check(b"") == AnswerEvidence(EvidenceState.NOT_SENT)
    assert check(b"").finding is check(b"", ZERO_HASH).finding is None


@pytest.mark.parametrize(
    ("packed", "root", "most", "problem"),
    [
        (PACKED, ZERO_HASH, 100, "expected no rows, since the receipt commits to none"),
        (PACKED, Hash(b"x" * 32), 100, "expected the rows that the receipt commits to, got 10 others"),
        (PACKED[:-1], evidence_root(ROWS), 100, "it ends within a row"),
        (PACKED + b"\x05", evidence_root(ROWS), 100, "it ends within a row"),
        (PACKED + b"\x05\x06", evidence_root(ROWS), 100, "it ends within a number"),
        (PACKED + b"\x05\xff" + b"\x01\0\0" * 6, evidence_root(ROWS), 100, "expected at most 5 tokens a position, got 6"),
        (PACKED + PACKED, evidence_root(ROWS), 100, "got 20 others"),
        (pack_evidence(ROWS[1:]), evidence_root(ROWS), 100, "got 9 others"),
        (pack_evidence(ROWS[::-1]), evidence_root(ROWS), 100, "got 10 others"),
        (PACKED, evidence_root(ROWS), 1, "expected rows of at most 9 tokens, got 10"),
        (None, evidence_root(ROWS), 1, "expected rows of at most 9 tokens in at most 315 bytes, got more"),
    ],
)
def test_false_rows(packed: bytes | None, root: Hash, most: int, problem: str) -> None:
    """Rows of another root, cut rows, rows that lie about their length, and too many: the objection says what is wrong."""
    evidence = check(packed, root, most)
    assert (evidence.state, evidence.rows, evidence.packed) == (EvidenceState.FALSE, (), b"")
    assert evidence.finding is not None
    assert evidence.finding.refuse
    assert evidence.finding.reason.startswith("the provider sent false evidence: ")
    assert problem in evidence.finding.reason


@given(st.binary(min_size=1, max_size=300))
def test_any_bytes_are_judged(packed: bytes) -> None:
    """Nothing that a provider sends is an error of this client."""
    assert check(packed).state is EvidenceState.FALSE


def test_the_longest_row() -> None:
    """An honest answer of the ordered length always fits."""
    longest = EvidenceRow(MAX_TOKEN_ID, tuple((MAX_TOKEN_ID - n, 1) for n in (4, 3, 2, 1, 0)))
    assert len(longest.pack()) == MAX_ROW_BYTES
    assert len(pack_evidence([longest] * (100 + ROWS_ALLOWANCE))) == most_bytes(100)
