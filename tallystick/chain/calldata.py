"""What settlement transactions say: orders and claims in calldata that anyone may have written. Pure.

Nothing in it is believed for its place. An order counts since its payer signed it, a claim since its provider did, wherever they
stand: in a call of the escrow, or in the call of a wallet or a multicall that makes that call.
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
"""Bytes that are looked at: a transaction of 2^24 gas has no more."""
MAX_ROWS = 20_000
"""Rows that are hashed to find the claims of one call. Claims can overlap in calldata, so its size alone is no bound."""
MAX_SIGNATURES = 1_024
"""Signatures that are checked in one call."""
_WORD = 32
_ROW = ROW_WORDS * _WORD


@dataclass(frozen=True, slots=True)
class CalldataOrder:
    """An order that its payer signed, and the total that a provider collected on it, as of its receipt `seq`."""

    order: Verified[Order]
    row: SettleRow


@dataclass(frozen=True, slots=True)
class CalldataClaim:
    """A claim that its provider signed, with the orders that it stands on."""

    claim: Verified[Claim]
    batch: ClaimBatch

    @classmethod
    def of(cls, batch: ClaimBatch, domain: Domain) -> Self:
        """Checks the provider's signature. Raises BadSignature."""
        return cls(Signed(batch.claim(domain), batch.signature).verify(domain), batch)


def find_orders(data: bytes, payer: Address, provider: Address, domain: Domain) -> Iterator[CalldataOrder]:
    """Every order for this provider in calldata that this payer signed, in their places' order.

    A row begins with its payer, so each place of the payer's address may be a row. Only signatures that verify count.
    """
    tried = 0
    for place in _places(data[:MAX_CALLDATA], bytes.fromhex(payer[2:])):
        raw = data[place : place + _ROW]
        if len(raw) < _ROW or tried == MAX_SIGNATURES:
            return
        tried += 1
        row = SettleRow.decode(provider, raw)
        try:
            yield CalldataOrder(row.order.verify(domain), row)
        except BadSignature:
            continue  # another provider's order, or only the address


def find_claims(data: bytes, provider: Address, payer: Address, domain: Domain) -> Iterator[CalldataClaim]:
    """Every claim in calldata that this provider signed and that has a row of this payer.

    Tuples are read as the contract reads them, which takes any offset, backwards too. Each place of the provider's address may
    begin one; claims further on are left out once MAX_ROWS rows were hashed.
    """
    data, wanted = data[:MAX_CALLDATA], bytes.fromhex(payer[2:])
    seen, rows_left = set[tuple[int, int, int]](), MAX_ROWS
    for place in _places(data, bytes.fromhex(provider[2:]).rjust(_WORD, b"\0")):
        rows_at, count = _tail(data, place, place + _WORD)
        signature_at, size = _tail(data, place, place + 2 * _WORD)
        key = rows_at, count, signature_at
        if size != 65 or rows_at + count * _ROW > len(data) or key in seen:
            continue
        if data.find(wanted, rows_at, rows_at + count * _ROW) < 0:
            continue
        if count > rows_left or len(seen) == MAX_SIGNATURES:
            return
        seen.add(key)
        rows_left -= count
        starts = range(rows_at, rows_at + count * _ROW, _ROW)
        rows = tuple(SettleRow.decode(provider, data[at : at + _ROW]) for at in starts)
        batch = ClaimBatch(provider, rows, data[signature_at : signature_at + size].ljust(size, b"\0"))
        try:
            found = CalldataClaim.of(batch, domain)
        except BadSignature:
            continue
        if any(row.payer == payer for row in found.claim.message.rows):
            yield found


def _places(data: bytes, wanted: bytes) -> Iterator[int]:
    at = data.find(wanted)
    while at >= 0:
        yield at
        at = data.find(wanted, at + 1)


def _tail(data: bytes, base: int, head: int) -> tuple[int, int]:
    """Where a dynamic member of the tuple at `base` begins, and how long it says it is. (0, 0) where that is outside."""
    at = base + int.from_bytes(_word(data, head), "big", signed=True)
    if not 0 <= at < len(data):
        return 0, 0
    return at + _WORD, int.from_bytes(_word(data, at), "big")


def _word(data: bytes, at: int) -> bytes:
    """Past its end calldata is zeros."""
    return data[at : at + _WORD].ljust(_WORD, b"\0")
