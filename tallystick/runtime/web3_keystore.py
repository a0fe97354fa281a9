"""Encryption of keystores, and decryption of those that any wallet wrote (Web3 Secret Storage, version 3). Pure.

The format names its cipher, and the checksum does not cover that name: decryption with another cipher gives another key. https://ethereum.org/en/developers/docs/data-structures-and-encoding/web3-secret-storage/
"""

from __future__ import annotations

import hashlib
import hmac
import os
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tallystick.protocol.codecs import keccak

MAX_MEMORY = 1 << 30
"""Bytes that scrypt may take. geth's standard keystores take 256 MiB."""
MAX_SCRYPT_WORK, MAX_PBKDF2_ROUNDS = 1 << 26, 100_000_000
SCRYPT_R, SCRYPT_P = 8, 1
_KEY_BYTES, _BLOCK, _DERIVED = 32, 16, 32
_MAX_BYTES = 1_024


class KeystoreError(ValueError):
    """A keystore that cannot be opened, whatever the password: the message names the member."""


class WrongPassword(KeystoreError):
    """The checksum does not match: the password is another one, or the file is damaged."""

    def __init__(self) -> None:
        super().__init__("the password does not open it, or the file is damaged")


def encrypt_keystore(
    secret: bytes, password: str, address: str, *, cost: int, random: Callable[[int], bytes] = os.urandom
) -> dict[str, Any]:
    """A keystore that every wallet opens: AES-128-CTR, with a key that scrypt derives from the password. `cost`: scrypt's N.

    `address`: that of the key, which wallets show before they have the password.
    """
    salt, iv = random(_BLOCK), random(_BLOCK)
    parameters = {"dklen": _DERIVED, "n": cost, "r": SCRYPT_R, "p": SCRYPT_P, "salt": salt.hex()}
    derived = _derive({"kdf": "scrypt", "kdfparams": parameters}, password.encode())
    encryptor = Cipher(algorithms.AES(derived[:_BLOCK]), modes.CTR(iv)).encryptor()
    ciphertext = encryptor.update(secret) + encryptor.finalize()
    crypto = {
        "cipher": "aes-128-ctr",
        "cipherparams": {"iv": iv.hex()},
        "ciphertext": ciphertext.hex(),
        "kdf": "scrypt",
        "kdfparams": parameters,
        "mac": keccak(derived[_BLOCK:_DERIVED] + ciphertext).hex(),
    }
    return {
        "address": address.removeprefix("0x"),
        "crypto": crypto,
        "id": str(uuid.UUID(bytes=random(16), version=4)),
        "version": 3,
    }


def decrypt_keystore(store: object, password: str) -> bytes:
    """The secret key in a keystore, which is its decoded JSON. Takes as long as the keystore's key derivation.

    Raises WrongPassword, KeystoreError.
    """
    tree = _lower(store) if isinstance(store, dict) else {}
    if str(tree.get("version")) != "3" or isinstance(tree.get("version"), bool):
        raise KeystoreError(f"version: expected 3 (Web3 Secret Storage), got {_short(tree.get('version'))}")
    crypto = _members(tree, "crypto")
    cipher = str(crypto.get("cipher")).lower()
    if cipher not in _CIPHERS:
        raise KeystoreError(
            f"crypto.cipher: expected {' or '.join(_CIPHERS)}, got {_short(crypto.get('cipher'))}; export the key from its "
            "wallet in another form, such as a private key in hex"
        )
    ciphertext, mac = _hex(crypto, "ciphertext"), _hex(crypto, "mac")
    iv = _hex(_members(crypto, "cipherparams"), "iv")
    if not 0 < len(iv) <= _BLOCK:
        raise KeystoreError(f"crypto.cipherparams.iv: expected 16 bytes, got {len(iv)}")
    derived = _derive(crypto, password.encode())
    if not hmac.compare_digest(keccak(derived[_BLOCK:_DERIVED] + ciphertext), mac):
        raise WrongPassword
    secret = _CIPHERS[cipher](ciphertext, derived[:_BLOCK], iv.rjust(_BLOCK, b"\0"))
    if len(secret) != _KEY_BYTES:
        raise KeystoreError(f"crypto.ciphertext: expected a key of 32 bytes, got {len(secret)}")
    return secret


def _decrypt_ctr(ciphertext: bytes, key: bytes, iv: bytes) -> bytes:
    return _run(modes.CTR(iv), ciphertext, key)


def _decrypt_cbc(ciphertext: bytes, key: bytes, iv: bytes) -> bytes:
    """Decrypts with or without padding (PKCS #7); a key of 32 bytes has a whole block of it."""
    if len(ciphertext) not in (_KEY_BYTES, _KEY_BYTES + _BLOCK):
        raise KeystoreError(f"crypto.ciphertext: expected 32 or 48 bytes, got {len(ciphertext)}")
    plain = _run(modes.CBC(iv), ciphertext, key)
    if plain[_KEY_BYTES:] not in (b"", bytes([_BLOCK]) * _BLOCK):
        raise KeystoreError("crypto.ciphertext: its padding is wrong, so the file is damaged")
    return plain[:_KEY_BYTES]


def _run(mode: modes.CTR | modes.CBC, ciphertext: bytes, key: bytes) -> bytes:
    decryptor = Cipher(algorithms.AES(key), mode).decryptor()
    return decryptor.update(ciphertext) + decryptor.finalize()


_CIPHERS = {"aes-128-ctr": _decrypt_ctr, "aes-128-cbc": _decrypt_cbc}


def _derive(crypto: Mapping[str, Any], password: bytes) -> bytes:
    """The key that the password gives, by scrypt or PBKDF2, within the limits of memory and time."""
    kdf, parameters = str(crypto.get("kdf")).lower(), _members(crypto, "kdfparams")
    salt, length = _hex(parameters, "salt"), _number(parameters, "dklen", _DERIVED, 1_024)
    if kdf == "scrypt":
        n, r, p = (_number(parameters, name, 1, MAX_MEMORY) for name in ("n", "r", "p"))
        if n < 2 or n & (n - 1):
            raise KeystoreError(f"crypto.kdfparams.n: expected a power of two, got {n}")
        memory = 128 * r * (n + p)
        if memory > MAX_MEMORY + (1 << 24) or n * r * p > MAX_SCRYPT_WORK:
            raise KeystoreError(
                f"crypto.kdfparams: n={n}, r={r}, p={p} would take {memory >> 20} MiB or too long; 1024 MiB allowed"
            )
        return _scrypt(password, salt, length, n=n, r=r, p=p)
    if kdf == "pbkdf2":
        if str(parameters.get("prf", "hmac-sha256")).lower() != "hmac-sha256":
            raise KeystoreError(f"crypto.kdfparams.prf: expected hmac-sha256, got {_short(parameters.get('prf'))}")
        return hashlib.pbkdf2_hmac("sha256", password, salt, _number(parameters, "c", 1, MAX_PBKDF2_ROUNDS), length)
    raise KeystoreError(f"crypto.kdf: expected scrypt or pbkdf2, got {_short(crypto.get('kdf'))}")


def _scrypt(password: bytes, salt: bytes, length: int, *, n: int, r: int, p: int) -> bytes:
    if n.bit_length() <= 16 * r:
        memory = 128 * r * (n + p + 2) + (1 << 16)
        return hashlib.scrypt(password, salt=salt, n=n, r=r, p=p, maxmem=memory, dklen=length)
    # RFC 7914 forbids such n, so hashlib refuses them; geth does not. The import takes 2 MiB of a daemon, as long as it runs.
    from Crypto.Protocol.KDF import scrypt  # noqa: PLC0415 - see above

    derive: Any = scrypt  # its type stubs do not know that it takes bytes
    return bytes(derive(password, salt, length, n, r, p))


def _lower(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with all names in lower case: some wallets write `Crypto`."""
    return {str(name).lower(): _lower(value) if isinstance(value, dict) else value for name, value in tree.items()}


def _members(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    members = tree.get(name)
    if not isinstance(members, dict):
        raise KeystoreError(f"{name}: expected an object")
    return members


def _hex(tree: Mapping[str, Any], name: str) -> bytes:
    raw = tree.get(name)
    try:
        data = bytes.fromhex(raw.removeprefix("0x")) if isinstance(raw, str) and len(raw) <= 2 * _MAX_BYTES else None
    except ValueError:
        data = None
    if data is None:
        raise KeystoreError(f"{name}: expected bytes in hex")
    return data


def _number(tree: Mapping[str, Any], name: str, low: int, high: int) -> int:
    raw = tree.get(name)
    if isinstance(raw, bool) or not isinstance(raw, int) or not low <= raw <= high:
        raise KeystoreError(f"crypto.kdfparams.{name}: expected a whole number from {low} to {high}, got {_short(raw)}")
    return raw


def _short(value: object) -> str:
    return "nothing" if value is None else repr(value)[:40]
