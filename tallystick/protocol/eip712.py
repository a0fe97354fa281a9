"""EIP-712 typed data: message classes, their digests, binary and JSON form, signing and verifying.

A message class lists its fields; type string, digest, binary and JSON form are derived from them
(https://eips.ethereum.org/EIPS/eip-712). The binary form is the words that EIP-712 hashes and, behind them, what a word only
hashes (see codecs.py). A message that was read from it keeps the words: its digest is a hash of bytes that are there already, and
a field is decoded when it is first read.

Python names are snake_case; typed data and wire JSON use the same names in camelCase. Integers of more than 32 bits are decimal
strings on the wire, because JSON numbers lose digits beyond 2**53.

For speed, the type hash is computed once per class and the domain separator once per domain. A digest takes one join and two
or three Keccak calls in C; a signature recovery takes one call of libsecp256k1.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, dataclass_transform

import coincurve
import orjson

from tallystick.protocol.codecs import WORD, keccak, read_hex, take
from tallystick.protocol.errors import BadMessage, BadSignature
from tallystick.protocol.message_schema import Schema
from tallystick.protocol.signatures import SIGNATURE, address_of, recover
from tallystick.protocol.types import Address, Hash


class Message:
    """The base of all messages that are hashed or signed. `@message` defines a subclass."""

    __slots__ = ("_words",)
    SCHEMA: ClassVar[Schema]
    SIGNER: ClassVar[str | None]
    """The field that names the signing account; None for a struct that is only a part of other messages."""

    def struct_hash(self) -> Hash:
        """EIP-712 hashStruct. Raises BadMessage if a value does not fit its type."""
        return keccak(self.SCHEMA.type_hash + self.words())

    def words(self) -> bytes:
        """EIP-712 encodeData: one word of 32 bytes for each field. Raises BadMessage if a value does not fit its type."""
        known: bytes | None = getattr(self, "_words", None)
        if known is not None:
            return known
        schema = self.SCHEMA
        values = schema.read(self)
        packed = schema.layout.pack(values)
        if packed is None:  # each codec checks its value
            packed = b"".join([encode(value) for encode, value in zip(schema.encoders, values, strict=True)])
        return packed

    def keep_words(self) -> Self:
        """The same message, which keeps its words: for one that is both hashed and written. Raises BadMessage as `words` does."""
        object.__setattr__(self, "_words", self.words())
        return self

    def digest(self, domain: Domain) -> Hash:
        """The digest that is signed: keccak(0x1901 || domain separator || struct hash)."""
        return keccak(domain.prefix + self.struct_hash())

    def word(self, field: str) -> bytes:
        """The word of a field that fits it. Two words are compared faster than two decoded values."""
        start, _ = self.SCHEMA.places[field]
        return self.words()[start : start + WORD]

    def to_bytes(self) -> bytes:
        """The binary form. Raises BadMessage if a value does not fit its type, or is longer than readers accept."""
        tails = self.SCHEMA.tails
        if not tails:
            return self.words()
        return b"".join([self.words(), *[tail.pack(getattr(self, name)) for name, _, _, tail in tails]])

    @classmethod
    def from_bytes(cls, data: bytes, field: str = "") -> Self:
        """Reads the binary form. Raises BadMessage that names the member for anything but the one encoding of a message."""
        message, end = cls.unpack(data, 0, field)
        _check_end(data, end, field or cls.SCHEMA.name.lower())
        return message

    @classmethod
    def unpack(cls, data: bytes, at: int, field: str = "") -> tuple[Self, int]:
        """Reads the binary form at an offset. Returns the message and the offset after it. Raises BadMessage."""
        schema = cls.SCHEMA
        where = field or schema.name.lower()
        words, end = take(data, at, schema.size, where), at + schema.size
        if int.from_bytes(words, "big") & schema.padding:
            schema.check_words(words, where)
        read = object.__new__(cls)
        object.__setattr__(read, "_words", words)
        for name, wire_name, place, tail in schema.tails:
            value, word, end = tail.unpack(data, end, f"{where}.{wire_name}")
            if words[place : place + WORD] != word:
                raise BadMessage(f"{where}.{wire_name}: expected the value whose hash the message has, got another")
            object.__setattr__(read, name, value)
        return read, end

    def decode(self) -> None:
        """Decodes all fields of a message that was read from its binary form: faster than one by one if most are used."""
        words: bytes | None = getattr(self, "_words", None)
        if words is not None and not self._is_decoded():
            put = object.__setattr__
            for name, value in self.SCHEMA.layout.unpack(words):
                put(self, name, value)

    def _is_decoded(self) -> bool:
        """Whether the last field was decoded, and with it most likely all others. A field that was not is decoded when read."""
        try:
            object.__getattribute__(self, self.SCHEMA.layout.last)
        except AttributeError:
            return False
        return True

    @classmethod
    def unpack_struct(cls, data: bytes, at: int, field: str) -> tuple[Self, Hash, int]:
        """Reads a struct inside another message: `unpack`, and the struct's hash. Raises BadMessage."""
        read, end = cls.unpack(data, at, field)
        return read, read.struct_hash(), end

    if not TYPE_CHECKING:  # a type checker would accept any attribute

        def __getattr__(self, name: str) -> Any:
            """Decodes a field of a message that was read from its binary form, when the field is first used."""
            place = self.SCHEMA.places.get(name)
            if place is None:
                raise AttributeError(name=name, obj=self)
            start, decode = place
            value = decode(self._words[start : start + WORD])
            object.__setattr__(self, name, value)
            return value

    def to_json(self) -> dict[str, Any]:
        """The wire form: camelCase names, hex bytes, wide integers as decimal strings."""
        schema = self.SCHEMA
        return {name: write(v) for (name, write), v in zip(schema.writers, schema.read(self), strict=True)}

    @classmethod
    def from_json(cls, raw: object, field: str = "") -> Self:
        """Reads the wire form. Raises BadMessage that names a missing, unknown or ill-typed member."""
        schema = cls.SCHEMA
        where = field or schema.name.lower()
        if not isinstance(raw, dict):
            raise BadMessage(f"{where}: expected a JSON object")
        if raw.keys() != schema.wire_set:
            wrong = sorted(map(str, raw.keys() ^ schema.wire_set))[:5]
            raise BadMessage(f"{where}: missing or unknown members: {', '.join(wrong)}"[:500])
        try:
            return cls(**{f: read(raw[name], name) for f, name, read in schema.readers})
        except BadMessage as error:
            raise BadMessage(f"{where}.{error}") from None


def _check_end(data: bytes, end: int, where: str) -> None:
    if len(data) != end:
        raise BadMessage(f"{where}: expected {end} bytes, got {len(data)}")


T = TypeVar("T", bound=type[Message])
M = TypeVar("M", bound=Message, covariant=True)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def message(*, signer: str | None = None) -> Callable[[T], T]:
    """A class decorator: makes a frozen, keyword-only dataclass and derives its EIP-712 schema.

    `signer` is the field that names the signing account.
    """

    def decorate(cls: T) -> T:
        decorated = dataclass(frozen=True, slots=True, kw_only=True)(cls)
        decorated.SIGNER = signer
        decorated.SCHEMA = Schema(decorated)
        return decorated  # type: ignore[return-value]  # slots=True makes a new class of the same shape

    return decorate


@dataclass(frozen=True)
class Domain:
    """The EIP-712 domain, which binds each signature to one chain and one contract."""

    chain_id: int
    contract: Address
    name: str = "Tallystick"
    version: str = "1"

    TYPE: ClassVar[str] = "EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"

    @cached_property
    def separator(self) -> Hash:
        """EIP-712 hashStruct of the domain."""
        return keccak(
            keccak(self.TYPE.encode())
            + keccak(self.name.encode())
            + keccak(self.version.encode())
            + self.chain_id.to_bytes(32, "big")
            + bytes.fromhex(self.contract[2:]).rjust(32, b"\0")
        )

    @cached_property
    def prefix(self) -> bytes:
        """The first 34 bytes that a digest hashes: 0x1901 and the separator."""
        return b"\x19\x01" + self.separator

    def to_json(self) -> dict[str, Any]:
        """The `domain` section of a typed-data document."""
        return {"name": self.name, "version": self.version, "chainId": self.chain_id, "verifyingContract": self.contract}


def typed_data(message: Message, domain: Domain) -> dict[str, Any]:
    """The full EIP-712 document of a message, as wallet libraries expect it (eth_signTypedData_v4)."""
    domain_type = re.findall(r"(\w+) (\w+)", Domain.TYPE)
    return {
        "types": {"EIP712Domain": [{"name": n, "type": t} for t, n in domain_type]} | message.SCHEMA.types(),
        "domain": domain.to_json(),
        "primaryType": message.SCHEMA.name,
        "message": message.to_json(),
    }


@dataclass(frozen=True, slots=True)
class Signed(Generic[M]):
    """A message and a signature that was not checked yet. `verify` checks it."""

    message: M
    signature: bytes

    def verify(self, domain: Domain) -> Verified[M]:
        """Checks that the account in the message's signer field signed it. Raises BadSignature, BadMessage."""
        digest = self.message.digest(domain)
        name = self.message.SIGNER
        if name is None:
            raise TypeError(f"{self.message.SCHEMA.name} is only part of other messages and is not signed alone")
        signer = recover(digest, self.signature)
        if signer != getattr(self.message, name):
            expected = getattr(self.message, name)
            raise BadSignature(
                f"{self.message.SCHEMA.name.lower()}: expected a signature of {expected}, its {name}, got one of {signer}"
            )
        self.message.decode()  # whoever verifies a message goes on to use it
        return Verified(self.message, self.signature, digest)

    def to_json(self) -> dict[str, Any]:
        """{"message": …, "signature": "0x…"}."""
        return {"message": self.message.to_json(), "signature": "0x" + self.signature.hex()}

    def to_bytes(self) -> bytes:
        """The binary form: that of the message, then the 65 bytes of the signature. Raises BadMessage."""
        return self.message.to_bytes() + self.signature

    def dumps(self) -> str:
        """The wire form as compact JSON text, for databases."""
        return orjson.dumps(self.to_json()).decode()


S = TypeVar("S", bound=Message)


def read_signed(cls: type[S], raw: object, field: str = "") -> Signed[S]:
    """Reads the wire form of a signed message of class `cls`. Raises BadMessage."""
    where = field or cls.SCHEMA.name.lower()
    if not isinstance(raw, dict) or raw.keys() != {"message", "signature"}:
        raise BadMessage(f'{where}: expected {{"message": …, "signature": "0x…"}}')
    return Signed(cls.from_json(raw["message"], where), read_hex(f"{where}.signature", raw["signature"], 65))


def unpack_signed(cls: type[S], data: bytes, at: int = 0, field: str = "") -> tuple[Signed[S], int]:
    """Reads the binary form of a signed message at an offset. Returns it and the offset after it. Raises BadMessage.

    The result copies what it needs of `data`, so it does not keep a large frame alive.
    """
    where = field or cls.SCHEMA.name.lower()
    read, end = cls.unpack(data, at, where)
    return Signed(read, take(data, end, SIGNATURE, f"{where}.signature")), end + SIGNATURE


def read_signed_bytes(cls: type[S], data: bytes, field: str = "") -> Signed[S]:
    """Reads the binary form of a signed message, which must be all of `data`. Raises BadMessage."""
    signed, end = unpack_signed(cls, data, 0, field)
    _check_end(data, end, field or cls.SCHEMA.name.lower())
    return signed


def loads_signed(cls: type[S], text: str | bytes) -> Signed[S]:
    """Reads the text that `Signed.dumps` wrote. Raises BadMessage."""
    try:
        return read_signed(cls, orjson.loads(text))
    except orjson.JSONDecodeError as error:
        raise BadMessage(f"{cls.SCHEMA.name.lower()}: not JSON: {error}") from None


@dataclass(frozen=True, slots=True)
class Verified(Signed[M]):
    """A signed message with a checked signature. Only `Signed.verify` and `Signer.sign` return it."""

    digest: Hash


class Signer:
    """A secp256k1 key that signs messages (RFC 6979 nonces, low s). Its repr shows the address only."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) != 32:
            raise ValueError(f"expected a secret key of 32 bytes, got {len(secret)}")
        self._key = coincurve.PrivateKey(secret)
        self.address = address_of(self._key.public_key)

    def sign(self, message: S, domain: Domain) -> Verified[S]:
        """Signs a message that names this key in its signer field. Raises ValueError for any other message."""
        if message.SIGNER is None or getattr(message, message.SIGNER) != self.address:
            raise ValueError(f"{message.SCHEMA.name.lower()}: its signer field does not name this key, {self.address}")
        digest = message.digest(domain)
        return Verified(message, self.sign_digest(digest), digest)

    def sign_digest(self, digest: Hash) -> bytes:
        """The 65-byte signature r || s || v of a digest, with v 27 or 28."""
        raw = self._key.sign_recoverable(digest, hasher=None)
        return raw[:64] + bytes((raw[64] + 27,))

    @property
    def secret(self) -> bytes:
        """The raw key, for keystores and transaction signing. Never log or print it."""
        return self._key.secret

    def __repr__(self) -> str:
        return f"Signer({self.address})"
