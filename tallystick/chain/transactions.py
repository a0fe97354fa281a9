"""EIP-1559 transactions in their EIP-2718 envelope: calls, fees, nonces, encoding (RLP) and signing. Pure.

A replacement pays at least a tenth more than the transaction that it replaces, as nodes require.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Union

from tallystick.protocol.codecs import keccak
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.types import Address

_TYPE = b"\x02"
_Item = Union[int, bytes, Sequence["_Item"]]  # noqa: UP007 - an alias that names itself cannot have the operator
_SHORT_BYTES, _SHORT_LIST, _LONG = 0x80, 0xC0, 56
"""RLP's heads of bytes and of lists that are shorter than _LONG."""


@dataclass(frozen=True, slots=True)
class Call:
    """The call that a transaction makes. `to` None creates a contract; `value` is in wei."""

    sender: Address
    to: Address | None
    data: bytes
    value: int = 0

    def to_json(self) -> dict[str, str]:
        """The call as a JSON-RPC call object."""
        fields = {"from": self.sender, "data": "0x" + self.data.hex(), "value": hex(self.value)}
        return fields | ({"to": self.to} if self.to else {})


@dataclass(frozen=True, slots=True)
class Fees:
    """Fees in wei per unit of gas: the tip for the block producer, and the maximum in all."""

    tip: int
    maximum: int

    def raised(self, fresh: Fees) -> Fees:
        """The fees of a replacement: a tenth more of both, or the market's present fees if they are higher."""
        return Fees(max(fresh.tip, _tenth_more(self.tip)), max(fresh.maximum, _tenth_more(self.maximum)))

    def capped(self, limit: int | None) -> Fees:
        """The fees, at most `limit` in all."""
        return self if limit is None or self.maximum <= limit else Fees(min(self.tip, limit), limit)


def _tenth_more(wei: int) -> int:
    return wei + wei // 10 + 1


@dataclass(frozen=True, slots=True)
class SignedTransaction:
    """A signed transaction: its hash and its bytes, both as hex."""

    hash: str
    raw: str


def sign(signer: Signer, call: Call, *, chain_id: int, nonce: int, gas: int, fees: Fees) -> SignedTransaction:
    """Signs an EIP-1559 transaction. `gas` is its gas limit."""
    to = bytes.fromhex(call.to[2:]) if call.to else b""
    body: list[_Item] = [chain_id, nonce, fees.tip, fees.maximum, gas, to, call.value, call.data, []]
    signature = signer.sign_digest(keccak(_TYPE + _rlp(body)))
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:64], "big")
    raw = _TYPE + _rlp([*body, signature[64] - 27, r, s])
    return SignedTransaction("0x" + keccak(raw).hex(), "0x" + raw.hex())


def _rlp(item: _Item) -> bytes:
    """Encodes numbers, bytes and lists. The package rlp does too, and takes 7 MiB of a daemon with what it imports.

    https://ethereum.org/en/developers/docs/data-structures-and-encoding/rlp/
    """
    if isinstance(item, int):
        item = item.to_bytes((item.bit_length() + 7) // 8, "big")
    if isinstance(item, bytes):
        return item if len(item) == 1 and item[0] < _SHORT_BYTES else _rlp_head(_SHORT_BYTES, len(item)) + item
    content = b"".join(map(_rlp, item))
    return _rlp_head(_SHORT_LIST, len(content)) + content


def _rlp_head(kind: int, size: int) -> bytes:
    if size < _LONG:
        return bytes([kind + size])
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([kind + _LONG - 1 + len(length)]) + length


@dataclass
class Nonces:
    """The nonces of one account that are in use. The lowest free nonce is used first, so no transaction waits behind a gap."""

    _in_flight: set[int] = field(default_factory=set)
    _abandoned: dict[int, Fees] = field(default_factory=dict)
    _unfollowed: dict[int, Fees] = field(default_factory=dict)
    floor: int = 0
    """The last nonce seen in a block, plus one."""

    def take(self, pending: int, busy: Collection[int] = ()) -> int:
        """Reserves the nonce of the next transaction. `pending` is the chain's count; nonces in `busy` are used by others."""
        nonce = max(pending, self.floor)
        while nonce in self._in_flight or nonce in busy:
            nonce += 1
        nonce = min([nonce, *(n for n in self._abandoned if n not in busy)])
        self._in_flight.add(nonce)
        return nonce

    def pop_abandoned_fees(self, nonce: int) -> Fees | None:
        """The fees of the abandoned transaction with this nonce, which may still be pending; None if there is none."""
        return self._abandoned.pop(nonce, None)

    def release(self, nonce: int) -> None:
        """Frees a nonce that was not used."""
        self._in_flight.discard(nonce)

    def leave(self, nonce: int, fees: Fees) -> None:
        """Records that the transaction with this nonce was sent and that nobody waits for it any more. It may still be mined."""
        self._in_flight.discard(nonce)
        self._unfollowed[nonce] = fees

    def after_unfollowed(self, count: int) -> int:
        """The next nonce of an account with `count` transactions in blocks, whose endpoint does not count pending ones."""
        self._unfollowed = {nonce: fees for nonce, fees in self._unfollowed.items() if nonce >= count}
        while count in self._unfollowed:
            count += 1
        return count

    def mark_mined(self, nonce: int) -> None:
        """Records that a transaction with this nonce is in a block."""
        self._in_flight.discard(nonce)
        self.floor = max(self.floor, nonce + 1)

    def abandon(self, nonce: int, fees: Fees) -> None:
        """Records that the transaction with this nonce was not mined in time. The next transaction reuses the nonce.

        So are nonces below it that nobody follows: their transactions were lost too, or this one would have been mined.
        """
        self._in_flight.discard(nonce)
        lost = {lower: sent for lower, sent in self._unfollowed.items() if lower < nonce}
        self._unfollowed = {other: sent for other, sent in self._unfollowed.items() if other not in lost}
        self._abandoned |= lost | {nonce: fees}

    def lower_floor(self, count: int) -> None:
        """Records that the chain dropped blocks and counts only `count` transactions again."""
        self.floor = min(self.floor, count)

    @property
    def any_abandoned(self) -> bool:
        """Whether there is an abandoned nonce."""
        return bool(self._abandoned)

    def forget_abandoned_below(self, count: int) -> None:
        """Forgets abandoned nonces below `count`, which are in blocks."""
        self._abandoned = {nonce: fees for nonce, fees in self._abandoned.items() if nonce >= count}
