"""What a node keeps of each token of an answer, so that the answer can be audited: the token and the engine's five best ones.

The receipt commits to it (`evidence_root`, a Merkle root over `leaf`), before anybody knows whether the job is audited.
In its compact form a token takes about 30 bytes: rows of consecutive positions, each `token ‖ count ‖ count * (token ‖ uint16)`.
Tokens are unsigned LEB128 numbers; the uint16 are log-probabilities in thousandths of a nat below zero. There is one encoding of
given rows.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.merkle import EMPTY_ROOT, Edge, leaf_hash
from tallystick.protocol.types import ZERO_HASH, Hash

TOP = 5
"""Most probable tokens that are kept of a position."""
MAX_TOKENS = 1 << 20
"""Positions of an answer that can have evidence."""
MAX_TOKEN_ID = (1 << 28) - 1
MAX_MILLINATS = (1 << 16) - 1
"""A log-probability below -65.535 is kept as this."""
_ROUNDED_UP = 1e-3
"""The most that a log-probability may be, since engines round. Not-a-number is not below it."""
_COUNTS = tuple(bytes((count,)) for count in range(TOP + 1))
_LEAF = struct.Struct(">I")

Top = tuple[tuple[int, int], ...]
"""Tokens with their log-probabilities, in thousandths of a nat below zero; the most probable first, then by token."""


@dataclass(frozen=True, slots=True)
class EvidenceRow:
    """One position of an answer: the token that was returned, and the engine's most probable ones.

    Raises BadMessage for numbers out of range, for more than TOP tokens, and for tokens that are not in order.
    """

    token: int
    top: Top

    def __post_init__(self) -> None:
        if len(self.top) > TOP:
            raise BadMessage(f"evidence: expected at most {TOP} tokens a position, got {len(self.top)}")
        for token in (self.token, *(token for token, _ in self.top)):
            if not 0 <= token <= MAX_TOKEN_ID:
                raise BadMessage(f"evidence: expected a token from 0 to {MAX_TOKEN_ID}, got {token}")
        if not all(0 <= size <= MAX_MILLINATS for _, size in self.top):
            raise BadMessage(f"evidence: expected log-probabilities from 0 to {MAX_MILLINATS} thousandths of a nat below zero")
        order = [(size, token) for token, size in self.top]
        if order != sorted(order) or len({token for token, _ in self.top}) < len(self.top):
            raise BadMessage("evidence: expected the most probable tokens first, each once")

    @classmethod
    def of(cls, token: int, logprobs: Iterable[tuple[int, float]]) -> EvidenceRow:
        """Of what an engine reports: natural logarithms of probabilities by token. Keeps the TOP best. Raises BadMessage."""
        best: dict[int, int] = {}
        for other, logprob in logprobs:
            if not logprob <= _ROUNDED_UP:
                raise BadMessage(f"evidence: expected a log-probability of at most 0, got {logprob}")
            best.setdefault(other, round(min(-min(logprob, 0.0), MAX_MILLINATS / 1_000) * 1_000))
        ordered = sorted((size, other) for other, size in best.items())[:TOP]
        return cls(token, tuple((other, size) for size, other in ordered))

    def pack(self) -> bytes:
        """The row in its compact form."""
        packed = bytearray()
        _write_number(packed, self.token)
        packed.append(len(self.top))
        for token, size in self.top:
            _write_number(packed, token)
            packed += size.to_bytes(2, "big")
        return bytes(packed)


def pack_evidence(rows: Sequence[EvidenceRow]) -> bytes:
    """The rows of all positions of an answer, from its first token on."""
    return b"".join(row.pack() for row in rows)


def unpack_evidence(data: bytes) -> tuple[EvidenceRow, ...]:
    """Reads packed rows. Raises BadMessage for anything that `pack_evidence` does not write."""
    rows, at = list[EvidenceRow](), 0
    while at < len(data):
        if len(rows) == MAX_TOKENS:
            raise BadMessage(f"evidence: expected at most {MAX_TOKENS} tokens")
        token, at = _read_number(data, at)
        if at >= len(data):
            raise BadMessage("evidence: it ends within a row")
        count, at = data[at], at + 1
        top = []
        for _ in range(min(count, TOP + 1)):
            other, at = _read_number(data, at)
            if at + 2 > len(data):
                raise BadMessage("evidence: it ends within a row")
            top.append((other, int.from_bytes(data[at : at + 2], "big")))
            at += 2
        rows.append(EvidenceRow(token, tuple(top)))
    return tuple(rows)


def pack_report(token: int, logprobs: Iterable[tuple[int, float]]) -> bytes:
    """The packed row of what an engine reports: `EvidenceRow.of(…).pack()`, but faster. Raises BadMessage."""
    best: dict[int, int] = {}
    for other, logprob in logprobs:
        if not logprob <= _ROUNDED_UP:
            raise BadMessage(f"evidence: expected a log-probability of at most 0, got {logprob}")
        if other not in best:
            best[other] = round(min(-logprob, MAX_MILLINATS / 1_000) * 1_000) if logprob < 0 else 0
    ordered = sorted(zip(best.values(), best, strict=True))[:TOP]
    parts = [_number_bytes(token), _COUNTS[len(ordered)]]
    for size, other in ordered:
        parts += (_number_bytes(other), size.to_bytes(2, "big"))
    return b"".join(parts)


@lru_cache(1 << 14)
def _number_bytes(number: int) -> bytes:
    if not 0 <= number <= MAX_TOKEN_ID:
        raise BadMessage(f"evidence: expected a token from 0 to {MAX_TOKEN_ID}, got {number}")
    packed = bytearray()
    _write_number(packed, number)
    return bytes(packed)


class EvidenceBuilder:
    """Packs the rows of an answer as it is generated, and keeps their Merkle root up to date."""

    def __init__(self) -> None:
        self.packed = bytearray()
        self.count = 0
        self._edge = Edge()

    @property
    def root(self) -> Hash:
        """The `evidence_root` of the rows so far; zero without any."""
        return self._edge.root() if self.count else ZERO_HASH

    def add(self, token: int, logprobs: Iterable[tuple[int, float]]) -> None:
        """Adds the row of the next position; see `EvidenceRow.of`. Raises BadMessage."""
        if self.count == MAX_TOKENS:
            raise BadMessage(f"evidence: expected at most {MAX_TOKENS} tokens")
        row = pack_report(token, logprobs)
        self._edge.append(leaf_hash(_LEAF.pack(self.count) + row))
        self.packed += row
        self.count += 1


def leaf(position: int, row: EvidenceRow) -> bytes:
    """The data of a row's leaf. It names its position, so no row passes for another one."""
    return _LEAF.pack(position) + row.pack()


def evidence_root(rows: Sequence[EvidenceRow]) -> Hash:
    """The `evidence_root` of a receipt: the Merkle root over the leaves, or zero without rows."""
    edge = Edge()
    for position, row in enumerate(rows):
        edge.append(leaf_hash(leaf(position, row)))
    root = edge.root()
    return ZERO_HASH if root == EMPTY_ROOT or not rows else root


def _write_number(packed: bytearray, number: int) -> None:
    while number > 0x7F:
        packed.append(number & 0x7F | 0x80)
        number >>= 7
    packed.append(number)


def _read_number(data: bytes, at: int) -> tuple[int, int]:
    """A number and where the next byte is. Raises BadMessage if it is cut, too large, or written with needless bytes."""
    number = shift = 0
    while True:
        if at >= len(data):
            raise BadMessage("evidence: it ends within a number")
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte <= 0x7F:
            if byte == 0 and shift:
                raise BadMessage("evidence: a number has needless bytes")
            return number, at
        shift += 7
        if shift > 21:
            raise BadMessage(f"evidence: expected numbers of at most {MAX_TOKEN_ID}")
