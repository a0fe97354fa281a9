"""Messages as databases keep them, also as release 0.1 wrote them."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.codecs import keccak
from tallystick.protocol.eip712 import Domain, Message, Signed, Signer
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.messages import Receipt, Terms
from tallystick.protocol.stored import (
    load_signed,
    load_struct,
    pack,
    pack_signed,
    pack_struct,
    store_signed,
    store_struct,
    unpack,
)
from tallystick.protocol.types import Address
from tallystick.protocol.wire import dumps
from tests.builders import build_receipt, build_terms
from tests.protocol.strategies import any_message, some

DOMAIN = Domain(31_337, Address("0x" + "5f" * 20))
SIGNER = Signer(keccak(b"somebody"))


@some
@given(any_message)
def test_what_was_stored_is_read(value: Message) -> None:
    """Signed messages and structs, in today's form and in the JSON of release 0.1."""
    signed = Signed(value, bytes(65))
    cls = type(value)
    assert load_signed(cls, store_signed(signed)) == load_signed(cls, signed.dumps()) == signed
    assert load_signed(cls, pack_signed(signed)) == signed
    assert load_struct(cls, pack_struct(value)) == value
    assert load_struct(cls, store_struct(value)) == load_struct(cls, dumps(value.to_json()).decode()) == value


@some
@given(st.binary(max_size=600), st.integers(0, 600))
def test_bytes_are_packed_without_loss(data: bytes, zeros: int) -> None:
    """Runs of zeros of any length, at any place, come back."""
    for plain in (data, bytes(zeros) + data, data + bytes(zeros)):
        assert unpack(pack(plain)) == plain


def test_packed_receipts_are_small() -> None:
    """Most of a message's words is zeros; what is left are its hashes, addresses and signature."""
    signed = SIGNER.sign(build_receipt(Address("0x" + "22" * 20), SIGNER.address), DOMAIN)
    assert len(pack_signed(signed)) < len(signed.to_bytes()) * 0.7


@pytest.mark.parametrize("data", [b"", b"\0", b"\1", b"\0\xff" * 500, b"\0\0"])
def test_damaged_bytes_are_refused_by_name(data: bytes) -> None:
    """A database that another program changed gives an error that names the message."""
    with pytest.raises(BadMessage, match="receipt"):
        load_signed(Receipt, data)
    with pytest.raises(BadMessage, match="terms"):
        load_struct(Terms, data)


def test_a_stored_receipt_is_verified_over_its_bytes() -> None:
    """The digest is that of the message that was signed, and the text is shorter than the JSON."""
    signed = SIGNER.sign(build_receipt(Address("0x" + "22" * 20), SIGNER.address), DOMAIN)
    text = store_signed(signed)
    assert load_signed(Receipt, text).verify(DOMAIN) == signed
    assert len(text) < len(signed.dumps())


@pytest.mark.parametrize("text", ["", "%", "A", "AAAA", "{", "[]", "null", "\u20ac", base64.b64encode(bytes(500)).decode()])
def test_damaged_texts_are_refused_by_name(text: str) -> None:
    """A database that another program changed gives an error that names the message."""
    with pytest.raises(BadMessage, match=r"^receipt"):
        load_signed(Receipt, text)
    with pytest.raises(BadMessage, match=r"^terms"):
        load_struct(Terms, text)
    with pytest.raises(BadMessage, match=r"^stored terms"):
        load_struct(Terms, text, "stored terms")
    assert load_struct(Terms, store_struct(build_terms())) == build_terms()
