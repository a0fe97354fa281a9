"""Words that are written and read all at once are those that each codec writes and reads, for every value."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given

from tallystick.protocol.eip712 import Domain, Message, Signer, read_signed_bytes
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.messages import Order
from tallystick.protocol.types import Address, Amount, Hash
from tests.builders import build_order, build_receipt, build_terms
from tests.protocol.strategies import any_message, many
from tests.protocol.test_eip712_binary import Flags

DOMAIN = Domain(31_337, Address("0x" + "5f" * 20))
PAYER, PROVIDER = Address("0x" + "ab" * 20), Address("0x" + "cd" * 20)
ORDER, TERMS = build_order(PAYER, PROVIDER), build_terms()
FLAGS = Flags(on=True, small=1, flags=(), ids=(), parts=())


def one_by_one(value: Message) -> bytes:
    """The words as each codec encodes its field."""
    schema = value.SCHEMA
    return b"".join(encode(getattr(value, name)) for encode, name in zip(schema.encoders, schema.fields, strict=True))


@many
@given(any_message)
def test_the_words_of_a_message_are_those_of_its_codecs(value: Message) -> None:
    """All at once or one by one, the words are the same."""
    assert value.SCHEMA.layout.pack(value.SCHEMA.read(value)) == one_by_one(value)


@many
@given(any_message)
def test_fields_that_are_decoded_at_once_have_the_values_and_types_of_single_ones(value: Message) -> None:
    """Also the subclasses of int, which amounts are."""
    at_once, single = (type(value).from_bytes(value.to_bytes()) for _ in range(2))
    at_once.decode()
    for name in value.SCHEMA.fields:
        assert getattr(at_once, name) == getattr(single, name) == getattr(value, name)
        assert type(getattr(at_once, name)) is type(getattr(single, name))


def test_booleans_are_decoded_at_once() -> None:
    """True and false, beside small numbers."""
    for on in (True, False):
        read = Flags.from_bytes(Flags(on=on, small=255, flags=(on,), ids=(), parts=()).to_bytes())
        read.decode()
        assert (read.on, read.small, read.flags) == (on, 255, (on,))


def test_decoding_what_was_not_read_from_bytes_changes_nothing() -> None:
    """A message that was made here has its fields."""
    ORDER.decode()
    assert build_order(PAYER, PROVIDER) == ORDER


def test_a_verified_message_is_decoded() -> None:
    """Whoever verifies it reads its fields, which cost a call each otherwise."""
    signer = Signer(b"\1" * 32)
    raw = signer.sign(build_order(signer.address, PROVIDER), DOMAIN).to_bytes()
    verified = read_signed_bytes(Order, raw).verify(DOMAIN)
    assert object.__getattribute__(verified.message, "ceiling") == Amount(1)
    assert type(verified.message.ceiling) is Amount


def test_decoding_again_keeps_the_values() -> None:
    """Also after only the last field was read on its own: the others are decoded when they are read."""
    for first in ((), ("ceiling",), Order.SCHEMA.fields):
        read = Order.from_bytes(ORDER.to_bytes())
        for name in first:
            getattr(read, name)
        read.decode()
        read.decode()
        assert read == ORDER
        assert Order.SCHEMA.layout.last in Order.SCHEMA.fields
    read = Order.from_bytes(ORDER.to_bytes())
    assert getattr(read, Order.SCHEMA.layout.last) == getattr(ORDER, Order.SCHEMA.layout.last)
    read.decode()
    assert [getattr(read, name) for name in Order.SCHEMA.fields] == [getattr(ORDER, name) for name in Order.SCHEMA.fields]


def with_field(value: Message, **changes: Any) -> Message:
    """The message with a value that no constructor of ours would give it."""
    fields = {name: getattr(value, name) for name in value.SCHEMA.fields}
    return type(value)(**(fields | changes))


@pytest.mark.parametrize(
    ("value", "changes", "error"),
    [
        (ORDER, {"ceiling": Amount(1 << 96)}, "uint96"),
        (ORDER, {"ceiling": Amount(-1)}, "uint96"),
        (ORDER, {"seq": 1 << 64}, "uint64"),
        (ORDER, {"seq": -1}, "uint64"),
        (ORDER, {"max_fee_bps": 1 << 16}, "uint16"),
        (TERMS, {"max_output_tokens": 1 << 32}, "uint32"),
        (build_receipt(PAYER, PROVIDER), {"outcome": 256}, "uint8"),
        (ORDER, {"terms_hash": Hash(b"\1" * 31)}, "32 bytes"),
        (ORDER, {"terms_hash": Hash(b"\1" * 33)}, "32 bytes"),
        (TERMS, {"job": b"\1" * 15}, "16 bytes"),
        (TERMS, {"job": b"\1" * 17}, "16 bytes"),
        (TERMS, {"model": "\ud800"}, "surrogate"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_as_by_its_codec(value: Message, changes: dict[str, Any], error: str) -> None:
    """Nothing is cut, filled or wrapped around: a message never stands for another one."""
    with pytest.raises(BadMessage, match=error):
        with_field(value, **changes).words()


@pytest.mark.parametrize("changes", [{"seq": 1.5}, {"seq": "1"}, {"ceiling": None}, {"payer": None}, {"payer": "0x" + "zz" * 20}])
def test_a_value_of_another_type_is_an_error(changes: dict[str, Any]) -> None:
    """A mistake of the program is never encoded."""
    with pytest.raises((TypeError, ValueError, AttributeError)):
        with_field(ORDER, **changes).words()
