"""Sealing: end-to-end encryption of requests and responses between client and provider, which the coordinator cannot read.

Each job has one content key. The request body is sealed once with it (AES-256-GCM). The content key is wrapped for each
shortlisted provider with HPKE (RFC 9180, base mode), whose `info` binds job, order and provider. HPKE's curve arithmetic may be
shared by the jobs of a minute: then it wraps a session key, and a key derived from that, job, order and provider wraps the
content key. Response chunks are sealed with a key derived from the content key and the order hash, so no two providers
share a key and nonce. A chunk's nonce is its number and the last chunk is marked, so the client detects chunks that are
reordered, dropped, repeated or altered, and a response that is cut off.

Plaintext is padded to size buckets first, because exact lengths leak text. The commitments to the request and to the response
transcript are HMACs under a key derived from the content key. Nobody else can test a guess against them, and to prove a
commitment to a third party, a client reveals that derived key and not the content key.
"""

from __future__ import annotations

import base64
import functools
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
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, MLKEM768X25519PublicKey, Suite

from tallystick.protocol.errors import BadSeal
from tallystick.protocol.types import Address, Hash, JobId

KEY_BYTES = 32
_NONCE_BYTES = 12
_MORE, _LAST, _EVIDENCE = b"\0", b"\1", b"\2"
"""The first byte of a sealed chunk: more chunks follow, it is the last one, or it has no bytes of the response but evidence."""
_LENGTH_BYTES = 4
_SMALLEST, _LARGEST = 128, 16_384
X25519: Final = "x25519"
HYBRID: Final = "mlkem768-x25519"
_IN_SESSION_BYTES = KEY_BYTES + 16
"""A content key that is sealed with a session's key, and the tag."""
_SESSION_INFO = b"tallystick/1 session"
MAX_SESSIONS = 1_024
"""Session keys that a provider remembers. Another one costs the curve arithmetic of one job."""


def bucket(size: int) -> int:
    """The bucket of `size` bytes: a power of two from 128 to 16 KiB, above that a multiple of 16 KiB."""
    if size > _LARGEST:
        return -(-size // _LARGEST) * _LARGEST
    return max(_SMALLEST, 1 << (size - 1).bit_length())


@functools.lru_cache(4_096)
def padded_size(size: int) -> int:
    """The padded size of a plaintext of `size` bytes, including its length prefix and without the authentication tag."""
    return bucket(size + _LENGTH_BYTES)


def _pad(data: bytes) -> bytes:
    padding = padded_size(len(data)) - len(data) - _LENGTH_BYTES
    return b"".join((len(data).to_bytes(_LENGTH_BYTES, "big"), data, bytes(padding)))


def _unpad(padded: bytes) -> bytes:
    size = int.from_bytes(padded[:4], "big")
    if size > len(padded) - 4:
        raise BadSeal("seal: the length prefix does not fit the padding")
    return padded[4 : 4 + size]


def _derive(key: bytes, label: bytes) -> bytes:
    """HKDF-Expand with SHA-256 (RFC 5869, 2.3) for 32 bytes, which are its first block alone."""
    return hmac.digest(key, label + b"\1", "sha256")


@dataclass(frozen=True, repr=False)
class ContentKey:
    """The secret of one job: 32 random bytes. Its repr does not show them."""

    secret: bytes

    @classmethod
    def new(cls, random: Callable[[int], bytes] = os.urandom) -> ContentKey:
        """A new key from the given source of random bytes."""
        return cls(random(KEY_BYTES))

    @cached_property
    def commitment_key(self) -> bytes:
        """The key that opens this job's commitments and decrypts nothing."""
        return _derive(self.secret, b"tallystick/1 commitment")

    def seal_request(self, job: JobId, body: bytes) -> bytes:
        """Seals the padded body with AES-256-GCM, bound to `job`. The nonce is zero, because the key seals this message only."""
        return AESGCM(_derive(self.secret, b"tallystick/1 request")).encrypt(bytes(12), _pad(body), job)

    def open_request(self, job: JobId, sealed: bytes | memoryview) -> bytes:
        """Opens a sealed request. Raises BadSeal."""
        try:
            return _unpad(AESGCM(_derive(self.secret, b"tallystick/1 request")).decrypt(bytes(12), sealed, job))
        except (InvalidTag, ValueError):
            raise BadSeal("seal: the request was altered, or sealed with another job's key") from None

    def seal_reason(self, order_hash: Hash, reason: str, random: Callable[[int], bytes] = os.urandom) -> str:
        """Seals a node's words about a failed order for its client, padded, as base64."""
        nonce = random(_NONCE_BYTES)
        sealed = AESGCM(self._reason_key(order_hash)).encrypt(nonce, _pad(reason.encode(errors="replace")), order_hash)
        return base64.b64encode(nonce + sealed).decode()

    def open_reason(self, order_hash: Hash, sealed: str) -> str:
        """Opens a sealed reason. Raises BadSeal."""
        try:
            raw = base64.b64decode(sealed, validate=True)
            cipher = AESGCM(self._reason_key(order_hash))
            return _unpad(cipher.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], order_hash)).decode(errors="replace")
        except (InvalidTag, ValueError):
            raise BadSeal("seal: the reason was altered, or sealed for another order") from None

    def _reason_key(self, order_hash: Hash) -> bytes:
        return _derive(self.secret, b"tallystick/1 reason" + order_hash)

    def response_cipher(self, order_hash: Hash) -> AESGCM:
        """The cipher of the response to one order."""
        return AESGCM(_derive(self.secret, b"tallystick/1 response" + order_hash))


def commit_request(commitment_key: bytes, job: JobId, body: bytes) -> Hash:
    """The commitment to a request's plaintext, which the order's terms contain."""
    return Hash(hmac.digest(commitment_key, b"request" + job + body, "sha256"))


class Transcript:
    """A hash chain over the plaintext chunks of a response: c0 = HMAC("response" || order), c(n+1) = HMAC(c(n) || chunk)."""

    def __init__(self, commitment_key: bytes, order_hash: Hash) -> None:
        self._key = commitment_key
        self.commitment = Hash(hmac.digest(commitment_key, b"response" + order_hash, "sha256"))

    def add(self, chunk: bytes) -> None:
        """Appends a chunk to the chain."""
        self.commitment = Hash(hmac.digest(self._key, self.commitment + chunk, "sha256"))


def is_last(sealed: bytes) -> bool:
    """Whether a sealed chunk is marked as the last of its response. The mark is plaintext and authenticated by the seal."""
    return sealed[:1] == _LAST


def is_evidence(sealed: bytes) -> bool:
    """Whether a sealed chunk has rows of evidence (token_evidence.py) instead of bytes of the response. Authenticated as well."""
    return sealed[:1] == _EVIDENCE


class _Stream:
    def __init__(self, key: ContentKey, job: JobId, order_hash: Hash) -> None:
        self._cipher = key.response_cipher(order_hash)
        self._associated = {flag: job + order_hash + flag for flag in (_MORE, _LAST, _EVIDENCE)}
        self._count = 0
        """The number of the next chunk, which is its nonce."""
        self.finished = False


class Sealer(_Stream):
    """Seals a response, chunk by chunk. A sealed chunk is one flag byte (1: last, 2: evidence) and the ciphertext."""

    def seal(self, chunk: bytes, *, last: bool = False) -> bytes:
        """Seals the next chunk. Raises ValueError after the last one."""
        return self._seal(chunk, _LAST if last else _MORE)

    def seal_evidence(self, rows: bytes) -> bytes:
        """Seals a chunk of evidence, whose place among the chunks nobody can change. Raises ValueError after the last one."""
        return self._seal(rows, _EVIDENCE)

    def _seal(self, chunk: bytes, flag: bytes) -> bytes:
        if self.finished:
            raise ValueError("the last chunk was sealed already")
        self.finished = flag == _LAST
        nonce = self._count.to_bytes(_NONCE_BYTES, "big")
        self._count += 1
        return flag + self._cipher.encrypt(nonce, _pad(chunk), self._associated[flag])


class Opener(_Stream):
    """Opens a response, chunk by chunk and in order. `finished` is true once the last chunk was opened.

    A chunk that does not open changes nothing: the opened chunks are always a prefix of the sealed ones.
    """

    def open(self, sealed: bytes) -> bytes:
        """Opens the next chunk. Raises BadSeal for a chunk that is altered, out of order, or after the last."""
        if self.finished:
            raise BadSeal("seal: a chunk follows the last one")
        try:
            associated = self._associated[sealed[:1]]
            chunk = _unpad(self._cipher.decrypt(self._count.to_bytes(_NONCE_BYTES, "big"), sealed[1:], associated))
        except (InvalidTag, ValueError, KeyError):
            raise BadSeal(f"seal: chunk {self._count} is altered, missing or out of order") from None
        self._count += 1
        self.finished = is_last(sealed)
        return chunk


def _suite(kem: KEM) -> Suite:
    return Suite(kem, KDF.HKDF_SHA256, AEAD.AES_128_GCM)


_SUITES: dict[str, Suite] = {X25519: _suite(KEM.X25519), HYBRID: _suite(KEM.MLKEM768_X25519)}
SUITES = frozenset(_SUITES)


_WRAPPED_BYTES = {X25519: 32 + KEY_BYTES + 16, HYBRID: 1_088 + 32 + KEY_BYTES + 16}
"""Bytes of a key that HPKE has wrapped: the encapsulated key, the ciphertext and the tag."""


def _info(job: JobId, order_hash: Hash, provider: Address) -> bytes:
    return b"tallystick/1 wrap" + job + order_hash + bytes.fromhex(provider[2:])


def wrap_key(key: ContentKey, suite: str, sealing_key: bytes, *, job: JobId, order_hash: Hash, provider: Address) -> bytes:
    """Wraps the content key for the provider whose ask names this suite and key. Raises BadSeal if they are unusable."""
    return _encapsulate(suite, sealing_key, key.secret, _info(job, order_hash, provider))


class KeySession:
    """A key that a client shares with one provider, by which it wraps the content keys of many jobs. Its repr does not show it.

    As long as a client keeps it, whoever gets it can open the jobs that were wrapped with it, so clients replace it every minute.
    """

    __slots__ = ("_secret", "_wrapped")

    def __init__(self, suite: str, sealing_key: bytes, random: Callable[[int], bytes] = os.urandom) -> None:
        """Makes a key for the provider whose ask names this suite and key. Raises BadSeal if they are unusable."""
        self._secret = random(KEY_BYTES)
        self._wrapped = _encapsulate(suite, sealing_key, self._secret, _SESSION_INFO)

    def wrap(self, key: ContentKey, *, job: JobId, order_hash: Hash, provider: Address) -> bytes:
        """Wraps a content key for this job, order and provider. The nonce is zero: the derived key seals this message only."""
        cipher = AESGCM(_derive(self._secret, _info(job, order_hash, provider)))
        return self._wrapped + cipher.encrypt(bytes(_NONCE_BYTES), key.secret, None)


def _encapsulate(suite: str, sealing_key: bytes, secret: bytes, info: bytes) -> bytes:
    try:
        return _SUITES[suite].encrypt(secret, _public_key(suite, sealing_key), info=info)
    except (KeyError, ValueError):
        raise BadSeal(f"ask.sealingKey: expected a usable key of suite {suite!r}") from None


@functools.lru_cache(1_024)  # each job wraps its key for providers that earlier jobs had
def _public_key(suite: str, raw: bytes) -> X25519PublicKey | MLKEM768X25519PublicKey:
    if suite == X25519:
        return X25519PublicKey.from_public_bytes(raw)
    head, tail = raw[:-32], raw[-32:]
    return MLKEM768X25519PublicKey(MLKEM768PublicKey.from_public_bytes(head), X25519PublicKey.from_public_bytes(tail))


class SealingKey:
    """A provider's long-lived key, which unwraps content keys. Its secret has `secret_bytes(suite)` bytes."""

    def __init__(self, suite: str, secret: bytes) -> None:
        if len(secret) != self.secret_bytes(suite):
            raise ValueError(f"expected a {suite} secret of {self.secret_bytes(suite)} bytes, got {len(secret)}")
        self.suite = suite
        self._suite = _SUITES[suite]
        self._sessions: dict[bytes, bytes] = {}
        """Keys of sessions by what wraps them, the one that was used last at the end."""
        x25519 = X25519PrivateKey.from_private_bytes(secret[-32:])
        self._private: X25519PrivateKey | MLKEM768X25519PrivateKey = x25519
        self.public = x25519.public_key().public_bytes_raw()
        if suite == HYBRID:
            mlkem = MLKEM768PrivateKey.from_seed_bytes(secret[:64])
            self._private = MLKEM768X25519PrivateKey(mlkem, x25519)
            self.public = mlkem.public_key().public_bytes_raw() + self.public

    @staticmethod
    def secret_bytes(suite: str) -> int:
        """The size of a suite's secret in bytes: 32 for X25519, 96 for the hybrid."""
        return 96 if suite == HYBRID else 32

    def unwrap(self, wrapped: bytes, *, job: JobId, order_hash: Hash, provider: Address) -> ContentKey:
        """Unwraps the content key for this job, order and provider. Raises BadSeal."""
        info, size = _info(job, order_hash, provider), _WRAPPED_BYTES[self.suite]
        try:
            if len(wrapped) == size + _IN_SESSION_BYTES:
                cipher = AESGCM(_derive(self._session_key(wrapped[:size]), info))
                secret = cipher.decrypt(bytes(_NONCE_BYTES), wrapped[size:], None)
            else:
                secret = self._suite.decrypt(wrapped, self._private, info=info)
        except (InvalidTag, ValueError):
            raise BadSeal("seal: the content key was wrapped for another provider or order, or altered") from None
        if len(secret) != KEY_BYTES:
            raise BadSeal(f"seal: expected a content key of {KEY_BYTES} bytes, got {len(secret)}")
        return ContentKey(secret)

    def _session_key(self, wrapped: bytes) -> bytes:
        """The key of a session. Raises InvalidTag or ValueError."""
        secret = self._sessions.pop(wrapped, None)
        if secret is None:
            secret = self._suite.decrypt(wrapped, self._private, info=_SESSION_INFO)
            if len(self._sessions) >= MAX_SESSIONS:
                del self._sessions[next(iter(self._sessions))]
        self._sessions[wrapped] = secret
        return secret
