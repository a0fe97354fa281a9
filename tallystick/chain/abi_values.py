"""Values of Solidity's types as bytes and back, for the types that this project's contracts have. Pure.

Decoding is strict, since an endpoint may answer anything: padding must be zero, offsets must not lead back, and no more bytes are
read than there are, since no encoder lets values share bytes. So the cost of decoding is bounded by the length of the data.

eth-abi does the same for all types of Solidity, and takes 6 MiB of a daemon with what it imports; the tests compare with it.
https://docs.soliditylang.org/en/latest/abi-spec.html
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

_WORD = 32
_NUMBER = re.compile(r"uint([1-9][0-9]*)")
_FIXED_BYTES = re.compile(r"bytes([1-9][0-9]*)")
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")
_ADDRESS_BYTES = 20


class AbiError(ValueError):
    """Data that no encoder makes, or a value that its type does not have."""


@dataclass(frozen=True, slots=True)
class _Type:
    """A parsed type. `kind`: "uint", "address", "bool", "fixed" (bytes1 to bytes32), "bytes", "string", "array" or "tuple".

    `size`: bits of a number, bytes of fixed ones. `parts`: the types of a tuple's members, or of an array's items.
    `dynamic`: whether its place has an offset instead of a value. `width`: bytes of its place.
    """

    kind: str
    size: int = 0
    parts: tuple[_Type, ...] = ()
    dynamic: bool = False
    width: int = _WORD


def encode(types: Sequence[str], values: Sequence[Any]) -> bytes:
    """Encodes a sequence of values. Addresses are hex, bytes are bytes, tuples are sequences.

    Raises AbiError for a value that its type does not have, ValueError for an unknown type.
    """
    return _encode(_tuple_of(tuple(types)), values)


def decode(types: Sequence[str], data: bytes) -> tuple[Any, ...]:
    """Decodes what `encode` made; addresses become hex in lower case, arrays and tuples become tuples. More data may follow.

    Raises AbiError, and ValueError for an unknown type.
    """
    values: tuple[Any, ...] = _Reader(data).members(_tuple_of(tuple(types)).parts, 0)
    return values


# ------------------------------------------------------------------------------------------------------------------ types


@cache
def _tuple_of(types: tuple[str, ...]) -> _Type:
    return _new_tuple(tuple(map(_parse, types)))


def _new_tuple(parts: tuple[_Type, ...]) -> _Type:
    dynamic = any(part.dynamic for part in parts)
    return _Type("tuple", 0, parts, dynamic, _WORD if dynamic else sum(part.width for part in parts))


def _parse(name: str) -> _Type:
    """The type of this name. Raises ValueError if it is unknown."""
    if name.endswith("[]"):
        return _Type("array", 0, (_parse(name[:-2]),), dynamic=True)
    if name.startswith("(") and name.endswith(")") and len(name) > 2:
        return _new_tuple(tuple(map(_parse, _split(name[1:-1]))))
    if name in {"address", "bool"}:
        return _Type(name)
    if name in {"bytes", "string"}:
        return _Type(name, dynamic=True)
    if (number := _NUMBER.fullmatch(name)) and int(number[1]) <= 256 and int(number[1]) % 8 == 0:
        return _Type("uint", int(number[1]))
    if (fixed := _FIXED_BYTES.fullmatch(name)) and int(fixed[1]) <= _WORD:
        return _Type("fixed", int(fixed[1]))
    raise ValueError(f"unknown type of an ABI: {name}")


def _split(names: str) -> list[str]:
    """The members of a tuple's name, which are separated by the commas outside of inner tuples."""
    found, depth, start = list[str](), 0, 0
    for place, character in enumerate(names):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            found.append(names[start:place])
            start = place + 1
    return [*found, names[start:]]


# --------------------------------------------------------------------------------------------------------------- encoding


def _encode(kind: _Type, value: Any) -> bytes:
    if kind.kind in {"tuple", "array"}:
        return _encode_sequence(kind, value)
    if kind.kind in {"bytes", "string"}:
        data = value.encode() if kind.kind == "string" and isinstance(value, str) else value
        if not isinstance(data, bytes) or (kind.kind == "string" and data is value):
            raise AbiError(f"{kind.kind}: got {type(value).__name__}")
        return len(data).to_bytes(_WORD, "big") + data + bytes(-len(data) % _WORD)
    return _encode_word(kind, value)


def _encode_word(kind: _Type, value: Any) -> bytes:
    if kind.kind == "fixed":
        if not isinstance(value, bytes) or len(value) != kind.size:
            raise AbiError(f"bytes{kind.size}: expected {kind.size} bytes, got {value!r:.80}")
        return value.ljust(_WORD, b"\0")
    if kind.kind == "address":
        if not isinstance(value, str) or not _ADDRESS.fullmatch(value):
            raise AbiError(f"address: expected 20 bytes in hex after 0x, got {value!r:.80}")
        return bytes.fromhex(value[2:]).rjust(_WORD, b"\0")
    if kind.kind == "bool":
        if not isinstance(value, bool):
            raise AbiError(f"bool: got {value!r:.80}")
        return int(value).to_bytes(_WORD, "big")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << kind.size:
        raise AbiError(f"uint{kind.size}: expected a whole number below 2^{kind.size}, got {value!r:.80}")
    return value.to_bytes(_WORD, "big")


def _encode_sequence(kind: _Type, values: Any) -> bytes:
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise AbiError(f"{kind.kind}: expected a sequence, got {values!r:.80}")
    parts = kind.parts * len(values) if kind.kind == "array" else kind.parts
    if len(parts) != len(values):
        raise AbiError(f"tuple: expected {len(parts)} members, got {len(values)}")
    end = sum(part.width for part in parts)
    heads, tails = list[bytes](), list[bytes]()
    for part, value in zip(parts, values, strict=True):
        encoded = _encode(part, value)
        if part.dynamic:
            heads.append(end.to_bytes(_WORD, "big"))
            tails.append(encoded)
            end += len(encoded)
        else:
            heads.append(encoded)
    length = len(values).to_bytes(_WORD, "big") if kind.kind == "array" else b""
    return b"".join((length, *heads, *tails))


# --------------------------------------------------------------------------------------------------------------- decoding


class _Reader:
    """Reads the values in some data, as many bytes as it has."""

    def __init__(self, data: bytes) -> None:
        self._data, self._unread = data, len(data)

    def _read(self, start: int, size: int) -> bytes:
        self._unread -= size
        if self._unread < 0 or start + size > len(self._data):
            raise AbiError(f"expected {size} more bytes at byte {start} of {len(self._data)}, or parts of the data overlap")
        return self._data[start : start + size]

    def _number(self, start: int) -> int:
        return int.from_bytes(self._read(start, _WORD), "big")

    def members(self, parts: Sequence[_Type], base: int) -> tuple[Any, ...]:
        """Decodes parts that follow each other. Offsets count from `base`."""
        values, place, end = list[Any](), base, base + sum(part.width for part in parts)
        for part in parts:
            start = base + self._number(place) if part.dynamic else place
            if part.dynamic and start < end:
                raise AbiError(f"offset at byte {place}: expected at least {end - base}, got {start - base}")
            values.append(self._value(part, start))
            place += part.width
        return tuple(values)

    def _value(self, kind: _Type, start: int) -> Any:
        if kind.kind == "tuple":
            return self.members(kind.parts, start)
        if kind.kind == "array":
            length = self._number(start)
            if length * kind.parts[0].width > self._unread:  # checked before a list of that length is made
                raise AbiError(f"expected an array of {length} items in {self._unread} bytes")
            return self.members(kind.parts * length, start + _WORD)
        if kind.dynamic:
            length = self._number(start)
            data = self._read(start + _WORD, length + -length % _WORD)
            if any(data[length:]):
                raise AbiError(f"{kind.kind}: expected zeros after its {length} bytes")
            return _text(data[:length]) if kind.kind == "string" else data[:length]
        return _static(kind, self._read(start, _WORD))


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise AbiError(f"string: {error}") from None


def _static(kind: _Type, word: bytes) -> Any:
    if kind.kind == "fixed":
        if any(word[kind.size :]):
            raise AbiError(f"bytes{kind.size}: expected zeros after its bytes, got {word.hex()}")
        return word[: kind.size]
    number = int.from_bytes(word, "big")
    bits = {"address": 8 * _ADDRESS_BYTES, "bool": 1, "uint": kind.size}[kind.kind]
    if number >> bits:
        raise AbiError(f"{kind.kind}: expected a number below 2^{bits}, got {number}")
    if kind.kind == "address":
        return "0x" + word[-_ADDRESS_BYTES:].hex()
    return bool(number) if kind.kind == "bool" else number
