"""Codecs of EIP-712's field types: name, hash encoding, JSON form and binary form of each. Pure.

The binary form of a message is its EIP-712 words, one of 32 bytes for each field, and then a tail: whatever the words only hash.
A string or bytes in the tail is 2 bytes length (big-endian) and the bytes, an array 2 bytes count and the items, a struct its own
binary form. Each message has exactly one binary form.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

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


WORD = 32
"""Bytes of an EIP-712 word."""


class Tail(NamedTuple):
    """The binary form of a type whose word is only a hash.

    `pack` writes the value. `unpack` reads it from `data` at an offset; it returns the value, the word that hashes it, and the
    offset after it. Both raise BadMessage; that of `unpack` begins with the field's name.
    """

    pack: Callable[[Any], bytes]
    unpack: Callable[[bytes, int, str], tuple[Any, bytes, int]]


class Layout(NamedTuple):
    """How `struct` writes and reads the word of a type.

    `code`: its format of 32 bytes. `dump` turns a value into what the format packs, `load` turns that back; None: it is the same.
    `size`: the exact number of bytes of a value, which `struct` would cut or fill; None if it has no such size.
    """

    code: str
    dump: Callable[[Any], Any] | None = None
    load: Callable[[Any], Any] | None = None
    size: int | None = None


@dataclass(frozen=True, slots=True)
class Codec:
    """One field type: its name, its EIP-712 encoding to 32 bytes, its JSON writer and reader, and its binary form.

    A type that fits its word has `decode`, which reads the value from the word, and `padding`: the bits of the word that must be
    zero, as a number. Any other type has `tail`. `layout` says the same once more, for a whole message at once.
    """

    name: str
    encode: Callable[[Any], bytes]
    to_json: Callable[[Any], Any]
    from_json: Callable[[Any, str], Any]
    decode: Callable[[bytes], Any] | None = None
    padding: int = 0
    tail: Tail | None = None
    layout: Layout | None = None


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

    def decode(word: bytes) -> int:
        value: int = of(int.from_bytes(word, "big"))
        return value

    to_json: Callable[[int], object] = int if bits <= 32 else (lambda v: str(int(v)))
    return Codec(f"uint{bits}", encode, to_json, from_json, decode, _bits(256) - _bits(bits), layout=_uint_layout(bits, of))


def _uint_layout(bits: int, of: type) -> Layout:
    code = {8: "31xB", 16: "30xH", 32: "28xI", 64: "24xQ"}.get(bits)
    if code is not None:
        return Layout(code, load=None if of is int else of)
    size = bits // 8

    def load(raw: bytes) -> int:
        return int.__new__(of, int.from_bytes(raw, "big"))  # an Amount's own constructor checks a type that is known here

    return Layout(f"{WORD - size}x{size}s", lambda value: value.to_bytes(size, "big"), load)


def _bits(count: int) -> int:
    return (1 << count) - 1


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

    return Codec(
        f"bytes{size}",
        encode,
        lambda v: "0x" + v.hex(),
        lambda raw, field: read_hex(field, raw, size),
        lambda word: word[:size],
        _bits(8 * (WORD - size)),
        layout=Layout(f"{size}s{WORD - size}x", size=size),
    )


def take(data: bytes, at: int, size: int, field: str) -> bytes:
    """`size` bytes of a binary message. Raises BadMessage if it ends before."""
    part = data[at : at + size]
    if len(part) != size:
        raise BadMessage(f"{field}: cut off: expected {size} bytes, got {len(part)}")
    return part


MAX_SIZED = (1 << 16) - 1


def pack_sized(value: bytes, limit: int = MAX_SIZED) -> bytes:
    """Bytes behind their length in 2 bytes. Raises BadMessage for more than `limit`."""
    if len(value) > limit:
        raise BadMessage(f"expected at most {limit} bytes, got {len(value)}")
    return len(value).to_bytes(2, "big") + value


def unpack_sized(data: bytes, at: int, field: str, limit: int = MAX_SIZED) -> tuple[bytes, int]:
    """Reads `pack_sized` at an offset. Returns the bytes and the offset after them. Raises BadMessage."""
    size = int.from_bytes(take(data, at, 2, field), "big")
    if size > limit:
        raise BadMessage(f"{field}: expected at most {limit} bytes, got {size}")
    return take(data, at + 2, size, field), at + 2 + size


def _pack_string(value: str) -> bytes:
    if len(value) > MAX_STRING:
        raise BadMessage(f"expected a string of at most {MAX_STRING} characters, got {len(value)}")
    return pack_sized(_utf8(value), 4 * MAX_STRING)


@functools.lru_cache(256)
def _read_string(raw: bytes) -> tuple[str, Hash]:
    """Cached, since one model stands in all candidates of a job and in most jobs: its text is then held once."""
    return raw.decode(), keccak(raw)


def _unpack_string(data: bytes, at: int, field: str) -> tuple[str, bytes, int]:
    raw, end = unpack_sized(data, at, field, 4 * MAX_STRING)
    try:
        value, word = _read_string(raw)
    except UnicodeDecodeError:
        raise BadMessage(f"{field}: expected UTF-8") from None
    if len(value) > MAX_STRING:
        raise BadMessage(f"{field}: expected a string of at most {MAX_STRING} characters, got {len(value)}")
    return value, word, end


def _unpack_bytes(data: bytes, at: int, field: str) -> tuple[bytes, bytes, int]:
    value, end = unpack_sized(data, at, field, MAX_BYTES)
    return value, keccak(value), end


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


@functools.lru_cache(4_096)
def _read_address(raw: bytes) -> str:
    """Cached, since the same payers and providers stand in most messages: the text of each is then held once."""
    return "0x" + raw.hex()


@functools.lru_cache(4_096)
def _dump_address(address: str) -> bytes:
    return bytes.fromhex(address[2:])


SCALARS: dict[object, Codec] = {
    Address: Codec(
        "address",
        lambda v: bytes.fromhex(v[2:]).rjust(32, b"\0"),
        str,
        parse_address,
        lambda word: _read_address(word[12:]),
        _bits(256) - _bits(160),
        layout=Layout("12x20s", _dump_address, _read_address, 42),
    ),
    Hash: _fixed_bytes(32),
    JobId: _fixed_bytes(16),
    bytes: Codec(
        "bytes",
        keccak,
        lambda v: "0x" + v.hex(),
        lambda raw, field: read_hex(field, raw, None),
        tail=Tail(lambda v: pack_sized(v, MAX_BYTES), _unpack_bytes),
    ),
    str: Codec("string", lambda v: keccak(_utf8(v)), str, _string, tail=Tail(_pack_string, _unpack_string)),
    bool: Codec(
        "bool",
        lambda v: int(v).to_bytes(32, "big"),
        bool,
        _boolean,
        lambda word: bool(word[-1]),
        _bits(256) - _bits(1),
        layout=Layout("31x?"),
    ),
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
        tail=_array_tail(item),
    )


def _array_tail(item: Codec) -> Tail:
    pack_item = item.encode if item.tail is None else item.tail.pack
    unpack_item = _unpack_word(item) if item.tail is None else item.tail.unpack

    def pack(values: tuple[Any, ...]) -> bytes:
        if len(values) > MAX_ITEMS:
            raise BadMessage(f"expected at most {MAX_ITEMS} items, got {len(values)}")
        return len(values).to_bytes(2, "big") + b"".join(map(pack_item, values))

    def unpack(data: bytes, at: int, field: str) -> tuple[tuple[Any, ...], bytes, int]:
        count = int.from_bytes(take(data, at, 2, field), "big")
        if count > MAX_ITEMS:
            raise BadMessage(f"{field}: expected at most {MAX_ITEMS} items, got {count}")
        end, values, words = at + 2, [], []
        for i in range(count):
            value, word, end = unpack_item(data, end, f"{field}[{i}]")
            values.append(value)
            words.append(word)
        return tuple(values), keccak(b"".join(words)), end

    return Tail(pack, unpack)


def _unpack_word(item: Codec) -> Callable[[bytes, int, str], tuple[Any, bytes, int]]:
    """The reader of an array's items that fit their words."""
    decode = item.decode
    if decode is None:
        raise TypeError(f"{item.name} has neither words nor a tail")

    def unpack(data: bytes, at: int, field: str) -> tuple[Any, bytes, int]:
        word = take(data, at, WORD, field)
        check_padding(word, item, field)
        return decode(word), word, at + WORD

    return unpack


def check_padding(word: bytes, codec: Codec, field: str) -> None:
    """Raises BadMessage for a word that is not the encoding of any value."""
    if int.from_bytes(word, "big") & codec.padding:
        raise BadMessage(f"{field}: expected a {codec.name} padded with zeros to {WORD} bytes, got 0x{word.hex()}")
