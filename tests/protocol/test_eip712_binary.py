"""The binary form of messages: one encoding each, fields that are decoded when they are read, and hashes over the bytes."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.codecs import MAX_BYTES, MAX_ITEMS, MAX_STRING, U8, keccak
from tallystick.protocol.eip712 import Domain, Message, Signer, message, read_signed_bytes, unpack_signed
from tallystick.protocol.errors import BadMessage, BadSignature
from tallystick.protocol.messages import Ask, Claim, ClaimRow, Order, Receipt, Spec, Terms
from tallystick.protocol.types import Address, Amount, Hash, JobId
from tests.builders import build_ask, build_order, build_receipt, build_terms
from tests.protocol.strategies import ALL, any_message, few, many, messages, some

DOMAIN = Domain(31_337, Address("0x" + "5f" * 20))
SIGNER = Signer(keccak(b"somebody"))
VECTORS = Path(__file__).parent.parent / "vectors"
CLASSES = {cls.__name__: cls for cls in ALL}


@message()
class Flags(Message):
    """A message with types that no message of the market uses yet."""

    on: bool
    small: U8
    flags: tuple[bool, ...]
    ids: tuple[JobId, ...]
    parts: tuple[bytes, ...]


def test_binary_forms_are_those_of_an_independent_encoder() -> None:
    """The golden vectors, both ways: bytes from the message, and the message from the bytes."""
    cases = {case["name"]: case for case in json.loads((VECTORS / "messages.json").read_text())["cases"]}
    vectors = json.loads((VECTORS / "binary.json").read_text())["vectors"]
    assert {vector["name"] for vector in vectors} == cases.keys()
    for vector in vectors:
        case = cases[vector["name"]]
        cls, binary = CLASSES[case["primaryType"]], bytes.fromhex(vector["binary"])
        assert cls.from_json(case["message"]).to_bytes() == binary
        assert cls.from_bytes(binary).to_json() == case["message"]


@many
@given(any_message)
def test_every_message_survives_its_binary_form(value: Message) -> None:
    """Reading gives the same message with the same hash and the same bytes, whichever field is read first."""
    read = type(value).from_bytes(value.to_bytes())
    assert read.struct_hash() == value.struct_hash()
    assert read.to_bytes() == value.to_bytes()
    assert read.to_json() == value.to_json()
    assert read == value
    assert hash(read) == hash(value)
    assert repr(read) == repr(value)


@many
@given(any_message)
def test_a_message_that_keeps_its_words_is_the_same(value: Message) -> None:
    """Its fields, hash and bytes stay; a copy with another value has words of its own."""
    json_form, words, binary, struct_hash = value.to_json(), value.words(), value.to_bytes(), value.struct_hash()
    assert value.keep_words() is value
    assert value.words() is value.words(), "encoded once"
    assert (value.to_json(), value.words(), value.to_bytes(), value.struct_hash()) == (json_form, words, binary, struct_hash)
    assert replace(value) == value  # type: ignore[type-var]
    assert replace(value).words() == words  # type: ignore[type-var]
    assert type(value).from_bytes(binary) == value


def test_a_changed_copy_does_not_keep_the_words() -> None:
    """Words belong to one value."""
    terms = build_terms().keep_words()
    assert replace(terms, max_cost=Amount(terms.max_cost + 1)).words() != terms.words()


@some
@given(any_message, st.data())
def test_each_message_has_one_binary_form(value: Message, data: st.DataObject) -> None:
    """Changed bytes are refused, or they are the binary form of another message."""
    form = bytearray(value.to_bytes())
    at = data.draw(st.integers(0, len(form) - 1))
    form[at] ^= data.draw(st.integers(1, 255))
    try:
        read = type(value).from_bytes(bytes(form))
    except BadMessage:
        return
    assert read.to_bytes() == form
    assert read != value


@some
@given(any_message, st.binary(min_size=1, max_size=40))
def test_bytes_behind_a_message_and_cut_off_ones_are_refused(value: Message, more: bytes) -> None:
    """Each error names the message."""
    form, name = value.to_bytes(), type(value).SCHEMA.name.lower()
    for wrong in (form + more, form[:-1], form[: len(form) // 2], b""):
        with pytest.raises(BadMessage, match=f"^{name}"):
            type(value).from_bytes(wrong)


@pytest.mark.parametrize("cls", [cls for cls in ALL if cls.SCHEMA.padding])
def test_padding_that_is_not_zero_is_refused(cls: type[Message]) -> None:
    """Each bit of padding of each word; the error names the member."""
    schema = cls.SCHEMA
    form = bytes(schema.size)
    for i, codec in enumerate(schema.codecs):
        for bit in [bit for bit in range(256) if codec.padding >> bit & 1][::17]:
            wrong = bytearray(form)
            wrong[32 * i : 32 * i + 32] = (1 << bit).to_bytes(32, "big")
            with pytest.raises(BadMessage, match=rf"^x\.{schema.wire_names[i]}: expected a {codec.name} padded with zeros"):
                cls.unpack(bytes(wrong) + bytes(200), 0, "x")


@few
@given(
    st.builds(
        Flags,
        on=st.booleans(),
        small=st.integers(0, 255),
        flags=st.lists(st.booleans()).map(tuple),
        ids=st.lists(st.binary(min_size=16, max_size=16).map(JobId)).map(tuple),
        parts=st.lists(st.binary()).map(tuple),
    )
)
def test_types_that_no_message_has_yet(value: Flags) -> None:
    """Booleans, and arrays of booleans, of short bytes and of bytes."""
    read = Flags.from_bytes(value.to_bytes())
    assert read == value
    assert (type(read.on), type(read.small)) == (bool, int)
    assert all(type(flag) is bool for flag in read.flags)


def test_padding_of_array_items_is_refused() -> None:
    """The error names the item."""
    value = Flags(on=True, small=1, flags=(True, False), ids=(JobId(bytes(16)),), parts=())
    form = bytearray(value.to_bytes())
    form[5 * 32 + 2 + 32 + 31] = 2
    with pytest.raises(BadMessage, match=r"^flags\.flags\[1\]: expected a bool padded with zeros"):
        Flags.from_bytes(bytes(form))
    form[5 * 32 + 2 + 32 + 31] = 1
    with pytest.raises(BadMessage, match=r"^flags\.flags: expected the value whose hash the message has, got another"):
        Flags.from_bytes(bytes(form))


def test_a_tail_that_its_word_does_not_hash_is_refused() -> None:
    """A string, bytes, a struct, and a string inside a struct; each error names the member."""
    ask = build_ask(SIGNER.address, model="tiny", sealing_key=b"key", spec=Spec(region="eu", features=("tools",)))
    form = ask.to_bytes()
    changes = {
        b"\0\4tiny": (b"\0\4tinY", "ask.model"),
        b"\0\3key": (b"\0\3kex", "ask.sealingKey"),
        b"\0\2eu": (b"\0\2us", "ask.spec.region"),
        b"\0\5tools": (b"\0\5toolz", "ask.spec.features"),
    }
    for old, (new, member) in changes.items():
        assert form.count(old) == 1
        with pytest.raises(BadMessage, match=rf"^{member}: expected the value whose hash"):
            Ask.from_bytes(form.replace(old, new))
    spec = ask.spec.to_bytes()
    other = replace(ask.spec, region="us").to_bytes()
    with pytest.raises(BadMessage, match=r"^ask\.spec: expected the value whose hash"):
        Ask.from_bytes(form.replace(spec, other))


def test_a_string_in_another_encoding_is_refused() -> None:
    """Bytes that are not UTF-8 have no JSON form, even if their hash is right."""
    terms = build_terms(model="mm")
    for raw in (b"\xff\xff", b"\xed\xa0", b"\xc0\x80"):
        words = keccak(raw) + terms.words()[32:]
        with pytest.raises(BadMessage, match=r"^terms\.model: expected UTF-8"):
            Terms.from_bytes(words + len(raw).to_bytes(2, "big") + raw)


def test_lengths_beyond_the_limits_are_refused_on_both_sides() -> None:
    """A writer refuses what no reader accepts. A hostile length reads nothing beyond the frame."""
    for model in ("x" * (MAX_STRING + 1), "\U0001f9fe" * (MAX_STRING + 1)):
        with pytest.raises(BadMessage, match=f"at most {MAX_STRING} characters"):
            build_terms(model=model).to_bytes()
        raw = model.encode()
        words = keccak(raw) + build_terms().words()[32:]
        with pytest.raises(BadMessage, match=r"^terms\.model: expected (a string of )?at most"):
            Terms.from_bytes(words + len(raw).to_bytes(2, "big") + raw)
    assert Terms.from_bytes(build_terms(model="\U0001f9fe" * MAX_STRING).to_bytes()).model == "\U0001f9fe" * MAX_STRING
    with pytest.raises(BadMessage, match=f"at most {MAX_BYTES} bytes"):
        build_ask(SIGNER.address, sealing_key=bytes(MAX_BYTES + 1)).to_bytes()
    row = ClaimRow(payer=SIGNER.address, order_hash=Hash(bytes(32)), seq=1, cumulative_cost=Amount(1))
    claim = Claim(provider=SIGNER.address, rows=(row,) * MAX_ITEMS)
    assert Claim.from_bytes(claim.to_bytes()) == claim
    with pytest.raises(BadMessage, match=f"at most {MAX_ITEMS} items"):
        replace(claim, rows=(row,) * (MAX_ITEMS + 1)).to_bytes()
    with pytest.raises(BadMessage, match=rf"^claim\.rows: expected at most {MAX_ITEMS} items, got 65535"):
        Claim.from_bytes(claim.words() + b"\xff\xff")
    with pytest.raises(BadMessage, match=r"^claim\.rows\[0\]: cut off"):
        Claim.from_bytes(claim.words() + MAX_ITEMS.to_bytes(2, "big"))


def test_a_field_is_decoded_when_it_is_first_read() -> None:
    """A read message behaves like any other: comparing, replacing, copying, pickling, and no attribute that it lacks."""
    order = build_order(SIGNER.address, Address("0x" + "22" * 20), 7, terms_hash=Hash(b"t" * 32))
    form = order.to_bytes()
    read = Order.from_bytes(form)
    with pytest.raises(AttributeError):
        object.__getattribute__(read, "ceiling")
    assert (read.ceiling, type(read.ceiling)) == (7, Amount)
    assert object.__getattribute__(read, "ceiling") == 7
    assert Order.from_bytes(form) == order
    assert replace(Order.from_bytes(form), seq=9) == replace(order, seq=9)
    assert replace(Order.from_bytes(form), seq=9).struct_hash() == replace(order, seq=9).struct_hash()
    assert copy.deepcopy(Order.from_bytes(form)) == pickle.loads(pickle.dumps(Order.from_bytes(form))) == order
    with pytest.raises(AttributeError):
        read.nothing  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError):
        read.ceiling = Amount(8)  # type: ignore[misc]
    with pytest.raises(AttributeError):
        object.__new__(Order).ceiling  # noqa: B018


def test_signed_messages() -> None:
    """A signature is checked over the bytes as they came. A changed byte of message or signature fails the check."""
    receipt = build_receipt(Address("0x" + "22" * 20), SIGNER.address, cost=Amount(5))
    signed = SIGNER.sign(receipt, DOMAIN)
    form = signed.to_bytes()
    assert len(form) == 13 * 32 + 65
    read = read_signed_bytes(Receipt, form).verify(DOMAIN)
    assert (read.message, read.signature, read.digest) == (receipt, signed.signature, signed.digest)
    assert read.to_bytes() == form
    assert read.to_json() == signed.to_json()
    for at in (4 * 32 - 1, 13 * 32 + 5):
        wrong = bytearray(form)
        wrong[at] ^= 1
        with pytest.raises(BadSignature):
            read_signed_bytes(Receipt, bytes(wrong)).verify(DOMAIN)
    for cut, member in ((form[:-1], "receipt.signature: cut off"), (form + b"\0", "receipt: expected 481 bytes, got 482")):
        with pytest.raises(BadMessage, match=f"^{member}"):
            read_signed_bytes(Receipt, cut)


def test_a_message_keeps_no_frame_alive() -> None:
    """What is read from a large frame is copied."""
    signed = SIGNER.sign(build_receipt(Address("0x" + "22" * 20), SIGNER.address), DOMAIN)
    frame = b"x" * 7 + signed.to_bytes() + bytes(1_000)
    before = sys.getrefcount(frame)
    read, end = unpack_signed(Receipt, frame, 7)
    assert end == 7 + 481
    assert read.verify(DOMAIN).message == signed.message
    assert sys.getrefcount(frame) == before


@few
@given(messages(Terms))
def test_terms_of_any_model(terms: Terms) -> None:
    """The hash that an order commits to is the hash of the words."""
    assert Terms.from_bytes(terms.to_bytes()).struct_hash() == terms.struct_hash()
