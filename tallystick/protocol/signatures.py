"""Ethereum signatures: the account that made one, and an account's display form. One call of libsecp256k1 recovers an account."""

from __future__ import annotations

import coincurve

from tallystick.protocol.codecs import keccak
from tallystick.protocol.errors import BadSignature
from tallystick.protocol.types import Address, Hash

SIGNATURE = 65
"""Bytes of a signature: r, s and v."""
_HALF_ORDER = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0


def checksum(address: str) -> str:
    """An address in EIP-55 mixed case, for display. Programs use the lower-case form."""
    digits = address[2:].lower()
    hashed = keccak(digits.encode()).hex()
    return "0x" + "".join(c.upper() if int(h, 16) >= 8 else c for c, h in zip(digits, hashed, strict=False))


def recover(digest: Hash, signature: bytes) -> Address:
    """The account that made a signature. Raises BadSignature for a malformed, malleable (high s) or unrecoverable one."""
    if len(signature) != 65 or signature[64] not in (27, 28):
        raise BadSignature("signature: expected 65 bytes r, s, v with v 27 or 28")
    if int.from_bytes(signature[32:64], "big") > _HALF_ORDER:
        raise BadSignature("signature: expected s in the lower half of the curve order (EIP-2), got the malleable upper half")
    try:
        public = coincurve.PublicKey.from_signature_and_message(
            signature[:64] + bytes((signature[64] - 27,)), digest, hasher=None
        )
    except Exception as error:  # noqa: BLE001 - coincurve raises bare Exception for unrecoverable signatures
        raise BadSignature(f"signature: {error}") from None
    return address_of(public)


def address_of(public: coincurve.PublicKey) -> Address:
    """The account of a public key."""
    return Address("0x" + keccak(public.format(compressed=False)[1:])[12:].hex())
