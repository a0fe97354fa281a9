"""What a transaction is made of: a call, a fee, a nonce. Pure.

EIP-1559 transactions in their EIP-2718 envelope; a replacement pays a tenth more than what it replaces, as nodes demand.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import rlp

from tallystick.protocol.codecs import keccak
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.types import Address

_TYPE = b"\x02"


@dataclass(frozen=True, slots=True)
class Call:
    """What a transaction does. `to` None creates a contract; `value` is in wei."""

    sender: Address
    to: Address | None
    data: bytes
    value: int = 0

    def to_json(self) -> dict[str, str]:
        """The call object of JSON-RPC."""
        fields = {"from": self.sender, "data": "0x" + self.data.hex(), "value": hex(self.value)}
        return fields | ({"to": self.to} if self.to else {})


@dataclass(frozen=True, slots=True)
class Fees:
    """Wei a unit of gas: to the block's maker, and in all at most."""

    tip: int
    most: int

    def raised(self, fresh: Fees) -> Fees:
        """What replaces a transaction of these fees: a tenth more of both, or what the market asks now where that is more."""
        return Fees(max(fresh.tip, _tenth_more(self.tip)), max(fresh.most, _tenth_more(self.most)))

    def capped(self, limit: int | None) -> Fees:
        """The same within a limit."""
        return self if limit is None or self.most <= limit else Fees(min(self.tip, limit), limit)


def _tenth_more(wei: int) -> int:
    return wei + wei // 10 + 1


@dataclass(frozen=True, slots=True)
class SignedTransaction:
    """A transaction as it is sent: its hash, and its bytes as hex."""

    hash: str
    raw: str


def sign(signer: Signer, call: Call, *, chain_id: int, nonce: int, gas: int, fees: Fees) -> SignedTransaction:
    """Signs an EIP-1559 transaction."""
    to = bytes.fromhex(call.to[2:]) if call.to else b""
    body = [chain_id, nonce, fees.tip, fees.most, gas, to, call.value, call.data, []]
    signature = signer.sign_digest(keccak(_TYPE + rlp.encode(body)))
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:64], "big")
    raw = _TYPE + rlp.encode([*body, signature[64] - 27, r, s])
    return SignedTransaction("0x" + keccak(raw).hex(), "0x" + raw.hex())


@dataclass
class Nonces:
    """Which nonces of one account are in use here. The lowest free one goes first, so that no transaction waits behind a hole."""

    _flying: set[int] = field(default_factory=set)
    _given_up: dict[int, Fees] = field(default_factory=dict)
    floor: int = 0
    """One more than the last nonce that was seen in a block."""

    def take(self, pending: int, busy: Collection[int] = ()) -> int:
        """The nonce of the next transaction, where the chain's own count is `pending` and others use those in `busy`."""
        nonce = max(pending, self.floor)
        while nonce in self._flying or nonce in busy:
            nonce += 1
        nonce = min([nonce, *(n for n in self._given_up if n not in busy)])
        self._flying.add(nonce)
        return nonce

    def fees_to_beat(self, nonce: int) -> Fees | None:
        """The fees of the transaction that was given up with this nonce and may still be waiting somewhere."""
        return self._given_up.pop(nonce, None)

    def free(self, nonce: int) -> None:
        """The nonce was not used."""
        self._flying.discard(nonce)

    def landed(self, nonce: int) -> None:
        """A transaction of this nonce is in a block."""
        self._flying.discard(nonce)
        self.floor = max(self.floor, nonce + 1)

    def give_up(self, nonce: int, fees: Fees) -> None:
        """The transaction of this nonce was not mined in time; the next one takes its place."""
        self._flying.discard(nonce)
        self._given_up[nonce] = fees

    def went_back(self, count: int) -> None:
        """The chain forgot blocks: its count is `count` again."""
        self.floor = min(self.floor, count)

    @property
    def any_given_up(self) -> bool:
        """Whether a nonce waits to be used again."""
        return bool(self._given_up)

    def forget_given_up(self, count: int) -> None:
        """Those below `count` are in blocks."""
        self._given_up = {nonce: fees for nonce, fees in self._given_up.items() if nonce >= count}
