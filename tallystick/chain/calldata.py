"""Search of settlement calldata for signed orders and claims. Pure.

Calldata is untrusted. An order counts because its payer signed it, and a claim because its provider signed it. Both are found in
a call of the escrow, and in a call of a wallet or multicall contract that makes that call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from tallystick.chain.claims import ROW_WORDS, ClaimBatch, SettleRow
from tallystick.protocol.eip712 import Domain, Signed, Verified
from tallystick.protocol.errors import BadSignature
from tallystick.protocol.messages import Claim, Order
from tallystick.protocol.types import Address

MAX_CALLDATA = 4 * 1024 * 1024
"""Bytes that are searched. A transaction of 2^24 gas has no more."""
MAX_ROWS = 20_000
"""Rows that are hashed in a search for claims. Claims can overlap in calldata, so its size alone does not bound them."""
MAX_SIGNATURES = 1_024
"""Signatures that are checked in one search."""
_WORD = 32
_ROW = ROW_WORDS * _WORD


@dataclass(frozen=True, slots=True)
class CalldataOrder:
    """An order that its payer signed, and the row in which the provider collected on it."""

    order: Verified[Order]
    row: SettleRow


@dataclass(frozen=True, slots=True)
class CalldataClaim:
    """A claim that its provider signed, with the orders of its rows."""

    claim: Verified[Claim]
    batch: ClaimBatch

    @classmethod
    def of(cls, batch: ClaimBatch, domain: Domain) -> Self:
        """Checks the provider's signature. Raises BadSignature."""
        return cls(Signed(batch.claim(domain), batch.signature).verify(domain), batch)


def find_orders(data: bytes, payer: Address, provider: Address, domain: Domain) -> Iterator[CalldataOrder]:
    """Yields each order on this provider in calldata that this payer signed, in the order of their positions.

    A row begins with its payer, so each occurrence of the payer's address may be a row. Only rows whose signature verifies count.
    """
    checked = 0
    for place in _occurrences(data[:MAX_CALLDATA], bytes.fromhex(payer[2:])):
        raw = data[place : place + _ROW]
        if len(raw) < _ROW or checked == MAX_SIGNATURES:
            return
        checked += 1
        row = SettleRow.decode(provider, raw)
        try:
            yield CalldataOrder(row.order.verify(domain), row)
        except BadSignature:
            continue  # an order on another provider, or only the address


def find_claims(data: bytes, provider: Address, payer: Address, domain: Domain) -> Iterator[CalldataClaim]:
    """Yields each claim in calldata that this provider signed and that has a row of this payer.

    Each occurrence of the provider's address may begin a claim. Tuples are decoded as the contract decodes them, which follows
    any offset, also backwards. The search ends once MAX_ROWS rows were hashed.
    """
    data, needle = data[:MAX_CALLDATA], bytes.fromhex(payer[2:])
    seen, rows_left = set[tuple[int, int, int]](), MAX_ROWS
    for place in _occurrences(data, bytes.fromhex(provider[2:]).rjust(_WORD, b"\0")):
        rows_at, count = _tail(data, place, place + _WORD)
        signature_at, size = _tail(data, place, place + 2 * _WORD)
        key = rows_at, count, signature_at
        if size != 65 or rows_at + count * _ROW > len(data) or key in seen:
            continue
        if data.find(needle, rows_at, rows_at + count * _ROW) < 0:
            continue
        if count > rows_left or len(seen) == MAX_SIGNATURES:
            return
        seen.add(key)
        rows_left -= count
        starts = range(rows_at, rows_at + count * _ROW, _ROW)
        rows = tuple(SettleRow.decode(provider, data[at : at + _ROW]) for at in starts)
        batch = ClaimBatch(provider, rows, data[signature_at : signature_at + size].ljust(size, b"\0"))
        try:
            claim = CalldataClaim.of(batch, domain)
        except BadSignature:
            continue
        if any(row.payer == payer for row in claim.claim.message.rows):
            yield claim


def _occurrences(data: bytes, needle: bytes) -> Iterator[int]:
    at = data.find(needle)
    while at >= 0:
        yield at
        at = data.find(needle, at + 1)


def _tail(data: bytes, base: int, head: int) -> tuple[int, int]:
    """The start and the declared length of a dynamic member of the tuple at `base`; (0, 0) if the start is outside the data."""
    at = base + int.from_bytes(_word(data, head), "big", signed=True)
    if not 0 <= at < len(data):
        return 0, 0
    return at + _WORD, int.from_bytes(_word(data, at), "big")


def _word(data: bytes, at: int) -> bytes:
    """The word at a position. Calldata is zero past its end."""
    return data[at : at + _WORD].ljust(_WORD, b"\0")
