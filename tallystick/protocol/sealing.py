"""Sealing: what the middle carries but cannot read.

One content key a job. The request body is sealed once under it (AES-256-GCM); the content key is wrapped for each shortlisted
provider with HPKE (RFC 9180, base mode), its `info` binding job, order and provider. Response chunks are sealed under a key
that is derived from the content key *and the order hash*, so two providers of one shortlist never share a key and nonce; a
chunk's nonce is its number, and the last one says so, so reordering, dropping, repeating, altering or cutting off is seen.

Everything is padded to size buckets first, since lengths alone give text away. Commitments (to the request, and to the
transcript as a chain over the response's plaintext) are HMACs under a key derived from the content key: nobody outside can
confirm a guess, and opening one for a third party means revealing that derived key, not the content key.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, MLKEM768X25519PublicKey, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from tallystick.protocol.errors import BadSeal
from tallystick.protocol.types import Address, Hash, JobId

KEY_BYTES = 32
_TAG_BYTES = 16
_LENGTH_BYTES = 4
_SMALLEST, _LARGEST = 128, 16_384
X25519: Final = "x25519"
HYBRID: Final = "mlkem768-x25519"


def bucket(size: int) -> int:
    """The padded size of `size` bytes: the next power of two from 128, and multiples of 16 KiB from there on."""
    if size > _LARGEST:
        return -(-size // _LARGEST) * _LARGEST
    return max(_SMALLEST, 1 << (size - 1).bit_length())


def padded_size(size: int) -> int:
    """The bytes that a plaintext of `size` bytes is sealed as, without the tag: its bucket with the length before it."""
    return bucket(size + _LENGTH_BYTES)


def _pad(data: bytes) -> bytes:
    room = padded_size(len(data)) - len(data) - _LENGTH_BYTES
    return b"".join((len(data).to_bytes(_LENGTH_BYTES, "big"), data, bytes(room)))


def _unpad(padded: bytes) -> bytes:
    size = int.from_bytes(padded[:4], "big")
    if size > len(padded) - 4:
        raise BadSeal("seal: the padding contradicts the length")
    return padded[4 : 4 + size]


def _derive(key: bytes, label: bytes) -> bytes:
    return HKDFExpand(SHA256(), KEY_BYTES, label).derive(key)


@dataclass(frozen=True, repr=False)
class ContentKey:
    """The secret of one job: 32 random bytes. Its repr says nothing."""

    secret: bytes

    @classmethod
    def new(cls, random: Callable[[int], bytes] = os.urandom) -> ContentKey:
        """A fresh key from the given source of randomness."""
        return cls(random(KEY_BYTES))

    @cached_property
    def commitment_key(self) -> bytes:
        """What opens the commitments of this job, and nothing else."""
        return _derive(self.secret, b"tallystick/1 commitment")

    def seal_request(self, job: JobId, body: bytes) -> bytes:
        """The padded body under AES-256-GCM; the key serves this one message, so the nonce is zero. `job` is bound."""
        return AESGCM(_derive(self.secret, b"tallystick/1 request")).encrypt(bytes(12), _pad(body), job)

    def open_request(self, job: JobId, sealed: bytes) -> bytes:
        """The inverse. Raises BadSeal."""
        try:
            return _unpad(AESGCM(_derive(self.secret, b"tallystick/1 request")).decrypt(bytes(12), sealed, job))
        except (InvalidTag, ValueError):
            raise BadSeal("seal: the request does not open with this job's key") from None

    def response_cipher(self, order_hash: Hash) -> AESGCM:
        """The cipher of the response to one order."""
        return AESGCM(_derive(self.secret, b"tallystick/1 response" + order_hash))


def commit_request(commitment_key: bytes, job: JobId, body: bytes) -> Hash:
    """The commitment to a request's plaintext that its terms carry."""
    return Hash(hmac.digest(commitment_key, b"request" + job + body, "sha256"))


class Transcript:
    """The hash chain over the plaintext chunks of a response: c0 = HMAC("response" || order), c(n+1) = HMAC(c(n) || chunk)."""

    def __init__(self, commitment_key: bytes, order_hash: Hash) -> None:
        self._key = commitment_key
        self.commitment = Hash(hmac.digest(commitment_key, b"response" + order_hash, "sha256"))

    def add(self, chunk: bytes) -> None:
        """Chains one more chunk."""
        self.commitment = Hash(hmac.digest(self._key, self.commitment + chunk, "sha256"))


def is_last(sealed: bytes) -> bool:
    """Whether a sealed chunk says that it is the last of its response. Readable without the key; the seal binds it."""
    return sealed[:1] == b"\1"


class _Stream:
    def __init__(self, key: ContentKey, job: JobId, order_hash: Hash) -> None:
        self._cipher = key.response_cipher(order_hash)
        self._bound = job + order_hash
        self._count = 0
        self.finished = False

    def _at(self, flag: bytes) -> tuple[bytes, bytes]:
        return self._count.to_bytes(12, "big"), self._bound + flag


class Sealer(_Stream):
    """Seals a response chunk by chunk. A sealed chunk is one flag byte (1: the last) and the ciphertext."""

    def seal(self, chunk: bytes, *, last: bool = False) -> bytes:
        """The next sealed chunk. Nothing may follow the last one."""
        if self.finished:
            raise ValueError("the response was closed")
        self.finished = last
        flag = b"\1" if last else b"\0"
        nonce, bound = self._at(flag)
        self._count += 1
        return flag + self._cipher.encrypt(nonce, _pad(chunk), bound)


class Opener(_Stream):
    """Opens a response chunk by chunk, in order. `finished` tells whether the last one came. A chunk that does not open changes
    nothing: what was opened is always a prefix of what was sealed.
    """

    def open(self, sealed: bytes) -> bytes:
        """The plaintext of the next chunk. Raises BadSeal for one that is altered, out of order, or after the last."""
        if self.finished:
            raise BadSeal("seal: a chunk after the last one")
        nonce, bound = self._at(sealed[:1])
        try:
            chunk = _unpad(self._cipher.decrypt(nonce, sealed[1:], bound))
        except (InvalidTag, ValueError):
            raise BadSeal(f"seal: chunk {self._count} is altered, missing or out of order") from None
        self._count += 1
        self.finished = is_last(sealed)
        return chunk


def _suite(kem: KEM) -> Suite:
    return Suite(kem, KDF.HKDF_SHA256, AEAD.AES_128_GCM)


_SUITES: dict[str, Suite] = {X25519: _suite(KEM.X25519), HYBRID: _suite(KEM.MLKEM768_X25519)}
SUITES = frozenset(_SUITES)


def _info(job: JobId, order_hash: Hash, provider: Address) -> bytes:
    return b"tallystick/1 wrap" + job + order_hash + bytes.fromhex(provider[2:])


def wrap_key(key: ContentKey, suite: str, sealing_key: bytes, *, job: JobId, order_hash: Hash, provider: Address) -> bytes:
    """The content key, sealed for the provider whose ask names this suite and key. Raises BadSeal for unusable ones."""
    try:
        public = _public_key(suite, sealing_key)
        return _SUITES[suite].encrypt(key.secret, public, info=_info(job, order_hash, provider))
    except (KeyError, ValueError):
        raise BadSeal(f"ask.sealingKey: not a usable {suite!r} key") from None


def _public_key(suite: str, raw: bytes) -> X25519PublicKey | MLKEM768X25519PublicKey:
    if suite == X25519:
        return X25519PublicKey.from_public_bytes(raw)
    head, tail = raw[:-32], raw[-32:]
    return MLKEM768X25519PublicKey(MLKEM768PublicKey.from_public_bytes(head), X25519PublicKey.from_public_bytes(tail))


class SealingKey:
    """A provider's long-lived key that opens what was wrapped for it. Made from a secret: 32 bytes, or 96 for the hybrid."""

    def __init__(self, suite: str, secret: bytes) -> None:
        if len(secret) != self.secret_bytes(suite):
            raise ValueError(f"a {suite} key is made from {self.secret_bytes(suite)} bytes, not from {len(secret)}")
        self.suite = suite
        self._suite = _SUITES[suite]
        x25519 = X25519PrivateKey.from_private_bytes(secret[-32:])
        self._private: X25519PrivateKey | MLKEM768X25519PrivateKey = x25519
        self.public = x25519.public_key().public_bytes_raw()
        if suite == HYBRID:
            mlkem = MLKEM768PrivateKey.from_seed_bytes(secret[:64])
            self._private = MLKEM768X25519PrivateKey(mlkem, x25519)
            self.public = mlkem.public_key().public_bytes_raw() + self.public

    @staticmethod
    def secret_bytes(suite: str) -> int:
        """How many secret bytes a suite's key is made from."""
        return 96 if suite == HYBRID else 32

    def unwrap(self, wrapped: bytes, *, job: JobId, order_hash: Hash, provider: Address) -> ContentKey:
        """The content key that was wrapped for this job, order and provider. Raises BadSeal."""
        try:
            secret = self._suite.decrypt(wrapped, self._private, info=_info(job, order_hash, provider))
        except (InvalidTag, ValueError):
            raise BadSeal("seal: the content key was not wrapped for this provider and order") from None
        if len(secret) != KEY_BYTES:
            raise BadSeal(f"seal: the content key has {len(secret)} bytes, not {KEY_BYTES}")
        return ContentKey(secret)
