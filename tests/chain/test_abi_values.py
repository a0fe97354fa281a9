"""Contract values: the bytes that eth-abi makes, its values for these bytes, and nothing but AbiError for any others."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from eth_abi import abi as eth_abi
from eth_abi.exceptions import DecodingError
from hypothesis import given
from hypothesis import strategies as st

from tallystick.chain.abi_values import AbiError, decode, encode

Typed = tuple[str, Any]
ADDRESS = "0x" + "5a" * 20


def _number(size: int) -> st.SearchStrategy[Typed]:
    return st.tuples(st.just(f"uint{size}"), st.integers(0, (1 << size) - 1) | st.just((1 << size) - 1))


def _fixed(size: int) -> st.SearchStrategy[Typed]:
    return st.tuples(st.just(f"bytes{size}"), st.binary(min_size=size, max_size=size))


_plain: st.SearchStrategy[Typed] = (
    st.sampled_from([8, 16, 32, 40, 64, 96, 256]).flatmap(_number)
    | st.integers(1, 32).flatmap(_fixed)
    | st.tuples(st.just("address"), st.binary(min_size=20, max_size=20).map(lambda raw: "0x" + raw.hex()))
    | st.tuples(st.just("bool"), st.booleans())
    | st.tuples(st.just("bytes"), st.binary(max_size=70))
    | st.tuples(st.just("string"), st.text(max_size=40))
)


def _within(inner: st.SearchStrategy[Typed]) -> st.SearchStrategy[Typed]:
    array = st.tuples(inner, st.integers(0, 3)).map(lambda of: (of[0][0] + "[]", (of[0][1],) * of[1]))
    members = st.lists(inner, min_size=1, max_size=4)
    return array | members.map(lambda parts: (f"({','.join(t for t, _ in parts)})", tuple(v for _, v in parts)))


typed = st.recursive(_plain, _within, max_leaves=6)


@given(st.lists(typed, max_size=4))
def test_values_have_the_bytes_of_eth_abi(parts: list[Typed]) -> None:
    """Values of every type, nested too, become the bytes that eth-abi makes of them, and these become the values again."""
    types, values = [name for name, _ in parts], tuple(value for _, value in parts)
    data = encode(types, values)
    assert data == eth_abi.encode(types, values)
    assert decode(types, data) == values
    assert decode(types, data + b"more") == values


_word = st.integers(0, 12).map(lambda n: (32 * n).to_bytes(32, "big")) | st.integers(0, 300).map(lambda n: n.to_bytes(32, "big"))
hostile = st.lists(_word | st.binary(min_size=32, max_size=32), max_size=14).map(b"".join)


@given(st.lists(typed.map(lambda pair: pair[0]), max_size=3), hostile, st.integers(0, 31))
def test_any_bytes_are_values_or_an_error(types: list[str], data: bytes, cut: int) -> None:
    """What decodes at all has the values that eth-abi finds. Anything else is an AbiError, and no other exception."""
    data = data[: len(data) - cut]
    with contextlib.suppress(AbiError):
        assert decode(types, data) == eth_abi.decode(types, data)


@given(st.lists(typed, min_size=1, max_size=3), st.data())
def test_a_flipped_bit_is_another_value_or_an_error(parts: list[Typed], draw: st.DataObject) -> None:
    """No bit of the data is without meaning: flipped, it changes a value or makes the data wrong, where eth-abi says so too."""
    types, values = [name for name, _ in parts], tuple(value for _, value in parts)
    data = bytearray(encode(types, values))
    if not data:
        return
    place = draw.draw(st.integers(0, 8 * len(data) - 1))
    data[place // 8] ^= 1 << place % 8
    try:
        decoded = decode(types, bytes(data))
    except AbiError:
        return
    assert decoded != values
    with contextlib.suppress(DecodingError, OverflowError, UnicodeDecodeError):
        assert decoded == eth_abi.decode(types, bytes(data))


@pytest.mark.parametrize(
    ("types", "data"),
    [
        (["uint256"], b""),
        (["uint256"], bytes(31)),
        (["uint8"], (256).to_bytes(32, "big")),
        (["bool"], (2).to_bytes(32, "big")),
        (["address"], b"\1" + bytes(31)),
        (["bytes4"], b"abcdx" + bytes(27)),
        (["bytes"], (32).to_bytes(32, "big") + (1).to_bytes(32, "big") + b"ab" + bytes(30)),
        (["string"], (32).to_bytes(32, "big") + (1).to_bytes(32, "big") + b"\xff" + bytes(31)),
        (["bytes"], (1 << 255).to_bytes(32, "big")),
        (["bytes"], (32).to_bytes(32, "big") + (1 << 255).to_bytes(32, "big")),
        (["uint8[]"], (32).to_bytes(32, "big") + (1 << 40).to_bytes(32, "big") + bytes(64)),
        (["(uint8,bytes)[]"], (32).to_bytes(32, "big") + (1 << 40).to_bytes(32, "big") + bytes(64)),
        (["bytes", "bytes"], (64).to_bytes(32, "big") * 2 + (32).to_bytes(32, "big") + b"x" * 32),
    ],
)
def test_data_that_no_encoder_makes_is_refused(types: list[str], data: bytes) -> None:
    """Missing bytes, padding that is not zero, impossible lengths and parts that overlap are errors."""
    with pytest.raises(AbiError):
        decode(types, data)


def test_shared_parts_do_not_multiply_the_cost() -> None:
    """An array whose 1,000 items all point at the same 30,000 bytes is refused instead of becoming 30 MB."""
    count, blob = 1_000, (30_000).to_bytes(32, "big") + bytes(30_016)
    offsets = (32 * count).to_bytes(32, "big") * count
    with pytest.raises(AbiError, match="overlap"):
        decode(["bytes[]"], (32).to_bytes(32, "big") + count.to_bytes(32, "big") + offsets + blob)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("uint8", 256),
        ("uint8", -1),
        ("uint8", True),
        ("uint8", "1"),
        ("bool", 1),
        ("address", ADDRESS[:-1]),
        ("address", "5a" * 20),
        ("address", bytes(20)),
        ("bytes4", b"abc"),
        ("bytes4", b"abcde"),
        ("bytes", "text"),
        ("string", b"bytes"),
        ("uint8[]", 3),
        ("uint8[]", b"ab"),
        ("(uint8,uint8)", (1,)),
        ("(uint8,uint8)", (1, 2, 3)),
    ],
)
def test_values_of_another_type_are_refused(kind: str, value: object) -> None:
    """A value that its type does not have is never encoded as another one."""
    with pytest.raises(AbiError):
        encode([kind], [value])
    with pytest.raises(AbiError):
        encode([kind, kind], [value])


@pytest.mark.parametrize(
    "kind", ["int8", "uint7", "uint0", "uint264", "bytes33", "bytes0", "()", "uint8[2]", "", "(uint8", "nonsense"]
)
def test_types_that_no_contract_of_ours_has_are_unknown(kind: str) -> None:
    """A type that cannot be encoded is named by its error."""
    with pytest.raises(ValueError, match="unknown type"):
        encode([kind], [0])
