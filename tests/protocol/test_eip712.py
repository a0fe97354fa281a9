"""The generic part of every signed message: schema, JSON, digest, signature."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import orjson
import pytest
from eth_account import Account
from eth_account.messages import encode_typed_data
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.codecs import MAX_BYTES, MAX_ITEMS, MAX_STRING, U8, U64, keccak
from tallystick.protocol.eip712 import Domain, Message, Signed, Signer, loads_signed, message, read_signed, typed_data
from tallystick.protocol.errors import BadMessage, BadSignature, TallyError
from tallystick.protocol.messages import Ask, Bind, Claim, ClaimRow, Order, Spec, Terms
from tallystick.protocol.signatures import recover
from tallystick.protocol.types import ZERO_ADDRESS, Address, Amount, Hash
from tests.protocol.strategies import (
    ALL,
    SIGNED,
    addresses,
    any_message,
    domains,
    few,
    json_values,
    many,
    messages,
    mutated,
    signers,
    some,
)

ORDER_OF_CURVE = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
DOMAIN = Domain(31_337, Address("0x" + "5f" * 20))
SIGNER = Signer(keccak(b"somebody"))
BIND = Bind(key=SIGNER.address, owner=ZERO_ADDRESS)
ASK_JSON = {
    "provider": "0x" + "00" * 20,
    "model": "m",
    "inputPrice": "1",
    "cachedInputPrice": "1",
    "outputPrice": "1",
    "contextTokens": 1,
    "maxOutputTokens": 1,
    "sealingSuite": "x25519",
    "sealingKey": "0x",
    "validFrom": "1",
    "validUntil": "1",
    "seq": "1",
    "spec": Spec().to_json(),
}


@message(signer="who")
class Everything(Message):
    """A message with every type that a field may have, including types that no message of the market uses yet."""

    who: Address
    flag: bool
    small: U8
    several: tuple[U64, ...]
    blobs: tuple[bytes, ...]
    nested: tuple[Spec, ...]


@given(any_message, domains)
@some
def test_digest_is_that_of_an_independent_implementation(subject: Message, domain: Domain) -> None:
    """For every message class, the digest is what eth_account computes from the typed-data document."""
    signable = encode_typed_data(full_message=typed_data(subject, domain))
    assert subject.digest(domain) == keccak(b"\x19" + signable.version + signable.header + signable.body)
    assert domain.separator == signable.header
    assert subject.struct_hash() == signable.body


@given(st.data(), signers, domains)
@few
def test_signature_and_recovery_are_those_of_an_independent_implementation(
    data: st.DataObject, signer: Signer, domain: Domain
) -> None:
    """A wallet library produces the same signature, and each side recovers the other's signer."""
    cls = data.draw(st.sampled_from(SIGNED))
    subject = data.draw(messages(cls, **{str(cls.SIGNER): signer.address}))
    signed = signer.sign(subject, domain)
    signable = encode_typed_data(full_message=typed_data(subject, domain))
    reference = Account.sign_message(signable, signer.secret)
    assert signed.signature == bytes(reference.signature)
    assert signed.digest == bytes(reference.message_hash)
    assert Account.recover_message(signable, signature=signed.signature).lower() == signer.address
    assert Signed(subject, bytes(reference.signature)).verify(domain) == signed


def test_a_signature_is_the_one_pinned_here() -> None:
    """An order's digest and signature equal constants made by eth_account, so both implementations cannot drift together."""
    signer = Signer(bytes.fromhex("4646464646464646464646464646464646464646464646464646464646464646"))
    order = Order(
        payer=signer.address,
        provider=Address("0x" + "22" * 20),
        ceiling=Amount(2**96 - 1),
        reserve_target=Amount(1_000_000),
        seq=7,
        deadline=1_900_000_000,
        claim_by=1_900_604_800,
        max_fee_bps=250,
        coordinator=Address("0x" + "33" * 20),
        terms_hash=Hash(b"\x44" * 32),
    )
    signed = signer.sign(order, Domain(1, Address("0x" + "cc" * 20)))
    assert signer.address == "0x9d8a62f656a8d1615c1294fd71e9cfb3e4855a4f"
    assert signed.digest.hex() == "748ba9e8b770ae17d6387c6c48df85890f3475084a88c1cf39446aeb7919aec3"
    assert signed.signature.hex() == (
        "d4c9a3cd72c9f8de557f532597a1fa0fcedffbc9d613f475095df4fa2ac81f39"
        "2544945ecb8aa139b023e4eda9a3a489a41a31073db12de199e9de71d15272181c"
    )


@given(any_message)
@many
def test_every_message_survives_its_json(subject: Message) -> None:
    """Writing a message to JSON text and reading it back, by either JSON library, gives an equal message of the same types."""
    for text in (json.dumps(subject.to_json()), orjson.dumps(subject.to_json())):
        again = type(subject).from_json(json.loads(text))
        assert again == subject
        assert again.to_json() == subject.to_json()
        assert [type(v) for v in again.SCHEMA.read(again)] == [type(v) for v in subject.SCHEMA.read(subject)]


@given(st.data(), signers, domains)
@few
def test_signed_messages_survive_the_store(data: st.DataObject, signer: Signer, domain: Domain) -> None:
    """`loads_signed` reads the output of `dumps`, and the signature stays valid."""
    cls = data.draw(st.sampled_from(SIGNED))
    signed = signer.sign(data.draw(messages(cls, **{str(cls.SIGNER): signer.address})), domain)
    again = loads_signed(cls, signed.dumps())
    assert (again.message, again.signature) == (signed.message, signed.signature)
    assert again.verify(domain) == signed
    assert read_signed(cls, again.to_json()) == again


def test_long_tuples_hash_and_travel() -> None:
    """A claim of the most permitted rows has eth_account's hash and survives JSON; one more row is refused."""
    row = ClaimRow(payer=ZERO_ADDRESS, order_hash=Hash(b"\1" * 32), seq=2**64 - 1, cumulative_cost=Amount(2**96 - 1))
    claim = Claim(provider=ZERO_ADDRESS, rows=(row,) * MAX_ITEMS)
    signable = encode_typed_data(full_message=typed_data(claim, DOMAIN))
    assert claim.struct_hash() == signable.body
    assert Claim.from_json(claim.to_json()) == claim
    longer = {**claim.to_json(), "rows": [row.to_json()] * (MAX_ITEMS + 1)}
    with pytest.raises(BadMessage, match=rf"claim\.rows: expected a list of at most {MAX_ITEMS}"):
        Claim.from_json(longer)


@given(addresses, st.booleans(), st.lists(st.integers(0, 2**64 - 1)), st.lists(st.binary(max_size=40)), domains)
@few
def test_types_that_no_message_uses_yet_are_right_too(
    who: Address, flag: bool, several: list[int], blobs: list[bytes], domain: Domain
) -> None:
    """Booleans and arrays of integers, bytes and structs have eth_account's hash and survive JSON."""
    made = Everything(who=who, flag=flag, small=255, several=tuple(several), blobs=tuple(blobs), nested=(Spec(), Spec(tier="a")))
    assert made.struct_hash() == encode_typed_data(full_message=typed_data(made, domain)).body
    assert Everything.from_json(made.to_json()) == made


def test_a_field_without_an_eip712_type_is_refused_when_the_class_is_made() -> None:
    """A class with a float or an optional field cannot be defined."""
    for hint in (float, int, str | None, dict):
        body = {"__annotations__": {"field": hint}, "__module__": __name__}
        with pytest.raises(TypeError, match="no EIP-712 type"):
            message()(type("Wrong", (Message,), body))


# Strict reading

UINT: list[Any] = [
    -1,
    1.0,
    1.5,
    True,
    None,
    "",
    "01",
    "+1",
    "-1",
    " 1",
    "1 ",
    "1\n",
    "0x10",
    "1e3",
    "1_0",
    "१",
    "1.0",
    [],
    {},
    10**5000,
]
HEX: list[Any] = ["", "0x0", "0X00", "00", "0xzz", "0x 00", "0x00 ", "0x00\n", "x", 0, None, True, b"", [], {}]
WRONG: dict[str, list[Any]] = {
    "address": [*HEX, "0x" + "0" * 39, "0x" + "0" * 41, "0" * 42, "0x" + "g" * 40],
    "bytes32": [*HEX, "0x", "0x" + "00" * 31, "0x" + "00" * 33],
    "bytes16": [*HEX, "0x", "0x" + "00" * 15, "0x" + "00" * 32],
    "bytes": [*HEX, "0x" + "00" * (MAX_BYTES + 1)],
    "string": [1, None, True, b"", [], {}, "a" * (MAX_STRING + 1), "\ud800", "a\udfffb"],
    "string[]": ["", None, {}, 1, [1], [None], ["\ud800"], [["a"]], ["a"] * (MAX_ITEMS + 1)],
    "ClaimRow[]": ["", None, {}, [1], [[]], [{}]],
    "Spec": ["", None, [], {}, 1, {"revision": "x"}],
}
WRONG |= {f"uint{bits}": [*UINT, 1 << bits, str(1 << bits), str(10**78)] for bits in (8, 16, 32, 64, 96)}


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_ill_typed_member_is_named(cls: type[Message]) -> None:
    """A member of a wrong type, range, form or length raises BadMessage with the member's name."""
    good = _example(cls)
    assert cls.from_json(good).to_json() == good
    for codec, name in zip(cls.SCHEMA.codecs, cls.SCHEMA.wire_names, strict=True):
        for value in WRONG[codec.name]:
            with pytest.raises(BadMessage) as caught:
                cls.from_json({**good, name: value})
            assert str(caught.value).startswith(f"{cls.__name__.lower()}.{name}"), value
            assert len(str(caught.value)) < 600


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_missing_and_unknown_members_are_named(cls: type[Message]) -> None:
    """A missing, an additional and a misspelt member are refused by name."""
    good = _example(cls)
    for name in good:
        with pytest.raises(BadMessage, match=rf"{cls.__name__.lower()}: missing or unknown members: {name}$"):
            cls.from_json({k: v for k, v in good.items() if k != name})
    with pytest.raises(BadMessage, match=r"missing or unknown members: extra$"):
        cls.from_json({**good, "extra": 1})
    with pytest.raises(BadMessage, match="expected a JSON object"):
        cls.from_json([good])
    with pytest.raises(BadMessage) as caught:
        cls.from_json({**good, "e" * 100_000: 1})
    assert len(str(caught.value)) <= 500, "a peer does not fill our logs"


def test_nested_members_are_named_by_their_path() -> None:
    """An error inside a nested message or a list gives its path of names and indices."""
    with pytest.raises(BadMessage, match=r"^ask\.spec\.features\[1\]: expected a string"):
        Ask.from_json({**ASK_JSON, "spec": {**Spec().to_json(), "features": ["a", 1]}})
    row = {"payer": "0x" + "00" * 20, "orderHash": "0x" + "00" * 32, "seq": "x", "cumulativeCost": "1"}
    with pytest.raises(BadMessage, match=r"^orders\[3\]\.rows\[0\]\.seq: expected a uint64"):
        Claim.from_json({"provider": "0x" + "00" * 20, "rows": [row]}, "orders[3]")


def test_wide_integers_travel_as_text_and_narrow_ones_as_numbers() -> None:
    """JSON numbers lose digits above 2**53, so only integers of up to 32 bits are written as numbers; both forms are read."""
    written = Ask.from_json(ASK_JSON).to_json()
    assert (written["inputPrice"], written["contextTokens"]) == ("1", 1)
    lenient = Ask.from_json({**ASK_JSON, "inputPrice": 1, "contextTokens": "1"})
    assert lenient.to_json() == ASK_JSON


def test_addresses_are_read_in_any_case_and_kept_in_lower_case() -> None:
    """Two spellings of one address are equal."""
    mixed = "0x" + "aB" * 20
    assert Bind.from_json({"key": mixed, "owner": mixed}).key == mixed.lower()


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
@given(st.data())
@some
def test_reading_anything_raises_nothing_but_badmessage(cls: type[Message], data: st.DataObject) -> None:
    """Any JSON, and any small change of a valid message, is read or refused with BadMessage."""
    for raw in (data.draw(json_values), data.draw(mutated(_example(cls)))):
        with contextlib.suppress(BadMessage):
            cls.from_json(raw).digest(DOMAIN)


@given(st.binary(max_size=200) | st.text(max_size=200) | json_values.map(json.dumps))
@many
def test_reading_any_stored_text_raises_nothing_but_badmessage(text: bytes | str) -> None:
    """`loads_signed` refuses every text that is not a signed message with BadMessage."""
    with pytest.raises(BadMessage):
        loads_signed(Order, text)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "1" * 5_000, b"\xff\xfe", "", "{}", "null", '{"message":{},"signature":"0x","x":1}'],
)
def test_hostile_texts_are_refused(text: str | bytes) -> None:
    """Deep nesting, endless numbers, wrong encodings and wrong shapes raise BadMessage."""
    with pytest.raises(BadMessage):
        loads_signed(Order, text)


@pytest.mark.parametrize("signature", ["", "0x", "0x" + "00" * 64, "0x" + "00" * 66, "00" * 65, 65, None, ["0x"]])
def test_a_signature_member_of_another_form_is_named(signature: object) -> None:
    """A signature that is not 65 bytes of hex is refused when it is read."""
    with pytest.raises(BadMessage, match=r"^bind\.signature: expected"):
        read_signed(Bind, {"message": BIND.to_json(), "signature": signature})


# Values that do not fit


def test_values_that_do_not_fit_their_type_have_no_digest() -> None:
    """A message with a value out of range, of a wrong length or not encodable raises BadMessage when it is created."""
    order = Order.from_json(_example(Order))
    terms = Terms.from_json(_example(Terms))
    for wrong in (
        _with(order, ceiling=Amount(2**96)),
        _with(order, seq=-1),
        _with(order, max_fee_bps=65_536),
        _with(order, terms_hash=Hash(b"short")),
        _with(terms, job=bytes(15)),
        _with(terms, model="\ud800"),
    ):
        with pytest.raises(BadMessage):
            wrong.digest(DOMAIN)


# Signatures


@given(signers, st.binary(min_size=32, max_size=32).map(Hash))
@some
def test_the_malleable_twin_of_a_signature_is_refused(signer: Signer, digest: Hash) -> None:
    """Signatures are low-s, and the equivalent high-s signature, which Ethereum would accept, is refused."""
    signature = signer.sign_digest(digest)
    r, s, v = signature[:32], int.from_bytes(signature[32:64], "big"), signature[64]
    assert s <= ORDER_OF_CURVE // 2
    assert recover(digest, signature) == signer.address
    high_s_signature = r + (ORDER_OF_CURVE - s).to_bytes(32, "big") + bytes((55 - v,))
    with pytest.raises(BadSignature, match="malleable"):
        recover(digest, high_s_signature)


@pytest.mark.parametrize("v", [0, 1, 2, 26, 29, 35, 36, 255])
def test_only_27_and_28_are_recovery_values(v: int) -> None:
    """Every other v is refused, including 0 and 1, which some libraries write."""
    signature = SIGNER.sign_digest(Hash(bytes(32)))
    with pytest.raises(BadSignature, match="27 or 28"):
        recover(Hash(bytes(32)), signature[:64] + bytes((v,)))


@pytest.mark.parametrize("length", [0, 1, 64, 66, 130])
def test_only_65_bytes_are_a_signature(length: int) -> None:
    """A signature of any other length is refused."""
    with pytest.raises(BadSignature, match="65 bytes"):
        recover(Hash(bytes(32)), b"\x1b" * length)


@pytest.mark.parametrize(
    ("r", "s"), [(0, 1), (1, 0), (0, 0), (ORDER_OF_CURVE, 1), (2**256 - 1, 1), (1, ORDER_OF_CURVE // 2 + 1), (5, 1)]
)
def test_impossible_points_are_refused(r: int, s: int) -> None:
    """Zero, overflowing and off-curve values recover no signer."""
    with pytest.raises(BadSignature):
        recover(Hash(b"\1" * 32), r.to_bytes(32, "big") + s.to_bytes(32, "big") + b"\x1b")


@given(st.binary(min_size=0, max_size=70) | st.binary(min_size=64, max_size=64).map(lambda raw: raw + b"\x1b"))
@many
def test_garbage_is_nobodys_signature(signature: bytes) -> None:
    """Random bytes are refused, or recover another account; they never verify and raise no other error."""
    with pytest.raises(BadSignature):
        Signed(BIND, signature).verify(DOMAIN)


@given(st.data(), signers)
@few
def test_any_change_of_a_signed_message_breaks_its_signature(data: st.DataObject, signer: Signer) -> None:
    """After a change of any field, the chain or the contract, the signature is invalid."""
    cls = data.draw(st.sampled_from(SIGNED))
    signer_member = {str(cls.SIGNER): signer.address}
    signed = signer.sign(data.draw(messages(cls, **signer_member)), DOMAIN)
    other = data.draw(messages(cls, **signer_member).filter(lambda made: made != signed.message))
    for name in cls.SCHEMA.fields:
        if getattr(other, name) != getattr(signed.message, name):
            with pytest.raises(BadSignature):
                Signed(_with(signed.message, **{name: getattr(other, name)}), signed.signature).verify(DOMAIN)
    for domain in (Domain(DOMAIN.chain_id + 1, DOMAIN.contract), Domain(DOMAIN.chain_id, ZERO_ADDRESS)):
        with pytest.raises(BadSignature):
            Signed(signed.message, signed.signature).verify(domain)


@given(any_message)
@some
def test_other_chains_and_contracts_have_other_digests(subject: Message) -> None:
    """A digest binds chain, contract, and the domain's name and version."""
    domains_ = [
        DOMAIN,
        Domain(1, DOMAIN.contract),
        Domain(DOMAIN.chain_id, ZERO_ADDRESS),
        Domain(DOMAIN.chain_id, DOMAIN.contract, name="Other"),
        Domain(DOMAIN.chain_id, DOMAIN.contract, version="2"),
    ]
    assert len({subject.digest(domain) for domain in domains_}) == len(domains_)


def test_a_message_signed_by_another_key_says_by_whom() -> None:
    """The error names the account that signed and the field that it should match."""
    stranger = Signer(keccak(b"stranger"))
    forged = Signed(BIND, stranger.sign_digest(BIND.digest(DOMAIN)))
    with pytest.raises(
        BadSignature, match=rf"^bind: expected a signature of {BIND.key}, its key, got one of {stranger.address}$"
    ):
        forged.verify(DOMAIN)


def test_a_part_of_a_message_is_never_signed_by_itself() -> None:
    """Spec, Terms and ClaimRow name no signer: signing or verifying one is a programming error, not a peer's error."""
    spec = Spec()
    with pytest.raises(ValueError, match="does not name this key"):
        SIGNER.sign(spec, DOMAIN)
    with pytest.raises(TypeError, match="not signed alone"):
        Signed(spec, SIGNER.sign_digest(spec.digest(DOMAIN))).verify(DOMAIN)


def test_a_key_signs_only_in_its_own_name() -> None:
    """A signer refuses a message that names another account as its signer."""
    with pytest.raises(ValueError, match="does not name this key"):
        SIGNER.sign(Bind(key=ZERO_ADDRESS, owner=SIGNER.address), DOMAIN)


@pytest.mark.parametrize("secret", [b"", b"\1", bytes(32), b"\xff" * 32, b"\1" * 31, b"\1" * 33])
def test_only_32_bytes_in_range_are_a_key(secret: bytes) -> None:
    """A secret that is too short, zero or above the curve's order is refused, and never padded."""
    with pytest.raises(ValueError, match=r"\w"):
        Signer(secret)


@given(signers)
@few
def test_a_signer_never_shows_its_secret(signer: Signer) -> None:
    """Neither repr, str nor a format of a signer, or of its container, contains the key."""
    shown = f"{signer!r} {signer!s} {signer} {[signer]} {vars(signer)}"
    assert signer.address in shown
    assert signer.secret.hex() not in shown
    assert repr(signer.secret) not in shown


def test_errors_of_this_module_are_in_the_tree() -> None:
    """Both errors are of this project, so a server can answer them."""
    assert issubclass(BadMessage, TallyError)
    assert issubclass(BadSignature, TallyError)


def _with(subject: Any, **changes: Any) -> Any:
    values = {name: getattr(subject, name) for name in subject.SCHEMA.fields}
    return type(subject)(**(values | changes))


def _example(cls: type[Message]) -> dict[str, Any]:
    """Builds a valid message of a class as JSON from the names of its types."""
    if cls is Ask:
        return ASK_JSON
    scalars: dict[str, Any] = {
        "address": "0x" + "00" * 20,
        "bytes32": "0x" + "11" * 32,
        "bytes16": "0x" + "22" * 16,
        "bytes": "0x33",
        "string": "text",
        "string[]": ["a", "b"],
        "ClaimRow[]": [],
    }
    scalars |= {f"uint{bits}": 5 if bits <= 32 else "5" for bits in (8, 16, 32, 64, 96)}
    return {name: scalars[codec.name] for codec, name in zip(cls.SCHEMA.codecs, cls.SCHEMA.wire_names, strict=True)}
