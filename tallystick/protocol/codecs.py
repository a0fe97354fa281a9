"""Codecs of EIP-712's field types: name, hash encoding, and the JSON form of each. Pure."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import sha3

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import Address, Amount, Hash, JobId, parse_address

MAX_STRING = 1_024
MAX_BYTES = 4_096
MAX_ITEMS = 1_024
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,77}")


def keccak(data: bytes) -> Hash:
    """Keccak-256 as Ethereum uses it (not NIST SHA3-256)."""
    return Hash(sha3.keccak_256(data).digest())


@dataclass(frozen=True, slots=True)
class Uint:
    """Marks an integer field as uintN: `Annotated[int, Uint(64)]`."""

    bits: int


U8 = Annotated[int, Uint(8)]
U16 = Annotated[int, Uint(16)]
U32 = Annotated[int, Uint(32)]
U64 = Annotated[int, Uint(64)]
U96 = Annotated[Amount, Uint(96)]
"""Money: an Amount of base units that fits 96 bits."""


@dataclass(frozen=True, slots=True)
class Codec:
    """One field type: its name, its EIP-712 encoding to 32 bytes, and its JSON writer and reader."""

    name: str
    encode: Callable[[Any], bytes]
    to_json: Callable[[Any], Any]
    from_json: Callable[[Any, str], Any]


def uint(bits: int, of: type) -> Codec:
    """The codec of uintN. Values are instances of `of`, which is int or a subclass."""
    limit = 1 << bits

    def encode(value: int) -> bytes:
        if not 0 <= value < limit:
            raise BadMessage(f"expected a uint{bits}, got {value}")
        return int.to_bytes(value, 32, "big")

    def from_json(raw: object, field: str) -> int:
        if isinstance(raw, str) and _DECIMAL.fullmatch(raw):
            raw = int(raw)
        if isinstance(raw, bool) or not isinstance(raw, int) or not 0 <= raw < limit:
            raise BadMessage(f"{field}: expected a uint{bits} (a whole number, as a decimal string above 32 bits)")
        return of(raw) if of is not int else raw

    return Codec(f"uint{bits}", encode, int if bits <= 32 else (lambda v: str(int(v))), from_json)


def read_hex(field: str, raw: object, size: int | None) -> bytes:
    """Reads bytes as 0x and hex digits; exactly `size` bytes if it is given. Raises BadMessage."""
    value = b""
    if isinstance(raw, str) and raw[:2] == "0x" and len(raw) <= 2 + 2 * MAX_BYTES:
        with contextlib.suppress(ValueError):
            value = bytes.fromhex(raw[2:])
    if not isinstance(raw, str) or len(raw) != 2 + 2 * len(value) or raw[:2] != "0x":  # fromhex also takes spaces
        raise BadMessage(f"{field}: expected bytes as 0x and hex digits, at most {MAX_BYTES} bytes")
    if size is not None and len(value) != size:
        raise BadMessage(f"{field}: expected {size} bytes, got {len(value)}")
    return value


def _fixed_bytes(size: int) -> Codec:
    def encode(value: bytes) -> bytes:
        if len(value) != size:
            raise BadMessage(f"expected {size} bytes, got {len(value)}")
        return value.ljust(32, b"\0")

    return Codec(f"bytes{size}", encode, lambda v: "0x" + v.hex(), lambda raw, field: read_hex(field, raw, size))


def _utf8(value: str, field: str = "a string") -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise BadMessage(f"{field}: contains a lone surrogate") from None


def _string(raw: object, field: str) -> str:
    if not isinstance(raw, str) or len(raw) > MAX_STRING:
        raise BadMessage(f"{field}: expected a string of at most {MAX_STRING} characters")
    _utf8(raw, field)
    return raw


def _boolean(raw: object, field: str) -> bool:
    if not isinstance(raw, bool):
        raise BadMessage(f"{field}: expected true or false")
    return raw


SCALARS: dict[object, Codec] = {
    Address: Codec("address", lambda v: bytes.fromhex(v[2:]).rjust(32, b"\0"), str, parse_address),
    Hash: _fixed_bytes(32),
    JobId: _fixed_bytes(16),
    bytes: Codec("bytes", keccak, lambda v: "0x" + v.hex(), lambda raw, field: read_hex(field, raw, None)),
    str: Codec("string", lambda v: keccak(_utf8(v)), str, _string),
    bool: Codec("bool", lambda v: int(v).to_bytes(32, "big"), bool, _boolean),
}
"""The codecs of scalar types, by Python type."""


def array(item: Codec) -> Codec:
    """The codec of T[]. Values are tuples."""

    def from_json(raw: object, field: str) -> tuple[Any, ...]:
        if not isinstance(raw, list) or len(raw) > MAX_ITEMS:
            raise BadMessage(f"{field}: expected a list of at most {MAX_ITEMS} items")
        return tuple(item.from_json(value, f"{field}[{i}]") for i, value in enumerate(raw))

    return Codec(
        f"{item.name}[]",
        lambda values: keccak(b"".join(map(item.encode, values))),
        lambda values: [item.to_json(v) for v in values],
        from_json,
    )
